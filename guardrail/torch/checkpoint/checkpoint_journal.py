"""Writes to the journal what happens to checkpoints, and deletes those that are not needed."""

from __future__ import annotations

from collections.abc import Callable

from guardrail.core.events.run_state import CheckpointChanged
from guardrail.core.records.status import SnapshotInfo
from guardrail.decide.run_history import RunHistory
from guardrail.rundir.recorder import Recorder
from guardrail.torch.checkpoint.checkpoint_index import CheckpointEvent
from guardrail.torch.checkpoint.disk_checkpoints import CheckpointStore
from guardrail.torch.checkpoint.snapshot_states import CANDIDATE, GOOD, SUSPECT


class CheckpointJournal:
    """Journal lines about the checkpoints of one run.

    Args:
        recorder: writes the lines, and learns whether the disk is failing.
        history: returns that of the run.

    Attributes:
        born_good: (timeline, step) of a state with nothing bad before it.
        since: first step of an incident that is not over.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        recorder: Recorder,
        history: Callable[[], RunHistory],
    ) -> None:
        self._store, self._recorder, self._history = store, recorder, history
        self.born_good: tuple[int, int] | None = None
        self.since: int | None = None

    def write_events(self) -> bool:
        """Write what the writer thread has done since the last call; return whether that is any.

        A commit also deletes what is not needed any more.
        """
        events = self._store.take_events()
        failure = ""
        for event in events:
            self._write_event(event)
            if event.state == CANDIDATE:
                self._set_state_of_committed(event)
                if self.since is not None:
                    self._store.prune(event.step, since=self.since)
            elif event.state == "failed":
                failure = event.reason
        if not events:
            return False
        if self._store.degraded:
            self._recorder.note_failing("checkpoint", f"checkpoint: {failure}")
        else:
            self._recorder.note_working("checkpoint")
        return True

    def _write_event(self, event: CheckpointEvent) -> None:
        reason = event.reason
        if not reason and event.state == SUSPECT:
            reason = "it holds steps of an incident that was not resolved"
        self._recorder.write(
            CheckpointChanged(
                path=event.name,
                state=event.state,
                cp_step=event.step,
                bytes=event.bytes,
                seconds=round(event.seconds, 3),
                reason=reason,
            )
        )

    def _set_state_of_committed(self, event: CheckpointEvent) -> None:
        """Set the state of a new checkpoint.

        It is suspect if its timeline was abandoned while it was written. It may be deleted already:
        a prune that was requested between its commit and this call did not keep it.
        """
        if not self._history().lives(timeline=event.timeline, step=event.step):
            for info in self._store.set_states({event.name: SUSPECT}):
                self._write_suspect(info)
        elif self.born_good == (event.timeline, event.step):
            for info in self._store.set_states({event.name: GOOD}):
                self._write_good(info)

    def confirm(self, is_good: Callable[[int], bool]) -> bool:
        """Make candidates good that are; return whether there are any."""
        confirmed = self._store.confirm(is_good)
        for info in confirmed:
            self._write_good(info)
        return bool(confirmed)

    def withdraw_good(self, since: int) -> bool:
        """Make good ones from the first step of an incident on candidates; return whether any."""
        withdrawn = self._store.withdraw_good(since)
        for info in withdrawn:
            line = CheckpointChanged.withdrawn(info.path, cp_step=info.step, since=since)
            self._recorder.write(line)
        return bool(withdrawn)

    def mark_suspect(self, from_step: int) -> None:
        """Make all from a step on suspect; they are never chosen again."""
        for info in self._store.mark_suspect(from_step):
            self._write_suspect(info)

    def _write_good(self, info: SnapshotInfo) -> None:
        line = CheckpointChanged(path=info.path, state=GOOD, cp_step=info.step)
        self._recorder.write(line)
        self._store.prune(info.step, since=self.since)

    def _write_suspect(self, info: SnapshotInfo) -> None:
        line = CheckpointChanged(path=info.path, state=SUSPECT, cp_step=info.step)
        self._recorder.write(line)
