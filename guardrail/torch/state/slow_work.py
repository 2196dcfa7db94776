"""Waiting for slow work of another rank without a collective whose timeout could end the wait.

A collective fails once it has waited for `launch.collective_timeout`, however well the slow rank
does. So no rank waits inside one for a save or for the hashes of a checkpoint: that work runs on a
thread, and meanwhile all ranks meet in small collectives, each of which is answered at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

MEETING_SECONDS = 0.05  # between two meetings of ranks that wait
FIRST_SECONDS = 0.002  # before the first one: most work is done by then

T = TypeVar("T")
Gathered = Callable[[Any], Sequence[Any]]


def wait_together(
    done: Callable[[], bool], gathered: Gathered, *, pause: float = MEETING_SECONDS
) -> None:
    """Return on every rank once `done()` holds on every rank. A collective that is called again and
    again.

    Args:
        done: of this rank; answers at once.
        gathered: every rank's value, by rank; a collective.
        pause: seconds between two meetings.
    """
    while not all(gathered(done())):
        time.sleep(pause)


def run_together(work: Callable[[], T], gathered: Gathered, *, world: int) -> T:
    """Run `work` on every rank, each in its own time, and return this rank's result once all have
    done.

    Args:
        work: holds no collective; runs on a thread of its own, except where there is one rank only.
        gathered: every rank's value, by rank; a collective.

    Raises:
        Exception: what `work` raised on this rank, after all ranks have done.
    """
    if world == 1:
        return work()
    job = _Job(work)
    thread = threading.Thread(target=job.run, name="guardrail-slow-work", daemon=True)
    thread.start()
    thread.join(FIRST_SECONDS)
    wait_together(lambda: not thread.is_alive(), gathered)
    if job.error is not None:
        raise job.error
    result: T = job.result
    return result


class _Job:
    """The outcome of work that runs on another thread."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self._work()
        except BaseException as error:  # raised again on the thread that waits
            self.error = error
