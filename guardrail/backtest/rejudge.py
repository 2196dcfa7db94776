"""A run directory's own rows through the controller once more: the verdicts of a live run, row by
row.

What the run did decides how it goes on: detectors go back to the state of the snapshot that the
journal names, an update that was left out teaches nothing, a restart begins with what the journal
had told by then. So under the run's own settings every verdict is the one that fell live; under
others the question is what they would have said about the same rows.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from guardrail.backtest.importers.run_directory import watched_signals
from guardrail.core.events.decisions import Diagnosed, RolledBack, Skipped, StepJudged, Undone
from guardrail.core.events.event import SENSELESS, Event
from guardrail.core.events.run_state import CommandAnswered, Note, Restarted
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records import (
    GRAD_NORM,
    LOSS,
    LOSS_SCALE,
    Action,
    FindingKind,
    Mode,
    Observation,
    Span,
    Verdict,
)
from guardrail.decide.control_commands.base import ReplayTarget
from guardrail.decide.control_commands.registry import replay_line
from guardrail.decide.controller import Controller
from guardrail.decide.diagnoses import diagnosis_of
from guardrail.decide.run_history import RunHistory
from guardrail.rundir.run_directory import RunDirectory

ACTIONS = list(Action)
CHUNK = 4096  # rows read at once
# Sees (row, bands that the row meets): signal -> (baseline, threshold).
Watch = Callable[[int, dict[str, tuple[float, float]]], None]
HEAD = ("step", "timeline", "time", "first", "last", "tokens", "verdict")


class JudgedRow(NamedTuple):
    """One row.

    Attributes:
        verdict: of the controller, now.
        done: what the run did, by its metrics.
        said: what its journal says of the row, None where it says nothing.
    """

    row: int
    verdict: Verdict
    done: Action
    said: StepJudged | None

    @property
    def agrees(self) -> bool:
        """Whether the verdict is the one that fell live; a question that a person answered is told
        by the journal.

        How much data the run had left out by then is not judged here: a verdict that went beyond
        the share that the guard may leave out counts as it was before.
        """
        if self.said is None:
            return self.verdict.action is self.done
        decided = self.verdict.would if self.verdict.action is Action.PAUSE else self.verdict.action
        if self.said.beyond:
            return decided is Action(self.said.beyond)
        return self.verdict.action is Action(self.said.action)


class State(NamedTuple):
    """What travelled with a snapshot and matters here."""

    controller: dict[str, Any]
    applied_end: int


class Rejudge:
    """Iterate over it once.

    Args:
        settings: the [guard] section.
        own: these are the run's own settings: follow the mode that it was in. Otherwise nothing is
        acted on.
        watch: called before each row is judged.

    Attributes:
        lost: one sentence for each place from which on verdicts may differ, because a row or a line
        is missing.
    """

    def __init__(
        self, run: RunDirectory, settings: GuardOptions, *, own: bool, watch: Watch | None = None
    ) -> None:
        self._settings, self._own, self._watch = settings, own, watch
        self._events = run.events()
        self._view = run.metrics()
        self._names = watched_signals(self._view)
        self._controller = Controller(settings, mode=None if own else Mode.ADVISE)
        self.lost: list[str] = []
        self._timeline = 0
        self._begins: dict[int, int] = {}  # timeline -> index of the event that began it
        # indices of commands to the controller that are still to come
        self._changes: deque[int] = deque()
        # (timeline, step) -> what the journal says of its tries
        self._told: dict[tuple[int, int], deque[StepJudged | Note]] = {}
        self._causes: dict[
            tuple[int, int], deque[Diagnosed]
        ] = {}  # as above: what replays have shown
        # Batches that were rejected, as positions -> from where on the next batch begins.
        self._left_out: dict[tuple[int, int], int] = {}
        self._wanted: set[int] = set()  # steps to whose state the run went back
        self._read_journal()
        self._saved = {0: State(self._controller.state_dict(), 0)}
        # As in the ledger: rejected batches behind the last applied one are the streak.
        self._applied_end = 0
        self._rejected: list[tuple[int, int]] = []

    def _read_journal(self) -> None:
        for index, event in enumerate(self._events):
            try:
                self._read_event(index, event)
            except SENSELESS:
                self.lost.append(f"line {event.seq} of the journal makes no sense")

    def _read_event(self, index: int, event: Event) -> None:
        match event:
            case (
                RolledBack(new_timeline=int() as timeline, to_step=int() as to_step)
                | Undone(new_timeline=int() as timeline, to_step=int() as to_step)
            ):
                self._begins[timeline] = index
                self._wanted.add(to_step)
            case RolledBack() | Undone():
                raise ValueError(f"line {event.seq}: it goes back to no state")
            case Restarted():
                self._begins[event.timeline] = index
                self._wanted.add(event.step)
            case StepJudged(at_step=int() as at):
                self._told.setdefault((event.timeline, at), deque()).append(event)
            case Diagnosed(at_step=int() as at):
                self._causes.setdefault((event.timeline, at), deque()).append(event)
            case Note(overflow=True):
                self._told.setdefault((event.timeline, event.step + 1), deque()).append(event)
            case CommandAnswered():
                if _ControllerChange.read(event) is not None:
                    self._changes.append(index)
            case Skipped(span=Span(origin="rejected") as span):
                next_first = span.first if span.positions else span.last
                self._left_out[span.first, span.last] = next_first

    def __iter__(self) -> Iterator[JudgedRow]:
        import numpy as np

        view = self._view
        for begin in range(0, len(view), CHUNK):
            rows = slice(begin, begin + CHUNK)
            table = np.stack(
                [view.column(name)[rows] for name in (*HEAD, *self._names)], axis=1
            ).tolist()
            for row, cells in enumerate(table, begin):
                if all(math.isfinite(cell) for cell in cells[:2]) and cells[0] >= 1:
                    yield self._judge(row, cells)

    def _judge(self, row: int, cells: list[float]) -> JudgedRow:
        step, timeline, first, last = int(cells[0]), int(cells[1]), int(cells[3]), int(cells[4])
        while self._timeline < timeline:
            self._timeline += 1
            self._begin(self._timeline)
        self._obey(step=step, time=cells[2])
        if self._watch is not None:
            self._watch(row, self._controller.bands())
        done = ACTIONS[int(cells[6])]
        said = self._said(timeline, step, done)
        told = said.findings if said is not None else ()
        ranks = {
            f.signal: f.ranks
            for f in told
            if f.kind in (FindingKind.NONFINITE, FindingKind.SCALE_COLLAPSE)
        }
        measured = dict(zip(self._names, cells[len(HEAD) :], strict=True))
        obs = Observation(
            step=step,
            first=first,
            last=last,
            signals=measured,
            nonfinite_loss=ranks.get(LOSS, ()),
            nonfinite_grad=ranks.get(GRAD_NORM) or ranks.get(LOSS_SCALE, ()),
            tokens=int(cells[5]),
            streak=self._streak(first),
            overflow=_overflow(measured),
        )
        causes = self._causes.get((timeline, step)) if self._own else None
        return JudgedRow(row, self._observe(obs, done, causes), done, said)

    def _observe(self, obs: Observation, done: Action, causes: deque[Diagnosed] | None) -> Verdict:
        """The verdict; afterwards the controller knows what the run did, whether or not that was
        the verdict.
        """
        controller, applied = self._controller, done is Action.APPLY
        before = None if applied else controller.state_dict()
        verdict = controller.observe(obs)
        if causes and controller.needs_cause_test(verdict):
            verdict = controller.apply_diagnosis(obs, verdict, diagnosis_of(causes.popleft()))
        if before is not None and verdict.accepted:
            controller.load_state_dict(before)
        elif applied and self._own and verdict.action is not Action.APPLY:
            controller.overrule(obs)  # a person had it applied
        if applied:
            self._applied_end = obs.last
            if obs.step in self._wanted:
                self._saved[obs.step] = State(controller.state_dict(), self._applied_end)
        elif done in (Action.SKIP, Action.PAUSE) and (obs.first, obs.last) in self._left_out:
            insort(self._rejected, (obs.first, self._left_out[obs.first, obs.last]))
        return verdict

    def _streak(self, first: int) -> int:
        begin = bisect_left(self._rejected, (self._applied_end, 0))
        return sum(end <= first for _, end in self._rejected[begin:])

    def _said(self, timeline: int, step: int, done: Action) -> StepJudged | None:
        """The journal's line on this try: tries of one step are told in order, and only the last
        can be applied.
        """
        told = self._told.get((timeline, step))
        if not told:
            return None
        first = told[0]
        overflow = done is Action.FP16_OVERFLOW
        if isinstance(first, Note) or first.action == Action.FP16_OVERFLOW:
            # Each overflow is noted; in `advise`, that of a collapse comes after its verdict.
            said = None
            if overflow and isinstance(first, StepJudged):
                told.popleft()
                said = first
            if overflow and told and isinstance(told[0], Note):
                told.popleft()
            return said
        if overflow or first.action not in (*Action,):
            return None
        if first.action != Action.PAUSE:
            if (first.action == Action.APPLY) is not (done is Action.APPLY):
                return None
        told.popleft()
        return first

    # -- what happened between two rows ------------------------------------------------------------

    def _begin(self, timeline: int) -> None:
        index = self._begins.get(timeline)
        if index is None:
            self.lost.append(f"the journal does not say how timeline {timeline} began")
            return
        while self._changes and self._changes[0] < index:
            self._change(self._changes.popleft())
        event = self._events[index]
        step = event.step
        if isinstance(event, RolledBack | Undone) and event.to_step is not None:
            step = event.to_step
        if isinstance(event, Restarted):
            self._restart(index)
            if not event.checkpoint:
                self._saved[0] = State(self._controller.state_dict(), 0)
        saved = self._saved.get(step)
        if saved is None:
            self.lost.append(f"the row of step {step}, to which the run went back, is missing")
            return
        self._controller.load_state_dict(saved.controller)
        self._applied_end = saved.applied_end
        match event:
            case Restarted():
                if self._own:
                    self._controller.memory.incidents.rewind(step, same_steps=True)
                if self._own and event.checkpoint:
                    self._controller.note_resume()
            case RolledBack(span=Span(origin="rollback") as span):
                self._go_back(index, step, [span])
            case Undone():
                self._go_back(index, step, event.spans)
            case _:
                self._go_back(index, step, [])

    def _go_back(self, index: int, step: int, gone: Sequence[Span]) -> None:
        """Forget the rejections in `gone`; the line of that index restored the state of `step`."""
        self._rejected = [one for one in self._rejected if not _is_within(one, gone)]
        if self._own:
            past = RunHistory.of(self._events[: index + 1])
            self._controller.memory.go_back(step, past.rollbacks)
            self._controller.memory.allowlist = [*self._settings.allowlist, *past.pardons]

    def _restart(self, index: int) -> None:
        """A new process: what it knows is what the journal had told."""
        if not self._own:
            self._controller = Controller(self._settings, mode=Mode.ADVISE)
            return
        told = self._events[:index]
        self._controller = Controller(self._settings)
        self._controller.rebuild(told)
        mode = RunHistory.of(told).mode
        if mode is not None:
            self._controller.set_mode(mode)

    def _obey(self, *, step: int, time: float) -> None:
        """Commands that took effect before this row: after its step's predecessor, and before its
        time.
        """
        while self._changes:
            event = self._events[self._changes[0]]
            key = (event.timeline, event.step)
            due = key < (self._timeline, step - 1) or (
                key == (self._timeline, step - 1) and event.time <= time
            )
            if not due:
                return
            self._change(self._changes.popleft())

    def _change(self, index: int) -> None:
        event = self._events[index]
        if not self._own:
            return
        change = _ControllerChange.read(event)
        if change is None:
            return
        if change.mode is not None:
            self._controller.set_mode(change.mode)
        if change.batch is not None:
            self._controller.memory.accept(event.step, change.batch)


class _ControllerChange(ReplayTarget):
    """What a command line changes in the controller.

    Attributes:
        mode: that the command has set; None: it sets none.
        batch: that came next when the command accepted an incident; None: it accepts none.
    """

    def __init__(self) -> None:
        self.mode: Mode | None = None
        self.batch: tuple[int, int] | None = None

    @classmethod
    def read(cls, event: Event) -> _ControllerChange | None:
        """Return what a line changes; None: nothing. Raises one of SENSELESS."""
        change = cls()
        replay_line(event, change)
        if change.mode is None and change.batch is None:
            return None
        return change

    def set_mode(self, mode: Mode) -> None:
        self.mode = mode

    def accept_incidents(self, step: int, batch: tuple[int, int]) -> None:
        self.batch = batch


def _is_within(batch: tuple[int, int], spans: Sequence[Span]) -> bool:
    """Return whether a batch [first, last) lies in one of the spans."""
    return any(span.first <= batch[0] and batch[1] <= span.last for span in spans)


def _overflow(measured: Mapping[str, float]) -> bool:
    """What the step's one reduction says of a gradient under a loss scale; see
    `Observation.overflow`.
    """
    scaled = math.isfinite(measured.get(LOSS_SCALE, math.nan))
    return scaled and math.isfinite(measured[LOSS]) and not math.isfinite(measured[GRAD_NORM])
