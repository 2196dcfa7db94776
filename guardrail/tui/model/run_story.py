"""What the screen shows of the journal: incidents, marks on the charts, log lines, answers to
commands. Pure.

A `StoryBuilder` takes events in order, in the reader's thread; the `Story` that it hands out never
changes. Journals of other versions and broken ones are read as far as they make sense: nothing
here raises on what an event holds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from guardrail.core.events.decisions import (
    OPEN,
    IncidentChanged,
    RolledBack,
    Skipped,
    Undone,
    VerdictGiven,
)
from guardrail.core.events.event import Event
from guardrail.core.events.run_state import CommandAnswered, Ended, Paused, Restarted, Resumed
from guardrail.core.format import clean_and_shorten, format_count
from guardrail.core.records.commands import Shown
from guardrail.core.records.verdicts import Action
from guardrail.decide.advised_incidents import AdvisedIncidents
from guardrail.decide.control_commands.pause import Pause
from guardrail.decide.control_commands.registry import find_command
from guardrail.tui.model.active_factors import ActiveFactor, FactorTracker
from guardrail.tui.model.evidence import EvidenceBuilder, JournalEvidence
from guardrail.tui.model.incident_list import (
    IncidentList,
    IncidentNews,
    IncidentSummary,
    skipped_data,
)
from guardrail.tui.model.log_lines import COMMAND, INCIDENT, ROLLBACK, SKIP, LogLine, make_log_line
from guardrail.tui.model.open_question import OpenQuestion

_MAX_LINES = 500  # newest log lines, and answers to commands, that are kept
_MAX_MARKS = 2000  # newest marks of each kind
ASKS = "paused, asks"
_ACTIONS: dict[Action | None, str] = {
    Action.SKIP: "update skipped",
    Action.ROLLBACK: "roll back",
    Action.PAUSE: ASKS,
    Action.HALT: "halted",
    Action.RETRY: "batch repeated",
}
ADVISED_ACTIONS: dict[Action | None, str] = {
    Action.SKIP: "would skip the update",
    Action.ROLLBACK: "would roll back",
    Action.PAUSE: "would pause and ask",
    Action.HALT: "would halt",
    Action.RETRY: "would repeat the batch",
}


@dataclass(frozen=True)
class CommandAnswer:
    """The journal's answer to a command."""

    applied: bool
    step: int
    reason: str


@dataclass(frozen=True)
class Story:
    """Everything that the screen shows of the journal.

    Attributes:
        incidents: newest first.
        marks: letter -> (step, label) pairs in the order of the journal; a label is an incident's
            number, a factor or "".
        lines: of the log, newest last.
        answers: command id -> answer.
        question: journal line of the question that is open, 0: none is; `asked`: its text.
        proposals, costs, shown: of this question, see `OpenQuestion`.
        paused_by: user who paused the run by a command, while it is paused; "" while it is not, or
            where the user is not known.
        factors: on the updates that a command or the guard has set, also those that do not act
            now.
        known: the evidence in full.
    """

    incidents: tuple[IncidentSummary, ...] = ()
    marks: Mapping[str, tuple[tuple[int, str], ...]] = field(default_factory=dict)
    lines: tuple[LogLine, ...] = ()
    answers: Mapping[str, CommandAnswer] = field(default_factory=dict)
    question: int = 0
    asked: str = ""
    proposals: tuple[str, ...] = ()
    costs: tuple[str, ...] = ()
    shown: tuple[Shown | None, ...] = ()
    paused_by: str = ""
    factors: tuple[ActiveFactor, ...] = ()
    known: JournalEvidence = field(default_factory=JournalEvidence)

    @property
    def recovering(self) -> bool:
        """The newest incident is still open."""
        return bool(self.incidents) and self.incidents[0].open and self.incidents[0].number > 0


