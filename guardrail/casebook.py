"""Gathers the events of a journal into incidents: the evidence, what was done, what was left out. Pure.

Journals of other versions, and broken ones, are read as far as they make sense.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from guardrail.files import as_float
from guardrail.records import Curve, Event, Finding, Record, Span
from guardrail.rundir import findings_of, span_of
from guardrail.text import clean
from guardrail.undoing import joined, stretches, taken_back

ENDS = ("recovered", "offset", "recurred")  # states of an incident that say how it went on
_NEAR = 20  # verdicts without an incident's number belong together up to this many steps apart


class Document(Record, frozen=True, kw_only=True):
    """A stretch of a document that was left out. `record` counts from 1; 0: the file is the document."""

    path: str
    record: int = 0
    first_byte: int = 0
    last_byte: int = 0
    excerpt: str = ""


class Sample(Record, frozen=True, kw_only=True):
    """One sample that was left out by itself: its loss, its share of the trouble, and what is odd about its text."""

    position: int
    loss: float = math.nan
    share: float = math.nan
    documents: tuple[Document, ...] = ()
    excerpt: str = ""
    odd: tuple[str, ...] = ()


_TOKENS = 8  # of an incident, named


class Token(Record, frozen=True, kw_only=True):
    """A token whose row of the embedding's gradient was among the longest at a rejected step.

    Attributes:
        text: "" where no tokenizer was at hand; what does not print stands in it as an escape.
        share: of the squared norm of the embedding's gradient, in [0, 1].
        norm: of its row of that gradient, before clipping.
        count: in the batch; -1: nobody counted.
    """

    id: int
    text: str = ""
    share: float = math.nan
    norm: float = math.nan
    count: int = -1

    def sentence(self) -> str:
        """'token 126 "~": up to 87% of the gradient of the embedding, norm 1.46, 264 times in the batch'"""
        facts = [f"up to {100 * self.share:.2g}% of the gradient of the embedding"] if math.isfinite(self.share) else []
        facts += [f"norm {self.norm:.4g}"] if math.isfinite(self.norm) else []
        facts += [f"{self.count:,} times in the batch"] if self.count >= 0 else []
        named = f'token {self.id} "{self.text}"' if self.text else f"token {self.id}"
        return f"{named}: {', '.join(facts)}" if facts else named


class Deed(Record, frozen=True, kw_only=True):
    """What was done about an incident.

    Attributes:
        action: "skip", "rollback", "pause", "halt", "retry", "remedy", "undo", or "would ..." where the guard only
            advised.
        step, timeline: where the run stood.
        to_step, tier, steps_lost: of a rollback: the snapshot used, and applied updates that were given up.
        window: positions [first, last) of the sample order that were left out.
        new_timeline: that it began, -1 if it began none.
        remedies: what went with it, a sentence each.
    """

    action: str
    step: int
    timeline: int
    time: float
    sentence: str
    to_step: int | None = None
    tier: str = ""
    steps_lost: int = 0
    window: tuple[int, int] | None = None
    new_timeline: int = -1
    remedies: tuple[str, ...] = ()


class Cost(Record, frozen=True, kw_only=True):
    """What an incident has cost.

    Attributes:
        steps: applied updates that were given up.
        seconds: that these and the rejected tries took; NaN where no row has measured it.
        parked: seconds that the run waited for a person.
        rejected: updates that were kept out of the weights.
        excess: nats a token, median, by which the losses from the onset on that were given up or rejected stand above
            the curve from before it; NaN where there is none.
        price: nats a token that the given-up steps bring on that curve: what it costs to make them again.
    """

    steps: int = 0
    seconds: float = math.nan
    parked: float = 0.0
    rejected: int = 0
    excess: float = math.nan
    price: float = 0.0


class Incident(Record, frozen=True, kw_only=True):
    """Findings that belong together, with what was done and what was left out. `number` 0: the journal gave none.

    Attributes:
        state: "open", "recovered", "offset" (a loss that stays above what was expected) or "recurred".
        tokens: that pulled hardest on the embedding where it was in trouble, by the longest row of any rejected step.
        cause, cause_reason: what a replay has shown, "" where none was made.
        closed_step: of the run when it was over; 0: it is not.
        curve: of the loss before the onset, where there was enough of it.
        outcome: the sentence that closed it.
        measured: the numbers of that sentence, as far as the journal has them: name -> value.
    """

    number: int
    state: str
    onset: int
    opened: float
    closed: float | None = None
    findings: tuple[Finding, ...] = ()
    parameters: dict[str, list[str]] = msgspec.field(default_factory=dict)  # rank -> non-finite gradients
    tokens: tuple[Token, ...] = ()
    deeds: tuple[Deed, ...] = ()
    spans: tuple[Span, ...] = ()
    samples: int = 0
    documents: tuple[Document, ...] = ()
    documents_total: int = 0
    named: tuple[Sample, ...] = ()
    cause: str = ""
    cause_reason: str = ""
    closed_step: int = 0
    curve: Curve | None = None
    outcome: str = ""
    measured: dict[str, float] = msgspec.field(default_factory=dict)
    cost: Cost = Cost()


class Casebook:
    """Gathers events into incidents: by number, else with what happened close by.

    Args:
        keep: newest incidents that are remembered; None: all.
    """

    def __init__(self, *, keep: int | None = None) -> None:
        self._keep = keep
        self._found: dict[int, Incident] = {}
        self._unnumbered = 0

    def of(self, events: Iterable[Event]) -> list[Incident]:
        for event in events:
            match event.kind:
                case "verdict" | "finding":
                    self._verdict(event)
                case "left_out" | "rollback":
                    self._remedy(event)
                case "incident":
                    self._turn(event)
                case "cause":
                    self._cause(event)
                case "remedy":
                    incident = self._at(event)
                    self._put(incident, {"deeds": (*incident.deeds, deed_of(event, "remedy"))})
                case "undo":
                    self._undo(event)
        while self._keep is not None and len(self._found) > self._keep:
            del self._found[next(iter(self._found))]
        # Found under negative numbers where the journal gave none.
        return [
            msgspec.structs.replace(incident, number=max(0, number)) if number < 0 else incident
            for number, incident in self._found.items()
        ]

    def _verdict(self, event: Event) -> None:
        action = event.data.get("action", "")
        would = event.data.get("would")
        findings = findings_of(event)
        noted = action in ("", "apply") and not would and not whole(event.data.get("incident"))
        if noted and (not findings or self._near(event) is None):
            return  # a note by itself is no incident; near an open one it is evidence
        incident = self._at(event, findings)
        changes: dict[str, Any] = {"findings": _joined(incident.findings, findings)}
        parameters = event.data.get("parameters")
        if isinstance(parameters, dict):
            changes["parameters"] = incident.parameters | {
                clean(str(rank), 20): [clean(str(name), 200) for name in names]
                for rank, names in parameters.items()
                if isinstance(names, list)
            }
        if tokens := _tokens(event):
            changes["tokens"] = _longest((*incident.tokens, *tokens))
        # A rollback is told by its own line, with the snapshot that was used.
        if action == "apply" and would and would != "apply":
            action = f"would {would}"
        if action not in ("", "apply", "rollback"):
            changes["deeds"] = (*incident.deeds, deed_of(event, clean(str(action), 40)))
        self._put(incident, changes)

    def _remedy(self, event: Event) -> None:
        span = span_of(event)
        if span is not None and span.cause == "user":
            return
        incident = self._at(event)
        changes: dict[str, Any] = {}
        if span is not None and span not in incident.spans:
            changes = _with_span(incident, span, event)
        if event.kind == "rollback":
            changes["deeds"] = (*incident.deeds, deed_of(event, "rollback"))
        self._put(incident, changes)

    def _turn(self, event: Event) -> None:
        state = clean(str(event.data.get("state") or ""), 40)
        incident = self._at(event)
        curve = _curve(event.data.get("curve"))
        told: dict[str, Any] = {"curve": curve} if curve is not None else {}
        if state not in ENDS:
            self._put(incident, told)
            return
        numbers = {
            clean(name, 40): as_float(value)
            for name, value in event.data.items()
            if name not in ("number", "onset") and isinstance(value, int | float) and not isinstance(value, bool)
        }
        closed = None if state == "recurred" else event.time
        said = clean(event.message, 400)
        outcome = "" if said == f"incident {incident.number}: {state}" else said  # which says no more than the state
        ended = {"closed": closed, "closed_step": event.step if closed is not None else 0}
        self._put(incident, {**told, **ended, "state": state, "outcome": outcome, "measured": numbers})

    def _cause(self, event: Event) -> None:
        cause = clean(str(event.data.get("cause") or ""), 60)
        reason = clean(str(event.data.get("reason") or event.message), 600)
        rank, host = whole(event.data.get("rank", -1)), clean(str(event.data.get("host") or ""), 80)
        if rank >= 0 and cause.startswith("hardware"):
            reason += f"; rank {rank}{f' on {host}' if host else ''}"
        self._put(self._at(event), {"cause": cause, "cause_reason": reason})

    def _undo(self, event: Event) -> None:
        """What a person took back is no longer left out."""
        back = taken_back(event)
        for incident in [one for one in self._found.values() if any(span in back for span in one.spans)]:
            spans = tuple(span for span in incident.spans if span not in back)
            deeds = (*incident.deeds, deed_of(event, "undo"))
            self._put(incident, {"spans": spans, "samples": _samples(spans), "deeds": deeds})

    def _at(self, event: Event, findings: Iterable[Finding] = ()) -> Incident:
        """The incident of an event. Its onset is the earliest that anything names."""
        number = whole(event.data.get("incident", event.data.get("number")))
        if number <= 0:
            number = self._close_by(event)
        named = [event.data.get("onset"), *(finding.onset for finding in findings)]
        onsets = [onset for onset in named if isinstance(onset, int) and onset > 0]
        incident = self._found.get(number) or self._adopted(number, event)
        if incident is None:
            onset = min(onsets, default=whole(event.data.get("at_step")) or event.step)  # a cause comes first
            return Incident(number=number, state="open", onset=onset, opened=event.time)
        return msgspec.structs.replace(incident, onset=min([incident.onset, *onsets]))

    def _adopted(self, number: int, event: Event) -> Incident | None:
        """A verdict may have come before the line that gives its incident a number."""
        before = self._near(event)
        if number < 0 or before is None or before.number > 0:
            return None
        del self._found[before.number]
        return msgspec.structs.replace(before, number=number)

    def _close_by(self, event: Event) -> int:
        before = self._near(event)
        if before is not None:
            return before.number
        self._unnumbered -= 1
        return self._unnumbered

    def _near(self, event: Event) -> Incident | None:
        """The newest incident, if it is open and the event happened close by."""
        last = next(reversed(self._found.values()), None)
        if last is None or last.state != "open":
            return None
        steps = [deed.step for deed in last.deeds] + [finding.step for finding in last.findings] + [last.onset]
        return last if min(abs(event.step - step) for step in steps) <= _NEAR else None

    def _put(self, incident: Incident, changes: dict[str, Any]) -> None:
        self._found[incident.number] = msgspec.structs.replace(incident, **changes)


def _joined(known: tuple[Finding, ...], new: Iterable[Finding]) -> tuple[Finding, ...]:
    """The worst of each kind of finding on each signal, in the order in which they first appeared."""
    worst = {(f.signal, f.kind): f for f in known}
    for finding in new:
        key = (finding.signal, finding.kind)
        before = worst.get(key)
        if before is None or (before.score == before.score and not finding.score <= before.score):
            worst[key] = finding
    return tuple(msgspec.structs.replace(f, signal=clean(f.signal, 60)) for f in worst.values())


def deed_of(event: Event, action: str) -> Deed:
    data = event.data
    window = data.get("window")
    to_step = data.get("to_step")
    lost = whole(data.get("from_step")) - to_step if isinstance(to_step, int) else 0
    span = span_of(event)
    return Deed(
        action=action,
        step=event.step,
        timeline=event.timeline,
        time=event.time,
        sentence=clean(event.message, 600),
        to_step=to_step if isinstance(to_step, int) else None,
        tier=clean(str(data.get("tier", "")), 40),
        steps_lost=max(0, lost),
        window=_pair(window) or ((span.first, span.last) if span else None),
        new_timeline=whole(data.get("new_timeline", -1)),
        remedies=tuple(_remedies(data)),
    )


def _remedies(data: Mapping[str, Any]) -> Iterator[str]:
    """What went with a decision, in words."""
    raw = data.get("remedies", [data.get("remedy")])
    for item in raw if isinstance(raw, list) else []:
        if not isinstance(item, dict) or not item.get("kind"):
            continue
        kind, value = clean(str(item["kind"]), 40), as_float(item.get("value"))
        if kind == "moments":
            yield f"optimizer moments reset before step {whole(item.get('from_step')):,}"
            continue
        what = {"lr": "learning rate", "embed_alpha": "embedding gradients", "clip": "clipping norm"}.get(kind, kind)
        hold, back = whole(item.get("hold")), whole(item.get("back"))
        until = f", held for {hold:,} steps and back over {back:,}" if hold or back else ""
        yield f"{what} x{value:g} from step {whole(item.get('from_step')):,} on{until}"


def _with_span(incident: Incident, span: Span, event: Event) -> dict[str, Any]:
    """A rollback's window usually covers the batches that were rejected before it: nothing counts twice."""
    documents = _documents(event.data)
    total = max(whole(event.data.get("documents_total")), len(documents))
    spans = (*incident.spans, span)
    if not all(span.first <= known.first and known.last <= span.last for known in incident.spans):
        documents = tuple(dict.fromkeys((*incident.documents, *documents)))
        total += incident.documents_total
    found = {"spans": spans, "samples": _samples(spans), "documents": documents, "documents_total": total}
    return found | {"named": (*incident.named, *_named(event))}


