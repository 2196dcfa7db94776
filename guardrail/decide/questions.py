"""The guard's question, and whether a command still does what its sender was shown. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from guardrail.core.events.event import Event
from guardrail.core.events.run_state import TURNS, Paused, Resumed
from guardrail.core.records.commands import Shown

CHOICES = ("accept", "continue", "stop")  # words of the three answers, in the order of their values
_TURNS = (Paused, Resumed, *TURNS)  # after such a line, no earlier question is open


class ParkResult(Enum):
    """How a wait of the ranks ended. The first three are the answers to a question."""

    AS_PROPOSED = 0
    GO_ON = 1
    STOP = 2
    BY_HAND = 3  # rolled back or skipped by command: the batch under question is gone


class Open(NamedTuple):
    """Which question is open.

    Attributes:
        number: of its journal line; 0: none is open.
        over: earlier question -> how it ended: "answer continue by ann@vm at step 20".
    """

    number: int
    over: dict[int, str]


def open_question(events: Sequence[Event]) -> Paused | None:
    """Return the line of the question that is open after these events; None: none is."""
    for event in reversed(events):
        if isinstance(event, Paused) and event.is_question:
            return event
        if isinstance(event, _TURNS):
            return None
    return None


def how_to_answer(number: int) -> str:
    """Return why `resume` does nothing while a question is open, as the end of a sentence."""
    line = ""
    if number:
        line = f" (journal line {number})"
    return f"the guard asks{line}: use answer accept, answer continue or answer stop"


def question_changed(shown_for: int | None, now: Open) -> str:
    """Return why a command does not hold for the question that is open now; "" if it does.

    Args:
        shown_for: the question that was open when it was given; 0: none was; None: not known.
        now: the present question.
    """
    if shown_for is None or shown_for == now.number:
        return ""
    if not shown_for:
        return f"it was given before the guard asked the question of line {now.number}: read that first"
    reason = f"the question of line {shown_for} is over"
    if how := now.over.get(shown_for):
        reason += f": {how}"
    if now.number:
        reason += f"; the question of line {now.number} is open now"
    return reason


def target_changed(shown: Shown | None, *, to_step: int, tier: str, steps_lost: int) -> str:
    """Return what differs from the state that was shown to be restored; "" if nothing does.

    Args:
        shown: to the sender of the command; None: nothing was.
        to_step, tier: of the state that it would restore now.
        steps_lost: applied steps that it would discard now.
    """
    if shown is None or shown.to_step is None:
        return ""
    if (shown.to_step, shown.tier) != (to_step, tier):
        was = f"step {shown.to_step} ({shown.tier}) as shown"
        return f"it would restore step {to_step} ({tier}) now, not {was}"
    if steps_lost > shown.steps_lost_most:
        return f"it would lose {steps_lost} steps now, not {shown.steps_lost} as shown"
    return ""


def timeline_changed(shown: Shown | None, *, timeline: int, step: int) -> str:
    """Return that the run was rolled back since a command was shown; "" if it was not."""
    if shown is None or shown.timeline is None or shown.timeline == timeline:
        return ""
    return f"the run was rolled back meanwhile: it is at step {step} of timeline {timeline} now"


def setting_changed(shown: Shown | None, now: float, words: str) -> str:
    """Return that the setting which a command replaces has changed; "" if it has not.

    Args:
        now: the present setting.
        words: the present setting in words.
    """
    if shown is None or shown.instead_of is None or shown.instead_of == now:
        return ""
    return f"another user has changed it: it is {words} now"
