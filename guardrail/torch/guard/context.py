"""What all parts of a guard share: configuration, ranks, recorder, sample order, history, progress.

A part receives the context and, by keyword, the few other parts or functions that it calls. The
context knows none of them, so each part can be built and tested alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import torch
import torch.distributed as dist

from guardrail.core.config import GuardConfig
from guardrail.core.events.event import Event
from guardrail.core.records.status import Phase
from guardrail.core.records.verdicts import Mode
from guardrail.decide.controller import Controller
from guardrail.decide.run_history import Effects, RunHistory
from guardrail.decide.sample_cursor import SampleCursor
from guardrail.rundir.recorder import Recorder
from guardrail.rundir.run_directory import RunDirectory
from guardrail.torch.guard.arguments import check_mode
from guardrail.torch.state import slow_work
from guardrail.torch.state.collectives import gather_objects

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankInfo:
    """This process among all ranks, and the collectives that the guard uses.

    Attributes:
        rank, world: of the default process group; without one, 0 and 1.
        device: on which the ranks reduce.
        dtype: of the numbers that they reduce.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float64

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank. A collective."""
        if self.world == 1:
            return value
        box = [None]
        if self.rank == 0:
            box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, by rank. A collective."""
        return gather_objects(value, self.world)

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Return each number summed over the ranks. A collective."""
        vector = torch.tensor(numbers, dtype=self.dtype).to(self.device)
        if self.world > 1:
            dist.all_reduce(vector)
        summed: list[float] = vector.tolist()
        return summed

    def run_together(self, work: Callable[[], T]) -> T:
        """Return `work()` of this rank once all ranks have done theirs.

        No rank waits in a collective for a slow disk. `work` itself holds no collective.
        """
        return slow_work.run_together(work, self.gather, world=self.world)


@dataclass(slots=True)
class Progress:
    """Where the run stands: the only fields of the context that change at each step.

    Attributes:
        mode: what the guard may do by itself.
        step: applied updates so far.
        timeline: number of the present timeline.
        tokens: label tokens of the applied updates.
        phase: how the run has ended; None while it runs.
        incident: number of the incident that the present step belongs to.
    """

    mode: Mode
    step: int = 0
    timeline: int = 0
    tokens: int = 0
    phase: Phase | None = None
    incident: int | None = None


class RunRecorder(Recorder):
    """A recorder that adds step and timeline to each event.

    Args:
        run: the run directory; None records nothing.
        progress: of the run, read at each event.
        active: True on rank 0, which alone writes.
        learn: called with every event on every rank.
        columns: signals that are recorded besides the usual ones.
    """

    def __init__(
        self,
        run: RunDirectory | None,
        *,
        progress: Progress,
        active: bool,
        learn: Callable[[Event], None],
        columns: Sequence[str] = (),
    ) -> None:
        super().__init__(run, active=active, learn=learn, columns=columns)
        self._progress = progress

    def write(self, event: Event) -> Event:
        """Append an event, at the step and timeline of the run."""
        step, timeline = self._progress.step, self._progress.timeline
        return super().write(msgspec.structs.replace(event, step=step, timeline=timeline))


@dataclass(slots=True, kw_only=True)
class RunContext:
    """What the parts of one guard share.

    Attributes:
        config: all sections that a guard reads.
        ranks: this rank and its collectives.
        recorder: journal and metrics; `write` adds step and timeline to an event.
        order: cursor over the sample order, with the quarantine.
        history: what the journal says; read from the disk once, at the start.
        controller: decides.
        progress: the fields that change.
        run: the run directory; None keeps everything in memory.
    """

    config: GuardConfig
    ranks: RankInfo
    recorder: RunRecorder
    order: SampleCursor
    history: RunHistory
    controller: Controller
    progress: Progress
    run: RunDirectory | None = None
    _effects: tuple[tuple[int, int], Effects] | None = field(default=None, init=False, repr=False)

    def set_history(self, history: RunHistory) -> None:
        """Take over what the journal on the disk says, at a start."""
        self.history = history
        self._effects = None

    def effects(self, step: int) -> Effects:
        """Return what the update of a step is made with: settings by command, and remedies.

        Each new journal line may change it. The heartbeat's thread calls this too.
        """
        key = (step, self.history.lines)
        known = self._effects
        if known is None or known[0] != key:
            known = (key, self.history.effects(step, self.config.guard))
            self._effects = known
        return known[1]

    def set_mode(self, mode: Mode) -> None:
        """Change what the guard may do by itself. Raises ConfigError for a word that is no mode."""
        self.progress.mode = check_mode(mode)
        self.controller.set_mode(self.progress.mode)
