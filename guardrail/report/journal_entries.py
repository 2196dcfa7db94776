"""Reads one line of a journal as parts of an incident: action, samples, documents, tokens, loss
trend. Pure.

Lines of other versions, and broken ones, are read as far as they make sense.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from guardrail.core.events.decisions import (
    RemedyUsed,
    RolledBack,
    SamplesTaken,
    StepJudged,
    Undone,
)
from guardrail.core.files import as_float, as_int
from guardrail.core.records.findings import Finding
from guardrail.core.records.spans import Span
from guardrail.core.records.verdicts import LossTrend, Remedy
from guardrail.core.text import clean_text
from guardrail.decide.remedies.registry import find_effect
from guardrail.report.incident import Document, IncidentAction, Sample, Token

ActionLine = StepJudged | SamplesTaken | RemedyUsed | Undone


def read_action(event: ActionLine, action: str) -> IncidentAction:
    """Return the action of a line, under the name `action`."""
    known = IncidentAction(
        action=action,
        step=event.step,
        timeline=event.timeline,
        time=event.time,
        sentence=clean_text(event.message, 600),
    )
    return msgspec.structs.replace(known, **_find_details(event))


def _find_details(event: ActionLine) -> dict[str, Any]:
    """Return what a line of this kind says besides its sentence."""
    match event:
        case StepJudged():
            return {
                "batch": event.batch,
                "window": event.window,
                **_find_worst(event.findings),
            }
        case RolledBack():
            return {**_find_restored(event), **_find_skipped(event, event.window)}
        case SamplesTaken():
            return _find_skipped(event, None)
        case RemedyUsed():
            return _name_remedies(_read_remedies(event.remedies))
        case Undone():
            return _find_restored(event)


def _find_restored(event: RolledBack | Undone) -> dict[str, Any]:
    """Return the state that the line restored, and the number of steps that this discarded."""
    found: dict[str, Any] = {
        "tier": clean_text(event.tier, 40),
        "new_timeline": as_int(event.new_timeline, -1),
    }
    if event.to_step is not None:
        lost = (event.from_step or 0) - event.to_step
        found |= {"to_step": event.to_step, "steps_lost": max(0, lost)}
    return found


def _find_skipped(event: SamplesTaken, window: tuple[int, int] | None) -> dict[str, Any]:
    """Return the positions that the line skipped, and its remedies."""
    remedies = _name_remedies(event.remedies)
    span = event.span
    if span is None:
        return {**remedies, "window": window}
    return {
        **remedies,
        "window": window or (span.first, span.last),
        "samples_skipped": count_positions(span),
    }


def _find_worst(findings: tuple[Finding, ...]) -> dict[str, Any]:
    """Return the most severe finding of a line."""
    if not findings:
        return {}
    worst = findings[0]
    return {
        "signal": clean_text(worst.signal, 60),
        "value": worst.value,
        "baseline": worst.baseline,
    }


def count_positions(span: Span) -> int:
    """Return how many positions a span skips: those that it names, otherwise all of it."""
    return len(span.positions) or max(0, span.last - span.first)


def _name_remedies(remedies: Iterable[Remedy]) -> dict[str, Any]:
    """Return the remedies that belong to a decision, in full and in two or three words."""
    full, short = [], []
    for remedy in remedies:
        kind = clean_text(remedy.kind, 40)
        if remedy.kind:
            shown = msgspec.structs.replace(remedy, kind=kind)
            full.append(find_effect(kind).report_line(shown))
            short.append(find_effect(kind).short_line(shown))
    return {"remedies": tuple(full), "short_remedies": tuple(short)}


def _read_remedies(items: Iterable[Any]) -> Iterator[Remedy]:
    """Give the remedies of an old line. It may lack some of their fields."""
    for item in items:
        if isinstance(item, dict):
            yield Remedy(
                kind=str(item.get("kind") or ""),
                value=as_float(item.get("value")),
                from_step=as_int(item.get("from_step")),
                hold_steps=as_int(item.get("hold_steps")),
                ramp_steps=as_int(item.get("ramp_steps")),
            )


def read_samples(items: Iterable[Any]) -> tuple[Sample, ...]:
    """Return the single samples that a `skipped` line names, with loss and share of the gradient."""
    return tuple(_as_sample(item) for item in items if isinstance(item, dict))


def _as_sample(item: Mapping[str, Any]) -> Sample:
    return Sample(
        position=as_int(item.get("position")),
        loss=as_float(item.get("loss")),
        share=as_float(item.get("share")),
        documents=read_documents(_as_list(item.get("documents"))),
        excerpt=clean_text(str(item.get("excerpt") or ""), 200),
        odd=tuple(clean_text(str(word), 120) for word in _as_list(item.get("odd"))),
    )


def read_tokens(items: Iterable[Any]) -> tuple[Token, ...]:
    """Return the tokens that a verdict names if the gradient of the embedding was too large."""
    return tuple(
        Token(
            id=as_int(item.get("id")),
            text=clean_text(str(item.get("text") or ""), 60),
            share=as_float(item.get("share")),
            norm=as_float(item.get("norm")),
            count=as_int(item.get("count", -1)),
        )
        for item in items
        if isinstance(item, dict)
    )


def read_documents(items: Iterable[Any]) -> tuple[Document, ...]:
    """Return the documents that a line, or one of its samples, names."""
    found = []
    for item in items:
        if isinstance(item, str):
            found.append(Document(path=clean_text(item, 400)))
        elif isinstance(item, dict):
            found.append(
                Document(
                    path=clean_text(str(item.get("path", "")), 400),
                    record=as_int(item.get("record")),
                    first_byte=as_int(item.get("first_byte")),
                    last_byte=as_int(item.get("last_byte")),
                    excerpt=clean_text(str(item.get("excerpt") or ""), 200),
                )
            )
    return tuple(found)


def read_trend(trend: LossTrend | None) -> LossTrend | None:
    """Return a trend that gives a finite loss at every step, else None. A journal may hold
    anything.
    """
    if trend is None:
        return None
    numbers = (trend.middle, trend.level, trend.slope, trend.noise, trend.spread)
    if not all(math.isfinite(number) and abs(number) < 1e6 for number in numbers):
        return None
    if not (-5.0 <= trend.slope <= 0.0 and abs(trend.level) < 100 and abs(trend.middle) < 100):
        return None
    return msgspec.structs.replace(trend, count=max(0, as_int(trend.count)))


def _as_list(value: Any) -> list[Any]:
    """Return a list of the journal; an empty one for anything else."""
    if isinstance(value, list):
        return value
    return []
