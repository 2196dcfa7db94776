"""The two tiers as one: the ring in host memory and the checkpoints on disk.

Decides when to copy, what counts as good, and where a rollback goes: the ring if it reaches far enough back, else the
newest valid checkpoint of the present timeline.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from guardrail.config import Settings
from guardrail.past import Past
from guardrail.policy import choose_target
from guardrail.recorder import Recorder
from guardrail.records import SnapshotInfo
from guardrail.rundir import RunDirectory
from guardrail.torch.checkpoints import CheckpointStore
from guardrail.torch.snapshots import GOOD, Snapshot, SnapshotRing
from guardrail.torch.state import TrainingState

Facts = Callable[[bool], dict[str, Any]]
Say = Callable[..., None]


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a rollback goes: a snapshot of the ring, or the checkpoint at `name`."""

    step: int
    cursor: int
    tier: str
    name: str = ""
    snapshot: Snapshot | None = None


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What a resume found: the checkpoint's name, the guard's own state in it, and the self-check per component."""

    name: str
    extra: dict[str, Any]
    good: bool
    check: dict[str, str] = field(default_factory=dict)


class Tiers:
    """Snapshots and checkpoints of one guard. Every rank calls the same methods at the same steps.

    Args:
        settings: the [snapshots], [checkpoint] and [guard] sections.
        state: what is copied.
        store: the disk tier; None: there is none.
        recorder: told when durability degrades.
        rank: of the default process group.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        state: TrainingState,
        store: CheckpointStore | None,
        recorder: Recorder,
        rank: int,
    ) -> None:
        self.settings = settings
        self.ring = SnapshotRing(state, settings.snapshots.keep)
        self.store = store
        self.infos: tuple[SnapshotInfo, ...] = ()
        self._recorder, self._rank = recorder, rank
        self._retry_at: float | None = None

    # -- copying -------------------------------------------------------------------------------------------------

    def begin(self, facts: Facts, *, good: bool = True, saved: bool = False) -> None:
        """The first snapshot and checkpoint of this process, so that there always is something to go back to.

        Args:
            good: nothing has happened yet, or the checkpoint that was loaded is good.
            saved: this very state is on disk already.
        """
        snapshot = self._take(facts, checkpoint=not saved)
        if good:
            snapshot.state = GOOD
        if not saved:
            self._save(snapshot)
        self._tell()

    def after_step(self, step: int, *, healthy_through: int, facts: Facts) -> None:
        """Confirm what has been followed by enough healthy steps; copy and save when it is time."""
        self.ring.confirm(healthy_through, self.settings.guard.confirm)
        if self.store is not None:
            self.store.confirm(healthy_through, self.settings.guard.confirm)
        save = self.store is not None and step % self.settings.checkpoint.every == 0
        if save or step % self.settings.snapshots.every == 0:
            snapshot = self._take(facts, checkpoint=save)
            if save:
                self._save(snapshot)
            self._tell()

    def save_now(self, facts: Facts) -> None:
        """A checkpoint of the present state, by command or as another try of one that failed."""
        if self.store is not None:
            self._save(self._take(facts, checkpoint=True))
            self._tell()

    def _take(self, facts: Facts, *, checkpoint: bool) -> Snapshot:
        extra = facts(checkpoint)
        return self.ring.take(extra["step"], extra["cursor"], extra["timeline"], extra)

    # -- going back ----------------------------------------------------------------------------------------------

    def target(self, cursor: int, *, past: Past, to_step: int | None = None) -> Target | None:
        """The newest good state that has passed no position from `cursor` on; of step `to_step` where that is given.

        A collective when the ring does not reach back far enough: then all ranks agree on a checkpoint.
        """
        infos = [info for info in self.ring.infos() if to_step is None or info.step == to_step]
        beyond = 1 + max((info.step for info in infos), default=0)
        chosen = choose_target(infos, beyond, cursor=cursor, good_only=to_step is None)
        if chosen is not None:
            snapshot = self.ring.get(chosen.step)
            return Target(step=chosen.step, cursor=chosen.cursor, tier="memory", snapshot=snapshot)
        return None

    def restore(self, target: Target) -> dict[str, Any]:
        """Make the live state that of `target`; returns the guard's own part of it."""
        assert target.snapshot is not None
        return self.ring.restore(target.snapshot)

    def rolled_back(self, facts: Facts, target: Target) -> None:
        """The states after `target` belong to an abandoned timeline."""
        self.ring.drop_after(target.step)
        self._tell()

    def resume(self, past: Past) -> Restored | None:
        return None

    def finish(self, facts: Facts) -> bool:
        return True

    def wants_retry(self) -> bool:
        return False

    def poll(self, say: Say) -> None:
        pass

    def close(self) -> None:
        pass

    def _save(self, snapshot: Snapshot) -> None:
        pass

    def _tell(self) -> None:
        self.infos = tuple(self.ring.infos())
