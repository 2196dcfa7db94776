"""Which checkpoints may be deleted: a pure function of their steps and states."""

from __future__ import annotations

from collections.abc import Sequence

from guardrail.core.records.status import SnapshotInfo
from guardrail.torch.checkpoint.snapshot_states import CANDIDATE, GOOD


def find_superfluous(
    infos: Sequence[SnapshotInfo], *, keep: int, now: int, delay: int, since: int | None = None
) -> list[SnapshotInfo]:
    """Return the checkpoints that are not needed any more, oldest first.

    These are kept:

    - the `keep` newest good ones;
    - the newest good one from before `now - delay`, because an anomaly may be found that late; the
      oldest good one while there is none from before;
    - the oldest good one after that. It takes the other's place later; without it, that place
      would stay with the very first checkpoint for ever;
    - every candidate newer than the newest good one.

    Suspect and invalid ones are never chosen again. They stay, as all others do, until `keep` good
    ones exist: until then a user may need them.

    No state becomes good during an incident, however long it is. So the `keep` newest candidates
    from its first step on stay as well, and take the place of no other.

    Args:
        keep: good ones kept, at least 1.
        now: the present step.
        delay: longest time between the onset of an anomaly and its detection, in steps.
        since: the first step of an incident that is not over; None: there is none.
    """
    ordered = sorted(infos, key=lambda info: (info.timeline, info.step, info.path))
    if since is None:
        return _outside_incident(ordered, keep=keep, now=now, delay=delay)
    within = [info for info in ordered if info.state == CANDIDATE and info.step >= since]
    going = within[:-keep]
    others = [info for info in ordered if info not in going]
    return [*going, *_outside_incident(others, keep=keep, now=now, delay=delay)]


def _outside_incident(
    ordered: Sequence[SnapshotInfo], *, keep: int, now: int, delay: int
) -> list[SnapshotInfo]:
    good = [info for info in ordered if info.state == GOOD]
    if not good or len(good) < keep:
        return []
    kept = good[-keep:]
    old = [info for info in good if info.step <= now - delay]
    if old:
        kept.append(old[-1])
        kept += [info for info in good if info.step > now - delay][:1]
    else:
        kept.append(good[0])
    newest = (good[-1].timeline, good[-1].step)
    for info in ordered:
        if info.state == CANDIDATE and (info.timeline, info.step) > newest:
            kept.append(info)
    return [info for info in ordered if info not in kept]
