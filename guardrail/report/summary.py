"""The lines of a report's summary: state of the run, losses of time and data, checkpoints, next
commands. Pure.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Iterator

from guardrail.core.format import (
    format_duration,
    format_number,
    format_plural,
    format_run_time,
    format_share,
    format_size,
)
from guardrail.report.formats import COLUMNS, join_words, shorten
from guardrail.report.incident import Incident
from guardrail.report.model import CheckpointLine, Report
from guardrail.report.table_rows import STATES, costliest_first, incident_row

MAX_NAMED = 4  # checkpoints
LONGEST_SPEC = 66  # characters of the run's name in a command that fits a line
LONGEST_PATH = 46  # characters of its path in a call that fits a line


# -- how the run stands


def describe_run(report: Report) -> str:
    """Return "two/2026-11-29-01: finished, 300 of 300 steps in 1:57 (exit code 0)"."""
    steps = f"{report.step:,} of {report.total_steps:,} steps"
    if not report.total_steps:
        steps = format_plural(report.step, "step")
    took = ""
    if report.seconds:
        took = f" in {format_run_time(report.seconds)}"
    code = ""
    if report.exit_code is not None:
        code = f" (exit code {report.exit_code})"
    return f"{report.run}: {report.state}, {steps}{took}{code}"


def describe_numbers(report: Report) -> str:
    """Return loss, tokens, ranks, mode and overhead of the guard, as far as they are known."""
    numbers = []
    if report.loss is not None:
        numbers.append(f"loss {format_number(report.loss)}")
    if report.eval_loss is not None:
        numbers.append(f"held-out {format_number(report.eval_loss)}")
    if report.tokens:
        numbers.append(f"{report.tokens:,} tokens")
    setup = []
    if report.world:
        on = ""
        if report.host:
            on = f" on {report.host}"
        setup.append(f"{format_plural(report.world, 'rank')}{on}")
    if report.mode:
        setup.append(f"mode {report.mode}")
    if report.guard_share:
        setup.append(f"guard overhead {format_share(report.guard_share)} of step time")
    said = [", ".join(part) for part in (numbers, setup) if part]
    return " ".join(f"{part[:1].upper()}{part[1:]}." for part in said)


def describe_reason(report: Report) -> Iterator[str]:
    """Give why the run is not finished, and which incident is not over."""
    if report.question and report.state == "running":
        yield f"The run waits for an answer: {report.question}"
    if report.state == "lost":
        yield "The run ended without a final message."
    elif report.reason and report.state != "finished":
        yield f"Reason: {report.reason}"
    if report.unresolved:
        yield f"{report.unresolved[:1].upper()}{report.unresolved[1:]}."


# -- what happened


def describe_incidents(report: Report) -> str:
    """Return "2 incidents, both recovered. No rollback. 119 samples skipped (2.4 % of those
    read).".
    """
    parts = [_count_incidents(report.incidents)]
    parts += _count_faults(report)
    if report.incidents:
        actions = [action for incident in report.incidents for action in incident.actions]
        rollbacks = sum(action.action == "rollback" for action in actions)
        parts.append(format_plural(rollbacks, "rollback") if rollbacks else "No rollback")
    if report.samples_skipped:
        parts.append(_count_samples(report))
    if math.isfinite(report.seconds_lost) and report.seconds_lost > 0:
        parts.append(f"Time lost: {format_duration(report.seconds_lost)}")
    return " ".join(f"{part}." for part in parts)


def _count_incidents(incidents: tuple[Incident, ...]) -> str:
    count = len(incidents)
    if not count:
        return "No incidents"
    states = Counter(STATES.get(incident.state, incident.state) for incident in incidents)
    if len(states) > 1:
        listed = join_words(f"{number:,} {state}" for state, number in states.items())
        return f"{format_plural(count, 'incident')}: {listed}"
    (state,) = states
    every = {1: "", 2: "both "}.get(count, "all ")
    return f"{format_plural(count, 'incident')}, {every}{state}"


def _count_faults(report: Report) -> list[str]:
    ranks = sum(fault.count for fault in report.faults if fault.kind.startswith("rank"))
    disks = sum(fault.count for fault in report.faults) - ranks
    parts = []
    if ranks:
        parts = [format_plural(ranks, "rank failure")]
    if disks:
        return [*parts, format_plural(disks, "disk problem")]
    return parts


def _count_samples(report: Report) -> str:
    if report.samples_skipped < 0:
        return "Samples were skipped, the journal does not say how many"
    share = math.nan
    if report.samples_read:
        share = report.samples_skipped / report.samples_read
    known = ""
    if share <= 1:
        known = f" ({format_share(share)} of those read)"
    return f"{format_plural(report.samples_skipped, 'sample')} skipped{known}"


def describe_commands(report: Report) -> str:
    """Return how many commands and notes there are; "" if there are none."""
    undone = sum(one.command == "undo" and one.is_applied for one in report.commands)
    asked = Counter(action.action for action in report.by_person)
    parts = []
    if report.commands:
        parts = [format_plural(len(report.commands), "command")]
    if undone:
        parts.append(f"{undone:,} undo")
    parts += [f"{format_plural(count, action)} by command" for action, count in asked.items()]
    if report.notes:
        parts.append(format_plural(len(report.notes), "note"))
    if not parts:
        return ""
    return f"Also: {', '.join(parts)} (list them with --commands)."


# -- checkpoints


def describe_checkpoints(report: Report) -> str:
    """Return "Checkpoints: newest good step 250, final step 300 (not confirmed), also good 150 and
    200.".
    """
    there = [c for c in report.checkpoints if c.state not in ("pruned", "failed")]
    failed = [c for c in report.checkpoints if c.state == "failed"]
    if not there and not failed:
        return "Checkpoints: none."
    said = ", ".join(_describe_newest(there, report.state)) or "none"
    if failed:
        said += f"; {format_plural(len(failed), 'save')} failed"
        if failed[-1].reason:
            said += f" ({failed[-1].reason})"
    sizes = [checkpoint.bytes for checkpoint in there if checkpoint.bytes]
    each = ""
    if sizes:
        each = f" {format_size(sizes[-1])} each."
    return f"Checkpoints: {said}.{each}"


def _describe_newest(there: list[CheckpointLine], state_of_run: str) -> Iterator[str]:
    ordered = sorted(there, key=lambda checkpoint: checkpoint.step)
    good = [checkpoint.step for checkpoint in ordered if checkpoint.state == "good"]
    yield f"newest good step {good[-1]:,}" if good else "no good one yet"
    if ordered and (not good or ordered[-1].step > good[-1]):
        last = ordered[-1]
        if last.state == "candidate":
            state = "not confirmed"
        else:
            state = last.state
        which = "last"
        if state_of_run == "finished":
            which = "final"
        yield f"{which} step {last.step:,} ({state})"
    if older := good[:-1]:
        named = join_words(f"{step:,}" for step in older[-MAX_NAMED:])
        more = ""
        if len(older) > MAX_NAMED:
            more = f" ({len(older):,} in all)"
        yield f"also good {named}{more}"


# -- what comes next


def list_next_commands(report: Report, spec: str) -> list[tuple[str, str]]:
    """Return (command, what it does), most useful first.

    Args:
        spec: what names the run on a command line.
    """
    run = shlex.quote(spec)
    if len(run) > LONGEST_SPEC:
        run = "RUN"
    found = [*_commands_to_continue(report, run)]
    numbered = [incident for incident in report.incidents if incident.number]
    if numbered:
        costliest = costliest_first([incident_row(incident) for incident in numbered])[0].number
        command = f"guardrail report {run} --incident {costliest}"
        found.append((command, "documents, tokens, every decision"))
    if report.samples_skipped > 0:
        command = f"guardrail report {run} --quarantine > bad.txt"
        found.append((command, "use as data.quarantine next time"))
    return found[:3]


def _commands_to_continue(report: Report, run: str) -> Iterator[tuple[str, str]]:
    if report.question and report.state == "running":
        yield f"guardrail attach {run}", "see the question and answer it"
    elif report.state == "running":
        yield f"guardrail attach {run}", "watch the run"
    elif report.state not in ("finished", "new"):
        yield from _command_to_read_log(report)
        yield _command_to_resume(report, run)


def _command_to_resume(report: Report, run: str) -> tuple[str, str]:
    """Return what continues the run. Only its own script can start a custom loop."""
    if not report.custom_loop:
        return f"guardrail launch --resume {run}", "continue the run from its newest checkpoint"
    path = "PATH"
    if len(report.path) <= LONGEST_PATH:
        path = repr(report.path)
    return f"run=RunDirectory.open({path})", "start your script again with this run"


def _command_to_read_log(report: Report) -> Iterator[tuple[str, str]]:
    """Give the command for the log of the rank that failed last, if that ended the run and its path
    is short.
    """
    last = next((fault for fault in reversed(report.faults) if fault.log), None)
    if last is None or last.resolved_step is not None:
        return
    command = f"less {shlex.quote(f'{report.path}/{last.log}')}"
    if len(command) < COLUMNS - 2:
        yield command, "read why the rank failed"


def align_commands(commands: list[tuple[str, str]]) -> list[str]:
    """Return the lines below "Next:". The meaning of a command is omitted if it does not fit the
    line.
    """
    widest = max((len(command) for command, _ in commands), default=0)
    lines = []
    for command, meaning in commands:
        tries = (f"  {command.ljust(widest)}   {meaning}", f"  {command}   {meaning}")
        fitting = [line for line in tries if len(line) <= COLUMNS]
        lines.append(fitting[0] if fitting else shorten(f"  {command}", COLUMNS))
    return lines
