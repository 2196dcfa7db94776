"""Which positions a rollback skips, and how far it goes back. Pure.

A function of the onset and of applied batches alone, never of the snapshots that exist: which data
a run reads must not depend on what a crash has left of its ring.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from msgspec import Struct

from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.findings import Observation


class Applied(Struct, frozen=True, gc=False):
    """A batch whose update was applied."""

    step: int
    first: int
    last: int


def compute_rollback_window(
    onset: int,
    obs: Observation,
    *,
    history: Sequence[Applied],
    settings: GuardOptions,
    overflows: int = 0,
    widened: int = 1,
) -> tuple[tuple[int, int], int]:
    """Return the positions [first, last) to skip, and the first step whose batch is among them.

    Args:
        obs: of the rejected step.
        history: the last applied batches, oldest first.
        overflows: consecutive overflows of the loss scale up to this step.
        widened: factor of the window's length: half of the addition comes before it and half after
            it, as far as `max_window` allows.
    """
    span = min([obs.last - obs.first, *(batch.last - batch.first for batch in history)])
    index = bisect_left(history, onset, key=lambda batch: batch.step) - settings.skip_before
    after = settings.skip_after
    if widened > 1:
        begin = obs.first
        if history and index < len(history):
            begin = history[max(0, index)].first
        plain = max(1, round((obs.last - begin) / span)) + after
        more = max(0, min(widened * plain, settings.max_window) - plain)
        index, after = index - more // 2, after + more - more // 2
    before = obs.step
    if history and index < len(history):
        batch = history[max(0, index)]
        first, before = batch.first, batch.step
    elif history:
        first = history[-1].last
    else:
        # Nothing was ever applied. The rejected batches reach back to about here, and are skipped
        # already.
        rejected = obs.streak + max(0, overflows - 1)
        first = max(0, obs.first - rejected * (obs.last - obs.first))
    return (min(first, obs.first), obs.last + after * span), before
