"""One step of a training loop: a batch, and the update that it becomes or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from guardrail.core.records.verdicts import Verdict
from guardrail.decide.sample_cursor import Batch
from guardrail.torch.guard.arguments import check_loss, check_numbers


class FinishStep(Protocol):
    """Judges a computed step and carries the verdict out; see `Step.finish` for the arguments."""

    def __call__(
        self,
        step: Step,
        loss: Tensor,
        tokens: Tensor | float,
        nominal: float | None,
        incomplete: bool,
        signals: Mapping[str, Tensor | float] | None,
        wait: bool,
    ) -> Verdict | None: ...


class Step:
    """One attempt at an update.

    Attributes:
        number: of the update, if it is applied.
        batch: to compute it from, over all ranks.
        samples: ids of this rank's share of `batch.samples`: a contiguous part, so that the
            data-parallel ranks together have each sample once. With one rank: all of them. Ranks
            that compute the same loss (tensor parallelism, stages of a pipeline) have the same
            share. Where the batch cannot be divided evenly, sizes differ by one at most. Then give
            `finish` sums with `tokens` and `nominal_tokens`, so that every token has the same
            weight.
        verdict, applied: known after `finish`. With `guard.decide = "deferred"` mostly after the
            `finish` of the next step.
        repeated: an earlier attempt with this number was dropped before it was judged. This happens
            with `guard.decide = "deferred"`, where numbers are read one step later.
        began: `time.perf_counter()` at its start, seconds.
        finished: whether `finish` was called.
    """

    def __init__(
        self,
        finish_step: FinishStep,
        *,
        number: int,
        batch: Batch,
        began: float,
        repeated: bool = False,
        share: Callable[[Batch], tuple[int, ...]] | None = None,
    ) -> None:
        self._finish_step = finish_step
        self._share = share
        self.number = number
        self.batch = batch
        self.verdict: Verdict | None = None
        self.applied = False
        self.repeated = repeated
        self.began = began
        self.finished = False

    @property
    def samples(self) -> tuple[int, ...]:
        """Ids of this rank's share of the batch's samples."""
        if self._share is None:
            return self.batch.samples
        return self._share(self.batch)

    def finish(
        self,
        loss: Tensor,
        *,
        tokens: Tensor | float = 1.0,
        nominal_tokens: float | None = None,
        incomplete: bool = False,
        signals: Mapping[str, Tensor | float] | None = None,
        wait: bool = False,
    ) -> Verdict | None:
        """Judge the step, then apply its update or skip it.

        Call it once, on every rank, after the last backward.

        Args:
            loss: 0-d. Without `nominal_tokens` this rank's mean loss, whose gradients are in
                `.grad` (averaged over ranks, as DDP and FSDP do). With `nominal_tokens` the SUM of
                this rank's token losses.
            tokens: label tokens of the sum.
            nominal_tokens: the number, summed over ranks, that the sums were divided by before
                backward. The guard rescales the gradients by nominal / actual tokens, so that every
                token has the same weight.
            incomplete: this rank was asked to stop and skipped micro-batches. Nothing is decided,
                and the run ends.
            signals: further numbers of this rank, 0-d, named in `guard.extra_signals`. Their mean
                over the ranks that give one is checked. They are part of the step's one reduction.
            wait: judge the step now, also with `guard.decide = "deferred"`, which would read its
                numbers a step later. For a loop that uses the weights next, as in an evaluation.
                The same on every rank.

        Raises:
            UsageError: an argument has the wrong type or shape.

        Returns:
            The verdict; None when a stop made the batch incomplete, or when it is not known yet.
        """
        if self.finished:
            raise RuntimeError("step.finish was called twice")
        check_loss(loss)
        check_numbers(tokens=tokens, nominal_tokens=nominal_tokens, signals=signals)
        self.finished = True
        return self._finish_step(self, loss, tokens, nominal_tokens, incomplete, signals, wait)
