"""Gathers the events of a journal into incidents: the evidence, what was done, what was skipped.
Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from guardrail.core.events.event import Event
from guardrail.core.files import as_float, as_int
from guardrail.core.records import Finding, Span
from guardrail.core.text import clean_text
from guardrail.decide.undo import joined, split_span, undone_spans
from guardrail.report.cause_evidence import evidence_from_line
from guardrail.report.incident import Incident, IncidentAction, Token
from guardrail.report.journal_entries import (
    SKIPPED,
    action_of,
    curve_of,
    documents_of,
    samples_of,
    samples_of_span,
    tokens_of,
)
from guardrail.rundir.run_directory import findings_of, span_of

NOT_MEASURED = ("number", "onset", "at_step")
# states of an incident that say how it went on
ENDS = (
    "recovered",
    "recovered with higher loss",
    "repeated",
    "accepted",
)
_NEAR = 20  # verdicts without an incident's number belong together up to this many steps apart
_TOKENS = 8  # of an incident, named


class IncidentBuilder:
    """Gathers events into incidents: by number, else with what happened close by.

    Args:
        keep: newest incidents that are remembered; None: all.
    """

    def __init__(self, *, keep: int | None = None) -> None:
        self._keep = keep
        self._found: dict[int, Incident] = {}
        self._unnumbered = 0
        self._decided: dict[int, IncidentAction] = {}  # rollbacks whose own line is to come

    def of(self, events: Iterable[Event]) -> list[Incident]:
        for event in events:
            match event.kind:
                case "verdict" | "finding":
                    self._add_verdict(event)
                case "skipped" | "rollback":
                    self._add_remedy(event)
                case "incident":
                    self._add_state(event)
                case "diagnosis":
                    self._add_cause(event)
                case "remedy":
                    incident = self._incident_of(event)
                    self._store(
                        incident, {"actions": (*incident.actions, action_of(event, "remedy"))}
                    )
                case "undo":
                    self._add_undo(event)
        while self._keep is not None and len(self._found) > self._keep:
            del self._found[next(iter(self._found))]
        # Found under negative numbers where the journal gave none.
        return [
            msgspec.structs.replace(incident, number=max(0, number)) if number < 0 else incident
            for number, incident in self._found.items()
        ]

    def _add_verdict(self, event: Event) -> None:
        action = event.data.get("action", "")
        would = event.data.get("would")
        findings = findings_of(event)
        noted = action in ("", "apply") and not would and not as_int(event.data.get("incident"))
        if noted and (not findings or self._find_near(event) is None):
            return  # a note by itself is no incident; near an open one it is evidence
        incident = self._incident_of(event, findings)
        changes: dict[str, Any] = {"findings": _join_findings(incident.findings, findings)}
        parameters = event.data.get("parameters")
        if isinstance(parameters, dict):
            changes["parameters"] = incident.parameters | {
                clean_text(str(rank), 20): [clean_text(str(name), 200) for name in names]
                for rank, names in parameters.items()
                if isinstance(names, list)
            }
        modules = event.data.get("modules")
        if isinstance(modules, dict):
            changes["modules"] = incident.modules | {
                clean_text(str(rank), 20): clean_text(str(name), 200)
                for rank, name in modules.items()
            }
        if tokens := tokens_of(event):
            changes["tokens"] = _keep_longest((*incident.tokens, *tokens))
        # A rollback has its own line, with the snapshot that was used.
        if action == "apply" and would and would != "apply":
            action = f"would {would}"
        if action == "rollback":
            self._decided[incident.number] = action_of(event, "rollback")
        if action not in ("", "apply", "rollback"):
            changes["actions"] = (*incident.actions, action_of(event, clean_text(str(action), 40)))
        self._store(incident, changes)

    def _add_remedy(self, event: Event) -> None:
        span = span_of(event)
        if span is not None and span.origin == "user":
            return
        incident = self._incident_of(event)
        changes: dict[str, Any] = {}
        if span is not None and span not in incident.spans:
            changes = _add_span(incident, span, event)
            changes["actions"] = _add_sample_count(incident.actions, span)
        if event.kind == "rollback":
            changes["actions"] = (
                *changes.get("actions", incident.actions),
                self._rollback(event, incident.number),
            )
        self._store(incident, changes)

    def _rollback(self, event: Event, number: int) -> IncidentAction:
        """The rollback of this line, with the batch and the finding that led to it."""
        done, decided = action_of(event, "rollback"), self._decided.pop(number, None)
        if decided is None:
            return done
        return msgspec.structs.replace(
            done,
            batch=decided.batch,
            signal=decided.signal,
            value=decided.value,
            baseline=decided.baseline,
        )

    def _add_state(self, event: Event) -> None:
        state = clean_text(str(event.data.get("state") or ""), 40)
        incident = self._incident_of(event)
        curve = curve_of(event.data.get("curve"))
        trend: dict[str, Any] = {"curve": curve} if curve is not None else {}
        if state not in ENDS:
            self._store(incident, trend)
            return
        numbers = {
            clean_text(name, 40): as_float(value)
            for name, value in event.data.items()
            if name not in ("number", "onset", "at_step")
            and isinstance(value, int | float)
            and not isinstance(value, bool)
        }
        closed = None
        if state != "repeated":
            closed = event.time
        said = clean_text(event.message, 400)
        # which says no more than the state
        outcome = said
        if said == f"incident {incident.number}: {state}":
            outcome = ""
        ended = {"closed": closed, "closed_step": event.step if closed is not None else 0}
        self._store(
            incident, {**trend, **ended, "state": state, "outcome": outcome, "measured": numbers}
        )

    def _add_cause(self, event: Event) -> None:
        cause = clean_text(str(event.data.get("cause") or ""), 60)
        reason = clean_text(str(event.data.get("reason") or event.message), 600)
        rank, host = (
            as_int(event.data.get("rank", -1)),
            clean_text(str(event.data.get("host") or ""), 80),
        )
        if rank >= 0 and cause.startswith(("hardware", "not reproducible")):
            reason += f"; rank {rank}{f' on {host}' if host else ''}"
        changes: dict[str, Any] = {
            "cause": cause,
            "cause_reason": reason,
            "cause_rank": rank,
            "cause_host": host,
            "evidence": evidence_from_line(event.data),
            "is_new_data": event.data.get("shift") is True,
            "is_raised_only": event.data.get("borne") is True,
        }
        incident = self._incident_of(event)
        if event.data.get("applied") is True:
            changes["has_bad_updates"] = True
        self._store(incident, changes)

    def _add_undo(self, event: Event) -> None:
        """What a user has undone is no longer skipped."""
        back = undone_spans(event)
        for incident in [
            one for one in self._found.values() if any(span in back for span in one.spans)
        ]:
            spans = tuple(span for span in incident.spans if span not in back)
            actions = (*incident.actions, action_of(event, "undo"))
            self._store(
                incident, {"spans": spans, "samples": _count_samples(spans), "actions": actions}
            )

    def _incident_of(self, event: Event, findings: Iterable[Finding] = ()) -> Incident:
        """The incident of an event. Its onset is the earliest that anything names."""
        number = as_int(event.data.get("incident", event.data.get("number")))
        if number <= 0:
            number = self._number_near(event)
        named = [event.data.get("onset"), *(finding.onset for finding in findings)]
        onsets = [onset for onset in named if isinstance(onset, int) and onset > 0]
        incident = self._found.get(number) or self._adopt_unnumbered(number, event)
        if incident is None:
            # a cause comes first
            onset = min(onsets, default=as_int(event.data.get("at_step")) or event.step)
            return Incident(number=number, state="open", onset=onset, opened=event.time)
        return msgspec.structs.replace(incident, onset=min([incident.onset, *onsets]))

    def _adopt_unnumbered(self, number: int, event: Event) -> Incident | None:
        """A verdict may have come before the line that gives its incident a number."""
        before = self._find_near(event)
        if number < 0 or before is None or before.number > 0:
            return None
        del self._found[before.number]
        return msgspec.structs.replace(before, number=number)

    def _number_near(self, event: Event) -> int:
        before = self._find_near(event)
        if before is not None:
            return before.number
        self._unnumbered -= 1
        return self._unnumbered

    def _find_near(self, event: Event) -> Incident | None:
        """The newest incident, if it is open and the event happened close by."""
        last = next(reversed(self._found.values()), None)
        if last is None or last.state != "open":
            return None
        steps = (
            [action.step for action in last.actions]
            + [finding.step for finding in last.findings]
            + [last.onset]
        )
        if min(abs(event.step - step) for step in steps) <= _NEAR:
            return last
        return None

    def _store(self, incident: Incident, changes: dict[str, Any]) -> None:
        self._found[incident.number] = msgspec.structs.replace(incident, **changes)


def asked_for(events: Iterable[Event]) -> Iterator[IncidentAction]:
    """Skips and rollbacks that a user asked for: no incidents."""
    for event in events:
        span = None
        if event.kind in (*SKIPPED, "rollback"):
            span = span_of(event)
        if span is not None and span.origin == "user":
            yield action_of(event, "rollback" if event.kind == "rollback" else "skip")


def _join_findings(known: tuple[Finding, ...], new: Iterable[Finding]) -> tuple[Finding, ...]:
    """The worst of each kind of finding on each signal, in the order in which they first
    appeared.
    """
    worst = {(f.signal, f.kind): f for f in known}
    for finding in new:
        key = (finding.signal, finding.kind)
        before = worst.get(key)
        if before is None or (before.score == before.score and not finding.score <= before.score):
            worst[key] = finding
    return tuple(
        msgspec.structs.replace(f, signal=clean_text(f.signal, 60)) for f in worst.values()
    )


def _add_span(incident: Incident, span: Span, event: Event) -> dict[str, Any]:
    """The changes that a span brings. The window of a rollback usually covers the batches that were
    rejected before it: nothing counts twice.
    """
    documents = documents_of(event.data)
    total = max(as_int(event.data.get("documents_total")), len(documents))
    spans = (*incident.spans, span)
    if not all(span.first <= known.first and known.last <= span.last for known in incident.spans):
        documents = tuple(dict.fromkeys((*incident.documents, *documents)))
        total += incident.documents_total
    found = {
        "spans": spans,
        "samples": _count_samples(spans),
        "documents": documents,
        "documents_total": total,
    }
    return found | {"named": (*incident.named, *samples_of(event))}


def _add_sample_count(
    actions: tuple[IncidentAction, ...], span: Span
) -> tuple[IncidentAction, ...]:
    """The actions, where the try of that batch knows how many of its samples were skipped."""
    for at in range(len(actions) - 1, -1, -1):
        batch = actions[at].batch
        if batch is not None and batch[0] == span.first and actions[at].samples_skipped < 0:
            known = msgspec.structs.replace(actions[at], samples_skipped=samples_of_span(span))
            return (*actions[:at], known, *actions[at + 1 :])
    return actions


def _count_samples(spans: Iterable[Span]) -> int:
    """Positions that are skipped; of a span that names some of its positions, these."""
    pieces = joined(piece for span in spans for piece in split_span(span))
    return sum(last - first for first, last in pieces)


def _keep_longest(tokens: Iterable[Token]) -> tuple[Token, ...]:
    """Each token once, with the longest row that it had; the longest first."""
    found: dict[int, Token] = {}
    for token in tokens:
        known = found.get(token.id)
        if known is None or not token.norm <= known.norm:
            found[token.id] = token
    return tuple(sorted(found.values(), key=lambda token: -_sort_key(token.norm))[:_TOKENS])


def _sort_key(norm: float) -> float:
    if norm == norm:
        return norm
    return math.inf
