"""The guard's question on the screen: what it says, its choices, and how long it stays open."""

from __future__ import annotations

from dataclasses import dataclass

from guardrail.core.format import clean_and_shorten, format_seconds_in_words
from guardrail.core.records.status import Status
from guardrail.tui.draw.lines import Row
from guardrail.tui.model.view import View

CALM = "Training is paused; waiting loses nothing."
PROPOSALS = {
    "rollback": ": roll back, skip that data",
    "back": ": roll back, skip nothing",
    "halt": ": save and end",
    "skip": ": skip it",
}
ANSWERS = ("Do as proposed", "Continue as if nothing had happened", "Stop here with a checkpoint")
DEFAULTS = {
    "proposal": "the proposal is carried out",
    "continue": "training continues",
    "stop": "training stops with a checkpoint",
    # as versions before 0.2 wrote them
    "proposed": "the proposal is carried out",
    "go_on": "training continues",
}


@dataclass
class OpenQuestion:
    """A question that is on the screen.

    Attributes:
        text: of the question; "" for none.
        line: number of its journal line; 0: it is not known yet.
    """

    text: str = ""
    line: int = 0

    def is_open(self, view: View) -> bool:
        """Return whether it is the one that is open now.

        One whose number is not known yet is recognized by its text.
        """
        status = view.status
        if status is None or status.question != self.text or not self.text:
            return False
        return not self.line or not status.question_number or self.line == status.question_number

    def choices(self, view: View) -> list[tuple[str | Row, str]]:
        """Return the answers, each with its cost; [] until its journal line is read."""
        story, status = view.snapshot.story, view.status
        if not story.question or story.asked != self.text or status is None:
            return []
        if status.question_number and status.question_number != story.question:
            return []
        self.line = self.line or story.question
        if self.line != story.question:
            return []
        proposed = PROPOSALS.get(next(iter(story.proposals), ""), "")
        names = (ANSWERS[0] + proposed, *ANSWERS[1:])
        costs = [*story.costs, *[""] * len(names)]
        return list(zip(names, costs, strict=False))


def question_lines(view: View, text: str) -> list[str]:
    """Return what the dialog of a question says."""
    return [text, "", *_waiting_lines(view), "", *_newest_findings(view)]


def time_left(view: View) -> str:
    """Return how long the question stays open; "" where nothing limits it."""
    status = view.status
    if status is None or not status.deadline:
        return ""
    return f"{format_seconds_in_words(_seconds_left(status, view.now))} left"


def _newest_findings(view: View) -> list[str]:
    """Return the findings of the newest incident, while it is open."""
    incidents = view.snapshot.story.incidents
    if not incidents or not incidents[0].open:
        return []
    return [clean_and_shorten(finding.sentence(), 200) for finding in incidents[0].findings[:3]]


def _waiting_lines(view: View) -> list[str]:
    """Return how long the guard waits and what it does then."""
    status = view.status
    if status is None or not status.deadline:
        return [CALM]
    then = DEFAULTS.get(status.default, "the guard decides by itself")
    return [
        f"Without an answer in {format_seconds_in_words(_seconds_left(status, view.now))} {then}.",
        CALM,
    ]


def _seconds_left(status: Status, now: float) -> float:
    return max(0.0, status.deadline - now)
