"""One try at an update, as a training loop meets it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from guardrail.core.records import Verdict
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
    """One try at an update.

    Attributes:
        number: the step that it becomes when it is applied.
        batch: what to compute it from, over all ranks.
        samples: ids of this rank's share of `batch.samples`: a contiguous part of them, so that the
            data-parallel ranks together have each sample once; all of them with one rank. Ranks
            that compute the same loss (tensor parallelism, stages of a pipeline) have the same
            share. Where the batch cannot be divided evenly, sizes differ by one at most: then give
            `finish` sums with `tokens` and `nominal_tokens`, so that every token weighs the same.
        verdict, applied: known after `finish`; under `guard.decide = "deferred"` mostly after that of
            the next step.
        repeated: an earlier try with this number was dropped unjudged: numbers are read a step
            late, and those of the step before it, or its own, called for the host.
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
        return self.batch.samples if self._share is None else self._share(self.batch)

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
            loss: without `nominal_tokens` this rank's mean loss, whose gradients are in `.grad`
                (averaged over ranks, as DDP and FSDP do); with it the SUM of this rank's token
                losses, 0-d.
            tokens: label tokens of the sum.
            nominal_tokens: the number, summed over ranks, that the sums were divided by before
                backward. The guard rescales the gradients by nominal / actual tokens, so that every
                token weighs the same.
            incomplete: this rank was asked to stop and skipped micro-batches: nothing is decided,
                the run ends.
            signals: further numbers of this rank that `guard.extra_signals` announces, 0-d; their mean
                over the ranks that give one is watched. They travel in the step's one reduction.
            wait: judge it now, even where `guard.decide = "deferred"` would read its numbers a step
                later: the loop is going to use the weights after it, as in an evaluation. The same
                on every rank.

        Raises:
            UsageError: an argument that is not what is written above.

        Returns:
            The verdict; None when a stop made the window incomplete, or when it is not known yet.
        """
        if self.finished:
            raise RuntimeError("step.finish was called twice")
        check_loss(loss)
        check_numbers(tokens=tokens, nominal_tokens=nominal_tokens, signals=signals)
        self.finished = True
        return self._finish_step(self, loss, tokens, nominal_tokens, incomplete, signals, wait)
