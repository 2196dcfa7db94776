"""Reads one line of a journal as parts of an incident: action, samples, documents, tokens, loss
trend. Pure.

Lines of other versions, and broken ones, are read as far as they make sense.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from guardrail.core.events.event import Event
from guardrail.core.files import as_float, as_int
from guardrail.core.records.spans import Span
from guardrail.core.records.verdicts import LossTrend
from guardrail.core.text import clean_text
from guardrail.report.incident import Document, IncidentAction, Sample, Token
from guardrail.rundir.journal import findings_of, span_of

SKIPPED = ("skipped",)


def read_action(event: Event, action: str) -> IncidentAction:
    """Return the action of a line, under the name `action`."""
    data = event.data
    return IncidentAction(
        action=action,
        step=event.step,
        timeline=event.timeline,
        time=event.time,
        sentence=clean_text(event.message, 600),
        tier=clean_text(str(data.get("tier", "")), 40),
        new_timeline=as_int(data.get("new_timeline", -1)),
        remedies=tuple(_list_remedies(data)),
        batch=_as_pair(data.get("batch")),
        **_find_target(data),
        **_find_window(event),
        **_find_worst(event),
    )


def _find_target(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state that the line restored, and the number of steps that this discarded."""
    to_step = data.get("to_step")
    if not isinstance(to_step, int):
        return {}
    return {"to_step": to_step, "steps_lost": max(0, as_int(data.get("from_step")) - to_step)}


def _find_window(event: Event) -> dict[str, Any]:
    """Return the positions that the line skipped."""
    window, span = _as_pair(event.data.get("window")), span_of(event)
    if span is None:
        return {"window": window}
    return {"window": window or (span.first, span.last), "samples_skipped": count_positions(span)}


def _find_worst(event: Event) -> dict[str, Any]:
    """Return the most severe finding of the line."""
    worst = next(iter(findings_of(event)), None)
    if worst is None:
        return {}
    return {
        "signal": clean_text(worst.signal, 60),
        "value": worst.value,
        "baseline": worst.baseline,
    }


def count_positions(span: Span) -> int:
    """Return how many positions a span skips: those that it names, otherwise all of it."""
    return len(span.positions) or max(0, span.last - span.first)


def _list_remedies(data: Mapping[str, Any]) -> Iterator[str]:
    """Give one sentence per remedy that belongs to a decision."""
    for item in _as_list(data.get("remedies", [data.get("remedy")])):
        if not isinstance(item, dict) or not item.get("kind"):
            continue
        kind, value = clean_text(str(item["kind"]), 40), as_float(item.get("value"))
        if kind == "moments":
            yield f"optimizer moments reset before step {as_int(item.get('from_step')):,}"
            continue
        what = {
            "lr": "learning rate",
            "embed_alpha": "embedding gradients",
            "shrink_embedding": "embedding gradients",
            "clip": "clipping norm",
        }.get(kind, kind)
        hold = as_int(item.get("hold", item.get("hold_steps")))
        back = as_int(item.get("back", item.get("ramp_steps")))
        until = ""
        if hold or back:
            until = f", hold {hold:,} steps, ramp {back:,} steps"
        yield f"{what} x {value:g} from step {as_int(item.get('from_step')):,}{until}"


def read_samples(event: Event) -> tuple[Sample, ...]:
    """Return the single samples that a `skipped` line names, with loss and share of the gradient."""
    items = _as_list(event.data.get("samples"))
    return tuple(_as_sample(item) for item in items if isinstance(item, dict))


def _as_sample(item: Mapping[str, Any]) -> Sample:
    return Sample(
        position=as_int(item.get("position")),
        loss=as_float(item.get("loss")),
        share=as_float(item.get("share")),
        documents=read_documents(item),
        excerpt=clean_text(str(item.get("excerpt") or ""), 200),
        odd=tuple(clean_text(str(word), 120) for word in _as_list(item.get("odd"))),
    )


def read_tokens(event: Event) -> tuple[Token, ...]:
    """Return the tokens that a verdict names if the gradient of the embedding was too large."""
    items = _as_list(event.data.get("tokens"))
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


def read_documents(data: Mapping[str, Any]) -> tuple[Document, ...]:
    """Return the documents that a line, or one of its samples, names."""
    found = []
    for item in _as_list(data.get("documents")):
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


def read_trend(raw: Any) -> LossTrend | None:
    """Return a trend that gives a finite loss at every step, else None. A journal may hold
    anything.
    """
    if not isinstance(raw, dict):
        return None
    numbers = {
        name: as_float(raw.get(name)) for name in ("middle", "level", "slope", "noise", "spread")
    }
    if not all(math.isfinite(number) and abs(number) < 1e6 for number in numbers.values()):
        return None
    if not (
        -5.0 <= numbers["slope"] <= 0.0
        and abs(numbers["level"]) < 100
        and abs(numbers["middle"]) < 100
    ):
        return None
    return LossTrend(**numbers, count=max(0, as_int(raw.get("count"))))


def _as_list(value: Any) -> list[Any]:
    """Return a list of the journal; an empty one for anything else."""
    if isinstance(value, list):
        return value
    return []


def _as_pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(item, int) for item in value):
        return value[0], value[1]
    return None
