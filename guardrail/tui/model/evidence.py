"""What the journal says about each incident in full, and about each stretch of data that is left
out. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from guardrail.core.events.event import Event
from guardrail.core.files import as_int
from guardrail.core.format import clean_and_shorten
from guardrail.core.records import Span
from guardrail.decide.undo import joined, split_span, undone_spans
from guardrail.report.incident import Incident
from guardrail.report.incident_builder import IncidentBuilder
from guardrail.rundir.run_directory import span_of

KEPT_CASES, KEPT_SPANS = 200, 5000
_TOLD = ("verdict", "finding", "skipped", "rollback", "incident", "diagnosis", "remedy", "undo")


@dataclass(frozen=True)
class SkippedSpan:
    """One stretch that is left out. `incident` 0: of none; `documents` are those that the journal
    names.
    """

    span: Span
    incident: int
    documents: tuple[str, ...] = ()

    @property
    def samples(self) -> int:
        return len(self.span.positions) or max(0, self.span.last - self.span.first)


@dataclass(frozen=True)
class JournalEvidence:
    """Attributes:
    cases: number of an incident -> all that is known of it.
    left_out: newest first.
    samples_out: positions that are left out, each counted once.
    samples: of one epoch, 0 where the journal does not say.
    """

    cases: Mapping[int, Incident] = field(default_factory=dict)
    left_out: tuple[SkippedSpan, ...] = ()
    samples_out: int = 0
    samples: int = 0


class EvidenceBuilder:
    """Takes in events in their order; what it hands out never changes."""

    def __init__(self) -> None:
        self._book = IncidentBuilder(keep=KEPT_CASES)
        self._cases: dict[int, Incident] = {}
        self._left_out: list[SkippedSpan] = []
        self._samples = 0

    def add(self, events: Iterable[Event]) -> None:
        told = [event for event in events if event.kind in _TOLD or event.kind == "started"]
        for event in told:
            if event.kind == "started":
                self._samples = max(0, as_int(event.data.get("samples"))) or self._samples
            elif event.kind == "undo":
                back = undone_spans(event)
                self._left_out = [one for one in self._left_out if one.span not in back]
            elif (span := span_of(event)) is not None:
                incident = as_int(event.data.get("incident"))
                self._left_out.append(
                    SkippedSpan(span, incident, tuple(_names(event.data.get("documents"))))
                )
        del self._left_out[:-KEPT_SPANS]
        if told:
            self._cases = {one.number: one for one in self._book.add_events(told) if one.number > 0}

    def known(self) -> JournalEvidence:
        pieces = [piece for one in self._left_out for piece in split_span(one.span)]
        return JournalEvidence(
            cases=MappingProxyType(self._cases),
            left_out=tuple(reversed(self._left_out)),
            samples_out=sum(last - first for first, last in joined(pieces)),
            samples=self._samples,
        )


def _names(raw: object) -> Iterable[str]:
    for item in raw if isinstance(raw, list) else []:
        path = item.get("path") if isinstance(item, dict) else item
        name = clean_and_shorten(str(path or ""), 400)
        record = as_int(item.get("record")) if isinstance(item, dict) else 0
        yield f"{name}:{record}" if record else name
