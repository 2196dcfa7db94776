"""What the screen needs of a reader. Readers are `RunReader`, `RecordedReader` and fakes of tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from guardrail.core.records.commands import Command
from guardrail.tui.model.view import Snapshot


class Reader(Protocol):
    """Reads a run and hands commands in. No method blocks; each result comes as a new snapshot."""

    def start(self, notify: Callable[[], None]) -> None:
        """Begin to read; `notify` is called, on any thread, whenever `latest` is a new snapshot."""

    def latest(self) -> Snapshot: ...

    def choose_signals(self, signals: tuple[str, ...], axis: str) -> None:
        """Keep these signals along this axis; they come in `Snapshot.series`."""

    def request_rows(self, ranges: Sequence[tuple[float, float]]) -> None:
        """Read the single rows of these ranges of steps; they come in `Series.details`."""

    def send(self, command: Command) -> None:
        """Hand a command in; a failure comes in `Snapshot.unsent`."""

    def preview(self, command: Command) -> None:
        """Work out what a command would do; the result comes in `Snapshot.previews`."""

    def write_note(self, text: str) -> None:
        """Write a note into the journal; a failure comes in `Snapshot.problem`."""

    def close(self) -> None: ...
