"""The guard's questions and what a command was shown for: which question is open, and what has
changed since. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple

from guardrail.core.events.event import Event
from guardrail.core.records import Shown

CHOICES = ("accept", "continue", "stop")  # words of the three answers, in the order of their values
_TURNS = ("paused", "resumed", "started", "restarted", "ended")


class ParkResult(Enum):
    """How a wait of the ranks ended. The first three are the answers to a question."""

    AS_PROPOSED = 0
    GO_ON = 1
    STOP = 2
    BY_HAND = 3  # rolled back or skipped by command: the batch under question is gone


class Open(NamedTuple):
    """The question that is open, by the number of its journal line (0: none), and what ended those
    before it.
    """

    number: int
    over: dict[int, str]  # question -> what ended it: "answer continue by ann@vm at step 20"


def open_question(events: Iterable[Event]) -> Event | None:
    """The `paused` line of the question that is open at the end of these events; None where none
    is.
    """
    newest = None
    for event in events:
        if event.kind in _TURNS:
            newest = event
    return newest if newest is not None and asks(newest) else None


def asks(event: Event) -> bool:
    """Whether a `paused` line is a question, not a pause by a command."""
    return event.kind == "paused" and bool(event.data.get("asks", event.data.get("proposals")))


def how_to_answer(number: int) -> str:
    """Why `resume` does nothing while a question is open, as the end of a sentence."""
    line = f" (journal line {number})" if number else ""
    return f"the guard asks{line}: use answer accept, answer continue or answer stop"


def question_changed(shown_for: int | None, now: Open) -> str:
    """Why a command that was given while question `shown_for` was open (0: none) does not hold now;
    "" if it does.
    """
    if shown_for is None or shown_for == now.number:
        return ""
    if not shown_for:
        return f"it was given before the guard asked the question of line {now.number}: look at that first"
    over = f"the question of line {shown_for} is over"
    if how := now.over.get(shown_for):
        over += f": {how}"
    return over + (f"; the question of line {now.number} is open now" if now.number else "")


def target_changed(shown: Shown | None, *, to_step: int, tier: str, steps_lost: int) -> str:
    """What is not as it was shown about the state that a command goes back to; "" if nothing is."""
    if shown is None or shown.to_step is None:
        return ""
    if (shown.to_step, shown.tier) != (to_step, tier):
        return f"it would go back to step {to_step} ({tier}) now, not to step {shown.to_step} ({shown.tier}) as shown"
    if steps_lost > shown.steps_lost_most:
        return f"it would lose {steps_lost} steps now, not {shown.steps_lost} as shown"
    return ""


def timeline_changed(shown: Shown | None, *, timeline: int, step: int) -> str:
    """Whether the run has gone back since a command was shown; "" if it has not."""
    if shown is None or shown.timeline is None or shown.timeline == timeline:
        return ""
    return f"the run has gone back meanwhile: it is at step {step} of timeline {timeline} now"


def setting_changed(shown: Shown | None, now: float, words: str) -> str:
    """Whether the setting that a command replaces is another one than was shown; `words` say what
    it is now.
    """
    if shown is None or shown.instead_of is None or shown.instead_of == now:
        return ""
    return f"somebody else has changed it: it is {words} now"