def _samples(spans: Iterable[Span]) -> int:
    """Positions that are left out; of a span that means some of its positions, these."""
    pieces = joined(piece for span in spans for piece in _pieces(span))
    return sum(last - first for first, last in pieces)


def _pieces(span: Span) -> list[tuple[int, int]]:
    return stretches(span.positions) if span.positions else [(span.first, max(span.first, span.last))]


def _named(event: Event) -> tuple[Sample, ...]:
    """The single samples that a `left_out` line names with their loss and their share."""
    raw = event.data.get("samples")
    return tuple(
        Sample(
            position=whole(item.get("position")),
            loss=as_float(item.get("loss")),
            share=as_float(item.get("share")),
            documents=_documents(item),
            excerpt=clean(str(item.get("excerpt") or ""), 200),
            odd=tuple(clean(str(word), 120) for word in odd) if isinstance(odd := item.get("odd"), list) else (),
        )
        for item in (raw if isinstance(raw, list) else [])
        if isinstance(item, dict)
    )


def _tokens(event: Event) -> tuple[Token, ...]:
    raw = event.data.get("tokens")
    return tuple(
        Token(
            id=whole(item.get("id")),
            text=clean(str(item.get("text") or ""), 60),
            share=as_float(item.get("share")),
            norm=as_float(item.get("norm")),
            count=whole(item.get("count", -1)),
        )
        for item in (raw if isinstance(raw, list) else [])
        if isinstance(item, dict)
    )


