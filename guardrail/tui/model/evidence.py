"""What the journal says about each incident in full, and about each range of skipped data. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from guardrail.core.events.decisions import (
    Diagnosed,
    IncidentChanged,
    RemedyUsed,
    SamplesTaken,
    StepJudged,
    Undone,
)
from guardrail.core.events.event import Event
from guardrail.core.events.run_state import Started
from guardrail.core.files import as_int
from guardrail.core.format import clean_and_shorten
from guardrail.core.records.spans import Span
from guardrail.decide.undo import merge_ranges, split_span
from guardrail.report.incident import Incident
from guardrail.report.incident_builder import IncidentBuilder

KEPT_INCIDENTS, KEPT_SPANS = 200, 5000
_USED = (Started, StepJudged, SamplesTaken, IncidentChanged, Diagnosed, RemedyUsed, Undone)


@dataclass(frozen=True)
class SkippedSpan:
    """One range of samples that is skipped.

    Attributes:
        incident: number of its incident; 0: it belongs to none.
        documents: names of those that the journal lists.
    """

    span: Span
    incident: int
    documents: tuple[str, ...] = ()

    @property
    def samples(self) -> int:
        return len(self.span.positions) or max(0, self.span.last - self.span.first)


@dataclass(frozen=True)
class JournalEvidence:
    """What the journal says in full.

    Attributes:
        incidents: number of an incident -> all that is known of it.
        skipped: newest first.
        samples_skipped: positions that are skipped, each counted once.
        samples: of one epoch, 0 where the journal does not say.
    """

    incidents: Mapping[int, Incident] = field(default_factory=dict)
    skipped: tuple[SkippedSpan, ...] = ()
    samples_skipped: int = 0
    samples: int = 0


class EvidenceBuilder:
    """Takes events in their order; the evidence that it hands out never changes."""

    def __init__(self) -> None:
        self._builder = IncidentBuilder(keep=KEPT_INCIDENTS)
        self._incidents: dict[int, Incident] = {}
        self._skipped: list[SkippedSpan] = []
        self._samples = 0

    def add(self, events: Iterable[Event]) -> None:
        used = [event for event in events if isinstance(event, _USED)]
        for event in used:
            self._add_span(event)
        del self._skipped[:-KEPT_SPANS]
        if used:
            incidents = self._builder.add_events(used)
            self._incidents = {one.number: one for one in incidents if one.number > 0}

    def _add_span(self, event: Event) -> None:
        match event:
            case Started():
                self._samples = max(0, event.samples or 0) or self._samples
            case Undone():
                self._skipped = [one for one in self._skipped if one.span not in event.spans]
            case SamplesTaken(span=Span() as span):
                names = tuple(map(_document_name, event.documents))
                self._skipped.append(SkippedSpan(span, event.incident or 0, names))

    def known(self) -> JournalEvidence:
        pieces = [piece for one in self._skipped for piece in split_span(one.span)]
        return JournalEvidence(
            incidents=MappingProxyType(self._incidents),
            skipped=tuple(reversed(self._skipped)),
            samples_skipped=sum(last - first for first, last in merge_ranges(pieces)),
            samples=self._samples,
        )


def _document_name(document: object) -> str:
    path, record = document, 0
    if isinstance(document, Mapping):
        path, record = document.get("path"), as_int(document.get("record"))
    name = clean_and_shorten(str(path or ""), 400)
    return f"{name}:{record}" if record else name
