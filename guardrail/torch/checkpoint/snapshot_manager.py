"""The two tiers as one: the ring in host memory and the checkpoints on disk.

Decides when to copy, what counts as good, and where a rollback goes: the ring if it reaches far
enough back, else the newest valid checkpoint of the present timeline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from guardrail.core.config import GuardConfig
from guardrail.core.records import SnapshotInfo
from guardrail.decide.policy import choose_target
from guardrail.decide.run_history import RunHistory
from guardrail.rundir.manifest import Manifest
from guardrail.rundir.recorder import Recorder
from guardrail.torch.checkpoint.disk_checkpoints import (
    FOREIGN,
    INVALID,
    CheckpointEvent,
    CheckpointStore,
)
from guardrail.torch.checkpoint.loader import Allowed, Selection
from guardrail.torch.checkpoint.memory_snapshots import (
    CANDIDATE,
    GOOD,
    SUSPECT,
    Snapshot,
    SnapshotRing,
)
from guardrail.torch.state.slow_work import MEETING_SECONDS, run_together
from guardrail.torch.state.training_state import TrainingState

Facts = Callable[[bool], dict[str, Any]]
Settled = Callable[[int], bool]
Accepted = Callable[[str, int], bool]  # (state, step)
FINAL_TRIES = 3


def never(step: int) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Fits:
    """Which states a rollback can use, by step and cursor; see `SnapshotManager.target`."""

    cursor: int
    to_step: int | None
    before: int | None

    def __call__(self, step: int, cursor: int) -> bool:
        return (
            cursor <= self.cursor
            and (self.to_step is None or step == self.to_step)
            and (self.before is None or step < self.before)
        )


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a rollback goes: a snapshot of the ring, or the checkpoint at `name`; `state` is good
    or candidate.
    """

    step: int
    cursor: int
    tier: str
    state: str
    name: str = ""
    snapshot: Snapshot | None = None


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What a resume found: the checkpoint's name, the guard's own state in it, and the self-check
    per component.
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
        store: the disk tier; None: there is none.
        recorder: gets a disk that fails, and one that works again.
        say: journals an event of this run, (kind, message, **data).
        gathered: every rank's value, by rank; a collective.
        alive: this rank gets ahead.
    """

    def __init__(
        self,
        settings: GuardConfig,
        *,
        state: TrainingState,
        store: CheckpointStore | None,
        recorder: Recorder,
        say: Callable[..., None],
        gathered: Callable[[Any], Sequence[Any]],
        alive: Callable[[], None],
    ) -> None:
        self.settings = settings
        self.ring = SnapshotRing(state, settings.snapshots.keep)
        self.store = store
        self.infos: tuple[SnapshotInfo, ...] = ()  # of both tiers, for the status
        self._recorder, self._say, self._gathered, self._alive = recorder, say, gathered, alive
        self._past = RunHistory()
        # (timeline, step) of a state with nothing bad before it
        self._born_good: tuple[int, int] | None = None
        self._since: int | None = None  # first step of an incident that is not over

    # -- copying -----------------------------------------------------------------------------------

    def begin(
        self, facts: Facts, *, past: RunHistory, good: bool = True, saved: bool = False
    ) -> None:
        """The first snapshot and checkpoint of this process, so that there always is something to
        go back to.

        Args:
            past: of the run; kept up to date by its owner.
            good: nothing has happened yet, or the checkpoint that was loaded is good.
            saved: this very state is on disk already.
        """
        self._past = past
        if good:
            present = facts(False)
            self._born_good = (present["timeline"], present["step"])
        saving = self.store is not None and not saved
        if saving or self.settings.snapshots.keep:
            snapshot = self._take(facts, checkpoint=saving)
            if good:
                snapshot.state = GOOD
            if saving:
                self._save(snapshot)
        self._tell()

    def after_step(
        self, step: int, *, is_good: Callable[[int], bool], facts: Facts, since: int | None = None
    ) -> None:
        """Confirm what enough healthy steps have followed; copy and save when it is time.

        Args:
            is_good: whether the state after so many updates is good; see `Controller.is_good`.
            since: the first step of an incident that is not over; None: there is none.
        """
        self.withdraw(since)
        changed = bool(self.ring.confirm(is_good))
        if self.store is not None:
            self.poll()
            for info in self.store.confirm(is_good):
                self._confirmed(info)
                changed = True
        if self.copies(step):
            save = self._saves(step)
            snapshot = self._take(facts, checkpoint=save)
            if save:
                self._save(snapshot)
            changed = True
        if changed:
            self._tell()

    def withdraw(self, since: int | None) -> None:
        """An incident that is not over began with step `since`: no state from there on is good, nor
        takes the place of a good one. None: there is no such incident."""
        self._since = since
        if since is None:
            return
        changed = bool(self.ring.withdraw(since))
        for info in self.store.withdraw(since) if self.store is not None else ():
            changed = True
            message = f"checkpoint {info.path} is a candidate again: the incident since step {since} is not over"
            self._say("checkpoint", message, path=info.path, state=CANDIDATE, cp_step=info.step)
        if changed:
            self._tell()

    def copies(self, step: int) -> bool:
        """Whether the state behind this step is copied, for the ring or for a checkpoint."""
        snapshots = self.settings.snapshots
        return self._saves(step) or (snapshots.keep > 0 and step % snapshots.every == 0)

    def _saves(self, step: int) -> bool:
        return self.store is not None and step % self.settings.checkpoint.every == 0

    def save_now(self, facts: Facts, *, suspect: bool = False) -> None:
        """A checkpoint of the present state, by command or as another try of one that failed."""
        if self.store is not None:
            self._save(self._take(facts, checkpoint=True), suspect=suspect)
            self._tell()

    @property
    def retry_due(self) -> bool:
        """On rank 0: a save has failed and it is time for another try, by all ranks together."""
        return self.store is not None and self.store.retry_due

    def _take(self, facts: Facts, *, checkpoint: bool) -> Snapshot:
        extra = facts(checkpoint)
        return self.ring.take(extra["step"], extra["cursor"], extra["timeline"], extra)

    @property
    def failed_save(self) -> int:
        """The number of this rank's last save that failed, for the reduction of the next step; 0:
        none.
        """
        return self.store.failure[0] if self.store is not None else 0

    def note_failures(self, serials: Sequence[int]) -> None:
        """`failed_save` of every rank, by rank: rank 0 does not wait for shares that will not
        come.
        """
        if self.store is not None:
            self.store.note_failures(serials)

    def _save(self, snapshot: Snapshot, *, suspect: bool = False) -> None:
        if self.store is not None:
            self.store.save(snapshot, identity=snapshot.extra.get("identity"), suspect=suspect)

    def _tell(self) -> None:
        disk = self.store.infos() if self.store is not None else []
        self.infos = (*disk, *self.ring.infos())

    # -- going back --------------------------------------------------------------------------------

    def target(
        self,
        cursor: int,
        *,
        to_step: int | None = None,
        before_step: int | None = None,
        candidates: bool = False,
        settled: Settled = never,
    ) -> Target | None:
        """The newest state that has passed no position from `cursor` on; of step `to_step` where
        that is given.

        With `before_step` it is older than that step as well, or the very first where there is none
        such.

        Good ones of the ring, good ones on disk, then candidates in the same order; with
        `candidates` these count as good from the first, and so do those that are `settled` (see
        `Controller.is_settled`). A collective wherever the ring does not do: all ranks agree on a
        checkpoint.
        """
        fits = Fits(cursor=cursor, to_step=to_step, before=before_step)
        for better in (False,) if candidates else (True, False):
            accepted = (
                (lambda state, step: state == GOOD or settled(step))
                if better
                else (lambda state, step: True)
            )
            found = self._in_ring(fits, accepted) or self._on_disk(fits, accepted)
            if found is not None:
                return found
        if before_step is None:
            return None
        return self.target(cursor, to_step=to_step, candidates=candidates, settled=settled)

    def _in_ring(self, fits: Fits, accepted: Accepted) -> Target | None:
        infos = [
            info
            for info in self.ring.infos()
            if fits(info.step, info.cursor) and accepted(info.state, info.step)
        ]
        chosen = choose_target(
            infos, max((info.step for info in infos), default=0) + 1, good_only=False
        )
        if chosen is None:
            return None
        snapshot = self.ring.get(chosen.step)
        return Target(
            step=chosen.step,
            cursor=chosen.cursor,
            tier="memory",
            state=chosen.state,
            snapshot=snapshot,
        )

    def _on_disk(self, fits: Fits, accepted: Accepted) -> Target | None:
        if self.store is None:
            return None

        def allowed(manifest: Manifest) -> bool:
            state = self._state_of(manifest)
            within = state in (GOOD, CANDIDATE) and fits(manifest.step, manifest.cursor)
            return within and accepted(state, manifest.step)

        selection = self._newest_valid(allowed)
        if selection.path is None or selection.manifest is None:
            return None
        step, at = selection.manifest.step, selection.manifest.cursor
        state = str(self._gathered(self._state_of(selection.manifest))[0])  # rank 0 knows it
        return Target(step=step, cursor=at, tier="disk", state=state, name=selection.path.name)

    def _newest_valid(self, allowed: Allowed) -> Selection:
        """What the store finds, with a journal line for each newer checkpoint that does not hold or
        is of another run: it says why."""
        assert self.store is not None
        selection = self.store.newest_valid(
            lambda manifest: self._why_foreign(manifest) or allowed(manifest)
        )
        for path, why in selection.refused:
            if path.name in selection.invalid:
                message = f"checkpoint {path.name} is not used: {why}"
                self._say("checkpoint", message, path=path.name, state=INVALID, reason=why)
        return selection

    def _why_foreign(self, manifest: Manifest) -> str:
        """Why a checkpoint that lies in the folder is none of this run; "" where it is."""
        return self._past.why_not_of_this_run(
            manifest.identity, timeline=manifest.timeline, step=manifest.step
        )

    def _refuse_foreign(self) -> None:
        """On rank 0: checkpoints of another run are named, and from then on they do not exist. They
        are not deleted.
        """
        assert self.store is not None
        store = self.store
        foreign = run_together(
            lambda: store.disown(self._why_foreign), self._gathered, world=store.world
        )
        for name, why in foreign.items():
            self._say(
                "checkpoint",
                f"checkpoint {name} is not used: {why}",
                path=name,
                state=FOREIGN,
                reason=why,
            )

    def _state_of(self, manifest: Manifest) -> str:
        """Good, candidate or suspect, as rank 0 knows it; its answer counts."""
        assert self.store is not None
        if not self._past.lives(timeline=manifest.timeline, step=manifest.step):
            return SUSPECT
        key = (manifest.timeline, manifest.step)
        states = [info.state for info in self.store.infos() if (info.timeline, info.step) == key]
        return states[-1] if states else CANDIDATE

    def restore(self, target: Target) -> dict[str, Any]:
        """Make the live state that of `target`; returns the guard's own part of it."""
        if target.snapshot is not None:
            return self.ring.restore(target.snapshot)
        assert self.store is not None
        return self.store.load(self.store.folder / target.name).extra

    def rolled_back(self, facts: Facts, target: Target) -> None:
        """The states after `target` belong to an abandoned timeline. To be loaded makes a state no
        better.
        """
        self.ring.drop_after(target.step)
        if target.snapshot is None and self.settings.snapshots.keep:
            self._take(facts, checkpoint=False).state = target.state
        self.first_suspect_step(target.step + 1)

    def first_suspect_step(self, step: int) -> None:
        """Checkpoints of `step` and later hold what went wrong; they are never chosen again."""
        if self.store is not None:
            for info in self.store.mark_suspect(step):
                self._suspected(info)
        self._tell()

    # -- the start and the end of a process --------------------------------------------------------

    def resume(self, past: RunHistory) -> Restored | None:
        """Load the newest valid checkpoint of the present timeline; None when there is none. A
        collective.
        """
        self._past = past
        if self.store is None:
            return None
        self._refuse_foreign()
        self.store.adopt(dict.fromkeys(past.good, GOOD) | dict.fromkeys(past.suspects, SUSPECT))
        # A crash between a rollback and its last journal line must not leave one of the abandoned
        # stretch good.
        gone = [i for i in self.store.infos() if not past.lives(timeline=i.timeline, step=i.step)]
        self.store.adopt({info.path: SUSPECT for info in gone})
        selection = self._newest_valid(
            lambda manifest: (
                self._state_of(manifest) != SUSPECT or "its stretch of the run was given up"
            )
        )
        if selection.path is None:
            return None
        loaded = self.store.load(selection.path)
        name = selection.path.name
        return Restored(name=name, extra=loaded.extra, good=name in past.good, check=loaded.checks)

    def finish(self, facts: Facts, *, onset: int | None = None) -> str:
        """Leave a checkpoint of the last state, however the run ends. A collective, in which no
        rank waits for another.

        Args:
            onset: first step of an incident that nothing was done about: what holds it is suspect
            from its commit on.

        Returns:
            Why there is no checkpoint of the last state; "" when there is one.
        """
        if self.store is None:
            return ""
        if onset is not None:
            self.first_suspect_step(onset)
        suspect = onset is not None and onset <= facts(False)["step"]
        why = self._written()
        for _ in range(FINAL_TRIES):
            if self._gathered(self._on_disk_now(facts))[0]:
                return ""
            if self._gathered(self.store.busy)[0]:  # it would wait for the one that takes too long
                return why
            self.save_now(facts, suspect=suspect)
            why = self._written()
        return "" if self._gathered(self._on_disk_now(facts))[0] else why

    def _written(self) -> str:
        """Until no rank has anything left to write, or launch.save_timeout have passed; why the
        last save failed.
        """
        assert self.store is not None
        limit = self.settings.launch.save_timeout
        deadline = time.monotonic() + limit
        while True:
            reports = self._gathered(
                (self.store.busy, *self.store.failure, time.monotonic() > deadline)
            )
            self.note_failures([serial for _, serial, _, _ in reports])
            if reports[0][3] or not any(busy for busy, *_ in reports):
                break
            self._alive()
            time.sleep(MEETING_SECONDS)
        self.poll()
        if any(busy for busy, *_ in reports):
            return f"it was not written within launch.save_timeout = {limit:g}"
        return _first_reason([(serial, why) for _, serial, why, _ in reports])

    def _on_disk_now(self, facts: Facts) -> bool:
        """On rank 0: whether the present state is a committed checkpoint."""
        assert self.store is not None
        present = facts(False)
        key = (present["step"], present["timeline"])
        return any(
            (info.step, info.timeline) == key and info.state != INVALID
            for info in self.store.infos()
        )

    def close(self) -> None:
        if self.store is not None:
            self.store.close()

    # -- the record --------------------------------------------------------------------------------

    def poll(self) -> None:
        """Journal what the background thread has done since the last look; prune."""
        if self.store is None:
            return
        events = self.store.poll()
        for event in events:
            suspect = (
                "it holds steps of an incident that was not resolved"
                if event.state == SUSPECT
                else ""
            )
            reason = event.reason or suspect
            self._say(
                "checkpoint",
                f"checkpoint {event.name or f'of step {event.step}'}: {event.state}"
                + (f" ({reason})" if reason else ""),
                path=event.name,
                state=event.state,
                cp_step=event.step,
                bytes=event.bytes,
                seconds=round(event.seconds, 3),
                reason=reason,
            )
            if event.state == CANDIDATE:
                self._committed(event)
                if self._since is not None:
                    self.store.prune(event.step, since=self._since)
        if events:
            failed = next(
                (event.reason for event in reversed(events) if event.state == "failed"), ""
            )
            if self.store.degraded:
                self._recorder.note_failing("checkpoint", f"checkpoint: {failed}")
            else:
                self._recorder.note_working("checkpoint")
            self._tell()

    def _committed(self, event: CheckpointEvent) -> None:
        """A checkpoint that was being written while its timeline was given up is suspect from the
        start.

        It may be gone already: a prune that was asked for between its commit and this look did not
        keep it.
        """
        assert self.store is not None
        if not self._past.lives(timeline=event.timeline, step=event.step):
            for info in self.store.adopt({event.name: SUSPECT}):
                self._suspected(info)
        elif self._born_good == (event.timeline, event.step):
            for info in self.store.adopt({event.name: GOOD}):
                self._confirmed(info)

    def _confirmed(self, info: SnapshotInfo) -> None:
        assert self.store is not None
        self._say(
            "checkpoint",
            f"checkpoint {info.path} is good",
            path=info.path,
            state=GOOD,
            cp_step=info.step,
        )
        self.store.prune(info.step, since=self._since)

    def _suspected(self, info: SnapshotInfo) -> None:
        self._say(
            "checkpoint",
            f"checkpoint {info.path} is suspect: it holds a stretch that was given up",
            path=info.path,
            state=SUSPECT,
            cp_step=info.step,
        )


def _first_reason(failures: Sequence[tuple[int, str]]) -> str:
    """Why the last save failed, of what each rank says of its last one, by rank: (number of the
    save, reason).
    """
    newest = max(serial for serial, _ in failures)
    reasons = {rank: why for rank, (serial, why) in enumerate(failures) if serial == newest and why}
    own = reasons.pop(0, "")
    if own and not own.startswith("rank "):
        return own  # the others may have failed because rank 0 had removed the folder
    return (
        next((f"rank {rank}: {why}" for rank, why in sorted(reasons.items())), own)
        or "the reason is not known"
    )
