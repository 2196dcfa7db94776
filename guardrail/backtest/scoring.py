"""Scores verdicts on recorded runs against labels that were made by eye from plots. Pure.

Rows are counted, not steps, since logs are sampled differently. An event reaches from `EARLY` rows
before its onset to its end, at least `LATE` rows after the onset. Alarms within `MERGE` rows of
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
COSTLY = frozenset({"rollback", "pause", "halt"})  # they cost time, or wake a user
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
    """The counts of one run. `guardrail backtest --json` prints them under these names."""

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


def score_runs(
    labels: Mapping[str, Any], runs: Mapping[str, tuple[Sequence[int], Sequence[tuple[int, str]]]]
) -> tuple[dict[str, Any], dict[str, Marks]]:
    """Return (sums and rates of all labelled runs, counts of each run).

    Args:
        runs: name -> (step of every record, [(row, "note" | "skip" | "rollback" | "pause" | "halt"), ...]). A labelled
            run that is not among them counts as one without alarms, and is listed under "missing".
    """
    marks: dict[str, Marks] = {}
    for run, label in sorted(labels.items()):
        if not run.startswith("_") and label.get("use") == "score":
            marks[run] = score_run(label, *runs.get(run, ((), ())))
            marks[run].missing = run not in runs
    missing = [run for run, mark in marks.items() if mark.missing]
    return sum_marks(marks.values(), missing=missing), marks


class _Label(msgspec.Struct):
    """The part of a run's labels that `score_run` reads."""

    use: str = ""
    labels: list[tuple[float | None, str, Any]] | None = None
    end_step: list[float | None] | None = None
    may: list[tuple[float, str, Any, float | None, Any]] = []
    auto_tolerated: list[Annotated[list[Any], msgspec.Meta(min_length=2)]] = []


def find_label_error(label: Any) -> str:
    """Return what is wrong with a run's labels from a file; "" if nothing is."""
    try:
        read = msgspec.convert(label, _Label)
    except msgspec.ValidationError as error:
        return str(error)
    if not all(isinstance(small[0], (int, float)) for small in read.auto_tolerated):
        return "expected auto_tolerated, a list of [STEP, KIND, ...]"
    if read.use == "score" and read.labels is None:
        return "expected labels, a list of [STEP, KIND, NOTE]"
    return ""


def sum_marks(marks: Iterable[Marks], *, missing: Sequence[str] = ()) -> dict[str, Any]:
    """Return sums, recalls, and rates per 10,000 records."""
    marks = list(marks)
    sums: dict[str, Any] = {}
    for name in TOTALS:
        sums[name] = sum(getattr(mark, name) for mark in marks)
    delays = sorted(delay for mark in marks for delay in mark.delays)
    sums["act_recall"] = round(sums["acted"] / max(1, sums["grave"]), 3)
    sums["note_recall"] = round(sums["noted"] / max(1, sums["labelled"]), 3)
    for name in ("false_rollbacks", "false_skips", "false_notes"):
        sums[f"{name}_per_10k"] = round(1e4 * sums[name] / max(1, sums["records"]), 2)
    sums["delay_median"] = sums["delay_p90"] = None
    if delays:
        sums["delay_median"] = statistics.median(delays)
        sums["delay_p90"] = delays[int(0.9 * (len(delays) - 1))]
    sums["missing"] = list(missing)
    return sums


def score_run(
    label: Mapping[str, Any], steps: Sequence[int], alarms: Sequence[tuple[int, str]]
) -> Marks:
    """Return the counts of one run."""
    events, excused, tolerated = _find_events(label, steps)
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
            if acts:
                out.delays.append(max(0, min(acts) - event.first))
    grave = [event for event in events if event.kind in GRAVE]
    out.false_rollbacks = _count_merged(
        row for row, v in alarms if v in COSTLY and not _is_inside(row, grave, excused)
    )
    out.false_skips = _count_merged(
        row for row, v in alarms if v == "skip" and not _is_inside(row, events, excused)
    )
    out.false_notes = _count_merged(
        row for row, v in alarms if v == "note" and not _is_inside(row, events, excused, tolerated)
    )
    return out


def _find_events(
    label: Mapping[str, Any], steps: Sequence[int]
) -> tuple[list[Event], list[Event], list[Event]]:
    """Return (labelled events, rows where an alarm is allowed, rows where a note is allowed).

    The second are those of `may`, and restarts. The third are those of `auto_tolerated`.
    """
    events: list[Event] = []
    excused: list[Event] = []
    ends = [*(label.get("end_step") or []), *[None] * len(label["labels"])]
    for (onset, kind, _), end in zip(label["labels"], ends, strict=False):
        if onset is None:
            continue
        event = _make_event(steps, onset, end, kind, open_end=len(steps))
        if kind == "restart":
            excused.append(event)
        else:
            events.append(event)
    for onset, kind, _, end, _ in label.get("may", []):
        excused.append(_make_event(steps, onset, end, kind, open_end=0))
    tolerated = []
    for step, kind, *_ in label.get("auto_tolerated", []):
        row = _find_row(steps, step)
        tolerated.append(Event(row, row + LATE, kind))
    return events, excused, tolerated


def _make_event(
    steps: Sequence[int], onset: int, end: int | None, kind: str, *, open_end: int
) -> Event:
    """Return the rows of an event.

    Args:
        open_end: last row of an event without an end.
    """
    first = _find_row(steps, onset)
    last = open_end
    if end is not None:
        last = _find_row(steps, end)
    return Event(first, max(last, first + LATE), kind)


def _find_row(steps: Sequence[int], step: int) -> int:
    """Return the first row whose step is not before `step`."""
    if all(a <= b for a, b in itertools.pairwise(steps)):
        return bisect_left(steps, step)
    for row, known in enumerate(steps):
        if known >= step:
            return row
    return len(steps)


def _is_inside(row: int, *groups: Iterable[Event]) -> bool:
    return any(event.first - EARLY <= row <= event.last for events in groups for event in events)


def _count_merged(rows: Iterable[int]) -> int:
    """Return the number of alarms; those within `MERGE` rows of one another count once."""
    ordered = sorted(rows)
    return sum(1 for at, row in enumerate(ordered) if at == 0 or row - ordered[at - 1] > MERGE)
