"""Where a run stands, as its directory tells it: the states one can go back to, the rows since,
what is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from guardrail.core.config import load_guard_options
from guardrail.core.errors import ConfigError
from guardrail.core.files import as_int
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records import Event, Mode, Phase, SnapshotInfo, Status, Unresolved
from guardrail.decide.questions import open_question
from guardrail.decide.run_history import Effects, RunHistory
from guardrail.rundir.run_directory import RunDirectory

if TYPE_CHECKING:
    from guardrail.decide.sample_order import SampleCursor

COLUMNS = ("step", "first", "last", "lr", "step_time")


class Row(NamedTuple):
    """An applied step of the present."""

    step: int
    first: int
    last: int
    lr: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run stands.

    Attributes:
        end: of the batch under question while the guard asks, which a rollback by hand leaves out
        as well; else 0.
        question: journal line of the question that is open; 0: none is.
        states: restorable ones of both tiers.
        rows: applied steps of the present, ascending, from the oldest state on.
        ledger: the order with all that is left out; None where the journal does not say the order.
        unresolved: the earliest incident that is not over.
        settings: the guard's, for remedies that hold from the beginning.
    """

    step: int = 0
    cursor: int = 0
    end: int = 0
    question: int = 0
    timeline: int = 0
    mode: Mode = Mode.AUTO
    phase: Phase = Phase.STEP
    states: tuple[SnapshotInfo, ...] = ()
    rows: Sequence[Row] = ()
    past: RunHistory = field(default_factory=RunHistory)
    events: Sequence[Event] = ()
    ledger: SampleCursor | None = None
    unresolved: Unresolved | None = None
    settings: GuardOptions = field(default_factory=GuardOptions)

    @classmethod
    def of(cls, run: RunDirectory, *, status: Status | None = None) -> RunState:
        """Read it from a run directory; `status` replaces what the directory says where somebody
        knows better.
        """
        events = run.events()
        status = status or run.known_status()
        past = RunHistory.of(events)
        settings = _settings_of(run)
        if status is None:
            return cls(past=past, events=events, ledger=_ledger_of(events, past), settings=settings)
        asked = open_question(events) if not status.phase.ended else None
        # Of a long run only the rows behind the oldest state that anybody can go back to are read.
        usable = [info.step for info in status.snapshots if info.state in ("good", "candidate")]
        oldest = min(usable, default=status.step)
        return cls(
            step=status.step,
            cursor=status.cursor,
            end=as_int(asked.data.get("end")) if asked is not None and status.question else 0,
            question=asked.seq if asked is not None else 0,
            timeline=status.timeline,
            mode=status.mode,
            phase=status.phase,
            states=status.snapshots,
            rows=_rows(run, oldest),
            past=past,
            events=events,
            ledger=_ledger_of(events, past),
            unresolved=status.unresolved,
            settings=settings,
        )

    def seconds_since(self, step: int) -> float:
        """What the applied steps after `step` took; NaN where one of them has no row."""
        found = [row.seconds for row in self.rows if step < row.step <= self.step]
        return math.fsum(found) if len(found) == self.step - step else math.nan

    def steps_in(self, seconds: float) -> int:
        """Steps that the run makes in so many seconds, by its last rows; at least 10."""
        recent = [row.seconds for row in self.rows[-20:] if row.seconds > 0]
        return max(10, math.ceil(seconds * len(recent) / math.fsum(recent))) if recent else 10

    def effects(self, step: int, past: RunHistory | None = None) -> Effects:
        """What an update is made with, as things are or as `past` has it: settings by hand and all
        remedies.
        """
        return (past or self.past).effects(step, self.settings)

    def lr_of(self, step: int, past: RunHistory | None = None) -> float:
        """The learning rate of `step`, a step that the rows know or the next one, as things are or
        as `past` has it.
        """
        row = next((row for row in self.rows if row.step == step), None)
        if row is None and self.rows and step > self.rows[-1].step:
            # the next step's is not on record; the schedule moves little in one step
            row = self.rows[-1]
        factor = self.effects(row.step).lr if row is not None else 0.0
        return (
            row.lr / factor * self.effects(step, past).lr
            if row is not None and factor
            else math.nan
        )

    def nothing_left(self, window: tuple[int, int]) -> str:
        """Why a person cannot leave these positions out, as Ledger.nothing_left has it; "" where
        that is unknown.
        """
        return self.ledger.nothing_left(*window) if self.ledger is not None else ""

    def fresh(self, positions: Sequence[int]) -> int:
        """Samples of these positions that are not left out yet."""
        if self.ledger is None:
            return len(positions)
        order, quarantine = self.ledger.order, self.ledger.quarantine
        if isinstance(positions, range):
            ids = order.samples(positions.start, positions.stop)
            held = quarantine.held(positions.start, ids, order)
            return len({sample for sample, out in zip(ids, held, strict=True) if not out})
        samples = ((position, order.sample(position)) for position in positions)
        return len(
            {
                sample
                for position, sample in samples
                if not quarantine.holds(sample, order.epoch(position))
            }
        )


def _settings_of(run: RunDirectory) -> GuardOptions:
    """The guard's settings of a run; the defaults where another version wrote them."""
    try:
        return load_guard_options(run.path / "config.toml", of_run=True)
    except ConfigError:
        return GuardOptions()


def _ledger_of(events: Iterable[Event], past: RunHistory) -> SampleCursor | None:
    """The order that the journal names, with all that the run itself has left out."""
    from guardrail.decide.sample_order import SampleCursor, SampleOrder

    for event in events:
        data = event.data
        samples = data.get("samples")
        if event.kind == "started" and isinstance(samples, int) and samples > 0:
            seed, shuffled = data.get("order_seed", data.get("seed", 0)), data.get("shuffled", True)
            ledger = SampleCursor(
                SampleOrder(samples=samples, seed=int(seed), shuffled=bool(shuffled)), batch_size=1
            )
            for span in past.spans:
                ledger.leave_out(span)
            return ledger
    return None


def _rows(run: RunDirectory, oldest: int) -> list[Row]:
    import numpy as np

    view = run.metrics()
    here = view.current() & (view.column("verdict") == 0) & (view.column("step") >= oldest)
    table = np.stack([view.column(name)[here] for name in COLUMNS], axis=1)
    # A run of another version may lack a column: without step and positions a row says nothing
    # here.
    table = table[np.isfinite(table[:, :3]).all(axis=1)]
    return [
        Row(int(step), int(first), int(last), lr, seconds)
        for step, first, last, lr, seconds in table.tolist()
    ]
