"""Threads of the supervisor that may fail or hang while training continues: notifications,
trackers, reports.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator

from guardrail.core.events.run_state import Note
from guardrail.launch.notify import Notifier
from guardrail.launch.supervisor_journal import SupervisorJournal
from guardrail.launch.supervisor_settings import SupervisorSettings
from guardrail.rundir.local_ranks import LocalRanks
from guardrail.rundir.run_directory import RunDirectory
from guardrail.trackers.base import Tracker
from guardrail.trackers.sink import follow_run

PUBLISH_SECONDS = 0.4  # between two looks at the reports of the ranks
TRACKER_SECONDS = 60.0  # that a tracker may take to write the last rows


class SideThreads:
    """Starts the threads of one supervisor. Each method is a context: the thread ends with it."""

    def __init__(
        self,
        settings: SupervisorSettings,
        run: RunDirectory,
        ranks: LocalRanks,
        journal: SupervisorJournal,
    ) -> None:
        self._settings, self._run, self._ranks, self._journal = settings, run, ranks, journal

    @contextlib.contextmanager
    def send_notifications(self) -> Iterator[None]:
        """Send the events of the run, on the first node."""
        if not self._settings.is_first_node:
            yield
            return
        missing = self._settings.missing_secrets
        if missing:
            message = (
                f"{', '.join(missing)}: the secret is masked in the run directory and was not "
                "given again. No notification is sent this way."
            )
            self._journal.record(Note(message=message, data={"text": message}))
        notify = self._settings.notify
        if not (notify.command or notify.webhook or notify.apprise):
            yield
            return
        notifier = Notifier(
            notify,
            self._run,
            record=self._journal.record,
            spawn=self._ranks.spared,
            since=time.time(),
        )
        with run_thread("notifier", notifier.run, seconds=4 * notify.seconds):
            yield

    @contextlib.contextmanager
    def publish_reports(self) -> Iterator[None]:
        """Keep ranks/node-NAME.json up to date.

        On a thread: a file system that hangs must not stop the supervisor from watching the ranks.
        """
        with run_thread("reports", self._publish_reports, seconds=5.0):
            yield

    def _publish_reports(self, stop: threading.Event) -> None:
        while not stop.wait(PUBLISH_SECONDS):
            self._ranks.publish()

    @contextlib.contextmanager
    def feed_trackers(self) -> Iterator[None]:
        """Feed each tracker on its own thread while the ranks run."""
        with contextlib.ExitStack() as threads:
            for tracker in self._settings.trackers:
                feed = functools.partial(self._feed_tracker, tracker)
                threads.enter_context(run_thread(tracker.name, feed, seconds=TRACKER_SECONDS))
            yield

    def _feed_tracker(self, tracker: type[Tracker], stop: threading.Event) -> None:
        """Feed one tracker until `stop`. If it fails, the journal notes it and training continues."""
        try:
            follow_run(tracker(self._run), stop=stop)
        except Exception as error:
            message = f"{tracker.output} are no longer written: {error!r}"
            self._journal.record(Note(message=message, data={"text": tracker.name}))


@contextlib.contextmanager
def run_thread(
    name: str, work: Callable[[threading.Event], None], *, seconds: float
) -> Iterator[None]:
    """Call `work` on a thread until the block is left.

    Then its event is set, and the block waits at most `seconds` for it.
    """
    stop = threading.Event()
    thread = threading.Thread(target=work, args=(stop,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=seconds)
