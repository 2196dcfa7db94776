"""The ring of snapshots in host memory: a rollback takes milliseconds, and every rank holds its own
shard.

All decisions (what is good, what is evicted) are functions of steps alone, so that all ranks hold
the same snapshots. Host buffers are reused: after the ring has filled up, a snapshot allocates
nothing. For a buffer that a slow writer holds another one is allocated on a thread: fresh memory
costs ten times what the copy does.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from guardrail.core.records import SnapshotInfo
from guardrail.rundir.manifest import Box
from guardrail.torch.state import foreach
from guardrail.torch.state.training_state import TrainingState

CANDIDATE, GOOD, SUSPECT = "candidate", "good", "suspect"

_ALIGNMENT = 64  # bytes, a cache line
_BLOCK = 1 << 27  # bytes of one host allocation; torch rounds pinned ones up to a power of two
_PAGE = 4096  # bytes; the least that any system hands out
# buffers beside the ring that the writer of checkpoints may hold: of the one being written and of
# the next
_WRITER = 2
# bytes from which on a buffer is allocated ahead of its use; a smaller one costs nothing
_AHEAD = 16 << 20


class Layout:
    """Names, shapes, types and places of a state's tensors, and the lists that `_foreach_copy_`
    takes, grouped once.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.names = list(tensors)
        self._kinds = [(t.shape, t.dtype, t.device) for t in tensors.values()]
        # Of a dense copy in the same memory format, so that equal formats copy as one stretch of
        # memory.
        self._strides = [torch.empty_like(t, device="meta").stride() for t in tensors.values()]
        self.bytes = sum(t.numel() * t.element_size() for t in tensors.values())
        self.devices = {t.device for t in tensors.values() if t.device.type == "cuda"}
        groups: dict[Any, list[int]] = {}
        for index, (_, dtype, device) in enumerate(self._kinds):
            groups.setdefault((device, dtype), []).append(index)
        self.groups = list(groups.values())

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        return len(tensors) == len(self.names) and all(
            name == own and (t.shape, t.dtype, t.device) == kind
            for (name, t), own, kind in zip(tensors.items(), self.names, self._kinds, strict=True)
        )

    def allocate(self) -> list[Tensor]:
        """Host tensors of this layout, cut from a few large blocks; pinned where they come from a
        device.
        """
        pinned = bool(self.devices)
        places: list[tuple[int, int]] = []  # (block, offset in bytes)
        sizes: list[int] = []
        for shape, dtype, _ in self._kinds:
            room = -(-shape.numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
            if not sizes or sizes[-1] + room > _BLOCK:
                sizes.append(0)
            places.append((len(sizes) - 1, sizes[-1]))
            sizes[-1] += room
        blocks = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in sizes]
        for block in blocks:
            # the system hands memory out page by page, as each is first written
            block[::_PAGE].zero_()
        return [
            blocks[block][at : at + shape.numel() * dtype.itemsize]
            .view(dtype)
            .as_strided(shape, stride)
            for (block, at), (shape, dtype, _), stride in zip(
                places, self._kinds, self._strides, strict=True
            )
        ]

    def copy(self, targets: list[Tensor], sources: list[Tensor]) -> list[torch.cuda.Event]:
        """Copy all; returns what to wait for before the host reads targets or writes sources."""
        for group in self.groups:
            foreach.copy_tensors(
                [targets[i] for i in group],
                [sources[i] for i in group],
                non_blocking=bool(self.devices),
            )
        events = []
        for device in self.devices:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            events.append(event)
        return events


