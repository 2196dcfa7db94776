"""Whether a pass gave the same numbers twice; if not, which rank's hardware or kernels did not."""

from __future__ import annotations

import math
from collections.abc import Sequence

from guardrail.core.cause_evidence import CauseEvidence, SameBatch
from guardrail.core.records.record import Record
from guardrail.core.records.verdicts import Cause, Diagnosis

# Kernels that add in any order differ by 1e-3 at most (sums in bfloat16), and the smallest rejected
# jump is 8 % (detectors.build). Half of that is far from both.
NONDETERMINISTIC = 0.04
# As `SameBatch.where`: each rank repeats its own number, and the reduced one differs.
BETWEEN_RANKS = "in the reduction between the ranks"


class RankNumbers(Record, frozen=True, kw_only=True):
    """What one rank computed by itself in a pass.

    Attributes:
        loss_sum: of its token losses.
        before: sum of the norms of its gradients before the ranks reduced them; 0 on a single rank.
        after: squared norm of its gradients, or shards of them, after the reduction.
    """

    loss_sum: float
    before: float
    after: float
    host: str = ""


# What is compared, in this order: (field, name, factor of the tolerance).
_COMPARED = (
    ("loss_sum", "the loss", 1),
    ("before", "the gradient", 1),
    ("after", "the gradient after the reduction", 2),
)


def is_same_number(one: float, other: float, tolerance: float = 0.0) -> bool:
    """Return whether two numbers are equal, both NaN, or within a relative tolerance."""
    if one == other or (math.isnan(one) and math.isnan(other)):
        return True
    if not tolerance > 0 or not (math.isfinite(one) and math.isfinite(other)):
        return False
    return math.isclose(one, other, rel_tol=tolerance)


def find_differing_ranks(
    first: Sequence[RankNumbers], again: Sequence[RankNumbers], tolerance: float
) -> tuple[list[int], str, str] | None:
    """Return the ranks whose own numbers differ between two passes; None if there are none.

    What a rank computes before the reduction is its own. After the reduction, every rank has the
    wrong gradient of one. So the ranks are named by their numbers from before; by those from after
    only if the ones from before are equal everywhere.

    Returns:
        (ranks, field of `RankNumbers` that differs, its name).
    """
    pairs = list(zip(first, again, strict=True))
    for field, name, factor in _COMPARED:
        ranks: list[int] = []
        for rank, (one, other) in enumerate(pairs):
            values = getattr(one, field), getattr(other, field)
            if not is_same_number(*values, factor * tolerance):
                ranks.append(rank)
        if ranks:
            return ranks, field, name
    return None


def diagnose_hardware(
    first: Sequence[RankNumbers],
    again: Sequence[RankNumbers],
    tolerance: float,
    *,
    sums: tuple[float, float],
    passes: int,
) -> Diagnosis | None:
    """Return a diagnosis if a pass did not give the same numbers twice, else None.

    Args:
        sums: the reduced loss of both passes. If each rank's own numbers are equal and these are
            not, the reduction between the ranks is wrong.
    """
    text = "the same batch from the same state and RNG state gave another number"
    differing = find_differing_ranks(first, again, tolerance)
    if differing is None:
        if is_same_number(*sums, tolerance):
            return None
        return Diagnosis(
            cause=Cause.HARDWARE,
            reason=f"{text} {BETWEEN_RANKS}: loss {sums[0]:.6g}, then {sums[1]:.6g}",
            passes=passes,
            evidence=_not_repeated("loss", *sums, where=BETWEEN_RANKS),
        )
    ranks, field, name = differing
    worst = _find_worst(ranks, first, again, field)
    one, other = getattr(first[worst], field), getattr(again[worst], field)
    if field == "after":
        one, other = _root(one), _root(other)
    is_everyone = len(ranks) == len(first) > 1
    host = "" if is_everyone else first[worst].host
    where = "every rank" if is_everyone else "rank " + ", ".join(map(str, ranks))
    if host:
        where += f" ({host})"
    return Diagnosis(
        cause=Cause.HARDWARE,
        reason=f"{text} on {where}: {name} {one:.6g}, then {other:.6g}",
        rank=-1 if is_everyone else worst,
        host=host,
        passes=passes,
        evidence=_not_repeated(name.removeprefix("the "), one, other, where=where),
    )


def _find_worst(
    ranks: Sequence[int], first: Sequence[RankNumbers], again: Sequence[RankNumbers], field: str
) -> int:
    """Return the rank whose numbers differ most, relatively."""
    distances = [_distance(getattr(first[r], field), getattr(again[r], field)) for r in ranks]
    return ranks[distances.index(max(distances))]


def _not_repeated(signal: str, first: float, again: float, *, where: str) -> CauseEvidence:
    """Return the evidence of a pass that did not give the same numbers twice."""
    same_batch = SameBatch(signal=signal, repeated=False, first=first, again=again, where=where)
    return CauseEvidence(same_batch=same_batch)


def _distance(one: float, other: float) -> float:
    if not (math.isfinite(one) and math.isfinite(other)):
        return math.inf
    return abs(one - other) / max(abs(one), abs(other), 1e-300)


def _root(square: float) -> float:
    return math.sqrt(square) if square >= 0 else math.nan
