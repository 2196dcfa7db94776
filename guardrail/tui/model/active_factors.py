"""Factors on the updates that a command or the guard has set, besides the schedule. Pure."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from guardrail.core.events.decisions import RolledBack, Skipped, Undone
from guardrail.core.events.event import SENSELESS, Event
from guardrail.core.events.run_state import CommandAnswered
from guardrail.core.format import clean_and_shorten, format_count
from guardrail.core.records.verdicts import Remedy
from guardrail.decide.control_commands.registry import find_command
from guardrail.decide.remedies.effects import EMBED_ALPHA, LR, compute_factor
from guardrail.decide.remedies.registry import SCREEN_NAMES
from guardrail.decide.run_history import RunHistory
from guardrail.decide.step_setting import StepSetting


@dataclass(frozen=True)
class ActiveFactor:
    """One factor.

    Attributes:
        kind: of a remedy: a key of `SCREEN_NAMES`.
        since: the first step that it acts on.
        by: who set it.
        remedy: its course over the steps; None: it acts until it is set again.
    """

    kind: str
    value: float
    since: int
    by: str
    remedy: Remedy | None = None

    def at(self, step: int) -> float:
        if self.remedy is not None:
            return compute_factor([self.remedy], self.kind, step)
        return self.value if step >= self.since else 1.0

    @property
    def until(self) -> int | None:
        """The first step that it no longer acts on; None: it acts until it is set again."""
        if self.remedy is None:
            return None
        return self.since + self.remedy.hold_steps + self.remedy.ramp_steps


class FactorTracker:
    """Takes events in their order, and knows the factors after them."""

    def __init__(self) -> None:
        self._history = RunHistory()
        self._by: dict[tuple[str, float], str] = {}  # (kind, value) -> who set it last

    def add(self, event: Event) -> bool:
        """Take an event; return whether the factors may have changed."""
        if isinstance(event, CommandAnswered):
            command = find_command(event.command)
            if command is None or not command.factor or event.value is None:
                return False
            self._by[command.factor, event.value] = clean_and_shorten(event.who or "", 60)
        elif not isinstance(event, Skipped | RolledBack | Undone):
            return False
        # A line of another version, or a broken one, sets nothing.
        with contextlib.suppress(*SENSELESS):
            self._history.add(event)
        return True

    def factors(self) -> tuple[ActiveFactor, ...]:
        """Return the newest factors of commands, and those of the guard's remedies."""
        found = [
            *self._set_by_command(LR, self._history.lr),
            *self._set_by_command(EMBED_ALPHA, self._history.alpha),
        ]
        for _, one in self._history.remedies:
            if one.kind in SCREEN_NAMES:
                found.append(ActiveFactor(one.kind, one.value, one.from_step, "guard", one))
        return tuple(found)

    def _set_by_command(self, kind: str, setting: StepSetting) -> list[ActiveFactor]:
        if not setting.changes:
            return []
        since, value = setting.changes[-1]
        return [ActiveFactor(kind, value, since, self._by.get((kind, value), ""))]


def format_factors(factors: Sequence[ActiveFactor], step: int) -> list[str]:
    """Return what acts on the update of `step`, one text for each kind.

    For example "embedding ×0.1 since 1,201 by guard until 1,400".
    """
    texts = []
    for kind, name in SCREEN_NAMES.items():
        acting = [one for one in factors if one.kind == kind and one.at(step) != 1.0]
        if acting:
            texts.append(f"{name} {_describe_factors(acting, step)}")
    return texts


def _describe_factors(acting: Sequence[ActiveFactor], step: int) -> str:
    value = math.prod(one.at(step) for one in acting)
    text = f"×{value:.3g} since {format_count(min(one.since for one in acting))}"
    users = dict.fromkeys(one.by.partition("@")[0] for one in acting if one.by)
    if users:
        text += f" by {', '.join(users)}"
    ends = [one.until for one in acting if one.until is not None]
    if len(ends) == len(acting):
        text += f" until {format_count(max(ends))}"
    return text
