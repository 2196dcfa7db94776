"""Runs a run directory's own rows through the controller again: the verdicts of a live run, row by
row.

The actions of the run decide how the controller continues. Detectors return to the state of the
snapshot that the journal names. A skipped update teaches nothing. A restart begins with what the
journal held by then. So with the run's own settings, every verdict is the live one. With other
settings, the result is what they would have decided about the same rows.
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
from guardrail.core.records.findings import FindingKind, Observation
from guardrail.core.records.signals import GRAD_NORM, LOSS, LOSS_SCALE
from guardrail.core.records.spans import Span
from guardrail.core.records.verdicts import Action, Mode, Verdict
from guardrail.decide.control_commands.base import ReplayTarget
from guardrail.decide.control_commands.registry import replay_line
from guardrail.decide.controller import Controller
from guardrail.decide.diagnoses import read_diagnosis
from guardrail.decide.run_history import RunHistory
from guardrail.rundir.run_directory import RunDirectory

ACTIONS = list(Action)
CHUNK = 4096  # rows that are read at once
# Called with (row, bands of the row): signal -> (baseline, threshold).
Watch = Callable[[int, dict[str, tuple[float, float]]], None]
HEAD = ("step", "timeline", "time", "first", "last", "tokens", "verdict")


class JudgedRow(NamedTuple):
    """One row with its verdict.

    Attributes:
        verdict: of the controller, now.
        done: the action of the run, by its metrics.
        line: the journal line about the row; None if there is none.
    """

    row: int
    verdict: Verdict
    done: Action
    line: StepJudged | None

    @property
    def agrees(self) -> bool:
        """Return whether the verdict is the live one. The journal has the answers of users.

        The amount of skipped data is not judged here. If the live verdict exceeded the allowed
        share, the verdict before that check is compared.
        """
        if self.line is None:
            return self.verdict.action is self.done
        decided: Action | None = self.verdict.action
        if not self.line.beyond:
            return decided is Action(self.line.action)
        if decided is Action.PAUSE:
            decided = self.verdict.would
        return decided is Action(self.line.beyond)


class State(NamedTuple):
    """The part of a snapshot that matters here."""

    controller: dict[str, Any]
    applied_end: int


class Rejudge:
    """Gives the judged rows of a run. It can be iterated once.

    Args:
        settings: the [guard] section.
        own: these are the run's own settings: follow the mode that it was in. Otherwise the
            controller only advises.
        watch: called before each row is judged.

    Attributes:
        lost: one sentence per missing row or line. After it, verdicts may differ.
    """

    def __init__(
        self, run: RunDirectory, settings: GuardOptions, *, own: bool, watch: Watch | None = None
    ) -> None:
        self._settings, self._own, self._watch = settings, own, watch
        self._events = run.events()
        self._view = run.metrics()
        self._names = watched_signals(self._view)
        mode = None
        if not own:
            mode = Mode.ADVISE
        self._controller = Controller(settings, mode=mode)
        self.lost: list[str] = []
        self._timeline = 0
        self._begins: dict[int, int] = {}  # timeline -> index of the event that began it
        # Indices of the commands that change the controller and have not taken effect yet.
        self._changes: deque[int] = deque()
        # (timeline, step) -> journal lines about its tries
        self._lines: dict[tuple[int, int], deque[StepJudged | Note]] = {}
        # the same: diagnoses
        self._causes: dict[tuple[int, int], deque[Diagnosed]] = {}
        # Rejected batches: (first, last) position -> where the next batch begins.
        self._skipped: dict[tuple[int, int], int] = {}
        self._wanted: set[int] = set()  # steps whose state the run restored
        self._read_journal()
        self._saved = {0: State(self._controller.state_dict(), 0)}
        # As in the sample order: the streak is the rejected batches after the last applied one.
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
                raise ValueError(f"line {event.seq}: it names no state to restore")
            case Restarted():
                self._begins[event.timeline] = index
                self._wanted.add(event.step)
            case StepJudged(at_step=int() as at):
                self._lines.setdefault((event.timeline, at), deque()).append(event)
            case Diagnosed(at_step=int() as at):
                self._causes.setdefault((event.timeline, at), deque()).append(event)
            case Note(overflow=True):
                self._lines.setdefault((event.timeline, event.step + 1), deque()).append(event)
            case CommandAnswered():
                if _ControllerChange.read(event) is not None:
                    self._changes.append(index)
            case Skipped(span=Span(origin="rejected") as span):
                following = span.last
                if span.positions:
                    following = span.first
                self._skipped[span.first, span.last] = following

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
                    yield self._judge_row(row, cells)

    def _judge_row(self, row: int, cells: list[float]) -> JudgedRow:
        step, timeline, first, last = int(cells[0]), int(cells[1]), int(cells[3]), int(cells[4])
        while self._timeline < timeline:
            self._timeline += 1
            self._begin_timeline(self._timeline)
        self._apply_commands(step=step, time=cells[2])
        if self._watch is not None:
            self._watch(row, self._controller.bands())
        done = ACTIONS[int(cells[6])]
        line = self._take_line(timeline, step, done)
        ranks: dict[str, tuple[int, ...]] = {}
        if line is not None:
            for finding in line.findings:
                if finding.kind in (FindingKind.NONFINITE, FindingKind.SCALE_COLLAPSE):
                    ranks[finding.signal] = finding.ranks
        measured = dict(zip(self._names, cells[len(HEAD) :], strict=True))
        obs = Observation(
            step=step,
            first=first,
            last=last,
            signals=measured,
            nonfinite_loss=ranks.get(LOSS, ()),
            nonfinite_grad=ranks.get(GRAD_NORM) or ranks.get(LOSS_SCALE, ()),
            tokens=int(cells[5]),
            streak=self._count_streak(first),
            overflow=_is_overflow(measured),
        )
        causes = None
        if self._own:
            causes = self._causes.get((timeline, step))
        return JudgedRow(row, self._observe(obs, done, causes), done, line)

    def _observe(self, obs: Observation, done: Action, causes: deque[Diagnosed] | None) -> Verdict:
        """Return the verdict. Then the controller learns what the run did, also if it is another."""
        controller, applied = self._controller, done is Action.APPLY
        before = None
        if not applied:
            before = controller.state_dict()
        verdict = controller.observe(obs)
        if causes and controller.needs_cause_test(verdict):
            verdict = controller.apply_diagnosis(obs, verdict, read_diagnosis(causes.popleft()))
        if before is not None and verdict.accepted:
            controller.load_state_dict(before)
        elif applied and self._own and verdict.action is not Action.APPLY:
            controller.overrule(obs)  # a user had it applied
        if applied:
            self._applied_end = obs.last
            if obs.step in self._wanted:
                self._saved[obs.step] = State(controller.state_dict(), self._applied_end)
        elif done in (Action.SKIP, Action.PAUSE) and (obs.first, obs.last) in self._skipped:
            insort(self._rejected, (obs.first, self._skipped[obs.first, obs.last]))
        return verdict

    def _count_streak(self, first: int) -> int:
        begin = bisect_left(self._rejected, (self._applied_end, 0))
        return sum(end <= first for _, end in self._rejected[begin:])

    def _take_line(self, timeline: int, step: int, done: Action) -> StepJudged | None:
        """Return the journal line about this try, and remove it from the lines of its step.

        The lines of a step are in the order of its tries. Only the last try can be applied.
        """
        lines = self._lines.get((timeline, step))
        if not lines:
            return None
        first = lines[0]
        overflow = done is Action.FP16_OVERFLOW
        if isinstance(first, Note) or first.action == Action.FP16_OVERFLOW:
            # Each overflow has a note. In `advise`, a collapse has its verdict before the note.
            line = None
            if overflow and isinstance(first, StepJudged):
                lines.popleft()
                line = first
            if overflow and lines and isinstance(lines[0], Note):
                lines.popleft()
            return line
        if overflow or first.action not in (*Action,):
            return None
        if first.action != Action.PAUSE:
            if (first.action == Action.APPLY) is not (done is Action.APPLY):
                return None
        lines.popleft()
        return first

    # -- what happened between two rows ------------------------------------------------------------

    def _begin_timeline(self, timeline: int) -> None:
        index = self._begins.get(timeline)
        if index is None:
            self.lost.append(f"the journal does not say how timeline {timeline} began")
            return
        while self._changes and self._changes[0] < index:
            self._apply_change(self._changes.popleft())
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
            self.lost.append(f"the row of step {step}, which the run restored, is missing")
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
            past = RunHistory.from_events(self._events[: index + 1])
            self._controller.memory.go_back(step, past.rollbacks)
            self._controller.memory.allowlist = [*self._settings.allowlist, *past.pardons]

    def _restart(self, index: int) -> None:
        """Begin a new process: it knows what the journal held by then."""
        if not self._own:
            self._controller = Controller(self._settings, mode=Mode.ADVISE)
            return
        earlier = self._events[:index]
        self._controller = Controller(self._settings)
        self._controller.rebuild(earlier)
        mode = RunHistory.from_events(earlier).mode
        if mode is not None:
            self._controller.set_mode(mode)

    def _apply_commands(self, *, step: int, time: float) -> None:
        """Apply the commands before this row: after the step before it, and before its time."""
        while self._changes:
            event = self._events[self._changes[0]]
            key, before = (event.timeline, event.step), (self._timeline, step - 1)
            if key > before or (key == before and event.time > time):
                return
            self._apply_change(self._changes.popleft())

    def _apply_change(self, index: int) -> None:
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
        if not isinstance(event, CommandAnswered):
            return None
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


def _is_overflow(measured: Mapping[str, float]) -> bool:
    """Return whether a gradient under a loss scale overflowed; see `Observation.overflow`."""
    scaled = math.isfinite(measured.get(LOSS_SCALE, math.nan))
    return scaled and math.isfinite(measured[LOSS]) and not math.isfinite(measured[GRAD_NORM])
