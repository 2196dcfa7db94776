"""The present state of a run: status.json, `notified`, and a file for the ranks of each node."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from guardrail.core.events.event import Event
from guardrail.core.events.run_state import Ended
from guardrail.core.files import (
    FOLDER_MODE,
    encode_json,
    overwrite_file,
    read_file,
    replace_file,
)
from guardrail.core.records.status import NodeStatus, RankStatus, Status
from guardrail.rundir.journal import last_turn, outcome_of


def read_status(path: Path) -> Status | None:
    """Return the status; None: there is none, or this version cannot read it."""
    found: Status | None = _read(path, Status)
    return found


def write_status(path: Path, status: Status) -> None:
    """Replace the file without a sync. Raises OSError."""
    replace_file(path, encode_json(status), sync=False)


def write_last_status(path: Path, status: Status) -> None:
    """Replace the file; overwrite it if the disk has no room for a second one. Raises OSError."""
    try:
        write_status(path, status)
    except OSError:
        overwrite_file(path, encode_json(status))


def read_notified(path: Path) -> int | None:
    """Return the number in the file; None: it has none."""
    try:
        return int(read_file(path))
    except (OSError, ValueError):
        return None


def status_of_end(run: str, events: Sequence[Event]) -> Status | None:
    """Return a status made from the last events of a run; None: the run has not ended.

    Args:
        run: its name.
    """
    last = last_turn(events)
    if not isinstance(last, Ended):
        return None
    outcome = outcome_of(last)
    if outcome is None:
        return None
    phase, exit_code = outcome
    return Status(
        run=run,
        phase=phase,
        step=last.step,
        timeline=last.timeline,
        heartbeat=last.time,
        exit_code=exit_code.value,
    )


def read_rank_reports(folder: Path) -> list[RankStatus]:
    """Return the last report of each rank, by rank.

    Files of single ranks are those of older versions.
    """
    found: dict[int, RankStatus] = {}
    for name in _list_files(folder):
        for report in _read_reports(folder / name):
            before = found.get(report.rank)
            if before is None or _age_of(before) < _age_of(report):
                found[report.rank] = report
    return [found[rank] for rank in sorted(found)]


def _age_of(report: RankStatus) -> tuple[int, float]:
    return report.incarnation, report.heartbeat


def _read_reports(path: Path) -> tuple[RankStatus, ...]:
    if path.name.startswith("node-"):
        node: NodeStatus | None = _read(path, NodeStatus)
        return () if node is None else node.ranks
    one: RankStatus | None = _read(path, RankStatus)
    return () if one is None else (one,)


def write_node(folder: Path, status: NodeStatus) -> None:
    """Replace the reports of one node's ranks. Raises OSError."""
    folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
    replace_file(folder / f"node-{status.node}.json", encode_json(status), sync=False)


def write_rank(folder: Path, status: RankStatus) -> None:
    """Write a file for one rank, as older versions did. Raises OSError.

    This version writes it only if the node's local disk fails.
    """
    folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
    replace_file(folder / f"rank-{status.rank:05d}.json", encode_json(status), sync=False)


def remove_rank_reports(folder: Path) -> None:
    """Remove the reports of an earlier start, before the next ranks are started."""
    for name in _list_files(folder):
        with contextlib.suppress(OSError):
            (folder / name).unlink()


def _list_files(folder: Path) -> list[str]:
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return sorted(name for name in names if name.startswith(("node-", "rank-")))


def _read(path: Path, kind: type[Any]) -> Any:
    """Return the record of a JSON file; None: it cannot be read."""
    try:
        fields = msgspec.json.decode(read_file(path))
        if kind is Status:
            fields = _with_present_disk(fields)
        found = msgspec.convert(fields, kind, strict=False)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    # JSON has integers of any length.
    numbers = [value for value in msgspec.structs.astuple(found) if isinstance(value, int)]
    if any(abs(number) >= 2**63 for number in numbers):
        return None
    return found


def _with_present_disk(fields: Any) -> Any:
    """Return the fields of a status, with the present name and word of its field `durability`."""
    if not isinstance(fields, dict) or not isinstance(old := fields.get("durability"), str):
        return fields
    return {"disk": old.replace("degraded", "failing", 1)} | fields
