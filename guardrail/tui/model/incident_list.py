"""The incidents as the screen lists them, read from journal events. Pure.

Journals of other versions and broken ones are read as far as they make sense: nothing here raises
on what an event holds.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from guardrail.core.events.decisions import SamplesTaken
from guardrail.core.files import as_int
from guardrail.core.format import clean_and_shorten, format_plural
from guardrail.core.records.findings import Finding, FindingKind

_MAX_INCIDENTS = 200
_MAX_DOCUMENTS = 16
# verdicts without an incident's number belong to one incident up to this many steps apart
_NEAR = 20


@dataclass(frozen=True)
class IncidentSummary:
    """What happened and what was done.

    Attributes:
        number: of the incident; 0 or less: the journal has given it none.
        step: where it began.
        action: what was done last, in a few words.
        spans: positions [first, last) that were skipped.
        documents: names of the documents that these samples are from; `documents_total`: how many
            there are.
        answered: how the guard's question about it ended, and by whom: "accepted by ann@vm".
    """

    number: int
    step: int
    open: bool = True
    action: str = ""
    findings: tuple[Finding, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()
    documents: tuple[str, ...] = ()
    documents_total: int = 0
    answered: str = ""

    @property
    def samples(self) -> int:
        """Count the skipped positions once each.

        A rollback names the positions of the rejected batches in its window again.
        """
        total = end = 0
        for first, last in sorted(self.spans):
            total += max(0, last - max(first, end))
            end = max(end, last)
        return total

    @property
    def label(self) -> str:
        """The number, or "" where the journal has given none."""
        return str(self.number) if self.number > 0 else ""


@dataclass(frozen=True)
class IncidentNews:
    """What one event adds to an incident; None and empty fields change nothing."""

    step: int | None = None
    open: bool | None = None
    action: str = ""
    answered: str | None = None
    findings: tuple[Finding, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()
    documents: tuple[str, ...] = ()
    documents_total: int = 0


class IncidentList:
    """Collects incidents in the order of the journal; keeps the newest 200."""

    def __init__(self) -> None:
        self._numbered: dict[int, IncidentSummary] = {}
        # the newest one without a number; older ones stand in `_numbered` under -1, -2, ...
        self._loose: IncidentSummary | None = None
        self._closed_loose = 0

    def newest_first(self) -> tuple[IncidentSummary, ...]:
        known = list(self._numbered.values())
        if self._loose is not None:
            known.append(self._loose)
        return tuple(reversed(known))

    def find(self, number: int) -> IncidentSummary | None:
        return self._numbered.get(number)

    def set_answer(self, number: int, text: str) -> None:
        """Record how the question about an incident ended."""
        if number in self._numbered:
            self._numbered[number] = replace(self._numbered[number], answered=text)

    def merge(self, number: int | None, at: int, news: IncidentNews) -> IncidentSummary:
        """Merge `news` into an incident, and return it.

        Args:
            number: of the incident; None or 0: the open one, else a new one.
            at: the step where a new incident begins.
        """
        number = number or self._open_number()
        if not number:
            return self._merge_loose(at, news)
        known = self._numbered.get(number)
        if known is None:
            known = self._new(number, at)
        self._numbered[number] = _merged(known, news)
        while len(self._numbered) > _MAX_INCIDENTS:
            del self._numbered[next(iter(self._numbered))]
        return self._numbered[number]

    def _open_number(self) -> int:
        newest = next(reversed(self._numbered.values()), None)
        if newest is None or not newest.open:
            return 0
        return max(0, newest.number)

    def _merge_loose(self, at: int, news: IncidentNews) -> IncidentSummary:
        if self._loose is not None and abs(at - self._loose.step) > _NEAR:
            self._closed_loose += 1
            self._numbered[-self._closed_loose] = replace(self._loose, open=False)
            self._loose = None
        self._loose = _merged(self._loose or IncidentSummary(0, at), news)
        return self._loose

    def _new(self, number: int, at: int) -> IncidentSummary:
        loose = self._loose
        if loose is not None and abs(at - loose.step) <= _NEAR:
            # The verdict came before the line that gives the incident its number.
            self._loose = None
            return replace(loose, number=number)
        return IncidentSummary(number, at)


def skipped_data(event: SamplesTaken) -> IncidentNews:
    """Return what an event says about skipped samples and their documents."""
    named = tuple(filter(None, map(_document_name, event.documents)))
    spans: tuple[tuple[int, int], ...] = ()
    if event.span is not None:
        spans = ((event.span.first, event.span.last),)
    total = event.documents_total or len(named)
    return IncidentNews(spans=spans, documents=named, documents_total=total)


def format_skipped(incident: IncidentSummary) -> str:
    """Return "12 samples of 3 documents skipped", or "" where nothing was skipped."""
    if not incident.samples:
        return ""
    documents = ""
    if incident.documents_total:
        documents = f" of {format_plural(incident.documents_total, 'document')}"
    return f"{format_plural(incident.samples, 'sample')}{documents} skipped"


def _merged(incident: IncidentSummary, news: IncidentNews) -> IncidentSummary:
    documents = tuple(dict.fromkeys((*incident.documents, *news.documents)))
    total = max(len(documents), incident.documents_total, news.documents_total)
    return replace(
        incident,
        step=incident.step if news.step is None else news.step,
        open=incident.open if news.open is None else news.open,
        action=news.action or incident.action,
        answered=incident.answered if news.answered is None else news.answered,
        findings=_worst_of_each((*incident.findings, *news.findings)),
        spans=tuple(dict.fromkeys((*incident.spans, *news.spans))),
        documents=documents[:_MAX_DOCUMENTS],
        documents_total=total,
    )


def _worst_of_each(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return the worst finding of each signal and kind; a NaN score is the worst of all."""
    worst: dict[tuple[str, FindingKind], Finding] = {}
    for finding in findings:
        before = worst.get((finding.signal, finding.kind))
        if before is None or not finding.score <= before.score:
            worst[finding.signal, finding.kind] = finding
    return tuple(worst.values())


def _document_name(raw: Any) -> str:
    """Return a document's name as it is shown: the end of its path, and the record in it."""
    if isinstance(raw, str):
        return clean_and_shorten(raw, 200)
    if not isinstance(raw, Mapping):
        return ""
    path = clean_and_shorten(str(raw.get("path", "")), 400)
    name = path
    if not path.startswith("builtin:"):
        name = posixpath.basename(path) or path
    record = as_int(raw.get("record"))
    return f"{name}:{record}" if record else name
