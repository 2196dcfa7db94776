"""The learning rate as a function of the step. Imports no torch."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from trainer.config.batch_ramp import BatchPlan
from trainer.config.recipe import OptimSection


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """Linear warm-up to `peak` at step `warmup`, then down to `floor` at step `total` in the given
    shape.

    cosine: half a cosine (Loshchilov & Hutter 2017); linear: a line; wsd: the peak up to step
    `decay`, then a line (warm-up, stable, decay: Hu et al. 2024); constant: the peak for ever.

    Calling it with a step (from 1) gives the learning rate of that update: a pure function, so
    nothing can be out of step with it after a resume. After `total` it stays at the floor.
    """

    peak: float
    floor: float
    warmup: int
    total: int
    shape: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    decay: int = 0

    @classmethod
    def from_section(
        cls, section: OptimSection, *, steps: int, warmup: int | None = None
    ) -> Schedule:
        """The schedule of a run of `steps` applied updates.

        Args:
            warmup: steps of it, as `warmup_steps` counts them; None: section.warmup_steps.
        """
        warmup = section.warmup_steps if warmup is None else warmup
        return cls(
            peak=section.lr,
            floor=section.lr * section.min_lr_share,
            warmup=warmup,
            total=steps,
            shape=section.schedule,
            decay=max(warmup, steps - round(section.decay_share * steps)),
        )

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * step / self.warmup
        if self.shape == "constant":
            return self.peak
        start = self.decay if self.shape == "wsd" else self.warmup
        if step >= self.total:
            return self.floor if self.total > self.warmup else self.peak
        if step <= start:
            return self.peak
        progress = (step - start) / (self.total - start)
        left = 0.5 * (1 + math.cos(math.pi * progress)) if self.shape == "cosine" else 1 - progress
        return self.floor + (self.peak - self.floor) * left


def warmup_steps(
    section: OptimSection, *, steps: int, plan: BatchPlan, sequence_length: int
) -> int:
    """Steps of the warm-up, however it is given.

    Args:
        steps: of the whole run.
        plan: the batch size by step; under a ramp the same tokens take more steps.
        sequence_length: tokens of a sample.
    """
    if section.warmup_tokens:
        return plan.steps_for(section.warmup_tokens / sequence_length)
    if section.warmup_share:
        return max(1, round(section.warmup_share * steps))
    return section.warmup_steps
