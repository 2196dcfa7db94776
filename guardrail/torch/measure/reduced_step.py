"""The numbers of one step after the reduction, equal on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from guardrail.core.records.signals import EMBED_GRAD_NORM, EMBED_SHARE, GRAD_NORM, LOSS, LOSS_SCALE


@dataclass(frozen=True, kw_only=True, slots=True)
class ReducedStep:
    """The sums of one step, equal on every rank.

    Attributes:
        loss: mean over the label tokens of the global batch, nats; NaN if it has no label.
        tokens: label tokens of the global batch.
        grad_norm, embed_grad_norm: L2 norms of the gradient of the mean loss, before clipping.
        embed_share: embed_grad_norm^2 / grad_norm^2.
        scale: factor that turns the accumulated gradients into the gradient of the mean loss.
        loss_scale: factor by which the loss was multiplied before backward; None: no loss scale.
        overflow: there is a loss scale, every loss is finite, and a gradient is not.
        nonfinite_loss, nonfinite_grad: ranks that computed NaN or Inf themselves (before the
            reduction, where that is known).
        step_times: by rank, seconds that it worked in this step, without waiting for other ranks
            (see `RankTimer`).
        command_kind: 0, or 1 + index in COMMANDS; command_value its argument.
        stop: number of ranks that were asked to stop.
        incomplete: number of ranks that skipped micro-batches because of it.
        failed_saves: by rank, the number of its last save that failed, counted from 1; 0: none.
        graded: number of ranks on which some parameter has a gradient.
        lacking: number of ranks on which a parameter has no gradient that had one before.
        further: signal -> value of block norms and extra signals; a number that no rank gave is
            missing.
    """

    loss: float
    tokens: int
    grad_norm: float
    embed_grad_norm: float
    embed_share: float
    scale: float
    loss_scale: float | None
    overflow: bool
    nonfinite_loss: tuple[int, ...]
    nonfinite_grad: tuple[int, ...]
    step_times: tuple[float, ...]
    command_kind: int
    command_value: float
    stop: int
    incomplete: int
    failed_saves: tuple[int, ...] = ()
    graded: int = 1
    lacking: int = 0
    further: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_request(self) -> bool:
        """Whether a command or a stop request came with the step."""
        return bool(self.command_kind or self.stop)

    def signals(self) -> dict[str, float]:
        """Return signal -> value, as detectors read them."""
        signals = {
            LOSS: self.loss,
            GRAD_NORM: self.grad_norm,
            EMBED_GRAD_NORM: self.embed_grad_norm,
            EMBED_SHARE: self.embed_share,
        }
        if self.loss_scale is not None:
            signals[LOSS_SCALE] = self.loss_scale
        signals.update(self.further)
        return signals
