"""Which positions a rollback leaves out, and how far it goes back. Pure.

A function of the onset and of applied batches alone, never of which snapshot is at hand: the data
that a run meets must not depend on what a crash has left of its ring.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from msgspec import Struct

from guardrail.core.guard_options import GuardOptions
from guardrail.core.records import Observation


class Applied(Struct, frozen=True, gc=False):
    """A batch whose update was applied."""

    step: int
    first: int
    last: int


def window(
    onset: int,
    obs: Observation,
    *,
    history: Sequence[Applied],
    settings: GuardOptions,
    overflows: int = 0,
    widened: int = 1,
) -> tuple[tuple[int, int], int]:
    """(Positions [first, last) that a rollback leaves out, first step whose batch is among them).

    Args:
        obs: of the rejected step.
        history: the last applied batches, oldest first.
        overflows: of the loss scale in a row, up to this step.
        widened: by how much the window is longer than the plain one, half of that before it and
            half behind, as far as `window_max` allows.
    """
    span = min([obs.last - obs.first, *(batch.last - batch.first for batch in history)])
    index = bisect_left(history, onset, key=lambda batch: batch.step) - settings.skip_before
    behind = settings.skip_after
    if widened > 1:
        begin = history[max(0, index)].first if history and index < len(history) else obs.first
        plain = max(1, round((obs.last - begin) / span)) + behind
        more = max(0, min(widened * plain, settings.max_window) - plain)
        index, behind = index - more // 2, behind + more - more // 2
    before = obs.step
    if history and index < len(history):
        batch = history[max(0, index)]
        first, before = batch.first, batch.step
    elif history:
        first = history[-1].last
    else:
        # Nothing was ever applied: the rejected batches reach back to about here, and are left out
        # already.
        passed = obs.streak + max(0, overflows - 1)
        first = max(0, obs.first - passed * (obs.last - obs.first))
    return (min(first, obs.first), obs.last + behind * span), before