def _longest(tokens: Iterable[Token]) -> tuple[Token, ...]:
    """Each token once, with the longest row that it had; the longest first."""
    found: dict[int, Token] = {}
    for token in tokens:
        known = found.get(token.id)
        if known is None or not token.norm <= known.norm:
            found[token.id] = token
    return tuple(sorted(found.values(), key=lambda token: -_rank(token.norm))[:_TOKENS])


def _rank(norm: float) -> float:
    return norm if norm == norm else math.inf


def _documents(data: Mapping[str, Any]) -> tuple[Document, ...]:
    found = []
    raw = data.get("documents")
    for item in raw if isinstance(raw, list) else []:
        if isinstance(item, str):
            found.append(Document(path=clean(item, 400)))
        elif isinstance(item, dict):
            found.append(
                Document(
                    path=clean(str(item.get("path", "")), 400),
                    record=whole(item.get("record")),
                    first_byte=whole(item.get("first_byte")),
                    last_byte=whole(item.get("last_byte")),
                    excerpt=clean(str(item.get("excerpt") or ""), 200),
                )
            )
    return tuple(found)


def asked_for(events: Iterable[Event]) -> Iterator[Deed]:
    """Skips and rollbacks that a person wanted: no incidents."""
    for event in events:
        span = span_of(event) if event.kind in ("left_out", "rollback") else None
        if span is not None and span.cause == "user":
            yield deed_of(event, "rollback" if event.kind == "rollback" else "skip")


def _curve(raw: Any) -> Curve | None:
    """Of a journal that may be anybody's: only one that gives a finite loss at every step."""
    if not isinstance(raw, dict):
        return None
    numbers = {name: as_float(raw.get(name)) for name in ("middle", "level", "slope", "noise", "spread")}
    if not all(math.isfinite(number) and abs(number) < 1e6 for number in numbers.values()):
        return None
    if not (-5.0 <= numbers["slope"] <= 0.0 and abs(numbers["level"]) < 100 and abs(numbers["middle"]) < 100):
        return None
    return Curve(**numbers, count=max(0, whole(raw.get("count"))))


def whole(value: Any) -> int:
    if isinstance(value, float) and value == value and abs(value) < 2**63:
        return int(value)
    return value if isinstance(value, int) else 0


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(item, int) for item in value):
        return value[0], value[1]
    return None
