"""What users did to a run, and the notes in its journal, as lines. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from guardrail.core.format import format_plural
from guardrail.decide.control_commands.registry import find_command
from guardrail.report.incident import IncidentAction
from guardrail.report.model import CommandRecord, Report

HEADS = ("step", "command", "user", "answer")


def list_commands(report: Report) -> Iterator[tuple[str, ...]]:
    """Give one row per command."""
    for command in report.commands:
        reason = ""
        if command.reason:
            reason = f": {command.reason}"
        yield (
            f"{command.step:,}",
            describe_command(command),
            command.who or "-",
            f"{command.effect}{reason}",
        )


def describe_command(command: CommandRecord) -> str:
    """Return the command with its value: "lr 0.5", "mode ask", "answer accept"."""
    kind = find_command(command.command)
    if kind is not None:
        return kind(command.value).write()
    name = command.command or "command"
    if command.value != command.value:
        return name
    return f"{name} {command.value:g}"


def list_effects(report: Report) -> Iterator[str]:
    """Give one sentence per skip, rollback and undo that a user asked for."""
    for action in report.by_person:
        yield f"step {action.step:,}: {_describe_effect(action)}"
    undone = {
        (action.time, action.step): action
        for incident in report.incidents
        for action in incident.actions
        if action.action == "undo"
    }
    for action in undone.values():
        if action.to_step is None:
            restored = ""
        else:
            restored = f", restored step {action.to_step:,}"
        lost = ""
        if action.steps_lost:
            lost = f" ({format_plural(action.steps_lost, 'step')} discarded)"
        yield f"step {action.step:,}: undo{restored}{lost}"


def _describe_effect(action: IncidentAction) -> str:
    parts = []
    if action.action == "rollback" and action.to_step is not None:
        parts.append(
            f"restored step {action.to_step:,} ({format_plural(action.steps_lost, 'step')} discarded)"
        )
    if action.samples_skipped >= 0:
        parts.append(f"{format_plural(action.samples_skipped, 'sample')} skipped")
    if action.window is not None and action.window[0] < action.window[1]:
        parts.append(f"positions {action.window[0]:,}-{action.window[1] - 1:,}")
    return ", ".join(parts) or action.sentence or action.action
