"""The numbers and weights of a replay, compared with those of the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from guardrail.core.records.record import Record
from guardrail.core.records.signals import METRIC_COLUMNS
from guardrail.decide.run_history import RunHistory
from guardrail.decide.timelines import TimelineIndex
from guardrail.operate.replay_plan import ReplayPlan, manifest_of
from guardrail.rundir.checkpoint_folders import checkpoint_dirs
from guardrail.rundir.metrics import MetricsView
from guardrail.rundir.run_directory import RunDirectory
from guardrail.rundir.verification import fingerprint

if TYPE_CHECKING:
    import numpy as np

# Columns about when and how fast, which differ in each run. The guard of a replay is off, so it has
# no baselines and no thresholds.
INCIDENTAL = frozenset(
    "timeline time step_time step_time_max slowest_rank guard_time verdict update_norm".split()
    + [name for name in METRIC_COLUMNS if name.endswith(("_baseline", "_threshold"))]
)


class Difference(Record, frozen=True, kw_only=True):
    """A number that is not the same."""

    step: int
    column: str
    was: float
    now: float

    def sentence(self) -> str:
        """Return the difference in words."""
        return f"{self.column} of step {self.step:,} was {self.was!r} and is {self.now!r}"


class Comparison:
    """Compares the rows of a replay with those of the run as they come; each is read once.

    Args:
        run: whose rows are expected.
        scratch: the run directory of the replay.
        plan: the steps of the replay.

    Attributes:
        columns: that both runs have and that are compared.
        steps: compared so far.
        first: the first difference; None: all are the same so far.
    """

    def __init__(self, run: RunDirectory, scratch: RunDirectory, plan: ReplayPlan) -> None:
        self._scratch, self._plan = scratch, plan
        view = run.metrics()
        self.columns = tuple(name for name in view.columns if name not in (*INCIDENTAL, "step"))
        self._steps, self._table = _applied_rows(view, view.current(), self.columns, plan)
        self._begin()

    def _begin(self) -> None:
        import numpy as np

        self._read = 0  # rows of the replay that have been compared
        self._timelines = TimelineIndex()
        self._met = np.zeros(len(self._steps), dtype=bool)
        self.steps = 0
        self.first: Difference | None = None

    def compare_new_rows(self) -> None:
        """Compare the rows that have come since. A step that only one run has does not count yet."""
        view = self._scratch.metrics()
        # The row before shows whether the first new one begins a timeline.
        before = max(0, self._read - 1)
        rows = MetricsView(view.columns, view.array[before:], lambda: self._timelines)
        steps, numbers = rows.column("step"), rows.column("timeline")
        self._timelines.add_rows(steps, numbers, from_start=self._read == 0)
        current = self._timelines.current(steps, numbers)
        current[: self._read - before] = False
        self._compare(rows, current)
        self._read = len(view)

    def finish(self) -> None:
        """Compare all rows again: only at the end the journal says which timelines are abandoned."""
        self._begin()
        view = self._scratch.metrics()
        self._compare(view, view.current())
        self._read = len(view)

    def _compare(self, view: MetricsView, current: np.ndarray) -> None:
        import numpy as np

        steps, table = _applied_rows(view, current, self.columns, self._plan)
        at = np.searchsorted(self._steps, steps)
        known = at < len(self._steps)
        known[known] = self._steps[at[known]] == steps[known]
        at, table = at[known], table[known]
        self.steps += int(np.count_nonzero(~self._met[at]))
        self._met[at] = True
        was = self._table[at]
        differ = (was != table) & ~(np.isnan(was) & np.isnan(table))
        rows = np.flatnonzero(differ.any(axis=1))
        if len(rows) and self.first is None:
            row = int(rows[0])
            column = int(np.flatnonzero(differ[row])[0])
            self.first = Difference(
                step=int(self._steps[at[row]]),
                column=self.columns[column],
                was=float(was[row, column]),
                now=float(table[row, column]),
            )

    @property
    def missing(self) -> int:
        """Steps of the plan that one of both runs has no row of."""
        return self._plan.to_step - self._plan.from_step - self.steps


def _applied_rows(
    view: MetricsView, current: np.ndarray, columns: Sequence[str], plan: ReplayPlan
) -> tuple[np.ndarray, np.ndarray]:
    """Return the applied steps of the present timeline that are in the plan.

    Of several rows of a step the last one counts.

    Returns:
        Steps, ascending, and their numbers of shape [steps, columns].
    """
    import numpy as np

    all_steps: np.ndarray = np.asarray(view.column("step"))
    here = current & (view.column("verdict") == 0)
    here &= (all_steps > plan.from_step) & (all_steps <= plan.to_step)
    rows = np.flatnonzero(here)
    steps, from_the_end = np.unique(all_steps[rows][::-1].astype(np.int64), return_index=True)
    rows = rows[len(rows) - 1 - from_the_end]
    if not columns:
        return steps, np.empty((len(rows), 0))
    table = [np.asarray(view.column(name)[rows]) for name in columns]
    return steps, np.stack(table, axis=1)


def compare_weights(
    run: RunDirectory, scratch: RunDirectory, plan: ReplayPlan
) -> tuple[int | None, bool]:
    """Compare the parameters of the newest step of which both runs have a checkpoint.

    Returns:
        The step, None where there is none, and whether the parameters are the same.
    """
    theirs = {}
    for folder in checkpoint_dirs(scratch.checkpoints):
        manifest = manifest_of(folder)
        if manifest is not None:
            theirs[manifest.step] = folder
    history = RunHistory.from_events(run.events())
    for folder in checkpoint_dirs(run.checkpoints):
        manifest = manifest_of(folder)
        if manifest is None or not plan.from_step < manifest.step <= plan.to_step:
            continue
        is_present = history.lives(timeline=manifest.timeline, step=manifest.step)
        if manifest.step in theirs and is_present:
            return manifest.step, fingerprint(folder) == fingerprint(theirs[manifest.step])
    return None, True
