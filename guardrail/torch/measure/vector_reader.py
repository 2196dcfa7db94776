"""Reads the numbers of a step from the reduced vector, on the host or on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from guardrail.core.records.signals import (
    EMBED_GRAD_NORM,
    EMBED_SHARE,
    GRAD_NORM,
    LOSS,
    UPDATE_NORM,
)
from guardrail.torch.measure.packed_vector import (
    FLAGS,
    HEAD,
    PER_RANK,
    PackedVector,
)
from guardrail.torch.measure.reduced_step import ReducedStep


class VectorReader:
    """Unpacks what `StepReduction.start` returns.

    Args:
        layout: of the vector.
        block_signals: names of the gradient norms of the blocks.
        named: names of the further numbers; `UPDATE_NORM` is the last one if it is among them.

    Attributes:
        signal_names: names of the values that `unpack_on_device` returns, in its order.
    """

    def __init__(
        self, layout: PackedVector, block_signals: Sequence[str], named: Sequence[str]
    ) -> None:
        self._layout = layout
        self._block_signals = tuple(block_signals)
        self._named = tuple(named)
        usual = (LOSS, GRAD_NORM, EMBED_GRAD_NORM, EMBED_SHARE)
        self.signal_names = (*usual, *self._block_signals, *self._named)

    def unpack(
        self, values: list[float], nominal_tokens: float | None, loss_scale: float | None
    ) -> ReducedStep:
        """Return the numbers of the packed vector, which is on the host.

        Args:
            nominal_tokens: divisor of the losses before backward, summed over the ranks: the
                gradients are those of loss_sum / nominal_tokens. None: they are those of the mean
                already.
            loss_scale: factor of the losses before backward, equal on all ranks; None: none.
        """
        sums = dict(zip(HEAD, values, strict=False))
        layout = self._layout
        tokens = sums["tokens"]
        loss = float("nan")
        if tokens:
            loss = sums["loss_sum"] / tokens
        scale = 1.0
        if nominal_tokens is not None and tokens:
            scale = nominal_tokens / tokens
        if loss_scale:
            scale /= loss_scale
        # After the reduction every rank has the bad gradient. The flags from before the reduction
        # name the rank that made it.
        nonfinite_grad = layout.flagged_ranks(values, "nonfinite_local")
        if not nonfinite_grad:
            nonfinite_grad = layout.flagged_ranks(values, "nonfinite_grad")
        nonfinite_loss = layout.flagged_ranks(values, "nonfinite_loss")
        failed_saves = layout.read_ranks(values, "failed_save")
        roots = values[layout.length :]
        return ReducedStep(
            loss=loss,
            tokens=int(tokens),
            grad_norm=roots[0] * scale,
            embed_grad_norm=roots[1] * scale,
            embed_share=_share(sums["embed_sq"], sums["grad_sq"]),
            scale=scale,
            loss_scale=loss_scale,
            overflow=loss_scale is not None and bool(nonfinite_grad) and not nonfinite_loss,
            nonfinite_loss=nonfinite_loss,
            nonfinite_grad=nonfinite_grad,
            step_times=layout.read_ranks(values, "step_time"),
            command_kind=int(sums["command_kind"]),
            command_value=sums["command_value"],
            stop=int(sums["stop"]),
            incomplete=int(sums["incomplete"]),
            failed_saves=tuple(int(serial) for serial in failed_saves),
            graded=int(sums["graded"]),
            lacking=int(sums["lacking"]),
            further=self._unpack_further(values, roots, scale),
        )

    def _unpack_further(
        self, values: list[float], roots: list[float], scale: float
    ) -> dict[str, float]:
        """Return block norms and further numbers by name; a number that no rank gave is missing."""
        further = {name: roots[2 + i] * scale for i, name in enumerate(self._block_signals)}
        for index, name in enumerate(self._named):
            slot = self._layout.named_slot(index)
            total, ranks = values[slot], values[slot + 1]
            if not ranks:
                continue
            if name == UPDATE_NORM:
                further[name] = roots[-1]
            else:
                further[name] = total / ranks
        return further

    def unpack_on_device(
        self, vector: Tensor, nominal_tokens: float | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute what `unpack` computes, by the same operations, without waiting for the device.

        Only for a loss without a loss scale.

        Returns:
            (values of `signal_names`; which of them are known; whether the step is finite, has
            labels and is complete, 0-d; the scale, 0-d). Flags are bool, numbers as in the vector.
        """
        layout = self._layout
        head = dict(zip(HEAD, vector[: len(HEAD)].unbind(), strict=True))
        tokens, grad_sq, embed_sq = head["tokens"], head["grad_sq"], head["embed_sq"]
        scale = torch.ones_like(tokens)
        if nominal_tokens is not None:
            # torch computes number / tensor as number * (1 / tensor): another last bit.
            scale = torch.full_like(tokens, nominal_tokens) / tokens
        roots = vector[layout.length :]
        norms = roots[: 2 + len(self._block_signals)] * scale
        usual = [head["loss_sum"] / tokens, norms[0], norms[1], embed_sq / grad_sq]
        pairs = vector[layout.named_start : layout.ranks_start].view(-1, 2)
        totals, given = pairs.unbind(1)
        further = totals / given
        if UPDATE_NORM in self._named:
            further = torch.cat([further[:-1], roots[-1:]])
        values = torch.cat([torch.stack(usual), norms[2:], further])
        known = torch.ones_like(values, dtype=torch.bool)
        known[len(values) - len(given) :] = given > 0
        by_rank = vector[layout.ranks_start : layout.length].view(-1, len(PER_RANK))
        flags = by_rank[:, : len(FLAGS)]
        is_sound = (tokens > 0) & (head["incomplete"] == 0) & (flags == 0).all()
        return values, known, is_sound, scale


def _share(part: float, total: float) -> float:
    """Return part / total: 0 for a total of 0, NaN for one that is NaN."""
    if total > 0:
        return part / total
    return 0.0 if total == 0 else float("nan")
