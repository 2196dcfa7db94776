"""Snapshots in memory and checkpoints on disk as one.

Decides when to copy and what counts as good. A rollback uses the ring if it reaches far enough
back, else the newest valid checkpoint of the present timeline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from guardrail.core.config import GuardConfig
from guardrail.core.records.status import SnapshotInfo
from guardrail.decide.run_history import RunHistory
from guardrail.rundir.manifest import Manifest
from guardrail.rundir.recorder import Recorder
from guardrail.torch.checkpoint.checkpoint_journal import CheckpointJournal
from guardrail.torch.checkpoint.disk_checkpoints import CheckpointStore
from guardrail.torch.checkpoint.final_save import FinalSave
from guardrail.torch.checkpoint.memory_snapshots import Facts, Snapshot, SnapshotRing
from guardrail.torch.checkpoint.rollback_target import Target, TargetLimits, TargetSearch
from guardrail.torch.checkpoint.snapshot_states import GOOD, SUSPECT
from guardrail.torch.state.training_state import TrainingState


def never(step: int) -> bool:
    """Return False for every step."""
    return False


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What a resume has loaded.

    Attributes:
        name: of the checkpoint.
        extra: the guard's own state in it.
        good: whether the checkpoint is good.
        check: result of the self-check per component.
    """

    name: str
    extra: dict[str, Any]
    good: bool
    check: dict[str, str] = field(default_factory=dict)


