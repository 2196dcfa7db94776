"""Whether the same pass gives the same bits twice, measured by two passes at the start of a run.

A flag does not prove it. `torch.use_deterministic_algorithms` covers neither NCCL nor kernels of
other packages, and it is also set where torch only warns.
"""

from __future__ import annotations

from collections.abc import Sequence

from guardrail.core.records.record import Record
from guardrail.decide.hardware_fault import (
    NONDETERMINISTIC,
    RankNumbers,
    find_differing_ranks,
    is_same_number,
)


class Repeatability(Record, frozen=True, kw_only=True):
    """What two passes of one batch from one state have shown.

    Attributes:
        kernels: loss and gradient of every rank, before the reduction, had the same bits.
        reduction: the same for the gradient after the reduction, and for the sums over the ranks.
            None: the kernels differ, so nothing is known of it.
    """

    kernels: bool
    reduction: bool | None = None

    @property
    def tolerance(self) -> float:
        """The relative difference within which two passes count as the same."""
        if self.kernels and self.reduction:
            return 0.0
        return NONDETERMINISTIC

    def sentence(self) -> str:
        """Return what was found, for the journal."""
        if not self.kernels:
            return (
                "two passes of the first batch gave different bits: kernels of this model are not "
                f"deterministic. A replay may differ by {NONDETERMINISTIC:.0%} before hardware is "
                "called the cause"
            )
        if not self.reduction:
            return (
                "two passes of the first batch gave the same bits on each rank, and different ones "
                "after the reduction between the ranks. A replay may differ by "
                f"{NONDETERMINISTIC:.0%} before hardware is called the cause"
            )
        return "two passes of the first batch gave the same bits on every rank"


def compare_passes(
    first: Sequence[RankNumbers],
    again: Sequence[RankNumbers],
    *,
    sums: tuple[Sequence[float], Sequence[float]],
) -> Repeatability:
    """Return what two passes show.

    Args:
        first, again: the own numbers of each rank.
        sums: the reduced numbers of both passes.
    """
    differing = find_differing_ranks(first, again, 0.0)
    if differing is not None:
        _, field, _ = differing
        if field != "after":
            return Repeatability(kernels=False)
    sums_equal = all(is_same_number(*values) for values in zip(*sums, strict=True))
    return Repeatability(kernels=True, reduction=differing is None and sums_equal)
