"""Forward and backward passes of one rank of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.config import Config
from trainer.loop.passes import PassResult, RankPasses
from trainer.objectives.loss import IGNORED
from trainer.parallel.data_parallel import unwrap_model
from trainer.parallel.pipeline import Pipeline, StagePosition
from trainer.parallel.tensor_parallel import vocabulary_columns


class PipelinePasses(RankPasses):
    """Runs the micro-batches of a batch through all stages of the pipeline together.

    The loss sum is known on the last stage and is 0 on the others.

    Args:
        place: of this rank in its pipeline.
        vocabulary: token ids of the model.
        others: see `RankPasses`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        *,
        place: StagePosition,
        vocabulary: int,
        **others: Any,
    ) -> None:
        super().__init__(model, config, **others)
        length, layout = config.data.sequence_length, config.layout
        stream_tokens = length // unwrap_model(model).stream_parts
        outputs = vocabulary_columns(vocabulary, place=self.rank % layout.tp, ranks=layout.tp)
        self._total = torch.zeros((), device=self.device)
        self._pipeline = Pipeline(
            model,
            place,
            schedule=config.parallel.schedule,
            micro_batches=config.micro_batches,
            rows=config.micro_batch_size,
            length=length,
            stream=(stream_tokens, config.model.width),
            outputs=len(outputs),
            device=self.device,
            begin=self.seed_dropout,
            loss=self._measure_loss,
        )

    def run(self, *, stoppable: bool) -> PassResult:
        """See `RankPasses.run`. A pipeline always runs to the end of the batch: its stages wait for
        each other in every micro-batch.
        """
        self._total = torch.zeros((), device=self.device)
        inputs, targets = [], []
        for index, micro in enumerate(self.micro_batches):
            inputs.append(self.to_device(micro.tokens))
            labels = self.to_device(micro.labels)
            if self.faults:
                labels = self.faults.damage_labels(index, labels)
            targets.append(labels)
        labels = torch.cat(targets)
        self._pipeline.train(torch.cat(inputs), labels)
        return PassResult(self._total, (labels != IGNORED).sum(), incomplete=False)

    def _measure_loss(self, index: int, logits: Tensor, labels: Tensor) -> Tensor:
        """Return what the backward pass of a micro-batch starts from; called on the last stage."""
        if self.faults:
            logits = self.faults.damage_logits(index, logits)
        loss, _ = self.loss_sum(logits, labels)
        self.record_row_losses(index, logits, labels)
        if self.faults:
            loss = self.faults.damage_loss(index, self.model, loss, scale=self.scaler.get_scale())
        self._total += loss.detach()
        return self.scale_loss(loss)

    def rerun_forward(self) -> None:
        """See `RankPasses.rerun_forward`."""
        for index, micro in enumerate(self.micro_batches):
            self._pipeline.forward(self.to_device(micro.tokens), again=index)

    def sum_losses_of_batch(
        self, tokens: Tensor, label_orders: Sequence[Tensor], extra: dict[str, Tensor]
    ) -> Tensor:
        """See `RankPasses.sum_losses_of_batch`; the values of the last stage on every stage."""
        logits = self._pipeline.forward(tokens)
        sums = torch.zeros(len(label_orders) + 1, device=self.device, dtype=torch.float64)
        if logits is not None:
            sums = self.sum_losses(logits, label_orders)
        return self._pipeline.from_last(sums)
