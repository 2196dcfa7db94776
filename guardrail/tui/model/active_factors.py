"""What now acts on the updates besides the schedule: factors that a command or the guard has set.
Pure.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from guardrail.core.events.event import Event
from guardrail.core.format import clean_and_shorten, format_count
from guardrail.core.records import Remedy
from guardrail.decide.control_commands.registry import find_command
from guardrail.decide.remedies.effects import CLIP, EMBED_ALPHA, LR, compute_factor
from guardrail.decide.run_history import RunHistory
from guardrail.decide.step_setting import StepSetting

# kind of a remedy -> its name on the screen
NAMES = {LR: "rate", EMBED_ALPHA: "embedding", CLIP: "clip"}


@dataclass(frozen=True)
class ActiveFactor:
    """One factor.

    Attributes:
        kind: of a remedy: "lr", "embed_alpha" or "clip".
        since: the first step that it holds for.
        by: who set it.
        remedy: its course over the steps; None: it holds until it is set again.
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
        """The first step that it no longer holds for."""
        return (
            None
            if self.remedy is None
            else self.since + self.remedy.hold_steps + self.remedy.ramp_steps
        )


class FactorTracker:
    """Takes in events in their order."""

    def __init__(self) -> None:
        self._past = RunHistory()
        self._by: dict[tuple[str, float], str] = {}  # (kind, value) -> who set it last

    def add(self, event: Event) -> bool:
        """Returns whether the factors may be others now."""
        if event.kind not in ("skipped", "rollback", "undo", "command"):
            return False
        data = event.data
        if event.kind == "command":
            command, value = find_command(data.get("command")), data.get("value")
            if command is None or not command.factor or not isinstance(value, int | float):
                return False
            self._by[command.factor, float(value)] = clean_and_shorten(data.get("who") or "", 60)
        # A line of another version, or a broken one, sets nothing.
        with contextlib.suppress(KeyError, TypeError, ValueError, msgspec.ValidationError):
            self._past.add(event)
        return True

    def held(self) -> tuple[ActiveFactor, ...]:
        remedies = [one for _, one in self._past.remedies if one.kind in NAMES]
        by_guard = [
            ActiveFactor(one.kind, one.value, one.from_step, "guard", one) for one in remedies
        ]
        return (
            *self._by_hand(LR, self._past.lr),
            *self._by_hand(EMBED_ALPHA, self._past.alpha),
            *by_guard,
        )

    def _by_hand(self, kind: str, setting: StepSetting) -> list[ActiveFactor]:
        return [
            ActiveFactor(kind, value, since, self._by.get((kind, value), ""))
            for since, value in setting.changes[-1:]
        ]


def format_factors(held: Sequence[ActiveFactor], step: int) -> list[str]:
    """What acts on the update of `step`: "embedding ×0.1 since 1,201 by guard until 1,400", one
    text a kind.
    """
    texts = []
    for kind, name in NAMES.items():
        acting = [one for one in held if one.kind == kind and one.at(step) != 1.0]
        if not acting:
            continue
        value = 1.0
        for one in acting:
            value *= one.at(step)
        who = ", ".join(dict.fromkeys(one.by.partition("@")[0] for one in acting if one.by))
        ends = [one.until for one in acting]
        text = f"{name} ×{value:.3g} since {format_count(min(one.since for one in acting))}" + (
            f" by {who}" if who else ""
        )
        if all(end is not None for end in ends):
            text += f" until {format_count(max(end for end in ends if end is not None))}"
        texts.append(text)
    return texts
