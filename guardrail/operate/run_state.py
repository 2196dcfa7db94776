"""Where a run stands, from its directory: states to restore, the rows since, and what is skipped."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from guardrail.core.config import load_guard_options
from guardrail.core.errors import ConfigError
from guardrail.core.events.event import Event
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.spans import Span
from guardrail.core.records.status import Phase, SnapshotInfo, Status, Unresolved
from guardrail.core.records.verdicts import Mode, Remedy
from guardrail.decide.control_commands.run_facts import Rates
from guardrail.decide.questions import open_question
from guardrail.decide.run_history import RunHistory
from guardrail.decide.step_setting import StepSetting
from guardrail.rundir.run_directory import RunDirectory

if TYPE_CHECKING:
    from guardrail.decide.sample_cursor import SampleCursor

# `next_window` looks this many times further than the batches, past positions in quarantine.
MAX_QUARANTINED = 64
LEAST_STEPS = 10  # `steps_in` returns at least this
COLUMNS = ("step", "first", "last", "lr", "step_time")


class AppliedStep(NamedTuple):
    """A row of an applied step of the present timeline."""

    step: int
    first: int
    last: int
    lr: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run stands; see `RecordedFacts` in guardrail.decide.control_commands.run_facts.

    Attributes:
        end: of the batch under question, which a rollback by command skips as well; else 0.
        question: journal line of the question that is open; 0: none is.
        states: snapshots and checkpoints that can be restored.
        rows: applied steps of the present timeline, ascending, from the oldest state on.
        history: what the journal says.
        order: the sample order with all that is skipped; None where the journal does not say it.
        unresolved: the earliest incident that is not over.
        settings: of the guard, for remedies that hold from the beginning.
    """

    step: int = 0
    cursor: int = 0
    end: int = 0
    question: int = 0
    timeline: int = 0
    mode: Mode = Mode.AUTO
    phase: Phase = Phase.STEP
    states: tuple[SnapshotInfo, ...] = ()
    rows: Sequence[AppliedStep] = ()
    history: RunHistory = field(default_factory=RunHistory)
    events: Sequence[Event] = ()
    order: SampleCursor | None = None
    unresolved: Unresolved | None = None
    settings: GuardOptions = field(default_factory=GuardOptions)

    @classmethod
    def read(cls, run: RunDirectory, *, status: Status | None = None) -> RunState:
        """Return the state of a run directory.

        Args:
            status: replaces that of the directory.
        """
        events = run.events()
        status = status or run.known_status()
        history = RunHistory.from_events(events)
        order = _build_order(events, history)
        settings = _read_options(run)
        if status is None:
            return cls(history=history, events=events, order=order, settings=settings)
        end = question = 0
        asked = open_question(events)
        if asked is not None and not status.phase.ended:
            question = asked.seq
            if status.question:
                end = asked.end or 0
        # A run may be long: only rows after the oldest state that can be restored are read.
        usable = [info.step for info in status.snapshots if info.state in ("good", "candidate")]
        oldest = min(usable, default=status.step)
        return cls(
            step=status.step,
            cursor=status.cursor,
            end=end,
            question=question,
            timeline=status.timeline,
            mode=status.mode,
            phase=status.phase,
            states=status.snapshots,
            rows=_read_rows(run, oldest),
            history=history,
            events=events,
            order=order,
            unresolved=status.unresolved,
            settings=settings,
        )

    def seconds_since(self, step: int) -> float:
        """Return the training time of the steps after `step`; NaN where a row is missing."""
        seconds = [row.seconds for row in self.rows if step < row.step <= self.step]
        if len(seconds) != self.step - step:
            return math.nan
        return math.fsum(seconds)

    def steps_in(self, seconds: float) -> int:
        """Return how many steps the run makes in this time, by its last rows; at least 10."""
        recent = [row.seconds for row in self.rows[-20:] if row.seconds > 0]
        if not recent:
            return LEAST_STEPS
        return max(LEAST_STEPS, math.ceil(seconds * len(recent) / math.fsum(recent)))

    @property
    def is_paused(self) -> bool:
        """Whether training is paused, by a command or for a question."""
        return self.phase is Phase.PAUSED

    @property
    def is_asking(self) -> bool:
        """Whether a question of the guard is open."""
        return self.question > 0 or self.end > 0 or open_question(self.events) is not None

    @property
    def remedies(self) -> Sequence[tuple[Span | int | None, Remedy]]:
        """Remedies of the decisions that stand, each with its decision."""
        return self.history.remedies

    def setting_of(self, factor: str) -> StepSetting:
        """Return what users have set; `factor` is the kind of a remedy, LR or EMBED_ALPHA."""
        return self.history.setting_of(factor)

    def next_rates(self) -> Rates:
        """Return what the next update is made with; NaN where that is not known."""
        return self._rates(self.step + 1, self.history)

    def rates_after(self, step: int, remedies: Sequence[Remedy]) -> Rates:
        """Return what the update after `step` is made with, once `step` was restored.

        A factor that a user set later holds from the restored step on.

        Args:
            remedies: in force then.
        """
        after = RunHistory(
            lr=copy.deepcopy(self.history.lr), alpha=copy.deepcopy(self.history.alpha)
        )
        after.remedies = [(None, remedy) for remedy in remedies]
        after.lr.rewind(step)
        after.alpha.rewind(step)
        return self._rates(step + 1, after)

    def _rates(self, step: int, history: RunHistory) -> Rates:
        effects = history.effects(step, self.settings)
        return Rates(self._scheduled_lr(step) * effects.lr, effects.embed_alpha)

    def _scheduled_lr(self, step: int) -> float:
        """Return the learning rate of the schedule alone; NaN where no row has it."""
        row = next((row for row in self.rows if row.step == step), None)
        if row is None and self.rows and step > self.rows[-1].step:
            # The rate of the next step is not recorded yet. The schedule moves little in one step.
            row = self.rows[-1]
        if row is None:
            return math.nan
        factor = self.history.effects(row.step, self.settings).lr
        if not factor:
            return math.nan
        return row.lr / factor

    def next_window(self, batches: int) -> tuple[int, int] | None:
        """Return the positions [first, last) of the next batches; None: the order is not known."""
        if self.order is None or not self.rows:
            return None
        last = self.rows[-1]
        wanted = batches * max(1, len(self._usable(last.first, last.last)))
        end, missing = self.cursor, wanted
        while missing > 0 and end < self.cursor + MAX_QUARANTINED * wanted:
            end += missing
            missing = wanted - len(self._usable(self.cursor, end))
        first = next(iter(self._usable(self.cursor, end)), self.cursor)
        return first, end

    def _usable(self, first: int, last: int) -> list[int]:
        """Return the positions of [first, last) that are not quarantined."""
        if self.order is None:
            return []
        order = self.order.order
        held = self.order.quarantine.are_held(first, order.samples(first, last), order)
        return [position for position, is_held in enumerate(held, first) if not is_held]

    def nothing_left(self, window: tuple[int, int]) -> str:
        """Return why a user cannot skip these positions; "" where a user can, or it is not known."""
        if self.order is None:
            return ""
        return self.order.why_user_may_not_skip(*window)

    def fresh(self, positions: Sequence[int]) -> int:
        """Return how many samples of these positions are not skipped yet."""
        if self.order is None:
            return len(positions)
        order, quarantine = self.order.order, self.order.quarantine
        fresh = set()
        if isinstance(positions, range):
            samples = order.samples(positions.start, positions.stop)
            held = quarantine.are_held(positions.start, samples, order)
            fresh = {sample for sample, is_held in zip(samples, held, strict=True) if not is_held}
            return len(fresh)
        for position in positions:
            sample = order.sample(position)
            if not quarantine.holds(sample, order.epoch(position)):
                fresh.add(sample)
        return len(fresh)


