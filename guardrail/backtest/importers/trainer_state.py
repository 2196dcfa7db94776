"""trainer_state.json of the Hugging Face Trainer: `log_history`, with evaluations between the
training records.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from guardrail.backtest.importers.jsonlines import flat, from_records
from guardrail.backtest.importers.recorded_log import Log
from guardrail.core.errors import DataError

_HISTORY = re.compile(r'"log_history"\s*:\s*\[')
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_SPACE = re.compile(r"[\s,]*")


def read(path: Path, shown: str, columns: Mapping[str, str]) -> list[Log]:
    """Reads entry by entry, so that a file that was cut off gives what it holds. DataError if that
    is nothing.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    begin = _HISTORY.search(text)
    if begin is None:
        raise DataError(f"{shown}: JSON without a log_history")
    return [from_records(_entries(text, begin.end()), shown, "trainer_state", columns)]


def _entries(text: str, at: int) -> Iterator[dict[str, Any] | None]:
    decoder = json.JSONDecoder()
    while True:
        space = _SPACE.match(text, at)
        at = space.end() if space else at
        if text[at : at + 1] == "]":
            return
        try:
            entry, at = decoder.raw_decode(text, at)
            record = flat(entry) if isinstance(entry, dict) else None
        except (ValueError, RecursionError):
            yield None
            return
        yield record


def newest(paths: list[Path]) -> list[Path]:
    """Without those that a later checkpoint of the same run tells again: each holds the history
    from the beginning.
    """
    best: dict[Path, tuple[int, Path]] = {}
    others = []
    for path in paths:
        match = _CHECKPOINT.fullmatch(path.parent.name)
        if match is None:
            others.append(path)
        elif path.parent.parent not in best or best[path.parent.parent][0] < int(match[1]):
            best[path.parent.parent] = int(match[1]), path
    whole = {path.parent for path in others}
    return others + [path for folder, (_, path) in best.items() if folder not in whole]
