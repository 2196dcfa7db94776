"""Apply an update or skip it: a real branch, never a multiplication by zero (0 x NaN is NaN)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from guardrail.core.errors import UsageError
from guardrail.torch.measure.gradient_norms import to_local
from guardrail.torch.measure.reduced_step import ReducedStep
from guardrail.torch.state import foreach

# The optimizer state that sums up past gradients, in torch's optimizers and those with equal names.
MOMENTS = frozenset(
    {
        "step",
        "exp_avg",
        "exp_avg_sq",
        "max_exp_avg_sq",
        "exp_inf",
        "momentum_buffer",
        "square_avg",
        "grad_avg",
        "sum",
    }
)


class Gate:
    """The only place where an optimizer is stepped.

    Args:
        optimizers: torch.optim optimizers over `parameters`.
        parameters: all trainable parameters.
        embedding: those of them that `embed_alpha` shrinks.
        clip: largest global norm of an applied gradient (0: no clipping), or a function that
            returns it from the norm of each applied update. If the function has a state, it must be
            part of the scheduler's state.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        parameters: Sequence[nn.Parameter],
        embedding: Sequence[nn.Parameter],
        clip: float | Callable[[float], float],
    ) -> None:
        self.optimizers = list(optimizers)
        self.parameters = list(parameters)
        self.embedding = list(embedding)
        self.clip = clip
        self._ours: set[int] = set()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                self._ours.update(id(parameter) for parameter in group["params"])
        self._stepping = False
        self._hook: RemovableHandle | None = None

    def open(self) -> None:
        """Refuse, until `close`, every step on these parameters that is not taken here."""
        if self._hook is None:
            self._hook = register_optimizer_step_pre_hook(self._refuse_step)

    def close(self) -> None:
        """Let the loop step its optimizers again. May be called again."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _refuse_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Raise UsageError before any optimizer of these parameters steps outside of the gate."""
        if self._stepping:
            return
        for group in optimizer.param_groups:
            if any(id(parameter) in self._ours for parameter in group["params"]):
                raise UsageError(
                    f"the loop called {type(optimizer).__name__}.step() before the guard had "
                    "judged the step: step.finish(loss) steps the optimizer. "
                    "Remove optimizer.step() (or scaler.step) from the loop."
                )

    def factor(self, reduced: ReducedStep, *, embed_alpha: float = 1.0, clip: float = 1.0) -> float:
        """Return the factor of all gradients: token weighting and clipping in one pass.

        Call it once per applied update. Clipping uses torch's rule, min(1, clip / (norm + 1e-6)),
        with the norm after embedding shrink.

        Args:
            embed_alpha: factor of the embedding gradients.
            clip: factor of the clip limit.
        """
        norm = reduced.grad_norm
        if embed_alpha != 1.0:
            rest = max(0.0, norm**2 - reduced.embed_grad_norm**2)
            norm = (rest + (embed_alpha * reduced.embed_grad_norm) ** 2) ** 0.5
        limit = clip * (self.clip(norm) if callable(self.clip) else self.clip)
        coefficient = 1.0
        if limit:
            coefficient = limit / (norm + 1e-6)
        # A NaN coefficient stays NaN: only the modes `advise` and `off` apply such a step.
        if coefficient >= 1.0:
            coefficient = 1.0
        return reduced.scale * coefficient

    def factor_on_device(self, norm: Tensor, scale: Tensor, *, clip: float = 1.0) -> Tensor:
        """Return `factor` by the same operations, without waiting for the device: float64, 0-d.

        Not for a `clip` that is a function.
        """
        limit = 0.0
        if isinstance(self.clip, int | float):
            limit = clip * self.clip
        if not limit:
            return scale
        return scale * (torch.full_like(norm, limit) / (norm + 1e-6)).clamp(max=1.0)

    @torch.no_grad()
    def apply(
        self,
        factor: float | Tensor,
        *,
        lr_factor: float = 1.0,
        embed_alpha: float = 1.0,
        unless: Tensor | None = None,
    ) -> None:
        """Scale the gradients, step every optimizer at lr * lr_factor, drop the gradients.

        Args:
            factor: of all gradients, a number or a tensor on the device, 0-d.
            unless: float32, 0-d, on the device: if it is 1, the optimizers change nothing.
        """
        if embed_alpha != 1.0:
            self._scale(self.embedding, embed_alpha)
        if isinstance(factor, Tensor) or factor != 1.0:
            self._scale(self.parameters, factor)
        with self._own_step(), self._rates_times(lr_factor):
            for optimizer in self.optimizers:
                if unless is None:
                    optimizer.step()
                else:
                    foreach.step_unless(optimizer, unless)
        self.drop_gradients()

    @contextlib.contextmanager
    def _own_step(self) -> Iterator[None]:
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    @contextlib.contextmanager
    def _rates_times(self, factor: float) -> Iterator[None]:
        """Multiply the learning rates by `factor` inside of the block; restore them in any case."""
        groups: list[dict[str, Any]] = []
        for optimizer in self.optimizers:
            groups += optimizer.param_groups
        rates = [group["lr"] for group in groups]
        try:
            if factor != 1.0:
                for group, rate in zip(groups, rates, strict=True):
                    group["lr"] = rate * factor
            yield
        finally:
            if factor != 1.0:
                for group, rate in zip(groups, rates, strict=True):
                    group["lr"] = rate

    @torch.no_grad()
    def reset_moments(self) -> None:
        """Set to zero what the optimizers know of past gradients, and their count of updates.

        With another count, Adam's bias correction would take the zeros for measurements and make
        the next updates several times too large.
        """
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                for name in MOMENTS & state.keys():
                    value = state[name]
                    if isinstance(value, torch.Tensor):
                        value.zero_()
                    elif isinstance(value, int | float):
                        state[name] = type(value)(0)

    def drop_gradients(self) -> None:
        """Drop the accumulated gradients, so that a rejected window adds nothing to the next."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        for parameter in self.parameters:
            parameter.grad = None

    @staticmethod
    def _scale(parameters: Sequence[nn.Parameter], factor: float | Tensor) -> None:
        gradients = [to_local(p.grad) for p in parameters if p.grad is not None]
        if not gradients:
            return
        if isinstance(factor, Tensor):
            factor = factor.to(gradients[0].dtype)
        foreach.multiply_tensors(gradients, factor)


def can_skip_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a step of the optimizer can be skipped on the device, as fused ones can."""
    return foreach.reads_found_inf(optimizer)
