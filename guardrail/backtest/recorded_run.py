"""A recorded log for the screen: its rows, and the journal that the live controller would have
written.

Nothing is written to the disk. The rows are available at once. The verdicts follow while the
controller works: a million rows take it half a minute.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from guardrail.backtest.importers.recorded_log import Log, options_for_log
from guardrail.backtest.rejudge import Rejudge
from guardrail.core.config import check_guard_options
from guardrail.core.errors import DataError, GuardrailError, RunDirectoryError
from guardrail.core.events.decisions import (
    FindingNoted,
    IncidentChanged,
    StepJudged,
    VerdictGiven,
)
from guardrail.core.events.event import Event
from guardrail.core.events.kinds import with_data
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.signals import METRIC_COLUMNS
from guardrail.core.records.verdicts import Action, Mode, Verdict
from guardrail.decide.advised_incidents import advised_words
from guardrail.decide.controller import Controller
from guardrail.rundir.run_directory import RunDirectory

if TYPE_CHECKING:
    import numpy as np

CHUNK = 4096  # rows that are judged per part
_NAMED = 8  # most recorded runs that an error names


class Part(NamedTuple):
    """Some rows, in the order of the log.

    Attributes:
        rows: float64 [n, len(columns)], with the bands of each row if the rows are judged.
        missing: bool [n, len(columns)]: cells that were not logged. They are not NaN.
        events: the journal lines of the controller about these rows.
    """

    rows: np.ndarray
    missing: np.ndarray
    events: list[Event]


class RecordedRun:
    """One log, read once and judged once.

    Args:
        settings: the [guard] section to judge by.

    Attributes:
        name: of the log, as the user named it.
        columns: of the rows, with the names of metrics.bin for the same quantities.
        last_step: the greatest step.
    """

    def __init__(self, log: Log, settings: GuardOptions) -> None:
        self._log, self._settings = log, options_for_log(log, check_guard_options(settings))
        self.name, self.format = log.path, log.format
        signals = [name for name in log.columns if name in METRIC_COLUMNS]
        bands = [f"{name}_{part}" for name in signals for part in ("baseline", "threshold")]
        self._signals = signals
        self._bands = {
            name: 2 + len(signals) + index
            for index, name in enumerate(bands)
            if name in METRIC_COLUMNS
        }
        self.columns: Sequence[str] = ("step", "timeline", *signals, *bands)
        self._timelines = self._read_column("timeline")
        self.last_step = max(log.steps, default=0)

    def __len__(self) -> int:
        return len(self._log)

    def plain_parts(self) -> Iterator[Part]:
        """Give all rows without verdicts."""
        for first in range(0, len(self), 65536):
            rows, missing = self._rows(first, min(len(self), first + 65536))
            yield Part(rows, missing, [])

    def judged_parts(self) -> Iterator[Part]:
        """Give all rows again, with bands and verdicts."""
        part = _Part(self, 0)
        events = _Events()
        for row, bands, verdict in self._verdicts():
            while row >= part.end:
                yield part.finish()
                part = _Part(self, part.end)
            part.set_bands(row, bands)
            part.events += events.make_events(verdict)
        while part.end < len(self):
            yield part.finish()
            part = _Part(self, part.end)
        yield part.finish()

    def _verdicts(self) -> Iterator[tuple[int, dict[str, tuple[float, float]], Verdict]]:
        if self._log.folder is not None:
            met: dict[str, tuple[float, float]] = {}

            def watch(row: int, bands: dict[str, tuple[float, float]]) -> None:
                nonlocal met
                met = bands

            run = RunDirectory.open(self._log.folder)
            for judged in Rejudge(run, self._settings, own=False, watch=watch):
                yield judged.row, met, judged.verdict
            return
        mode = Mode.ADVISE
        if self._settings.mode is Mode.OFF:
            mode = Mode.OFF
        controller = Controller(self._settings, mode=mode)
        for row, obs in self._log.observations():
            bands = controller.bands()
            yield row, bands, controller.observe(obs)

    def _rows(self, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        import numpy as np

        rows = np.full((end - first, len(self.columns)), np.nan)
        missing = np.zeros(rows.shape, dtype=bool)
        rows[:, 0] = self._log.steps[first:end]
        rows[:, 1] = 0.0
        if self._timelines is not None:
            rows[:, 1] = self._timelines[first:end]
        for index, name in enumerate(self._signals, 2):
            column = self._log.columns[name]
            rows[:, index] = column.values[first:end]
            missing[:, index] = np.frombuffer(column.present, dtype=np.uint8)[first:end] == 0
        rows[missing] = np.nan
        return rows, missing

    def _read_column(self, column: str) -> np.ndarray | None:
        if self._log.folder is None:
            return None
        return RunDirectory.open(self._log.folder).metrics().column(column)


class Background:
    """A `RecordedRun` that is judged in a separate process, so that the screen stays responsive.

    It must be made while this process has only one thread. The other process is a fork, so nothing
    is read twice. It ends with its work, or when its reader is gone.
    """

    def __init__(self, viewing: RecordedRun) -> None:
        self._viewing = viewing
        self.name, self.format, self.columns = viewing.name, viewing.format, viewing.columns
        self.last_step = viewing.last_step
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_send_all, args=(viewing, self._pipe, theirs), daemon=True
        )
        with warnings.catch_warnings():
            # Python warns about the threads of any library. Those of numpy hold no lock that the
            # fork needs.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()
        theirs.close()

    def __len__(self) -> int:
        return len(self._viewing)

    def plain_parts(self) -> Iterator[Part]:
        return self._viewing.plain_parts()

    def judged_parts(self) -> Iterator[Part]:
        """Give as `RecordedRun.judged_parts`. Raises DataError with the error of that process."""
        while True:
            try:
                got = self._pipe.recv()
            except EOFError:
                raise DataError("the process that judges the log has died", kind="died") from None
            if got is None:
                return
            if isinstance(got, str):
                raise DataError(got)
            yield Part(*got)

    def close(self) -> None:
        self._process.terminate()
        self._process.join()
        self._pipe.close()


def _send_all(viewing: RecordedRun, ours: Any, pipe: Any) -> None:
    ours.close()  # otherwise this process would not notice that its reader is gone
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        try:
            for part in viewing.judged_parts():
                pipe.send(tuple(part))
            pipe.send(None)
        except BrokenPipeError:
            raise
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            if isinstance(error, GuardrailError):
                message = str(error)
            pipe.send(message)


class _Part:
    """Collects the bands and events of rows [first, end)."""

    def __init__(self, viewing: RecordedRun, first: int) -> None:
        self.first, self.end = first, min(len(viewing), first + CHUNK)
        self._rows, self._missing = viewing._rows(first, self.end)
        self._where = viewing._bands
        self.events: list[Event] = []

    def set_bands(self, row: int, bands: dict[str, tuple[float, float]]) -> None:
        for name, band in bands.items():
            for part, value in zip(("baseline", "threshold"), band, strict=True):
                index = self._where.get(f"{name}_{part}")
                if index is not None:
                    self._rows[row - self.first, index] = value

    def finish(self) -> Part:
        return Part(self._rows, self._missing, self.events)


class _Events:
    """Turns verdicts into journal lines, as the guard writes them in mode `advise`.

    A log has no clock, so their time is 0.
    """

    def __init__(self) -> None:
        self._seq = 0

    def make_events(self, verdict: Verdict) -> Iterator[Event]:
        if verdict.findings:
            would = verdict.would or verdict.action
            line: type[StepJudged] = VerdictGiven
            what = f"{advised_words(would.value)} at step"
            advised: str | None = would.value
            if verdict.action is Action.APPLY and would is Action.APPLY:
                line, what, advised = FindingNoted, "step", None
            reason = verdict.reason or "; ".join(finding.sentence() for finding in verdict.findings)
            yield self._with_number(
                line(
                    step=verdict.step,
                    message=f"{what} {verdict.step}: {reason}",
                    action=verdict.action.value,
                    would=advised,
                    findings=verdict.findings,
                    onset=verdict.onset,
                    incident=verdict.incident,
                    at_step=verdict.step,
                )
            )
        if verdict.incident_state and verdict.incident is not None:
            yield self._with_number(
                IncidentChanged(
                    step=verdict.step,
                    message=f"incident {verdict.incident}: {verdict.incident_state}",
                    number=verdict.incident,
                    state=verdict.incident_state,
                    onset=verdict.onset,
                )
            )

    def _with_number(self, event: Event) -> Event:
        self._seq += 1
        return with_data(msgspec.structs.replace(event, seq=self._seq))


def read_one_log(path: str, columns: dict[str, str]) -> Log:
    """Return the recorded run at `path`.

    Raises:
        DataError: nothing there can be read, or several runs are recorded there.
    """
    from guardrail.backtest.importers.sources import find_sources

    found: list[Log] = []
    for source in find_sources([path]):
        try:
            found += [log for log in source.read(columns) if len(log)]
        except OSError as error:
            reason = error.strerror or error
            raise DataError(f"{source.path}: {reason}", kind="unreadable") from error
        if len(found) > _NAMED:
            break
    if not found:
        raise DataError(f"{path}: no step is recorded there", kind="no_step")
    if len(found) > 1:
        names = ", ".join(log.path for log in found[:_NAMED])
        if len(found) > _NAMED:
            names += " ..."
        raise DataError(
            f"{path}: several runs are recorded there. View one of them.\n  hint: {names}",
            kind="several_runs",
        )
    return found[0]


def is_run_directory(path: str) -> bool:
    """Return whether a path is a run directory of guardrail, which has its own journal."""
    try:
        return Path(path).is_dir() and bool(RunDirectory.open(path))
    except (RunDirectoryError, OSError):
        return False
