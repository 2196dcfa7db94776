"""A tracker in one file: a run as JSON lines, in RUN_DIRECTORY/json_lines/run.jsonl.

To use it, add `JsonLines` to `TRACKERS` in guardrail/trackers/registry.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from guardrail.core.events.event import Event
from guardrail.core.files import write_all
from guardrail.rundir.run_directory import RunDirectory
from guardrail.trackers.base import Entry, NewConfig, Position, Purge, Row, Tracker


class JsonLines(Tracker):
    """One line per entry: {"purge": 20}, {"config": ...}, {"event": ...} or {"row": ...}."""

    name = "json_lines"
    output = "JSON lines"

    def __init__(self, run: RunDirectory) -> None:
        super().__init__(run)
        self.path = self.folder / "run.jsonl"

    def open(self, position: Position) -> None:
        """Nothing to prepare: lines are appended."""

    def write(self, entries: Sequence[Entry]) -> None:
        if not entries:
            return
        with self.path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                write_all(file.fileno(), "".join(map(encode_line, entries)).encode())
            except OSError:
                file.truncate(size)
                raise

    def close(self) -> None:
        """Nothing is open between two writes."""


def encode_line(entry: Entry) -> str:
    match entry:
        case Purge(step):
            line: dict[str, Any] = {"purge": step}
        case NewConfig(toml):
            line = {"config": toml}
        case Row(values):
            line = {"row": values}
        case Event():
            line = {"event": entry.kind, "step": entry.step, "message": entry.message}
    return json.dumps(line) + "\n"


def read_rows(path: Path) -> list[dict[str, float]]:
    """Return the rows that no purge has voided, as a reader of the file would."""
    rows: list[dict[str, float]] = []
    for text in path.read_text().splitlines():
        line = json.loads(text)
        if "purge" in line:
            rows = [row for row in rows if row["step"] < line["purge"]]
        elif "row" in line:
            rows.append(line["row"])
    return rows
