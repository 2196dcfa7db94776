"""The journal as the screen tells it: incidents, marks on the curves, log lines, answers to
commands. Pure.

A `Digest` takes events in order, in the reader's thread; the `Story` that it hands out never
changes. Journals of other versions, and broken ones, are read as far as they make sense: nothing
here raises on what an event holds.
"""

from __future__ import annotations

import math
import posixpath
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from guardrail.core.files import as_int
from guardrail.core.format import brief, count, plural
from guardrail.core.records import Action, CommandKind, Event, Finding, FindingKind, Shown
from guardrail.decide.advised_incidents import AdvisedIncidents
from guardrail.decide.questions import asks
from guardrail.rundir.run_directory import findings_of, span_of
from guardrail.tui.model.active_factors import Held, HeldBook
from guardrail.tui.model.evidence import Evidence, Known
from guardrail.tui.model.log_lines import COMMAND, INCIDENT, ROLLBACK, SKIP, Line, line_of

_MAX_LINES = 500  # newest log lines, and answers to commands, that are kept
_MAX_INCIDENTS = 200
_MAX_MARKS = 2000  # newest ones of each kind
_MAX_DOCUMENTS = 16
ASKS = "parked, asks"
_NEAR = 20  # verdicts without an incident's number belong together up to this many steps apart


