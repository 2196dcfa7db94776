"""trainer_state.json of the Hugging Face Trainer: `log_history`, with evaluations between the
training records.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from guardrail.backtest.importers.base import Importer, Scope
from guardrail.backtest.importers.jsonlines import flatten, log_from_records
from guardrail.backtest.importers.log_file import LogFile
from guardrail.backtest.importers.recorded_log import Log
from guardrail.core.errors import DataError

FILE_NAME = "trainer_state.json"
_HISTORY = re.compile(r'"log_history"\s*:\s*\[')
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_SPACE = re.compile(r"[\s,]*")


class TrainerStates(Importer):
    name = "trainer_state"
    reads = "`trainer_state.json` of the Hugging Face Trainer"
    recognised_by = "its `log_history`"
    scope = Scope.SEARCH

    def recognises(self, file: LogFile) -> bool:
        return file.is_json and ('"log_history"' in file.text or file.path.name == FILE_NAME)

    def waits(self, file: LogFile) -> bool:
        return file.path.name == FILE_NAME

    def choose(self, paths: Sequence[Path]) -> list[Path]:
        return choose_newest(paths)

    def read(self, path: Path, shown: str, columns: Mapping[str, str]) -> list[Log]:
        """Read entry by entry, so that a file that was cut off gives the entries before the cut."""
        text = path.read_text(encoding="utf-8", errors="replace")
        begin = _HISTORY.search(text)
        if begin is None:
            raise DataError(f"{shown}: JSON without a log_history", kind="no_history")
        return [log_from_records(_read_entries(text, begin.end()), shown, "trainer_state", columns)]


def _read_entries(text: str, at: int) -> Iterator[dict[str, Any] | None]:
    """Give the entries of the list that begins at `at`; None for one that cannot be read."""
    decoder = json.JSONDecoder()
    while True:
        space = _SPACE.match(text, at)
        assert space is not None  # the pattern matches the empty string too
        at = space.end()
        if text[at : at + 1] == "]":
            return
        try:
            entry, at = decoder.raw_decode(text, at)
            record = None
            if isinstance(entry, dict):
                record = flatten(entry)
        except (ValueError, RecursionError):
            yield None
            return
        yield record


def choose_newest(paths: Sequence[Path]) -> list[Path]:
    """Return the files without those of older checkpoints.

    Each checkpoint repeats the history from its beginning. So only the newest of a folder counts,
    and none where the folder itself holds the file.
    """
    newest: dict[Path, tuple[int, Path]] = {}  # folder of checkpoints -> (step, file)
    others = []
    for path in paths:
        match = _CHECKPOINT.fullmatch(path.parent.name)
        if match is None:
            others.append(path)
            continue
        folder, step = path.parent.parent, int(match[1])
        if folder not in newest or newest[folder][0] < step:
            newest[folder] = step, path
    complete = {path.parent for path in others}
    return others + [path for folder, (_, path) in newest.items() if folder not in complete]
