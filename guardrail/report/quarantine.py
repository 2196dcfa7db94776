"""Finds which samples a run skips, from its journal and its quarantine file."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

from guardrail.core.errors import RunDirectoryError
from guardrail.core.events.decisions import SamplesTaken, Undone
from guardrail.core.events.event import Event
from guardrail.core.files import read_file
from guardrail.core.records.spans import Span
from guardrail.decide.sample_cursor import SampleCursor
from guardrail.decide.sample_order import SampleOrder, find_sample_order
from guardrail.rundir.run_directory import RunDirectory


def quarantine_lines(run: RunDirectory) -> list[str]:
    """Return all samples that the run skips, as lines `ID` or `ID@EPOCH` for `data.quarantine`.

    These are the samples of the run's own quarantine file, and those at the positions that the
    journal skips.

    Raises:
        RunDirectoryError: the order of the samples is not in the journal, or the file cannot be
            read; a list that is not complete would be worse than none.
    """
    events = run.events()
    spans = list(_list_spans(events))
    order = None
    if spans:
        order = find_sample_order(events)
    if spans and order is None:
        raise RunDirectoryError(
            f"{run.path}: the journal does not say in which order the samples came",
            kind="unknown_order",
        )
    # If only the file skips samples, any order will do: one of a single sample.
    ledger = SampleCursor(order or SampleOrder(samples=1), batch_size=1)
    file = _quarantine_file(run)
    if file is not None:
        try:
            ledger.quarantine.read(read_file(file).decode("utf-8").splitlines(), source=str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise RunDirectoryError(
                f"{file}: data.quarantine of this run cannot be read: {error}", kind="unreadable"
            ) from error
    for span in spans:
        ledger.skip_span(span)
    return list(ledger.quarantine.lines())


def count_skipped(events: list[Event]) -> int:
    """Return how many samples the journal skips; -1: it does not say in which order they came."""
    spans = list(_list_spans(events))
    order = None
    if spans:
        order = find_sample_order(events)
    if not spans or order is None:
        if spans:
            return -1
        return 0
    ledger = SampleCursor(order, batch_size=1)
    return sum(ledger.skip_span(span) for span in spans)


def _list_spans(events: Iterable[Event]) -> Iterator[Span]:
    """Give each span that is still skipped, once. A rollback may carry its span itself, with or
    without a separate line.
    """
    seen: list[Span] = []
    for event in events:
        match event:
            case SamplesTaken(span=Span() as span) if span not in seen:
                seen.append(span)
            case Undone():
                seen = [span for span in seen if span not in event.spans]
    yield from seen


def _quarantine_file(run: RunDirectory) -> Path | None:
    if not os.path.lexists(run.path / "config.toml"):
        return None
    try:
        data = tomllib.loads(run.config_text()).get("data", {})
    # RecursionError: deeply nested brackets. ValueError also: very long numbers.
    except (ValueError, RecursionError) as error:
        raise RunDirectoryError(
            f"{run.path / 'config.toml'}: not valid TOML ({error})", kind="not_toml"
        ) from error
    name = None
    if isinstance(data, dict):
        name = data.get("quarantine")
    if isinstance(name, str) and name:
        return Path(os.path.expanduser(name))
    return None
