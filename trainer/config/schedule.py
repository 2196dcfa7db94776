"""The learning rate as a function of the step. Imports no torch."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from trainer.config.batch_ramp import BatchPlan
from trainer.config.recipe import OptimSection


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """The learning rate: linear warm-up to `peak`, then down to `floor` in the given shape.

    The warm-up ends at step `warmup`, the decay at step `total`; after that the rate stays at
    `floor`. Calling it with a step (from 1) gives the learning rate of that update. It is a pure
    function, so a resume cannot change it.

    Attributes:
        shape: "cosine": half a cosine (Loshchilov & Hutter 2017). "linear": a line. "wsd": the peak
            up to step `decay`, then a line (warm-up, stable, decay; Hu et al. 2024). "constant":
            the peak throughout.
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
        """Return the schedule of a run of `steps` applied updates.

        Args:
            warmup: steps of the warm-up, as `warmup_steps` counts them; None: section.warmup_steps.
        """
        if warmup is None:
            warmup = section.warmup_steps
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
        if step >= self.total > self.warmup:
            return self.floor
        start = self.warmup
        if self.shape == "wsd":
            start = self.decay
        if step >= self.total or step <= start:
            return self.peak
        progress = (step - start) / (self.total - start)
        share = 1 - progress
        if self.shape == "cosine":
            share = 0.5 * (1 + math.cos(math.pi * progress))
        return self.floor + (self.peak - self.floor) * share


def warmup_steps(
    section: OptimSection, *, steps: int, plan: BatchPlan, sequence_length: int
) -> int:
    """Return the steps of the warm-up, which is set in steps, in tokens or as a share of the run.

    Args:
        steps: of the run.
        plan: the batch size by step; with a batch ramp the same tokens take more steps.
        sequence_length: tokens of a sample.
    """
    if section.warmup_tokens:
        return plan.steps_for(section.warmup_tokens / sequence_length)
    if section.warmup_share:
        return max(1, round(section.warmup_share * steps))
    return section.warmup_steps
