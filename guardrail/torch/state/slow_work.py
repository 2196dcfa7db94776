"""Slow work of one rank, without a collective whose timeout could end the wait of the others.

A collective fails once it has waited for `launch.collective_timeout`, even if the slow rank makes
progress. So no rank waits inside one for a save or for the hashes of a checkpoint. That work runs
on a thread, and meanwhile all ranks meet in small collectives that each rank answers at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from guardrail.torch.state.device_thread import DeviceThread

MEETING_SECONDS = 0.05  # between two meetings of ranks that wait
FIRST_SECONDS = 0.002  # before the first one: most work is done by then

T = TypeVar("T")
Gather = Callable[[Any], Sequence[Any]]


def wait_together(
    is_done: Callable[[], bool], gather: Gather, *, pause: float = MEETING_SECONDS
) -> None:
    """Return on every rank once `is_done()` is true on every rank. Repeats a collective.

    Args:
        is_done: of this rank; answers at once.
        gather: returns every rank's value, by rank; a collective.
        pause: seconds between two meetings.
    """
    while not all(gather(is_done())):
        time.sleep(pause)


def run_together(work: Callable[[], T], gather: Gather, *, world: int) -> T:
    """Run `work` on every rank; return this rank's result once all ranks are done.

    Args:
        work: contains no collective; runs on a thread if there are several ranks.
        gather: returns every rank's value, by rank; a collective.

    Raises:
        Exception: what `work` raised on this rank, after all ranks are done.
    """
    if world == 1:
        return work()
    task = _Task(work)
    thread = DeviceThread(task.run, name="guardrail-slow-work")
    thread.start()
    thread.join(FIRST_SECONDS)
    wait_together(lambda: not thread.is_alive(), gather)
    if task.error is not None:
        raise task.error
    result: T = task.result
    return result


class _Task:
    """Work that runs on another thread, and its outcome."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self._work()
        except BaseException as error:  # raised again on the thread that waits
            self.error = error