class StoryBuilder:
    """Builds a `Story` from events, in the order of the journal."""

    def __init__(self) -> None:
        self._incidents = IncidentList()
        self._question = OpenQuestion()
        self._marks: dict[str, dict[int, str]] = {SKIP: {}, ROLLBACK: {}, COMMAND: {}, INCIDENT: {}}
        self._lines: deque[LogLine] = deque(maxlen=_MAX_LINES)
        self._answers: dict[str, CommandAnswer] = {}
        self._paused_by = ""
        self._evidence = EvidenceBuilder()
        self._factor_tracker = FactorTracker()
        self._factors: tuple[ActiveFactor, ...] = ()
        self._advised = AdvisedIncidents()

    def add(self, events: Iterable[Event]) -> None:
        events = list(events)
        self._evidence.add(events)
        for event in events:
            if self._factor_tracker.add(event):
                self._factors = self._factor_tracker.factors()
            self._take(event)
            if not self._advised.is_repeated(event):
                self._lines.append(make_log_line(event))
        for letter, found in self._marks.items():
            if len(found) > _MAX_MARKS:
                self._marks[letter] = dict(list(found.items())[-_MAX_MARKS:])

    def story(self) -> Story:
        marks = {letter: tuple(found.items()) for letter, found in self._marks.items()}
        question = self._question
        return Story(
            incidents=self._incidents.newest_first(),
            marks=MappingProxyType(marks),
            lines=tuple(self._lines),
            answers=MappingProxyType(dict(self._answers)),
            question=question.number,
            asked=question.text,
            proposals=question.proposals,
            costs=question.costs,
            shown=question.shown,
            paused_by=self._paused_by,
            factors=self._factors,
            known=self._evidence.known(),
        )

    def _take(self, event: Event) -> None:
        match event:
            case VerdictGiven():
                self._verdict(event)
            case Skipped():
                self._skipped(event)
            case RolledBack():
                self._rollback(event)
            case IncidentChanged():
                self._incident(event)
            case CommandAnswered():
                self._command(event)
            case Paused(is_question=True):
                self._ask(event)
            case Resumed():
                self._end_question(event)
                self._paused_by = ""
            case Ended():
                self._end_question(event)
            case Restarted():
                self._end_question(event)
                self._paused_by = ""
                self._forget_skips_after(event.step)
            case Undone():
                self._forget_skips_after(event.step if event.to_step is None else event.to_step)

    # -- incidents

    def _verdict(self, event: VerdictGiven) -> None:
        action, would = _action(event.action), _action(event.would)
        advised = action in (Action.APPLY, Action.FP16_OVERFLOW)
        if action is None or (advised and would in (None, Action.APPLY)):
            return
        at = event.step if event.at_step is None else event.at_step
        words = ADVISED_ACTIONS.get(would, "") if advised else _ACTIONS.get(action, "")
        news = IncidentNews(action=words, findings=event.findings)
        label = self._incidents.merge(event.incident, at, news).label
        if action is Action.SKIP:
            self._marks[SKIP][at] = label
        elif advised and label not in self._marks[INCIDENT].values():
            # nothing was done: where it would have begun
            self._marks[INCIDENT][at] = label

    def _skipped(self, event: Skipped) -> None:
        span = event.span
        if span is not None and event.is_by_user:
            self._marks[SKIP][span.step] = ""
            return  # no incident: a user asked for it
        if span is None and not event.incident:
            return  # neither samples nor an incident: the line of another version, or a broken one
        self._incidents.merge(event.incident, event.step, skipped_data(event))
        if span is not None and span.origin == "rejected":
            self._marks[SKIP].setdefault(span.step, "")

    def _rollback(self, event: RolledBack) -> None:
        if event.span is None and not event.incident and event.to_step is None:
            return  # the line of another version, or a broken one
        to_step = event.step if event.to_step is None else event.to_step
        label = ""
        if not event.is_by_user:
            onset = event.step if event.onset is None else event.onset
            news = replace(skipped_data(event), action=f"rolled back to {format_count(to_step)}")
            label = self._incidents.merge(event.incident, onset, news).label
        self._forget_skips_after(to_step)
        self._marks[ROLLBACK][to_step] = label

    def _forget_skips_after(self, step: int) -> None:
        """Skips of an abandoned timeline would point at steps of the present one."""
        self._marks[SKIP] = {at: label for at, label in self._marks[SKIP].items() if at <= step}

    def _incident(self, event: IncidentChanged) -> None:
        if not event.number:
            return
        # one that repeats keeps the step where it began at first
        begins = event.onset if event.onset and event.state == OPEN else None
        news = IncidentNews(step=begins, open=not event.is_closed)
        self._incidents.merge(event.number, event.onset or event.step, news)

    # -- questions and commands

    def _ask(self, event: Paused) -> None:
        self._question.ask(event)
        if self._incidents.find(self._question.incident) is None:
            self._question.incident = 0  # not an incident that the screen lists
        else:
            self._incidents.merge(event.incident, event.step, IncidentNews(answered=""))

    def _end_question(self, event: Event) -> None:
        """Close the open question, if there is one: this event ends it."""
        if self._question.number:
            incident = self._question.incident
            self._incidents.set_answer(incident, self._question.end(event))

    def _command(self, event: CommandAnswered) -> None:
        if event.id:
            self._keep_answer(event)
        if not event.is_applied:
            return
        self._question.take_command(event)
        self._marks[COMMAND][event.step] = _factor_label(event)
        if event.command == Pause.name:
            self._paused_by = clean_and_shorten(event.who or "", 60).partition("@")[0]

    def _keep_answer(self, event: CommandAnswered) -> None:
        reason = clean_and_shorten(event.reason, 200)
        self._answers.pop(event.id, None)  # the newest answer stands last
        self._answers[event.id] = CommandAnswer(event.is_applied, event.step, reason)
        while len(self._answers) > _MAX_LINES:
            del self._answers[next(iter(self._answers))]


def _factor_label(event: CommandAnswered) -> str:
    """Return the factor that a command set, in a few characters: "×0.5"."""
    command = find_command(event.command)
    if command is None or not command.factor or event.value is None:
        return ""
    return f"×{event.value:.3g}" if math.isfinite(event.value) else ""


def _action(value: Any) -> Action | None:
    try:
        return Action(value)
    except ValueError:
        return None
