"""The checkpoint of the last state, at the end of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from guardrail.torch.checkpoint.disk_checkpoints import CheckpointStore
from guardrail.torch.checkpoint.memory_snapshots import Facts
from guardrail.torch.checkpoint.snapshot_states import INVALID
from guardrail.torch.state.slow_work import MEETING_SECONDS

MAX_TRIES = 3


class FinalSave:
    """Saves the last state and waits until it is on the disk. No rank waits inside a collective.

    Args:
        save: requests a checkpoint of the present state.
        write_events: writes the events of the store to the journal.
        gather: returns every rank's value, by rank; a collective.
        report_progress: reports that this rank is alive.
        timeout: seconds to wait for one save, `launch.save_timeout`.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        save: Callable[[], None],
        write_events: Callable[[], None],
        gather: Callable[[Any], Sequence[Any]],
        report_progress: Callable[[], None],
        timeout: float,
    ) -> None:
        self._store = store
        self._save, self._write_events = save, write_events
        self._gather, self._report_progress = gather, report_progress
        self._timeout = timeout

    def save(self, facts: Facts) -> str:
        """Save; return why there is no checkpoint of the last state, "" if there is one."""
        why = self._wait_until_written()
        for _ in range(MAX_TRIES):
            if self._gather(self._is_on_disk(facts))[0]:
                return ""
            if self._gather(self._store.busy)[0]:
                return why  # another try would wait for the save that takes too long
            self._save()
            why = self._wait_until_written()
        if self._gather(self._is_on_disk(facts))[0]:
            return ""
        return why

    def _wait_until_written(self) -> str:
        """Wait until no rank has anything left to write, or the timeout.

        Returns:
            Why the last save failed.
        """
        deadline = time.monotonic() + self._timeout
        while True:
            is_late = time.monotonic() > deadline
            reports = self._gather((self._store.busy, *self._store.failure, is_late))
            self._store.note_failures([serial for _, serial, _, _ in reports])
            is_any_busy = any(busy for busy, *_ in reports)
            if reports[0][3] or not is_any_busy:
                break
            self._report_progress()
            time.sleep(MEETING_SECONDS)
        self._write_events()
        if is_any_busy:
            return f"it was not written within launch.save_timeout = {self._timeout:g}"
        return _find_reason([(serial, why) for _, serial, why, _ in reports])

    def _is_on_disk(self, facts: Facts) -> bool:
        """Return, on rank 0, whether the present state is a committed checkpoint."""
        present = facts(False)
        key = (present["step"], present["timeline"])
        for info in self._store.infos():
            if (info.step, info.timeline) == key and info.state != INVALID:
                return True
        return False


def _find_reason(failures: Sequence[tuple[int, str]]) -> str:
    """Return why the last save failed.

    Args:
        failures: by rank, (number of its last save that failed, reason).
    """
    newest = max(serial for serial, _ in failures)
    reasons = {rank: why for rank, (serial, why) in enumerate(failures) if serial == newest and why}
    own = reasons.pop(0, "")
    if own and not own.startswith("rank "):
        return own  # the others may have failed because rank 0 had removed the folder
    for rank, why in sorted(reasons.items()):
        return f"rank {rank}: {why}"
    return own or "the reason is not known"