def _read_options(run: RunDirectory) -> GuardOptions:
    """Return the guard's settings of a run; the defaults where another version wrote them."""
    try:
        return load_guard_options(run.path / "config.toml", of_run=True)
    except ConfigError:
        return GuardOptions()


def _build_order(events: Iterable[Event], history: RunHistory) -> SampleCursor | None:
    """Return the sample order that the journal names, with all that the run itself skips."""
    from guardrail.decide.sample_cursor import SampleCursor
    from guardrail.decide.sample_order import find_sample_order

    order = find_sample_order(events)
    if order is None:
        return None
    cursor = SampleCursor(order, batch_size=1)
    for span in history.spans:
        cursor.skip_span(span)
    return cursor


def _read_rows(run: RunDirectory, oldest: int) -> list[AppliedStep]:
    """Return the applied steps of the present timeline from step `oldest` on."""
    import numpy as np

    view = run.metrics()
    here = view.current() & (view.column("verdict") == 0) & (view.column("step") >= oldest)
    table = np.stack([view.column(name)[here] for name in COLUMNS], axis=1)
    # A run of another version may lack a column. A row without step and positions is of no use.
    table = table[np.isfinite(table[:, :3]).all(axis=1)]
    return [
        AppliedStep(int(step), int(first), int(last), lr, seconds)
        for step, first, last, lr, seconds in table.tolist()
    ]
