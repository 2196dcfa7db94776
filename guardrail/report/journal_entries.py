"""What one line of a journal says of an incident: the action, samples, documents, tokens and the
trend in it. Pure.

Lines of other versions, and broken ones, are read as far as they make sense.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from guardrail.core.files import as_float, as_int
from guardrail.core.records import Event, LossTrend, Span
from guardrail.core.text import clean
from guardrail.report.incident import Document, IncidentAction, Sample, Token
from guardrail.rundir.run_directory import findings_of, span_of

# kinds of lines: the name that older versions wrote, and the present one
SKIPPED = ("left_out", "skipped")
DIAGNOSIS = ("cause", "diagnosis")


def action_of(event: Event, action: str) -> IncidentAction:
    """What the line did, under the name `action`."""
    data = event.data
    window = data.get("window")
    to_step = data.get("to_step")
    lost = whole(data.get("from_step")) - to_step if isinstance(to_step, int) else 0
    span = span_of(event)
    worst = next(iter(findings_of(event)), None)
    return IncidentAction(
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
        batch=_pair(data.get("batch")),
        signal=clean(worst.signal, 60) if worst is not None else "",
        value=worst.value if worst is not None else math.nan,
        baseline=worst.baseline if worst is not None else math.nan,
        samples_skipped=samples_of_span(span) if span is not None else -1,
    )


def samples_of_span(span: Span) -> int:
    """Positions that a span skips: those it names, else all of it."""
    return len(span.positions) or max(0, span.last - span.first)


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
        what = {
            "lr": "learning rate",
            "embed_alpha": "embedding gradients",
            "clip": "clipping norm",
        }.get(kind, kind)
        hold, back = whole(item.get("hold")), whole(item.get("back"))
        until = f", for {hold:,} steps, then back over {back:,} steps" if hold or back else ""
        yield f"{what} x {value:g} from step {whole(item.get('from_step')):,}{until}"


def samples_of(event: Event) -> tuple[Sample, ...]:
    """The single samples that a `left_out` line names with their loss and their share of the
    gradient.
    """
    raw = event.data.get("samples")
    return tuple(
        Sample(
            position=whole(item.get("position")),
            loss=as_float(item.get("loss")),
            share=as_float(item.get("share")),
            documents=documents_of(item),
            excerpt=clean(str(item.get("excerpt") or ""), 200),
            odd=tuple(clean(str(word), 120) for word in odd)
            if isinstance(odd := item.get("odd"), list)
            else (),
        )
        for item in (raw if isinstance(raw, list) else [])
        if isinstance(item, dict)
    )


def tokens_of(event: Event) -> tuple[Token, ...]:
    """The tokens that a verdict names where the gradient of the embedding was too large."""
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


def documents_of(data: Mapping[str, Any]) -> tuple[Document, ...]:
    """The documents that a line, or one of its samples, names."""
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


def curve_of(raw: Any) -> LossTrend | None:
    """A trend that gives a finite loss at every step, else None: a journal may hold anything."""
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
    return LossTrend(**numbers, count=max(0, whole(raw.get("count"))))


def whole(value: Any) -> int:
    """An integer from JSON; 0 for anything else."""
    return as_int(value)


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(item, int) for item in value):
        return value[0], value[1]
    return None
