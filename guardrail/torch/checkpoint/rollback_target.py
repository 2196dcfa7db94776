"""Which state a rollback or a resume uses: a snapshot of the ring, or a checkpoint of this run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from guardrail.core.events.run_state import CheckpointChanged
from guardrail.decide.policy import choose_target
from guardrail.decide.run_history import RunHistory
from guardrail.rundir.manifest import Manifest
from guardrail.rundir.recorder import Recorder
from guardrail.torch.checkpoint.disk_checkpoints import CheckpointStore
from guardrail.torch.checkpoint.loader import Allowed, Selection
from guardrail.torch.checkpoint.memory_snapshots import Snapshot, SnapshotRing
from guardrail.torch.checkpoint.snapshot_states import CANDIDATE, FOREIGN, GOOD, INVALID, SUSPECT
from guardrail.torch.state.slow_work import run_together

IsAccepted = Callable[[str, int], bool]  # (state, step)


@dataclass(frozen=True, kw_only=True)
class Target:
    """The state that a rollback restores: a snapshot of the ring, or the checkpoint `name`.

    Attributes:
        state: good or candidate.
    """

    step: int
    cursor: int
    tier: str
    state: str
    name: str = ""
    snapshot: Snapshot | None = None


@dataclass(frozen=True, kw_only=True)
class TargetLimits:
    """Which states a rollback can use.

    Attributes:
        cursor: the state has used no position from this one on.
        to_step: its step; None: any.
        before: its step is less than this; None: any.
    """

    cursor: int
    to_step: int | None
    before: int | None

    def allows(self, step: int, cursor: int) -> bool:
        """Return whether a state of this step and cursor can be used."""
        if cursor > self.cursor:
            return False
        if self.to_step is not None and step != self.to_step:
            return False
        return self.before is None or step < self.before


class TargetSearch:
    """Searches the ring and the disk for a state to restore.

    Args:
        store: None: there are no checkpoints.
        recorder: writes lines about checkpoints that cannot be used.
        gather: returns every rank's value, by rank; a collective.

    Attributes:
        history: of the run; its owner keeps it up to date.
    """

    def __init__(
        self,
        ring: SnapshotRing,
        store: CheckpointStore | None,
        *,
        recorder: Recorder,
        gather: Callable[[Any], Sequence[Any]],
    ) -> None:
        self._ring, self._store = ring, store
        self._recorder, self._gather = recorder, gather
        self.history = RunHistory()

    def find(
        self, limits: TargetLimits, *, candidates: bool, is_settled: Callable[[int], bool]
    ) -> Target | None:
        """Return the newest state that the limits allow; see `SnapshotManager.find_target`."""

        def is_better(state: str, step: int) -> bool:
            return state == GOOD or is_settled(step)

        if not candidates:
            found = self._find_in_ring(limits, is_better) or self._find_on_disk(limits, is_better)
            if found is not None:
                return found
        return self._find_in_ring(limits, _accept_any) or self._find_on_disk(limits, _accept_any)

    def _find_in_ring(self, limits: TargetLimits, is_accepted: IsAccepted) -> Target | None:
        infos = [
            info
            for info in self._ring.infos()
            if limits.allows(info.step, info.cursor) and is_accepted(info.state, info.step)
        ]
        newest = max((info.step for info in infos), default=0)
        chosen = choose_target(infos, newest + 1, good_only=False)
        if chosen is None:
            return None
        return Target(
            step=chosen.step,
            cursor=chosen.cursor,
            tier="memory",
            state=chosen.state,
            snapshot=self._ring.get(chosen.step),
        )

    def _find_on_disk(self, limits: TargetLimits, is_accepted: IsAccepted) -> Target | None:
        if self._store is None:
            return None

        def is_allowed(manifest: Manifest) -> bool:
            state = self.state_of(manifest)
            if state not in (GOOD, CANDIDATE):
                return False
            return limits.allows(manifest.step, manifest.cursor) and is_accepted(
                state, manifest.step
            )

        selection = self.find_newest_valid(is_allowed)
        if selection.path is None or selection.manifest is None:
            return None
        state = str(self._gather(self.state_of(selection.manifest))[0])  # only rank 0 knows it
        return Target(
            step=selection.manifest.step,
            cursor=selection.manifest.cursor,
            tier="disk",
            state=state,
            name=selection.path.name,
        )

    def find_newest_valid(self, allowed: Allowed) -> Selection:
        """Return the newest valid checkpoint of this run that is allowed.

        Newer ones that are damaged get a journal line with the reason.
        """
        assert self._store is not None
        selection = self._store.find_newest_valid(
            lambda manifest: self._why_foreign(manifest) or allowed(manifest)
        )
        for path, why in selection.refused:
            if path.name in selection.invalid:
                self._report_unused(path.name, INVALID, why)
        return selection

    def forget_foreign(self) -> None:
        """Report checkpoints of another run in the folder and ignore them from now on.

        They are not deleted.
        """
        store = self._store
        assert store is not None
        foreign = run_together(
            lambda: store.forget_foreign(self._why_foreign), self._gather, world=store.world
        )
        for name, why in foreign.items():
            self._report_unused(name, FOREIGN, why)

    def _report_unused(self, name: str, state: str, why: str) -> None:
        self._recorder.write(CheckpointChanged(path=name, state=state, reason=why))

    def _why_foreign(self, manifest: Manifest) -> str:
        """Return why a checkpoint is of another run; "" if it is of this run."""
        return self.history.why_not_of_this_run(
            manifest.identity, timeline=manifest.timeline, step=manifest.step
        )

    def state_of(self, manifest: Manifest) -> str:
        """Return good, candidate or suspect, as rank 0 knows it; its answer counts."""
        assert self._store is not None
        if not self.history.lives(timeline=manifest.timeline, step=manifest.step):
            return SUSPECT
        key = (manifest.timeline, manifest.step)
        states = [info.state for info in self._store.infos() if (info.timeline, info.step) == key]
        return states[-1] if states else CANDIDATE


def _accept_any(state: str, step: int) -> bool:
    return True