class SnapshotManager:
    """Snapshots and checkpoints of one guard. Every rank calls the same methods at the same steps.

    Args:
        settings: the [snapshots], [checkpoint] and [guard] sections.
        state: what is copied.
        store: the checkpoints on disk; None: there are none.
        recorder: writes the lines about checkpoints, and learns when the disk is failing.
        gather: returns every rank's value, by rank; a collective.
        report_progress: reports that this rank is alive.

    Attributes:
        infos: records of all snapshots and checkpoints, for the status.
    """

    def __init__(
        self,
        settings: GuardConfig,
        *,
        state: TrainingState,
        store: CheckpointStore | None,
        recorder: Recorder,
        gather: Callable[[Any], Sequence[Any]],
        report_progress: Callable[[], None],
    ) -> None:
        self.settings = settings
        self.ring = SnapshotRing(state, settings.snapshots.keep)
        self.store = store
        self.infos: tuple[SnapshotInfo, ...] = ()
        self._gather, self._report_progress = gather, report_progress
        self._search = TargetSearch(self.ring, store, recorder=recorder, gather=gather)
        self._journal: CheckpointJournal | None = None
        if store is not None:
            self._journal = CheckpointJournal(
                store, recorder=recorder, history=lambda: self._search.history
            )

    # -- copying -----------------------------------------------------------------------------------

    def take_first(
        self, facts: Facts, *, history: RunHistory, good: bool = True, saved: bool = False
    ) -> None:
        """Take the first snapshot and checkpoint of this process, so that there always is one.

        Args:
            history: of the run; its owner keeps it up to date.
            good: nothing has happened yet, or the loaded checkpoint is good.
            saved: this state is on disk already.
        """
        self._search.history = history
        if good and self._journal is not None:
            present = facts(False)
            self._journal.born_good = (present["timeline"], present["step"])
        will_save = self.store is not None and not saved
        if will_save or self.settings.snapshots.keep:
            snapshot = self._take(facts, checkpoint=will_save)
            if good:
                snapshot.state = GOOD
            if will_save:
                self._save(snapshot)
        self._update_infos()

    def after_step(
        self, step: int, *, is_good: Callable[[int], bool], facts: Facts, since: int | None = None
    ) -> None:
        """Confirm the states that enough healthy steps have followed; copy and save when due.

        Args:
            is_good: whether the state after so many updates is good; see `Controller.is_good`.
            since: first step of an incident that is not over; None: there is none.
        """
        self.note_incident(since)
        changed = bool(self.ring.confirm(is_good))
        if self._journal is not None:
            self.write_events()
            changed = self._journal.confirm(is_good) or changed
        if self.will_copy(step):
            will_save = self._will_save(step)
            snapshot = self._take(facts, checkpoint=will_save)
            if will_save:
                self._save(snapshot)
            changed = True
        if changed:
            self._update_infos()

    def note_incident(self, since: int | None) -> None:
        """Make no state good, and none replace a good one, from the first step of an incident on.

        Args:
            since: first step of an incident that is not over; None: there is none.
        """
        if self._journal is not None:
            self._journal.since = since
        if since is None:
            return
        changed = bool(self.ring.withdraw_good(since))
        if self._journal is not None:
            changed = self._journal.withdraw_good(since) or changed
        if changed:
            self._update_infos()

    def will_copy(self, step: int) -> bool:
        """Return whether the state after this step is copied, for the ring or a checkpoint."""
        snapshots = self.settings.snapshots
        return self._will_save(step) or (snapshots.keep > 0 and step % snapshots.every == 0)

    def _will_save(self, step: int) -> bool:
        return self.store is not None and step % self.settings.checkpoint.every == 0

    def save_now(self, facts: Facts, *, suspect: bool = False) -> None:
        """Save the present state, for a command or as another try of a save that failed."""
        if self.store is not None:
            self._save(self._take(facts, checkpoint=True), suspect=suspect)
            self._update_infos()

    @property
    def retry_due(self) -> bool:
        """On rank 0: whether a save has failed and all ranks shall try again together."""
        return self.store is not None and self.store.retry_due

    def _take(self, facts: Facts, *, checkpoint: bool) -> Snapshot:
        extra = facts(checkpoint)
        return self.ring.take(extra["step"], extra["cursor"], extra["timeline"], extra)

    @property
    def failed_save(self) -> int:
        """Number of this rank's last save that failed, for the next reduction; 0: none."""
        if self.store is None:
            return 0
        return self.store.failure[0]

    def note_failures(self, serials: Sequence[int]) -> None:
        """Store `failed_save` of every rank: rank 0 does not wait for shares that will not come."""
        if self.store is not None:
            self.store.note_failures(serials)

    def _save(self, snapshot: Snapshot, *, suspect: bool = False) -> None:
        if self.store is not None:
            self.store.save(snapshot, identity=snapshot.extra.get("identity"), suspect=suspect)

    def _update_infos(self) -> None:
        on_disk: list[SnapshotInfo] = []
        if self.store is not None:
            on_disk = self.store.infos()
        self.infos = (*on_disk, *self.ring.infos())

    # -- going back --------------------------------------------------------------------------------

    def find_target(
        self,
        cursor: int,
        *,
        to_step: int | None = None,
        before_step: int | None = None,
        candidates: bool = False,
        settled: Callable[[int], bool] = never,
    ) -> Target | None:
        """Return the newest state that has used no position from `cursor` on; None if none.

        Good ones of the ring come first, then good ones on disk, then candidates in the same order.
        A collective if the ring has none: all ranks agree on a checkpoint.

        Args:
            to_step: its step; None: any.
            before_step: it is older than this step; if there is none such, the limit is dropped.
            candidates: treat candidates as good ones.
            settled: steps of candidates that count as good (see `Controller.is_settled`).
        """
        limits = TargetLimits(cursor=cursor, to_step=to_step, before=before_step)
        target = self._search.find(limits, candidates=candidates, is_settled=settled)
        if target is not None or before_step is None:
            return target
        limits = TargetLimits(cursor=cursor, to_step=to_step, before=None)
        return self._search.find(limits, candidates=candidates, is_settled=settled)

    def restore(self, target: Target) -> dict[str, Any]:
        """Make the live state that of `target`; return the guard's own part of it."""
        if target.snapshot is not None:
            return self.ring.restore(target.snapshot)
        assert self.store is not None
        return self.store.load(self.store.folder / target.name).extra

    def finish_rollback(self, facts: Facts, target: Target) -> None:
        """Drop the states after `target`, which belong to an abandoned timeline.

        A state keeps its state (good or candidate) when it is loaded.
        """
        self.ring.drop_after(target.step)
        if target.snapshot is None and self.settings.snapshots.keep:
            self._take(facts, checkpoint=False).state = target.state
        self.mark_suspect(target.step + 1)

    def mark_suspect(self, from_step: int) -> None:
        """Make the checkpoints of `from_step` and later suspect; they are never chosen again."""
        if self._journal is not None:
            self._journal.mark_suspect(from_step)
        self._update_infos()

    # -- the start and the end of a process --------------------------------------------------------

    def resume(self, history: RunHistory) -> Restored | None:
        """Load the newest valid checkpoint of the present timeline; return None if there is none.

        A collective.
        """
        self._search.history = history
        store = self.store
        if store is None:
            return None
        self._search.forget_foreign()
        store.set_states(
            dict.fromkeys(history.good, GOOD) | dict.fromkeys(history.suspects, SUSPECT)
        )
        # A crash between a rollback and its last journal line may have left a checkpoint of the
        # abandoned steps good.
        for info in store.infos():
            if not history.lives(timeline=info.timeline, step=info.step):
                store.set_states({info.path: SUSPECT})

        def is_usable(manifest: Manifest) -> bool | str:
            return self._search.state_of(manifest) != SUSPECT or "its steps were discarded"

        selection = self._search.find_newest_valid(is_usable)
        if selection.path is None:
            return None
        loaded = store.load(selection.path)
        name = selection.path.name
        return Restored(
            name=name, extra=loaded.extra, good=name in history.good, check=loaded.checks
        )

    def save_final(self, facts: Facts, *, onset: int | None = None) -> str:
        """Save the last state, however the run ends; return why that failed, "" if it did not.

        A collective, in which no rank waits for another.

        Args:
            onset: first step of an incident that was not resolved; what holds it is suspect from
                its commit on.
        """
        if self.store is None:
            return ""
        if onset is not None:
            self.mark_suspect(onset)
        suspect = onset is not None and onset <= facts(False)["step"]
        final = FinalSave(
            self.store,
            save=lambda: self.save_now(facts, suspect=suspect),
            write_events=self.write_events,
            gather=self._gather,
            report_progress=self._report_progress,
            timeout=self.settings.launch.save_timeout,
        )
        return final.save(facts)

    def close(self) -> None:
        """Finish what was requested and end the writer thread."""
        if self.store is not None:
            self.store.close()

    def write_events(self) -> None:
        """Write to the journal what the writer thread has done since the last call."""
        if self._journal is not None and self._journal.write_events():
            self._update_infos()
