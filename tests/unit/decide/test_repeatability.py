"""Whether two passes gave the same bits, and what a replay may then differ by."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest

from guardrail.decide.hardware_fault import NONDETERMINISTIC, RankNumbers
from guardrail.decide.repeatability import Repeatability, compare_passes


@dataclass(frozen=True)
class Pass:
    """The numbers of one pass on two ranks."""

    loss_sum: float = 31.5
    before: float = 2.25
    after: float = 1.5
    reduced: float = 3.0

    def ranks(self) -> list[RankNumbers]:
        healthy = RankNumbers(loss_sum=30.0, before=2.0, after=1.5)
        own = RankNumbers(loss_sum=self.loss_sum, before=self.before, after=self.after)
        return [healthy, own]


def compare(one: Pass, other: Pass) -> Repeatability:
    return compare_passes(one.ranks(), other.ranks(), sums=([one.reduced], [other.reduced]))


@pytest.mark.parametrize(
    ("field", "kernels", "reduction"),
    [
        ("loss_sum", False, None),
        ("before", False, None),
        ("after", True, False),
        ("reduced", True, False),
    ],
)
def test_one_last_bit_is_a_difference(field: str, kernels: bool, reduction: bool | None) -> None:
    one = Pass()
    other = replace(one, **{field: math.nextafter(getattr(one, field), math.inf)})
    found = compare(one, other)
    assert (found.kernels, found.reduction) == (kernels, reduction)
    assert found.tolerance == NONDETERMINISTIC


def test_the_same_bits_need_no_tolerance() -> None:
    for one in (Pass(), Pass(loss_sum=math.nan, after=math.inf)):
        found = compare(one, one)
        assert found == Repeatability(kernels=True, reduction=True)
        assert found.tolerance == 0.0
