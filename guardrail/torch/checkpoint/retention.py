"""Which checkpoints may go. A pure function of their steps and states."""

from __future__ import annotations

from collections.abc import Sequence

from guardrail.core.records import SnapshotInfo
from guardrail.torch.checkpoint.memory_snapshots import CANDIDATE, GOOD


def superfluous(
    infos: Sequence[SnapshotInfo], *, keep: int, now: int, delay: int, since: int | None = None
) -> list[SnapshotInfo]:
    """The checkpoints that nobody will need again, oldest first.

    Kept are the `keep` newest good ones; the newest good one from before `now - delay`, because
    trouble may be found that late, or, while there is none, the oldest good one; the oldest one
    after it, which ripens to take its place: without it the place would be that of the very first
    for ever; every candidate newer than the newest good one. Suspect and invalid ones are never
    chosen again; like everything else they stay until `keep` good ones exist, as the last resort of
    a person.

    While an incident is not over no state becomes good, for however long: of the candidates from
    its first step on the `keep` newest stay. They take the place of no other.

    Args:
        keep: good ones kept, at least 1.
        now: the present step.
        delay: longest time between the onset of trouble and its detection, in steps.
        since: the first step of an incident that is not over; None: there is none.
    """
    ordered = sorted(infos, key=lambda info: (info.timeline, info.step, info.path))
    if since is not None:
        within = [info for info in ordered if info.state == CANDIDATE and info.step >= since]
        going = within[:-keep]
        return [
            *going,
            *superfluous(
                [info for info in ordered if info not in going], keep=keep, now=now, delay=delay
            ),
        ]
    good = [info for info in ordered if info.state == GOOD]
    if not good or len(good) < keep:
        return []
    kept = good[-keep:]
    old = [info for info in good if info.step <= now - delay]
    kept.append(old[-1] if old else good[0])
    if old:
        kept += [info for info in good if info.step > now - delay][:1]
    newest = good[-1]
    kept += [
        info
        for info in ordered
        if info.state == CANDIDATE and (info.timeline, info.step) > (newest.timeline, newest.step)
    ]
    return [info for info in ordered if info not in kept]
