"""Which samples of a batch this rank computes."""

from __future__ import annotations

from guardrail.core.errors import UsageError
from guardrail.decide.sample_cursor import Batch
from guardrail.torch.guard.context import RankInfo
from guardrail.torch.guard.hooks import RankLayout


class DataShare:
    """The share of this rank: a contiguous part of each batch, in the order of the batch.

    The ranks that count the loss are as many as there are shares. Where fewer than all count it,
    neighbouring ranks of each `shard_ranks` read the same share, as the ranks of a tensor-parallel
    group do; each stage of a pipeline has all shares.
    """

    def __init__(self, ranks: RankInfo, layout: RankLayout) -> None:
        self._ranks, self._layout = ranks, layout
        self._number, self._shares = ranks.rank, ranks.world

    def open(self) -> None:
        """Learn which ranks count the loss. A collective."""
        ranks = self._ranks
        holders = self._layout.shard_ranks or range(ranks.world)
        self._shares = sum(ranks.gather(self._layout.counts_loss))
        self._number = -1
        if self._shares and len(holders) % self._shares == 0 and ranks.rank in holders:
            same = len(holders) // self._shares  # ranks that read the same share
            self._number = (ranks.rank - holders.start) // same

    def of(self, batch: Batch) -> tuple[int, ...]:
        """Return the ids of this rank's samples of a batch.

        The shares are disjoint and together the batch. Their sizes differ by one at most; the first
        ranks have the larger ones. With fewer samples than shares the last ones are empty.

        Raises:
            UsageError: the layout of the ranks does not say which share this rank reads.
        """
        if self._number < 0:
            raise UsageError(
                f"RankLayout.shard_ranks = {self._layout.shard_ranks}: {self._shares} ranks count the "
                "loss, and the range cannot be divided among them. Choose this rank's samples from "
                "step.batch.samples"
            )
        size, larger = divmod(len(batch.samples), self._shares)
        first = self._number * size + min(self._number, larger)
        last = first + size + (self._number < larger)
        return batch.samples[first:last]
