"""What a command would do: the record, its sentence, and the proposals of the guard's question.

What the records of a run do not say is NaN, and is not in the sentence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec

from guardrail.core.events.event import Event
from guardrail.core.format import format_plural
from guardrail.core.records.record import Record
from guardrail.decide.questions import open_question

MINUTE = 60.0  # seconds; from one minute on, durations are given in minutes


class Preview(Record, frozen=True, kw_only=True):
    """What a command would do.

    Attributes:
        command, value: as it would be sent. "go on" and "halt" are further choices of the guard's
            own question.
        possible: False: it would be refused, for the reason in `refusal`.
        step: applied steps now.
        to_step, tier, state, path: the state that it restores; None and "" where it restores none.
        steps_lost: applied steps that are discarded.
        seconds_lost: training time of these steps; NaN where a step has no row.
        window: positions [first, last) that it skips, or brings back (undo).
        samples: samples that it skips and that were not skipped before.
        returned: positions that an undo brings back.
        lr_before, lr: learning rate of the next step, now and afterwards; NaN: not known.
        alpha_before, alpha: factor on the embedding gradients of the next step, likewise.
        timeline: of the run now.
        question: journal line of the question that is open; 0: none is.
        steps_lost_most: steps that it may discard when training goes on for some seconds more.
        instead_of: the factor, or index of the mode, that it replaces; None: it replaces none.
        worked_out: False: nothing is known but the remark.
        remark: one more sentence.
    """

    command: str
    value: float = 0.0
    possible: bool = True
    refusal: str = ""
    step: int = 0
    to_step: int | None = None
    tier: str = ""
    state: str = ""
    path: str = ""
    steps_lost: int = 0
    seconds_lost: float = 0.0
    window: tuple[int, int] | None = None
    samples: int = 0
    returned: int = 0
    lr_before: float = math.nan
    lr: float = math.nan
    alpha_before: float = math.nan
    alpha: float = math.nan
    timeline: int = 0
    question: int = 0
    steps_lost_most: int = 0
    instead_of: float | None = None
    worked_out: bool = True
    remark: str = ""

    def sentence(self) -> str:
        """Return the preview in one line."""
        if not self.possible:
            return f"{self.command} would be refused: {self.refusal}"
        parts = [*self._restored(), *self._data(), *self._rates()]
        if self.remark:
            parts.append(self.remark)
        return f"{self.command}: {', '.join(parts) or 'nothing changes'}"

    def _restored(self) -> list[str]:
        if self.to_step is None:
            return []
        state = ""
        if self.state not in ("", "good"):
            state = f", {self.state}"
        lost = format_plural(self.steps_lost, "step")
        return [f"back to step {self.to_step:,} ({self.tier}{state}), {lost}{self._took()} lost"]

    def _took(self) -> str:
        seconds = self.seconds_lost
        if not self.steps_lost or math.isnan(seconds):
            return ""
        if seconds < MINUTE:
            return f" ({seconds:.1f} s of training)"
        return f" ({seconds / MINUTE:.1f} min of training)"

    def _data(self) -> list[str]:
        parts = []
        if self.samples:
            parts.append(f"{format_plural(self.samples, 'sample')} skipped")
        if self.returned:
            parts.append(f"{format_plural(self.returned, 'sample')} no longer skipped")
        return parts

    def _rates(self) -> list[str]:
        parts = []
        if not math.isnan(self.lr):
            rate, before = f"{self.lr:.3g}", f"{self.lr_before:.3g}"
            instead = ""
            if rate != before:
                instead = f" instead of {before}"
            parts.append(f"learning rate {rate}{instead}")
        if not math.isnan(self.alpha) and self.alpha != self.alpha_before:
            parts.append(f"embedding gradients x{self.alpha:g} instead of x{self.alpha_before:g}")
        return parts


def proposals_of(events: Sequence[Event]) -> list[Preview]:
    """Return what the answers to the open question would do, as the guard has journaled it.

    Empty without a question, and for a question of another version that cannot be read.
    """
    paused = open_question(events)
    if paused is None:
        return []
    try:
        return [_read_proposal(one) for one in paused.proposals]
    except (msgspec.ValidationError, TypeError, KeyError):
        return []


def _read_proposal(raw: dict[str, Any]) -> Preview:
    known = {name: raw[name] for name in raw if name in Preview.__struct_fields__}
    return msgspec.convert({"command": raw["action"], **known}, Preview, strict=False)
