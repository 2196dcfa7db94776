"""Forward and backward passes of one rank over its share of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from guardrail.rundir.stop_signals import StopSignals
from trainer.config.config import Config
from trainer.data.loader import MicroBatch
from trainer.faults.fault_injection import Faults
from trainer.objectives.loss import z_penalty
from trainer.parallel.data_parallel import (
    accumulate_gradients,
    find_loss_sum,
    is_sharded,
    seed_micro_batch,
)

# Of each row of one micro-batch: loss sums [B], label tokens [B].
RowLosses = tuple[Tensor, Tensor]


class PassResult(NamedTuple):
    """What the passes over a batch gave on this rank.

    Attributes:
        loss_sum: sum of the losses of its label tokens, 0-d.
        tokens: its label tokens, 0-d int64.
        incomplete: whether a stop request ended the passes before the last micro-batch.
    """

    loss_sum: Tensor
    tokens: Tensor
    incomplete: bool


class RankPasses(ABC):
    """Runs the micro-batches of a batch: one after another, or in a pipeline.

    Args:
        model: as `distribute` returns it.
        scaler: multiplies the loss (fp16).
        rank: of this process.
        settle: called after forward passes without a backward pass. FSDP2 keeps the root's
            parameters gathered after such a pass, and the next update would start from that copy.

    Attributes:
        micro_batches: of the last batch that was run.
        row_losses: filled by `run`, one entry per micro-batch, when it is a list; None: not wanted.
        nominal: label tokens of a full batch.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        *,
        accelerator: Accelerator,
        scaler: torch.amp.GradScaler,
        faults: Faults,
        rank: int,
        settle: Callable[[], None],
    ) -> None:
        self.model, self.config, self.rank = model, config, rank
        self.settle = settle
        self.accelerator, self.scaler, self.faults = accelerator, scaler, faults
        self.device = accelerator.device
        self.loss_sum = find_loss_sum(model)
        self.micro_batches: list[MicroBatch] = []
        self.row_losses: list[RowLosses] | None = None
        self._data_rank = config.layout.data_rank(rank)
        self.nominal = config.train.batch_size * config.data.sequence_length

    @abstractmethod
    def run(self, *, stoppable: bool) -> PassResult:
        """Run forward and backward over `micro_batches`.

        Args:
            stoppable: whether a stop request may end the passes early.
        """

    @abstractmethod
    def rerun_forward(self) -> None:
        """Repeat the forward passes of `micro_batches`, with the same RNG state."""

    @torch.no_grad()
    def measure_losses(
        self, tokens: Any, label_orders: Sequence[Any], extra: dict[str, Any]
    ) -> Tensor:
        """Return losses without dropout and without gradients.

        Args:
            tokens: int64 [B, T].
            label_orders: each int64 [B, T]; all have the same number of labels that count.
            extra: further arguments of the model by name.

        Returns:
            float64 [len(label_orders) + 1]: the loss sum for each of `label_orders`, then the
            label tokens.
        """
        labels = [self.to_device(order) for order in label_orders]
        self.model.eval()
        try:
            return self.sum_losses_of_batch(
                self.to_device(tokens), labels, self.model_arguments(extra)
            )
        finally:
            self.model.train()
            self.settle()

    @abstractmethod
    def sum_losses_of_batch(
        self, tokens: Tensor, label_orders: Sequence[Tensor], extra: dict[str, Tensor]
    ) -> Tensor:
        """Run the model on a batch; return what `measure_losses` returns.

        Args:
            tokens, label_orders, extra: as `measure_losses` takes them, on the device.
        """

    def seed_dropout(self, index: int, chunk: int = 0) -> None:
        """Set the RNG state for a micro-batch of the last batch.

        Args:
            index: number of the micro-batch on this rank.
            chunk: which part of this rank's pipeline stage runs.
        """
        part = self.config.layout.rng_part(self.rank, chunk)
        position = self.micro_batches[index].position
        seed_micro_batch(self.config.train.seed, position, self._data_rank, part)

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Return what the backward pass starts from, given the summed loss of a micro-batch.

        trainer.objectives.loss gives the reason for the factor.
        """
        return self.scaler.scale(loss * (self.config.layout.data_ranks / self.nominal))

    @torch.no_grad()
    def record_row_losses(self, index: int, logits: Tensor, labels: Tensor) -> None:
        """Append the loss of each row to `row_losses`, if a replay asks for it.

        Args:
            index: number of the micro-batch; they come in order.
        """
        if self.row_losses is None:
            return
        assert index == len(self.row_losses)
        losses, counts = [], []
        for row in range(len(labels)):
            loss, count = self.loss_sum(logits[row : row + 1], labels[row : row + 1])
            losses.append(loss)
            counts.append(count)
        self.row_losses.append((torch.stack(losses), torch.stack(counts)))

    def to_device(self, array: Any) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor

    def model_arguments(self, extra: dict[str, Any]) -> dict[str, Tensor]:
        """Return the arguments that the objective gives the model besides tokens, on the device."""
        return {name: self.to_device(array) for name, array in extra.items()}

    def sum_losses(self, logits: Tensor, label_orders: Sequence[Tensor]) -> Tensor:
        """Return float64 [len(label_orders) + 1]: loss sums, then label tokens."""
        pairs = [self.loss_sum(logits, labels) for labels in label_orders]
        losses = [loss.double() for loss, _ in pairs]
        return torch.stack([*losses, pairs[0][1].double()])


class AccumulatedPasses(RankPasses):
    """Runs one micro-batch after another and accumulates gradients.

    Args:
        signals: a stop request lets the passes end early.
        others: see `RankPasses`.
    """

    def __init__(
        self, model: nn.Module, config: Config, *, signals: StopSignals, **others: Any
    ) -> None:
        super().__init__(model, config, **others)
        self._signals = signals

    def run(self, *, stoppable: bool) -> PassResult:
        """See `RankPasses.run`."""
        total = torch.zeros((), device=self.device)
        tokens = torch.zeros((), device=self.device, dtype=torch.int64)
        incomplete = False
        for index, micro in enumerate(self.micro_batches):
            is_last = index == len(self.micro_batches) - 1
            if stoppable and not is_last and self._may_stop():
                incomplete = True
                continue
            loss, count = self._run_micro_batch(index, micro, is_last=is_last)
            total += loss
            tokens += count
        return PassResult(total, tokens, incomplete)

    def _may_stop(self) -> bool:
        """Return whether to skip a micro-batch that is not the last one.

        Under ddp no rank waits for another before the last micro-batch, so the samples of the batch
        can still be given back. Under fsdp the ranks meet in every micro-batch.
        """
        return self._signals.requested and not is_sharded(self.model)

    def _run_micro_batch(
        self, index: int, micro: MicroBatch, *, is_last: bool
    ) -> tuple[Tensor, Tensor]:
        """Run forward and backward; return the loss sum, detached, and the label tokens."""
        inputs, labels = self.to_device(micro.tokens), self.to_device(micro.labels)
        if self.faults:
            labels = self.faults.damage_labels(index, labels)
        self.seed_dropout(index)
        with accumulate_gradients(self.model, last=is_last):
            logits = self.model(inputs, **self.model_arguments(micro.extra))
            if self.faults:
                logits = self.faults.damage_logits(index, logits)
            loss, count = self.loss_sum(logits, labels)
            self.record_row_losses(index, logits, labels)
            if self.faults:
                loss = self.faults.damage_loss(
                    index, self.model, loss, scale=self.scaler.get_scale()
                )
            trained = loss
            z_loss = self.config.train.z_loss
            if z_loss:
                trained = loss + z_penalty(logits, labels, z_loss)
            self.accelerator.backward(self.scale_loss(trained))
        return loss.detach(), count

    def rerun_forward(self) -> None:
        """See `RankPasses.rerun_forward`."""
        for index, micro in enumerate(self.micro_batches):
            self.seed_dropout(index)
            self.model(self.to_device(micro.tokens), **self.model_arguments(micro.extra))

    def sum_losses_of_batch(
        self, tokens: Tensor, label_orders: Sequence[Tensor], extra: dict[str, Tensor]
    ) -> Tensor:
        """See `RankPasses.sum_losses_of_batch`."""
        return self.sum_losses(self.model(tokens, **extra), label_orders)