@dataclass(frozen=True)
class Incident:
    """What went wrong and what was done. `number` 0: the journal has given none.

    `answered`: how the guard's question about it ended, and by whom: "accepted by ann@vm".
    """

    number: int
    step: int
    open: bool = True
    deed: str = ""
    findings: tuple[Finding, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()
    documents: tuple[str, ...] = ()
    documents_total: int = 0
    answered: str = ""

    @property
    def samples(self) -> int:
        """Positions left out; a rollback names those of the rejected batches in its window once
        more.
        """
        total = end = 0
        for first, last in sorted(self.spans):
            total += max(0, last - max(first, end))
            end = max(end, last)
        return total


@dataclass(frozen=True)
class Answer:
    """The journal's answer to a command."""

    applied: bool
    step: int
    reason: str


@dataclass(frozen=True)
class Story:
    """Everything the journal has said so far.

    Attributes:
        incidents: newest first.
        marks: letter -> (steps, labels), in order of the journal; a label is an incident's number
        or "".
        lines: newest last.
        answers: command id -> answer.
        question: journal line of the question that is open, 0: none is; `asked`: its text.
        proposals: what the guard proposes in it.
        costs: what each of these would do, "" where the journal does not say.
        shown: the same as an answer carries it, None where it goes nowhere.
        paused_by: who has paused the run by a command, while it is paused so; "": no one, or it is
        not known.
        held: factors on the updates that a command or the guard has set, whether they act now or
        not.
        known: the evidence in full.
    """

    incidents: tuple[Incident, ...] = ()
    marks: Mapping[str, tuple[tuple[int, str], ...]] = field(default_factory=dict)
    lines: tuple[Line, ...] = ()
    answers: Mapping[str, Answer] = field(default_factory=dict)
    question: int = 0
    asked: str = ""
    proposals: tuple[str, ...] = ()
    costs: tuple[str, ...] = ()
    shown: tuple[Shown | None, ...] = ()
    paused_by: str = ""
    held: tuple[Held, ...] = ()
    known: Known = field(default_factory=Known)

    @property
    def recovering(self) -> bool:
        """The newest incident is not over."""
        return bool(self.incidents) and self.incidents[0].open and self.incidents[0].number > 0


class Digest:
    def __init__(self) -> None:
        self._incidents: dict[int, Incident] = {}
        self._loose: Incident | None = None
        self._marks: dict[str, dict[int, str]] = {SKIP: {}, ROLLBACK: {}, COMMAND: {}, INCIDENT: {}}
        self._lines: deque[Line] = deque(maxlen=_MAX_LINES)
        self._answers: dict[str, Answer] = {}
        self._question, self._asked = 0, ""
        self._about: Incident | None = None  # the incident of the question that is open
        self._taken = ("", "")  # the command that was taken last, and who sent it
        self._proposals: tuple[str, ...] = ()
        self._costs: tuple[str, ...] = ()
        self._shown: tuple[Shown | None, ...] = ()
        self._paused_by = ""
        self._unnumbered = 0
        self._evidence = Evidence()
        self._book = HeldBook()
        self._held: tuple[Held, ...] = ()
        self._advised = AdvisedIncidents()

    def add(self, events: Iterable[Event]) -> None:
        events = list(events)
        self._evidence.add(events)
        for event in events:
            if self._book.add(event):
                self._held = self._book.held()
            match event.kind:
                case "verdict":
                    self._verdict(event)
                case "left_out":
                    self._left_out(event)
                case "rollback":
                    self._rollback(event)
                case "incident":
                    self._incident(event)
                case "command":
                    self._command(event)
                case "paused" if asks(event):
                    self._ask(event)
                case "resumed":
                    self._over(event)
                    self._paused_by = ""
                case "ended":
                    self._over(event)
                case "restarted":
                    self._over(event)
                    self._paused_by = ""
                    self._forget_after(event.step)
                case "undo":
                    self._forget_after(_whole(event.data.get("to_step"), event.step))
            if not self._advised.is_repeated(event):
                self._lines.append(line_of(event))
        for letter, found in self._marks.items():
            if len(found) > _MAX_MARKS:
                self._marks[letter] = dict(list(found.items())[-_MAX_MARKS:])

    def story(self) -> Story:
        incidents = [*self._incidents.values(), *([self._loose] if self._loose else [])]
        return Story(
            incidents=tuple(reversed(incidents)),
            marks=MappingProxyType(
                {letter: tuple(found.items()) for letter, found in self._marks.items()}
            ),
            lines=tuple(self._lines),
            answers=MappingProxyType(dict(self._answers)),
            question=self._question,
            asked=self._asked,
            proposals=self._proposals,
            costs=self._costs,
            shown=self._shown,
            paused_by=self._paused_by,
            held=self._held,
            known=self._evidence.known(),
        )

    # -- incidents

    def _learn(self, event: Event, at: int, **news: Any) -> Incident:
        """Merge `news` into the incident that the event belongs to: its own number, else the open
        one, else a new.

        Args:
            at: the step where a new incident begins.
        """
        number = _number(event)
        if not number:
            newest = next(reversed(self._incidents.values()), None)
            number = (
                newest.number if newest is not None and newest.open and newest.number > 0 else 0
            )
        if not number:
            if self._loose is not None and abs(at - self._loose.step) > _NEAR:
                self._unnumbered -= 1
                self._incidents[self._unnumbered] = replace(self._loose, open=False)
                self._loose = None
            self._loose = _merged(self._loose or Incident(0, at), news)
            return self._loose
        known = self._incidents.get(number)
        if known is None:
            known = Incident(number, at)
            if self._loose is not None and abs(at - self._loose.step) <= _NEAR:
                # The verdict came before the line that gives the incident its number.
                known, self._loose = replace(self._loose, number=number), None
        self._incidents[number] = _merged(known, news)
        while len(self._incidents) > _MAX_INCIDENTS:
            del self._incidents[next(iter(self._incidents))]
        return self._incidents[number]

    def _verdict(self, event: Event) -> None:
        action, would = _action(event.data.get("action")), _action(event.data.get("would"))
        if action is None or (
            action in (Action.APPLY, Action.OVERFLOW) and would in (None, Action.APPLY)
        ):
            return
        at = _whole(event.data.get("at_step"), event.step)
        advised = action in (Action.APPLY, Action.OVERFLOW)
        deed = _WOULD.get(would, "") if advised else _DEEDS.get(action, "")
        incident = self._learn(event, at, deed=deed, findings=findings_of(event))
        if action is Action.SKIP:
            self._marks[SKIP][at] = _label(incident)
        elif advised and _label(incident) not in self._marks[INCIDENT].values():
            # nothing was done: where it would have begun
            self._marks[INCIDENT][at] = _label(incident)

    def _left_out(self, event: Event) -> None:
        span = span_of(event)
        if span is not None and span.cause == "user":
            self._marks[SKIP][span.step] = ""
            return  # no incident: a person wanted it
        if span is None and not _number(event):
            return  # a line that cannot be understood is no incident
        self._learn(event, event.step, **_data(event))
        if span is not None and span.cause == "rejected":
            self._marks[SKIP].setdefault(span.step, "")

    def _rollback(self, event: Event) -> None:
        to_step, span = _whole(event.data.get("to_step"), event.step), span_of(event)
        label = ""
        if span is None and not _number(event) and "to_step" not in event.data:
            return  # a line that cannot be understood
        if span is None or span.cause != "user":
            onset = _whole(event.data.get("onset"), event.step)
            deed = f"rolled back to {count(to_step)}"
            label = _label(self._learn(event, onset, deed=deed, **_data(event)))
        self._forget_after(to_step)
        self._marks[ROLLBACK][to_step] = label

    def _forget_after(self, step: int) -> None:
        """Skips of an abandoned stretch would point at steps of the present."""
        self._marks[SKIP] = {at: label for at, label in self._marks[SKIP].items() if at <= step}

    def _incident(self, event: Event) -> None:
        if not _number(event):
            return
        onset, state = _whole(event.data.get("onset"), 0), event.data.get("state")
        # one that recurs began where it did at first
        begins = {"step": onset} if onset and state == "open" else {}
        self._learn(
            event,
            onset or event.step,
            open=state not in ("recovered", "offset", "accepted"),
            **begins,
        )

    # -- questions

    def _ask(self, event: Event) -> None:
        proposals = event.data.get("proposals")
        told = proposals if isinstance(proposals, list) else []
        self._question, self._asked, self._taken = event.seq, brief(event.message), ("", "")
        self._proposals, self._costs = tuple(map(_proposal, told)), tuple(map(_cost, told))
        self._shown = tuple(_shown(raw) for raw in told)
        number = as_int(event.data.get("incident"))
        self._about = self._incidents.get(number)
        if self._about is not None:
            self._learn(event, event.step, answered="")

    def _over(self, event: Event) -> None:
        """The open question, if there is one, has ended with this line."""
        if not self._question:
            return
        if self._about is not None:
            how = _how_answered(event, *self._taken)
            number = self._about.number
            if number in self._incidents:
                self._incidents[number] = replace(self._incidents[number], answered=how)
        self._question, self._asked, self._about = 0, "", None
        self._proposals = self._costs = self._shown = ()

    # -- commands

    def _command(self, event: Event) -> None:
        applied = event.data.get("effect") == "applied"
        if applied and self._question:
            self._taken = _answer_of(event), brief(event.data.get("who") or "", 100)
        identity = event.data.get("id")
        if isinstance(identity, str):
            self._answers.pop(identity, None)
            self._answers[identity] = Answer(
                applied, event.step, brief(event.data.get("reason") or "", 200)
            )
            while len(self._answers) > _MAX_LINES:
                del self._answers[next(iter(self._answers))]
        if applied:
            self._marks[COMMAND][event.step] = _change(event)
        if applied and event.data.get("command") == CommandKind.PAUSE.value:
            self._paused_by = brief(event.data.get("who") or "", 60).partition("@")[0]


def _change(event: Event) -> str:
    """What a command changed, in a few characters: "×0.5"."""
    value = event.data.get("value")
    factors = (CommandKind.LR.value, CommandKind.SHRINK_EMBEDDING.value)
    if event.data.get("command") not in factors or not isinstance(value, int | float):
        return ""
    return f"×{value:.3g}" if math.isfinite(value) else ""


def _answer_of(event: Event) -> str:
    """What a command that ended a question did to it."""
    command, value = event.data.get("command"), event.data.get("value")
    if command == "answer" and value in (0, 1, 2):
        return ("accepted", "continued", "stopped")[int(value)]
    return brief(f"answered with {command}", 40)


def _how_answered(event: Event, taken: str, who: str) -> str:
    """How a question ended: "accepted by ann@vm"."""
    if taken:
        return (
            f"{taken} by default, nobody answered"
            if who == "guard"
            else f"{taken} by {who or 'a command'}"
        )
    return (
        "asked, and not answered before a restart"
        if event.kind == "restarted"
        else "asked, and not answered"
    )


_DEEDS: dict[Action | None, str] = {
    Action.SKIP: "update left out",
    Action.ROLLBACK: "roll back",
    Action.PAUSE: ASKS,
    Action.HALT: "halted",
    Action.RETRY: "batch repeated",
}
_WOULD: dict[Action | None, str] = {
    Action.SKIP: "would leave the update out",
    Action.ROLLBACK: "would roll back",
    Action.PAUSE: "would park and ask",
    Action.HALT: "would halt",
    Action.RETRY: "would repeat the batch",
}


def _merged(incident: Incident, news: Mapping[str, Any]) -> Incident:
    known: dict[tuple[str, FindingKind], Finding] = {}
    for finding in (*incident.findings, *news.get("findings", ())):
        before = known.get((finding.signal, finding.kind))
        # the worst of each; a NaN is worse than all
        if before is None or not finding.score <= before.score:
            known[finding.signal, finding.kind] = finding
    documents = dict.fromkeys((*incident.documents, *news.get("documents", ())))
    return replace(
        incident,
        step=news.get("step", incident.step),
        open=news.get("open", incident.open),
        deed=news.get("deed") or incident.deed,
        answered=news.get("answered", incident.answered),
        findings=tuple(known.values()),
        spans=tuple(dict.fromkeys((*incident.spans, *news.get("spans", ())))),
        documents=tuple(documents)[:_MAX_DOCUMENTS],
        documents_total=max(
            len(documents), incident.documents_total, news.get("documents_total", 0)
        ),
    )


def _data(event: Event) -> dict[str, Any]:
    """What an event says about samples and documents that were left out."""
    span, documents = span_of(event), event.data.get("documents")
    named = tuple(filter(None, map(_document, documents))) if isinstance(documents, list) else ()
    total = _whole(event.data.get("documents_total"), len(named))
    spans = ((span.first, span.last),) if span is not None else ()
    return {"spans": spans, "documents": named, "documents_total": total}


def _proposal(raw: Any) -> str:
    """What the guard would do by one of its proposals; "back" is a rollback that leaves nothing
    out.
    """
    if not isinstance(raw, Mapping):
        return brief(raw, 200)
    action = brief(raw.get("action", ""), 200)
    return "back" if action == "rollback" and raw.get("samples") == 0 else action


def _cost(raw: Any) -> str:
    """What a proposal would do, as the journal says it."""
    if not isinstance(raw, Mapping):
        return ""
    return brief(raw.get("text", ""), 400).removeprefix(f"{brief(raw.get('command', ''), 40)}: ")


def _shown(raw: Any) -> Shown | None:
    """The state that a proposal goes back to, and what that loses. Training is parked: it comes to
    lose no more.
    """
    if not isinstance(raw, Mapping) or raw.get("to_step") is None:
        return None
    lost = as_int(raw.get("steps_lost"))
    to_step, tier = as_int(raw["to_step"]), brief(raw.get("tier", ""), 40)
    return Shown(to_step=to_step, tier=tier, steps_lost=lost, steps_lost_most=lost)


def _label(incident: Incident) -> str:
    return str(incident.number) if incident.number > 0 else ""


def _number(event: Event) -> int:
    """Of the incident that an event belongs to; 0: none."""
    return _whole(event.data.get("incident", event.data.get("number")), 0)


def _action(value: Any) -> Action | None:
    try:
        return Action(value)
    except ValueError:
        return None


def _whole(value: Any, default: int) -> int:
    return as_int(value, default)


def _document(raw: Any) -> str:
    """A document as a person names it: the end of its path, and the record in it."""
    if not isinstance(raw, Mapping):
        return brief(raw, 200) if isinstance(raw, str) else ""
    path = brief(str(raw.get("path", "")), 400)
    name = path if path.startswith("builtin:") else posixpath.basename(path) or path
    record = _whole(raw.get("record"), 0)
    return f"{name}:{record}" if record else name


def left_out(incident: Incident) -> str:
    """ "12 samples of 3 documents left out", or nothing."""
    if not incident.samples:
        return ""
    documents = (
        f" of {plural(incident.documents_total, 'document')}" if incident.documents_total else ""
    )
    return f"{plural(incident.samples, 'sample')}{documents} left out"
