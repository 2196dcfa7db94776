"""TensorBoard: curves, hparams and texts as event files, without torch or tensorflow.

tensorboard/            the curves and hparams; a purge is a SessionLog START at its step, as a
                        restarted writer makes it
tensorboard/journal/    the texts, see `tensorboard_texts`
"""

from __future__ import annotations

import math
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from guardrail.core.events.run_state import Ended
from guardrail.core.records.signals import COLUMNS, METRIC_COLUMNS
from guardrail.core.records.status import Phase
from guardrail.core.sections import TensorboardSection
from guardrail.rundir.run_directory import RunDirectory
from guardrail.trackers import tfevents
from guardrail.trackers.base import Entry, NewConfig, Position, Purge, Row, Tracker
from guardrail.trackers.tensorboard_texts import JournalTexts

JOURNAL = "journal"  # the subfolder of the texts; TensorBoard shows it as a run of that name

# Tag -> column, of rows whose update was applied. A step whose first batch was rejected has one
# point in these curves; the rejected values have their own tags.
_APPLIED = {column.curve: column.name for column in COLUMNS if column.curve}
_REJECTED = {column.rejected_curve: column.name for column in COLUMNS if column.rejected_curve}
_SHOWS_NAN = frozenset(
    tag for column in COLUMNS if column.shows_nan for tag in (column.curve, column.rejected_curve)
)
_HPARAM_METRICS = ("eval/loss", "train/loss")


class TensorBoard(Tracker):
    """Writes one run's event files."""

    name = "tensorboard"
    output = "TensorBoard files"
    package = "tensorboard"

    def __init__(self, run: RunDirectory) -> None:
        super().__init__(run)
        self._file = tfevents.EventFile(self.folder)
        self._texts = JournalTexts(self.folder / JOURNAL, run)

    @classmethod
    def is_enabled(cls, config: Mapping[str, Any]) -> bool:
        """Return `tensorboard.enabled`."""
        return msgspec.convert(config.get(cls.name, {}), TensorboardSection).enabled

    def open(self, position: Position) -> None:
        self._texts.open(position.seq)

    def write(self, entries: Sequence[Entry]) -> None:
        self._texts.write(entries)
        data = self._encode(entries)
        if data:
            self._file.append(data)

    def close(self) -> None:
        self._file.close()
        self._texts.close()

    def _encode(self, entries: Sequence[Entry]) -> bytes:
        """Return the entries of the curves as records."""
        records: list[bytes] = []
        last_step = -1
        for entry in entries:
            match entry:
                case Purge(step):
                    records.append(tfevents.encode_restart(step))
                case NewConfig(toml):
                    records += self._encode_config(toml)
                case Row(values):
                    records.append(_encode_row(values, last_step=last_step))
                    last_step = int(values["step"])
                case Ended(phase=phase, time=at):
                    is_good = phase in (Phase.FINISHED, Phase.STOPPED)
                    records.append(tfevents.encode_hparams_end(is_good=is_good, at=at))
        return b"".join(records)

    def _encode_config(self, toml: str) -> list[bytes]:
        """Return the configuration as hparams; nothing if it is not TOML."""
        try:
            values = dict(_flatten(tomllib.loads(toml)))
        except tomllib.TOMLDecodeError:
            return []
        return [
            tfevents.encode_hparams(
                values, name=self.run.name, at=time.time(), metrics=_HPARAM_METRICS
            )
        ]


def _encode_row(row: Mapping[str, float], *, last_step: int) -> bytes:
    """Return the points of one row.

    Args:
        last_step: of the row before it.
    """
    step = int(row["step"])
    is_applied = row.get("verdict", 0.0) == 0.0
    values = _applied_values(row) if is_applied else _pick(row, _REJECTED)
    values = {
        tag: value for tag, value in values.items() if tag in _SHOWS_NAN or not math.isnan(value)
    }
    if not math.isnan(row.get("eval_loss", math.nan)):
        values["eval/loss"] = row["eval_loss"]
    if not is_applied or step != last_step:
        # Readers keep one value per step. If the step was tried several times, show a rejection.
        values["guard/verdict"] = row.get("verdict", 0.0)
    values["timeline"] = row["timeline"]
    return tfevents.encode_scalars(values, step=step, at=row.get("time", math.nan))


def _applied_values(row: Mapping[str, float]) -> dict[str, float]:
    values = _pick(row, _APPLIED)
    step_time = row.get("step_time", 0.0)
    if step_time > 0:
        values["train/tokens_per_second"] = row.get("tokens", math.nan) / step_time
        values["guard/time_share"] = row.get("guard_time", math.nan) / step_time
    for name, value in row.items():
        if name not in METRIC_COLUMNS:  # further signals of the run
            values[f"train/{name}"] = value
    return values


def _pick(row: Mapping[str, float], columns: Mapping[str, str]) -> dict[str, float]:
    return {tag: row[column] for tag, column in columns.items() if column in row}


def _flatten(
    tree: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, bool | int | float | str]]:
    """Give "section.key" and value of each setting; a list as text."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, (bool, int, float, str)):
            yield f"{prefix}{key}", value
        else:
            yield f"{prefix}{key}", str(value)
