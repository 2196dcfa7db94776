"""Run directories of guardrail: every row that was tried, also rejected ones, in order."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from pathlib import Path

from guardrail.backtest.importers.base import Importer
from guardrail.backtest.importers.log_file import LogFile
from guardrail.backtest.importers.names import KNOWN
from guardrail.backtest.importers.recorded_log import Column, Log, as_step
from guardrail.core.errors import DataError, RunDirectoryError
from guardrail.core.records.signals import (
    EMBED_GRAD_NORM,
    EMBED_SHARE,
    GRAD_NORM,
    LOSS,
    METRIC_COLUMNS,
)
from guardrail.rundir.metrics import MetricsView
from guardrail.rundir.run_directory import RunDirectory

# Measured at every step, so their NaN is a result.
ALWAYS = (LOSS, GRAD_NORM, EMBED_GRAD_NORM, EMBED_SHARE)


class RunDirectories(Importer):
    name = "run_directory"
    reads = "run directories of guardrail"
    recognised_by = "`metrics.json` and `metrics.bin`"

    def recognises(self, file: LogFile) -> bool:
        return False

    def recognises_folder(self, folder: Path) -> bool:
        return (folder / "metrics.json").is_file() and (folder / "metrics.bin").is_file()

    def read(self, path: Path, shown: str, columns: Mapping[str, str]) -> list[Log]:
        """Its columns have the names of the signals, so `columns` is not needed."""
        try:
            return [read_run(RunDirectory.open(path), shown)]
        except RunDirectoryError as error:
            raise DataError(str(error), kind=error.kind) from error


def watched_signals(view: MetricsView) -> list[str]:
    """Return the signals that the run watched.

    A column that is NaN in all rows is one that the run could not measure.
    """
    import numpy as np

    signals = []
    for name in view.columns:
        if name in ALWAYS:
            signals.append(name)
        elif name in KNOWN or name not in METRIC_COLUMNS:
            if not np.isnan(view.column(name)).all():
                signals.append(name)
    return signals


def read_run(run: RunDirectory, shown: str) -> Log:
    """Return the rows of a run. DataError while there are none."""
    view = run.metrics()
    if not len(view):
        raise DataError(f"{shown}: no step has been recorded yet", kind="no_step")
    log = Log(path=shown, format="guardrail run", folder=run.path)
    log.steps = array("q", (as_step(step) or 0 for step in view.column("step").tolist()))
    for name in watched_signals(view):
        column = Column()
        column.values = array("d", view.column(name).tolist())
        column.present = bytearray(b"\1") * len(view)
        log.columns[name] = column
    log.names = {name: name for name in log.columns}
    return log
