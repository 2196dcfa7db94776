"""The ring of snapshots in host memory. A restore takes milliseconds; each rank has its own shard.

What is good and what is evicted depends on steps alone, so all ranks hold the same snapshots. Host
buffers are reused: once the ring is full, a snapshot allocates nothing. While a slow writer holds a
buffer, a thread allocates another one: new memory costs ten times as much as the copy.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from guardrail.core.records.status import SnapshotInfo
from guardrail.rundir.manifest import Box
from guardrail.torch.checkpoint.snapshot_layout import SnapshotLayout, SpareBuffer
from guardrail.torch.checkpoint.snapshot_states import CANDIDATE, GOOD
from guardrail.torch.state.training_state import TrainingState

# Buffers beside the ring that the writer of checkpoints may hold: of the save in progress and of
# the next one.
_WRITER_BUFFERS = 2
# Bytes from which on a buffer is allocated ahead of its use; a smaller one costs nothing.
_AHEAD_BYTES = 16 << 20

# Returns the guard's own state for a snapshot; the argument: whether it becomes a checkpoint.
Facts = Callable[[bool], dict[str, Any]]


class Snapshot:
    """A copy of the training state in host memory.

    Attributes:
        step, cursor, timeline: where the run was; `step` updates had been applied.
        scalars: learning rates, schedules, optimizer numbers.
        boxes, replicas: which part of each tensor this rank holds, and how many ranks hold the
            same.
        state: see `snapshot_states`.
        time: wall time of the copy, seconds since the epoch.
        bytes: of the tensors.
    """

    def __init__(
        self,
        *,
        step: int,
        cursor: int,
        timeline: int,
        extra: str,
        scalars: dict[str, Any],
        layout: SnapshotLayout,
        boxes: dict[str, Box],
        replicas: dict[str, tuple[int, int]],
        buffers: list[Tensor],
    ) -> None:
        self.step, self.cursor, self.timeline = step, cursor, timeline
        self.scalars, self.layout, self.boxes, self.replicas = scalars, layout, boxes, replicas
        self.state = CANDIDATE
        self.time = time.time()
        self.bytes = layout.bytes
        self.buffers = buffers
        self.events: list[torch.cuda.Event] = []
        self._extra = extra
        self._pins = 0
        self._lock = threading.Lock()

    @property
    def extra(self) -> dict[str, Any]:
        """The guard's own state, a new copy each time."""
        return dict(json.loads(self._extra))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Name -> host copy. Do not change them; call `wait` first."""
        return dict(zip(self.layout.names, self.buffers, strict=True))

    @property
    def pinned(self) -> bool:
        """Whether a writer still needs the buffers."""
        return self._pins > 0

    def wait(self) -> None:
        """Wait until the copy from or to the device is complete. May be called on any thread."""
        for event in self.events:
            event.synchronize()

    def pin(self) -> None:
        """Keep the buffers from being reused, until as many calls of `release`."""
        with self._lock:
            self._pins += 1

    def release(self) -> None:
        """Undo one `pin`."""
        with self._lock:
            self._pins -= 1

    def info(self) -> SnapshotInfo:
        """Return the record for the status."""
        return SnapshotInfo(
            step=self.step,
            cursor=self.cursor,
            timeline=self.timeline,
            tier="memory",
            state=self.state,
            time=self.time,
            bytes=self.bytes,
        )


class SnapshotRing:
    """The last snapshots of a run, oldest first.

    Args:
        state: what is copied.
        keep: snapshots held, at least 2. One that is pinned for writing is held in addition after
            its eviction: there are up to `keep` + 2 buffers. 0: the ring holds none, and a snapshot
            belongs to the caller alone.
    """

    def __init__(self, state: TrainingState, keep: int) -> None:
        if keep == 1:
            raise ValueError(
                "a ring of one snapshot loses its last good one when it takes the next"
            )
        self.state = state
        self.keep = keep
        self._snapshots: list[Snapshot] = []
        self._evicted: list[Snapshot] = []  # pinned when they left the ring
        self._free: list[list[Tensor]] = []
        self._spare: SpareBuffer | None = None  # that a thread is allocating
        self._layout: SnapshotLayout | None = None
        self._boxes: dict[str, Box] = {}
        self._replicas: dict[str, tuple[int, int]] = {}

    @torch.no_grad()
    def take(self, step: int, cursor: int, timeline: int, extra: Mapping[str, Any]) -> Snapshot:
        """Copy the present state, after `step` applied updates.

        The copy replaces a snapshot of the same step.

        Args:
            extra: JSON-able state of the guard; copied.

        Raises:
            RuntimeError: torch found no host memory for a new buffer. What was evicted to make
                room is gone; the ring is otherwise unchanged.
        """
        text = json.dumps(extra)
        tensors = self.state.tensors()
        layout = self._layout_of(tensors)
        self._make_room(step)
        buffers = self._take_buffers(layout)
        snapshot = Snapshot(
            step=step,
            cursor=cursor,
            timeline=timeline,
            extra=text,
            scalars=self.state.scalars(),
            layout=layout,
            boxes=self._boxes,
            replicas=self._replicas,
            buffers=buffers,
        )
        snapshot.events = layout.copy(buffers, list(tensors.values()))
        if self.keep:
            self._snapshots.append(snapshot)
            self._snapshots.sort(key=lambda held: held.step)
            self._allocate_ahead(layout)
        return snapshot

    def _take_buffers(self, layout: SnapshotLayout) -> list[Tensor]:
        """Return buffers for one snapshot; allocate them now only if none are free."""
        if not self._free and self._spare is not None:
            self._free.append(self._spare.wait())
            self._spare = None
        if self._free:
            return self._free.pop()
        return layout.allocate()

    def _allocate_ahead(self, layout: SnapshotLayout) -> None:
        """Start to allocate, on a thread, a buffer that a later snapshot will need."""
        if self._spare is not None and self._spare.ready:
            self._free.append(self._spare.wait())
            self._spare = None
        if self._spare is not None or self._free or layout.bytes < _AHEAD_BYTES:
            return
        held = [*self._snapshots, *self._evicted]
        pinned = sum(snapshot.pinned for snapshot in held)
        if len(held) < self.keep + min(pinned, _WRITER_BUFFERS):
            self._spare = SpareBuffer(layout)

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> dict[str, Any]:
        """Make the live state bit-identical to the snapshot; return the guard's `extra`.

        This works whatever state the optimizer has created since: a snapshot of a new optimizer
        makes it new again.
        """
        if not snapshot.buffers:
            raise ValueError(f"the snapshot of step {snapshot.step} has left the ring")
        live = self.state.tensors()
        if snapshot.layout.fits(live):
            self.state.reshard()
            snapshot.events = snapshot.layout.copy(list(live.values()), snapshot.buffers)
            self.state.load_scalars(snapshot.scalars)
        else:
            snapshot.wait()
            self.state.load(snapshot.tensors, snapshot.scalars, snapshot.boxes)
        return snapshot.extra

    def infos(self) -> list[SnapshotInfo]:
        """Return the records of all snapshots held, oldest first."""
        return [snapshot.info() for snapshot in self._snapshots]

    def get(self, step: int) -> Snapshot | None:
        """Return the snapshot after a step; None if the ring has none."""
        return next((held for held in self._snapshots if held.step == step), None)

    def newest_good(self, *, before_step: int | None = None) -> Snapshot | None:
        """Return the newest good snapshot, of a step less than `before_step` if that is given."""
        for snapshot in reversed(self._snapshots):
            if snapshot.state == GOOD and (before_step is None or snapshot.step < before_step):
                return snapshot
        return None

    def confirm(self, is_good: Callable[[int], bool]) -> list[Snapshot]:
        """Make every candidate good whose step `is_good` (see `Controller.is_good`).

        Call it before `take` at the same step: the candidate must be good before room is made.

        Returns:
            The snapshots that became good.
        """
        return self._change_state(CANDIDATE, GOOD, is_good)

    def withdraw_good(self, from_step: int) -> list[Snapshot]:
        """Make good snapshots of `from_step` and later candidates again; return these.

        They hold steps of an incident that is not over.
        """
        return self._change_state(GOOD, CANDIDATE, lambda step: step >= from_step)

    def _change_state(self, before: str, after: str, fits: Callable[[int], bool]) -> list[Snapshot]:
        changed = [s for s in self._snapshots if s.state == before and fits(s.step)]
        for snapshot in changed:
            snapshot.state = after
        return changed

    def drop_after(self, step: int) -> None:
        """Drop the snapshots of later steps, which belong to an abandoned timeline."""
        for snapshot in [s for s in self._snapshots if s.step > step]:
            self._evict(snapshot)

    def _layout_of(self, tensors: Mapping[str, Tensor]) -> SnapshotLayout:
        if self._layout is None or not self._layout.fits(tensors):
            self._layout = SnapshotLayout(tensors)
            self._boxes = self.state.boxes()
            self._replicas = self.state.replicas()
            self._free, self._spare = [], None
        return self._layout

    def _make_room(self, step: int) -> None:
        """Evict the oldest, but never the newest good one."""
        for snapshot in self._evicted[:]:
            if not snapshot.pinned:
                self._evicted.remove(snapshot)
                self._reclaim(snapshot)
        same = self.get(step)
        if same is not None:
            self._evict(same)
        while self._snapshots and len(self._snapshots) >= self.keep:
            protected = self.newest_good()
            self._evict(next(s for s in self._snapshots if s is not protected))

    def _evict(self, snapshot: Snapshot) -> None:
        self._snapshots.remove(snapshot)
        if snapshot.pinned:
            self._evicted.append(snapshot)
        else:
            self._reclaim(snapshot)

    def _reclaim(self, snapshot: Snapshot) -> None:
        """Free its buffers for a later snapshot, if they have the present layout.

        No more are kept than were in use.
        """
        snapshot.wait()
        held = len(self._free) + len(self._snapshots) + len(self._evicted)
        if snapshot.layout is self._layout and held < self.keep + _WRITER_BUFFERS:
            self._free.append(snapshot.buffers)
        snapshot.buffers = []
