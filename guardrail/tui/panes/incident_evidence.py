"""The evidence of one incident as (name, text) facts, for the window of an incident. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator

from guardrail.core.format import (
    clean_and_shorten,
    format_count,
    format_plural,
    format_time_of_day,
)
from guardrail.core.records.findings import Finding, score_words
from guardrail.report.incident import Document, Incident, Sample
from guardrail.tui.model.view import signal_label
from guardrail.tui.numerics.scales import format_short
from guardrail.tui.panes.frame import Fact, named_facts

_MOST_ACTIONS = 12  # the newest ones
NOT_OVER = "not over yet"
_MOST_SAMPLES, _MOST_SPANS, _DOCUMENTS_OF_SAMPLE = 16, 6, 2


def format_finding(finding: Finding) -> str:
    """Return "loss 2.31 → 11.5, score 41 (limit 8)"."""
    signal = signal_label(finding.signal)
    where = f" on rank {', '.join(map(str, finding.ranks))}" if finding.ranks else ""
    if not math.isfinite(finding.value):
        return f"{signal}: {format_short(finding.value)}{where}"
    values = f"{format_short(finding.baseline)} → {format_short(finding.value)}"
    return f"{signal} {values}{where}, {score_words(finding.score, finding.threshold)}"


def evidence_facts(incident: Incident) -> list[Fact]:
    """Return all facts of an incident, in the order in which a user asks for them."""
    facts = named_facts("findings", map(format_finding, incident.findings))
    if not facts:
        facts = [("findings", "none in the journal")]
    facts += named_facts("gradients", _parameter_lines(incident))
    facts += named_facts("tokens", [token.sentence() for token in incident.tokens])
    facts += named_facts("cause", _cause_lines(incident))
    facts += named_facts("actions", _action_lines(incident))
    remedies = [remedy for action in incident.actions for remedy in action.remedies]
    facts += named_facts("remedies", dict.fromkeys(remedies))
    facts += named_facts("skipped", _skipped_lines(incident))
    facts += named_facts("samples", _sample_lines(incident))
    facts += named_facts("documents", _document_lines(incident))
    facts.append(("outcome", _outcome(incident)))
    if incident.measured:
        facts.append(("measured", _measured(incident)))
    return facts


def _parameter_lines(incident: Incident) -> Iterator[str]:
    for rank, names in incident.parameters.items():
        yield f"rank {rank}: {', '.join(names)}"


def _cause_lines(incident: Incident) -> list[str]:
    if not incident.cause:
        return []
    if not incident.cause_reason:
        return [incident.cause]
    return [f"{incident.cause}: {incident.cause_reason}"]


def _action_lines(incident: Incident) -> Iterator[str]:
    for one in incident.actions[-_MOST_ACTIONS:]:
        yield f"{format_time_of_day(one.time)}  {one.sentence or one.action}"


def _skipped_lines(incident: Incident) -> Iterator[str]:
    if not incident.samples:
        return
    documents = ""
    if incident.documents_total:
        documents = f" of {format_plural(incident.documents_total, 'document')}"
    yield format_plural(incident.samples, "sample") + documents
    for span in incident.spans[:_MOST_SPANS]:
        last = max(span.first, span.last - 1)
        positions = f"positions {format_count(span.first)} to {format_count(last)}"
        chosen = f", {len(span.positions)} of them" if span.positions else ""
        yield f"{positions}{chosen} ({clean_and_shorten(span.origin, 20)})"


def _sample_lines(incident: Incident) -> Iterator[str]:
    for sample in incident.named[:_MOST_SAMPLES]:
        yield from _lines_of_sample(sample)


def _lines_of_sample(sample: Sample) -> Iterator[str]:
    line = f"position {format_count(sample.position)}: loss {format_short(sample.loss)}"
    if math.isfinite(sample.share):
        line += f", {100 * sample.share:.0f} % of the gradient"
    yield line
    if sample.odd:
        yield f"  odd: {', '.join(sample.odd)}"
    documents = sample.documents[:_DOCUMENTS_OF_SAMPLE]
    for document in documents:
        for text in _lines_of_document(document):
            yield f"  {text}"
    if sample.excerpt and sample.excerpt not in [document.excerpt for document in documents]:
        yield f"  “{sample.excerpt}”"


def _document_lines(incident: Incident) -> Iterator[str]:
    for document in incident.documents:
        yield from _lines_of_document(document)
    more = incident.documents_total - len(incident.documents)
    if incident.documents and more > 0:
        yield f"and {more:,} more"


def _lines_of_document(document: Document) -> Iterator[str]:
    line = document.path
    if document.record:
        line += f":{document.record}"
    if document.last_byte:
        line += f"  bytes {document.first_byte:,}-{document.last_byte:,}"
    yield line
    if document.excerpt:
        yield f"  “{document.excerpt}”"


def _outcome(incident: Incident) -> str:
    if incident.outcome:
        return incident.outcome
    if incident.state == "open":
        return NOT_OVER
    return incident.state


def _measured(incident: Incident) -> str:
    texts = []
    for name, value in incident.measured.items():
        texts.append(f"{name.replace('_', ' ')} {format_short(value)}")
    return ", ".join(texts)
