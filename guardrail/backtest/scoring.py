"""Verdicts on recorded runs against labels that a person made by eye from plots. Pure.

Rows are counted, not steps, since logs are sampled differently. An event reaches from `EARLY` rows
before its onset to its end, at least `LATE` rows behind the onset. Alarms within `MERGE` rows of
one another count once.

    act_recall        loss spikes, divergences and NaN that met a skip or more within the event
    note_recall       all labelled events (harmless gradient spikes too) that met at least a note
    false_rollbacks   rollback, pause or halt outside loss spikes, divergences, NaN and what `may` allows
    false_skips       skips outside every labelled event and `may`
    false_notes       notes outside every labelled event, `may` and `auto_tolerated`
    delay             rows from onset to the first skip or more

Labels: {run: {"labels": [[onset_step, kind, recovered], ...], "end_step": [...], "may": [[onset,
kind, recovered, end, note], ...], "auto_tolerated": [[step, kind, recovered], ...], "use":
"score"}}. An onset of null: healthy. Restarts and runs of another `use` are not scored.
"""

from __future__ import annotations

import itertools
import statistics
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import msgspec

EARLY, LATE, MERGE = 2, 10, 10
GRAVE = frozenset({"loss_spike", "divergence", "nan"})
COSTLY = frozenset({"rollback", "pause", "halt"})  # they cost time or a person's sleep
ACTS = COSTLY | {"skip"}
TOTALS = (
    "grave",
    "acted",
    "labelled",
    "noted",
    "records",
    "false_rollbacks",
    "false_skips",
    "false_notes",
)


class Event(NamedTuple):
    """Rows [first, last], both inside."""

    first: int
    last: int
    kind: str


@dataclass
class Marks:
    """How one run fared."""

    grave: int = 0
    acted: int = 0
    labelled: int = 0
    noted: int = 0
    records: int = 0
    false_rollbacks: int = 0
    false_skips: int = 0
    false_notes: int = 0
    delays: list[int] = field(default_factory=list)
    missing: bool = False


def score(
    labels: Mapping[str, Any], runs: Mapping[str, tuple[Sequence[int], Sequence[tuple[int, str]]]]
) -> tuple[dict[str, Any], dict[str, Marks]]:
    """The figures of all labelled runs together, and of each.

    Args:
        runs: name -> (step of every record, [(row, "note" | "skip" | "rollback" | "pause" | "halt"), ...]). A labelled
            run that is not among them counts as one without alarms, and is listed under "missing".
    """
    marks: dict[str, Marks] = {}
    for run, label in sorted(labels.items()):
        if not run.startswith("_") and label.get("use") == "score":
            marks[run] = score_run(label, *runs.get(run, ((), ())))
            marks[run].missing = run not in runs
    return total(
        marks.values(), missing=[run for run, mark in marks.items() if mark.missing]
    ), marks


class _Label(msgspec.Struct):
    """What `score_run` reads of a run's labels."""

    use: str = ""
    labels: list[tuple[float | None, str, Any]] | None = None
    end_step: list[float | None] | None = None
    may: list[tuple[float, str, Any, float | None, Any]] = []
    auto_tolerated: list[Annotated[list[Any], msgspec.Meta(min_length=2)]] = []


def why_no_label(label: Any) -> str:
    """What is wrong with the labels of a run that come from a file; "" if nothing is."""
    try:
        read = msgspec.convert(label, _Label)
    except msgspec.ValidationError as error:
        return str(error)
    if not all(isinstance(small[0], (int, float)) for small in read.auto_tolerated):
        return "expected auto_tolerated, a list of [STEP, KIND, ...]"
    return (
        "expected labels, a list of [STEP, KIND, NOTE]"
        if read.use == "score" and read.labels is None
        else ""
    )


def total(marks: Iterable[Marks], *, missing: Sequence[str] = ()) -> dict[str, Any]:
    """Sums, recalls and rates a 10,000 records."""
    marks = list(marks)
    sums: dict[str, Any] = {name: sum(getattr(mark, name) for mark in marks) for name in TOTALS}
    delays = sorted(delay for mark in marks for delay in mark.delays)
    sums["act_recall"] = round(sums["acted"] / max(1, sums["grave"]), 3)
    sums["note_recall"] = round(sums["noted"] / max(1, sums["labelled"]), 3)
    for name in ("false_rollbacks", "false_skips", "false_notes"):
        sums[f"{name}_per_10k"] = round(1e4 * sums[name] / max(1, sums["records"]), 2)
    sums["delay_median"] = statistics.median(delays) if delays else None
    sums["delay_p90"] = delays[int(0.9 * (len(delays) - 1))] if delays else None
    sums["missing"] = list(missing)
    return sums


def score_run(
    label: Mapping[str, Any], steps: Sequence[int], alarms: Sequence[tuple[int, str]]
) -> Marks:
    """One run against its labels."""
    events, excused, tolerated = _spans(label, steps)
    out = Marks(labelled=len(events), records=len(steps))
    for event in events:
        hits = [
            (row, verdict) for row, verdict in alarms if event.first - EARLY <= row <= event.last
        ]
        out.noted += bool(hits)
        if event.kind in GRAVE:
            acts = [row for row, verdict in hits if verdict in ACTS]
            out.grave += 1
            out.acted += bool(acts)
            out.delays += [max(0, min(acts) - event.first)] if acts else []
    grave = [event for event in events if event.kind in GRAVE]
    out.false_rollbacks = _merged(
        row for row, v in alarms if v in COSTLY and not _inside(row, grave, excused)
    )
    out.false_skips = _merged(
        row for row, v in alarms if v == "skip" and not _inside(row, events, excused)
    )
    out.false_notes = _merged(
        row for row, v in alarms if v == "note" and not _inside(row, events, excused, tolerated)
    )
    return out


def _spans(
    label: Mapping[str, Any], steps: Sequence[int]
) -> tuple[list[Event], list[Event], list[Event]]:
    """(labelled events, what `may` be an alarm and restarts, small things of which a note is no
    fault).
    """
    ascending = all(a <= b for a, b in itertools.pairwise(steps))

    def at(step: int) -> int:
        if ascending:
            return bisect_left(steps, step)
        return next((row for row, known in enumerate(steps) if known >= step), len(steps))

    events: list[Event] = []
    excused: list[Event] = []
    ends = [*(label.get("end_step") or []), *[None] * len(label["labels"])]
    for (onset, kind, _), end in zip(label["labels"], ends, strict=False):
        if onset is not None:
            first = at(onset)
            event = Event(
                first, max(at(end) if end is not None else len(steps), first + LATE), kind
            )
            (excused if kind == "restart" else events).append(event)
    for onset, kind, _, end, _ in label.get("may", []):
        excused.append(
            Event(at(onset), max(at(end) if end is not None else 0, at(onset) + LATE), kind)
        )
    tolerated = [
        Event(at(small[0]), at(small[0]) + LATE, small[1])
        for small in label.get("auto_tolerated", [])
    ]
    return events, excused, tolerated


def _inside(row: int, *groups: Iterable[Event]) -> bool:
    return any(event.first - EARLY <= row <= event.last for events in groups for event in events)


def _merged(rows: Iterable[int]) -> int:
    ordered = sorted(rows)
    return sum(1 for at, row in enumerate(ordered) if at == 0 or row - ordered[at - 1] > MERGE)
