"""16-bit weights that an update does not change, because it is smaller than their rounding.

Compared in a sample of elements, after 4, 8, 16, ... 1,024 updates, so it costs almost nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from guardrail.torch.measure.gradient_norms import to_local

HALVES = (torch.float16, torch.bfloat16)
FIRST, LAST = 4, 1024  # updates after which the first and the last sample is taken
TENSORS, ELEMENTS = 8, 256  # sampled tensors, the largest ones, and elements of each
STUCK = 0.9  # share of unchanged elements from which on rounding is the reason


class HalfWeights:
    """Samples the 16-bit parameters of this rank.

    Args:
        parameters: trained ones, sharded or not.
        apart: those of them of which most elements get no gradient in a step: embeddings.

    Attributes:
        span: number of updates between the two samples of the last comparison.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], *, apart: Collection[nn.Parameter]
    ) -> None:
        excluded = {id(parameter) for parameter in apart}
        halves = [p for p in parameters if to_local(p).dtype in HALVES and id(p) not in excluded]
        self._parameters = sorted(halves, key=lambda p: to_local(p).numel(), reverse=True)[:TENSORS]
        self._before: list[Tensor] = []
        self._updates = 0
        self.span = 0
        self._next = FIRST

    @property
    def dtype(self) -> str:
        """Type of the sampled parameters; "" if there are none."""
        if not self._parameters:
            return ""
        return str(self._parameters[0].dtype).removeprefix("torch.")

    @torch.no_grad()
    def count_update(self) -> float | None:
        """Return the share of elements that updates have not changed, if it is too large.

        Call it after each applied update. The share is that of the second half of all updates so
        far. It is returned once. It waits for the device when a sample is compared.
        """
        self._updates += 1
        if not self._parameters or self._updates != self._next or self._next > LAST:
            return None
        self._next *= 2
        now = [_take_sample(to_local(parameter)) for parameter in self._parameters]
        before, self._before = self._before, now
        if not before:
            return None
        self.span = self._updates // 2
        same = sum(int((old == new).sum()) for old, new in zip(before, now, strict=True))
        share = same / max(1, sum(sample.numel() for sample in now))
        if share < STUCK:
            return None
        self._next = LAST + 1
        return share


def _take_sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten()
    return flat[:: max(1, flat.numel() // ELEMENTS)][:ELEMENTS].clone()
