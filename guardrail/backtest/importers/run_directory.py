"""guardrail's own run directories: every row that was tried, rejected ones included, in order."""

from __future__ import annotations

from array import array

from guardrail.backtest.importers.names import KNOWN
from guardrail.backtest.importers.recorded_log import Column, Log, whole
from guardrail.core.errors import DataError
from guardrail.core.records import EMBED_GRAD_NORM, EMBED_SHARE, GRAD_NORM, LOSS, METRIC_COLUMNS
from guardrail.rundir.run_directory import MetricsView, RunDirectory

# Measured at every step; a NaN of theirs is a NaN.
ALWAYS = (LOSS, GRAD_NORM, EMBED_GRAD_NORM, EMBED_SHARE)


def signals(view: MetricsView) -> list[str]:
    """The signals that the run watched: a column of NaN alone is one that it could not measure."""
    import numpy as np

    watched = [
        name
        for name in view.columns
        if name in ALWAYS or name in KNOWN or name not in METRIC_COLUMNS
    ]
    return [name for name in watched if name in ALWAYS or not np.isnan(view.column(name)).all()]


def read(run: RunDirectory, shown: str) -> Log:
    """DataError while there are no rows."""
    view = run.metrics()
    if not len(view):
        raise DataError(f"{shown}: no step has been recorded yet")
    log = Log(path=shown, format="guardrail run", folder=run.path)
    log.steps = array("q", (whole(step) or 0 for step in view.column("step").tolist()))
    for name in signals(view):
        column = Column()
        column.values = array("d", view.column(name).tolist())
        column.present = bytearray(b"\1") * len(view)
        log.columns[name] = column
    log.names = {name: name for name in log.columns}
    return log
