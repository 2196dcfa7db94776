"""The interface of a tracker: a program outside guardrail that shows a run, such as TensorBoard.

A tracker is one class in one file, listed in `registry.TRACKERS`. `sink.py` reads the run
directory, sorts out the timelines, and calls the tracker. Both run in the supervisor, so a tracker
that fails or hangs never delays a training step.

    what comes           when
    NewConfig            first, and after each change of the configuration
    Event                one line of the journal, in order
    Row                  one row of the metrics, unless a rollback has discarded its step already
    Purge                steps that were written are discarded: by a rollback or a restart
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from guardrail.core.events.event import Event
from guardrail.core.records.record import Record
from guardrail.rundir.run_directory import RunDirectory


class Purge(NamedTuple):
    """All points from `step` on are void. The rows that replace them follow."""

    step: int


class NewConfig(NamedTuple):
    """The configuration as TOML text, without secrets."""

    toml: str


class Row(NamedTuple):
    """One row of the metrics, by the name of its column. NaN: not measured at this step."""

    values: dict[str, float]


Entry = Purge | NewConfig | Event | Row


class Position(Record, frozen=True, kw_only=True):
    """position.json in the folder of a tracker: what it has written of the run."""

    rows: int = 0  # of metrics.bin
    seq: int = 0  # of the last journal line
    timeline: int = 0
    config: str = ""  # digest of the configuration


class Tracker(abc.ABC):
    """One program that a run is reported to.

    Args:
        run: the run directory. A tracker may read it, and writes nothing there but in `folder`.
    """

    name: ClassVar[str]
    """One word: its folder in the run directory.

    A section of the configuration with this name needs a field of `core.config.GuardConfig` too.
    """

    output: ClassVar[str]
    """What it writes, in the plural, for messages: "TensorBoard files"."""

    package: ClassVar[str] = ""
    """The optional package that it needs (`core.packages`). Without it the run goes on untracked."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run

    @classmethod
    def is_enabled(cls, config: Mapping[str, Any]) -> bool:
        """Return whether a run with this configuration uses the tracker.

        By default it does, unless the section of its name says `enabled = false`.
        """
        section = config.get(cls.name, {})
        return not isinstance(section, dict) or bool(section.get("enabled", True))

    @property
    def folder(self) -> Path:
        """Return the folder for `position.json`, and for files of the tracker. The sink makes it."""
        return self.run.path / self.name

    @abc.abstractmethod
    def open(self, position: Position) -> None:
        """Prepare for the first `write` of this process.

        Args:
            position: what earlier processes wrote. A new run, or a lost position, begins at 0.

        Raises:
            OSError: it is called again at the next look at the run directory.
        """

    @abc.abstractmethod
    def write(self, entries: Sequence[Entry]) -> None:
        """Write all entries, or none.

        Each look at the run directory calls it at least once, so `entries` may be empty. The first
        entries of a process begin with a `Purge` that removes what an earlier process wrote after
        its last saved position.

        Raises:
            OSError: the entries come again at the next look, with the new ones after them.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Free what is open. The run has ended, or the supervisor stops."""
