"""The guard's open question, as the journal describes it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from guardrail.core.events.event import Event
from guardrail.core.events.run_state import CommandAnswered, Paused, Restarted
from guardrail.core.files import as_int
from guardrail.core.format import clean_and_shorten
from guardrail.core.records.commands import Shown

_ANSWERS = ("accepted", "continued", "stopped")  # by the value of an `answer` command


class OpenQuestion:
    """The question that is open; all fields are empty while none is.

    Attributes:
        number: its journal line, 0: none is open.
        text: its message.
        incident: number of the incident that it is about, 0: none.
        proposals: what the guard would do, by each proposal.
        costs: what each of them would cost, "" where the journal does not say.
        shown: the restore target of each of them as an answer carries it, None: it has none.
    """

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.number, self.text, self.incident = 0, "", 0
        self.proposals: tuple[str, ...] = ()
        self.costs: tuple[str, ...] = ()
        self.shown: tuple[Shown | None, ...] = ()
        self._answer, self._answered_by = "", ""

    def ask(self, event: Paused) -> None:
        """Take a `paused` event that asks a question."""
        self._clear()
        self.number, self.text = event.seq, clean_and_shorten(event.message)
        self.incident = event.incident or 0
        self.proposals = tuple(map(_proposed_action, event.proposals))
        self.costs = tuple(map(_proposal_cost, event.proposals))
        self.shown = tuple(map(_restore_target, event.proposals))

    def take_command(self, event: CommandAnswered) -> None:
        """Remember a command that was applied while the question is open: it may be the answer."""
        if self.number:
            self._answer = _answer_word(event)
            self._answered_by = clean_and_shorten(event.who or "", 100)

    def end(self, event: Event) -> str:
        """Close the question; return how it ended: "accepted by ann@vm"."""
        how = "asked, no answer"
        if self._answer and self._answered_by == "guard":
            how = f"{self._answer} by default, no answer"
        elif self._answer:
            how = f"{self._answer} by {self._answered_by or 'a command'}"
        elif isinstance(event, Restarted):
            how = "asked, no answer before a restart"
        self._clear()
        return how


def _answer_word(event: CommandAnswered) -> str:
    """Return what a command that ended a question did to it."""
    if event.command == "answer" and event.value in (0, 1, 2):
        return _ANSWERS[int(event.value)]
    return clean_and_shorten(f"answered with {event.command}", 40)


def _proposed_action(raw: Any) -> str:
    """Return the action of a proposal; "back" is a rollback that skips nothing."""
    if not isinstance(raw, Mapping):
        return clean_and_shorten(raw, 200)
    action = clean_and_shorten(raw.get("action", ""), 200)
    return "back" if action == "rollback" and raw.get("samples") == 0 else action


def _proposal_cost(raw: Any) -> str:
    """Return what a proposal would do, in the words of the journal."""
    if not isinstance(raw, Mapping):
        return ""
    return clean_and_shorten(raw.get("text", ""), 400).removeprefix(
        f"{clean_and_shorten(raw.get('command', ''), 40)}: "
    )


def _restore_target(raw: Any) -> Shown | None:
    """Return the state that a proposal restores, and the steps that it discards.

    Training is paused, so it cannot come to discard more.
    """
    if not isinstance(raw, Mapping) or raw.get("to_step") is None:
        return None
    lost = as_int(raw.get("steps_lost"))
    to_step, tier = as_int(raw["to_step"]), clean_and_shorten(raw.get("tier", ""), 40)
    return Shown(to_step=to_step, tier=tier, steps_lost=lost, steps_lost_most=lost)