class Snapshot:
    """A copy of the training state in host memory.

    Attributes:
        step, cursor, timeline: where the run was; `step` updates had been applied.
        scalars: learning rates, schedules, optimizer numbers.
        boxes, replicas: which part of each tensor this rank holds, and how many ranks hold the
        same.
        state: "candidate", "good" or "suspect".
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
        layout: Layout,
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
        """What the guard gave along: a fresh copy each time."""
        return dict(json.loads(self._extra))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Name -> host copy. Read-only by convention; call `wait` first."""
        return dict(zip(self.layout.names, self.buffers, strict=True))

    @property
    def pinned(self) -> bool:
        return self._pins > 0

    def wait(self) -> None:
        """Until the copy from (or to) the device is complete. May be called on any thread."""
        for event in self.events:
            event.synchronize()

    def pin(self) -> None:
        """Keep the buffers from being reused, until as many `release` calls."""
        with self._lock:
            self._pins += 1

    def release(self) -> None:
        with self._lock:
            self._pins -= 1

    def info(self) -> SnapshotInfo:
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
        keep: snapshots held, at least 2. One that is pinned for writing is held beside them after
            its eviction: there are up to `keep` + 2 buffers. 0: none is; what is taken belongs to
            the caller alone.
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
        self._spare: _Spare | None = None  # that is being allocated
        self._layout: Layout | None = None
        self._boxes: dict[str, Box] = {}
        self._replicas: dict[str, tuple[int, int]] = {}

    @torch.no_grad()
    def take(self, step: int, cursor: int, timeline: int, extra: Mapping[str, Any]) -> Snapshot:
        """Copy the state as it is now, after `step` applied updates; replaces a snapshot of the
        same step.

        Args:
            extra: JSON-able state of the guard; copied.

        Raises:
            RuntimeError: torch found no host memory for a new buffer. The ring is as it was, less
            what made room.
        """
        text = json.dumps(extra)
        tensors = self.state.tensors()
        layout = self._layout_of(tensors)
        self._make_room(step)
        buffers = self._buffers(layout)
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
            self._look_ahead(layout)
        return snapshot

    def _buffers(self, layout: Layout) -> list[Tensor]:
        """Room for one snapshot; made now only where none was made ahead."""
        if not self._free and self._spare is not None:
            self._free.append(self._spare.wait())
            self._spare = None
        return self._free.pop() if self._free else layout.allocate()

    def _look_ahead(self, layout: Layout) -> None:
        """Have a buffer allocated, on a thread of its own, that a later snapshot is going to
        need.
        """
        if self._spare is not None and self._spare.ready:
            self._free.append(self._spare.wait())
            self._spare = None
        if self._spare is not None or self._free or layout.bytes < _AHEAD:
            return
        held = len(self._snapshots) + len(self._evicted)
        pinned = sum(snapshot.pinned for snapshot in (*self._snapshots, *self._evicted))
        if held < self.keep + min(pinned, _WRITER):
            self._spare = _Spare(layout)

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> dict[str, Any]:
        """Make the live state bit-identical to the snapshot; returns the guard's `extra`.

        Works whatever the optimizer has gathered since: a snapshot of a new optimizer makes it new
        again.
        """
        if not snapshot.buffers:
            raise ValueError(f"the snapshot of step {snapshot.step} has left the ring")
        live = self.state.tensors()
        if snapshot.layout.fits(live):
            self.state.settle()
            snapshot.events = snapshot.layout.copy(list(live.values()), snapshot.buffers)
            self.state.load_scalars(snapshot.scalars)
        else:
            snapshot.wait()
            self.state.load(snapshot.tensors, snapshot.scalars, snapshot.boxes)
        return snapshot.extra

    def infos(self) -> list[SnapshotInfo]:
        """All that are held, oldest first."""
        return [snapshot.info() for snapshot in self._snapshots]

    def get(self, step: int) -> Snapshot | None:
        return next((held for held in self._snapshots if held.step == step), None)

    def newest_good(self, *, before_step: int | None = None) -> Snapshot | None:
        """The newest good snapshot, of a step less than `before_step` where that is given."""
        good = [
            s
            for s in self._snapshots
            if s.state == GOOD and (before_step is None or s.step < before_step)
        ]
        return good[-1] if good else None

    def confirm(self, is_good: Callable[[int], bool]) -> list[Snapshot]:
        """Call good every candidate whose step `is_good` (see `Controller.is_good`); returns these.

        Call it before `take` at the same step, so that the candidate is good before room is made.
        """
        return self._move({CANDIDATE}, GOOD, is_good)

    def withdraw(self, from_step: int) -> list[Snapshot]:
        """Good ones of `from_step` and later are candidates again: an incident that is not over
        holds them.
        """
        return self._move({GOOD}, CANDIDATE, lambda step: step >= from_step)

    def mark_suspect(self, from_step: int) -> list[Snapshot]:
        """Snapshots of `from_step` and later hold the trouble's updates; good ones too. Returns the
        newly marked.
        """
        return self._move({CANDIDATE, GOOD}, SUSPECT, lambda step: step >= from_step)

    def _move(self, before: set[str], after: str, fits: Callable[[int], bool]) -> list[Snapshot]:
        moved = [s for s in self._snapshots if s.state in before and fits(s.step)]
        for snapshot in moved:
            snapshot.state = after
        return moved

    def drop_after(self, step: int) -> None:
        """Forget the snapshots of later steps: the timeline they belong to is abandoned."""
        for snapshot in [s for s in self._snapshots if s.step > step]:
            self._evict(snapshot)

    def _layout_of(self, tensors: Mapping[str, Tensor]) -> Layout:
        if self._layout is None or not self._layout.fits(tensors):
            self._layout = Layout(tensors)
            self._boxes = self.state.boxes()
            self._replicas = self.state.replicas()
            self._free, self._spare = [], None
        return self._layout

    def _make_room(self, step: int) -> None:
        """Evict for one more. Suspects go first, then the oldest; the newest good one stays until
        there is a newer.
        """
        for snapshot in self._evicted[:]:
            if not snapshot.pinned:
                self._evicted.remove(snapshot)
                self._reclaim(snapshot)
        same = self.get(step)
        if same is not None:
            self._evict(same)
        while self._snapshots and len(self._snapshots) >= self.keep:
            protected = self.newest_good()
            spare = [s for s in self._snapshots if s is not protected]
            self._evict(next((s for s in spare if s.state == SUSPECT), spare[0]))

    def _evict(self, snapshot: Snapshot) -> None:
        self._snapshots.remove(snapshot)
        if snapshot.pinned:
            self._evicted.append(snapshot)
        else:
            self._reclaim(snapshot)

    def _reclaim(self, snapshot: Snapshot) -> None:
        """Keep its buffers for a later snapshot, if they have the present layout; never more than
        were in use.
        """
        snapshot.wait()
        held = len(self._free) + len(self._snapshots) + len(self._evicted)
        if snapshot.layout is self._layout and held < self.keep + _WRITER:
            self._free.append(snapshot.buffers)
        snapshot.buffers = []


class _Spare:
    """A buffer that is allocated on a thread, so that the step which needs it does not wait for
    fresh memory.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._buffers: list[Tensor] | None = None
        self._thread = threading.Thread(
            target=self._allocate, name="guardrail-snapshots", daemon=True
        )
        self._thread.start()

    def _allocate(self) -> None:
        # Without memory there is no buffer; the snapshot that needs it says so.
        with contextlib.suppress(RuntimeError, MemoryError):
            self._buffers = self._layout.allocate()

    @property
    def ready(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> list[Tensor]:
        """The buffer, allocated here where the thread got none. Raises RuntimeError, as
        `Layout.allocate`.
        """
        self._thread.join()
        return self._buffers if self._buffers is not None else self._layout.allocate()
