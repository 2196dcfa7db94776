"""Loss on held-out samples during the run, and on fixed samples after a resume."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from guardrail.core.records.status import Phase
from guardrail.torch.guard.guard import Guard
from trainer.config.config import Config
from trainer.data.corpus import Corpus, Split
from trainer.loop.passes import RankPasses
from trainer.objectives.examples import Objective

FIXED_SAMPLES = 8  # a resumed model must give the same loss on them; independent of the batch size


class Evaluation:
    """Measures losses without dropout.

    Args:
        data_rank: which share of each batch this rank has.
        counts_loss: whether this rank's loss enters the sums over the ranks.
        total_steps: applied updates of the run.
    """

    def __init__(
        self,
        passes: RankPasses,
        corpus: Corpus,
        objective: Objective,
        config: Config,
        *,
        data_rank: int,
        counts_loss: bool,
        total_steps: int,
    ) -> None:
        self._passes, self._corpus, self._objective = passes, corpus, objective
        self._config, self._data_rank = config, data_rank
        self._counts_loss, self._total_steps = counts_loss, total_steps

    def is_due(self, step: int) -> bool:
        """Return whether the held-out loss is measured after this step."""
        every = self._config.train.eval_every
        if not every or not len(self._corpus.eval):
            return False
        return step % every == 0 or step == self._total_steps

    def run(self, guard: Guard) -> None:
        """Log the mean held-out loss, nats per token, over the same samples each time.

        A stop request ends it at the next batch, without a result. Collective.
        """
        config, split = self._config, self._corpus.eval
        guard.report_phase(Phase.EVAL)
        sums = torch.zeros(2, device=self._passes.device, dtype=torch.float64)
        size = config.micro_batch_size
        for index in range(config.train.eval_batches):
            if guard.poll_stop():
                return
            first = (index * config.layout.data_ranks + self._data_rank) * size
            ids = range(first, min(first + size, len(split)))
            # A rank without samples takes part in the collectives with sample 0.
            losses = self.sum_losses(split, ids or [0])
            if ids and self._counts_loss:
                sums += losses
            guard.report_phase(Phase.EVAL)
        if config.world > 1:
            dist.all_reduce(sums)
        loss_sum, tokens = sums.tolist()
        if tokens:
            guard.log_eval(loss_sum / tokens)

    def fixed_batch_loss(self) -> float:
        """Return the loss on the first samples of the data, the same on every rank."""
        split = self._corpus.eval
        if not len(split):
            split = self._corpus.train
        loss, tokens = self.sum_losses(split, range(min(FIXED_SAMPLES, len(split))))
        return float(loss / tokens.clamp(min=1))

    def sum_losses(self, split: Split, sample_ids: Sequence[int]) -> Tensor:
        """Return float64 [2]: the loss sum of some samples and their label tokens."""
        examples = self._objective(split.tokens(sample_ids), sample_ids)
        return self._passes.measure_losses(examples.tokens, (examples.labels,), examples.extra)
