"""Replays of batches for the cause test: the hooks `replay`, `label_order_gain`, `rerun_forward`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from guardrail.decide.sample_cursor import Batch
from guardrail.torch.diagnose.per_sample import Rows
from trainer.loop.batch_source import BatchSource
from trainer.loop.passes import RankPasses
from trainer.objectives.loss import shuffle_labels
from trainer.stabilisers.qk_clip import QKClip


class BatchReplays:
    """Runs batches again without changing what the loop knows of its last step.

    Args:
        qk_clip: its record of attention scores is restored after each replay; None: not used.
        counts_loss: whether this rank's loss enters the sums over the ranks.
    """

    def __init__(
        self,
        passes: RankPasses,
        batches: BatchSource,
        *,
        qk_clip: QKClip | None,
        counts_loss: bool,
    ) -> None:
        self._passes, self._batches = passes, batches
        self._qk_clip, self._counts_loss = qk_clip, counts_loss

    def replay(self, batch: Batch, step: int, rows: Rows | None) -> tuple[Tensor, Tensor, float]:
        """Run forward and backward over this rank's share of any batch.

        Returns:
            The loss sum, the label tokens, the nominal tokens; see `LoopHooks.replay`.
        """
        passes = self._passes
        last_step = passes.micro_batches
        with self._kept_attention_scores():
            try:
                passes.micro_batches = self._batches.load_again(batch, step)
                if rows is not None:
                    passes.row_losses = []
                result = passes.run(stoppable=False)
                if passes.faults:
                    passes.faults.damage_gradients(passes.model)
                if rows is not None:
                    rows += self._rows_of(batch)
            finally:
                passes.micro_batches, passes.row_losses = last_step, None
        return result.loss_sum, result.tokens, passes.nominal

    def _rows_of(self, batch: Batch) -> Rows:
        """Return the row losses of the passes that just ran; empty where this rank has no loss."""
        passes, loader = self._passes, self._batches.loader
        losses = passes.row_losses
        if not losses:  # on all stages of a pipeline but the last
            nothing = torch.empty(0, device=passes.device)
            losses = [(nothing, nothing)] * len(passes.micro_batches)
        return [
            (loader.row_positions(batch, index), loss, count)
            for index, (loss, count) in enumerate(losses)
        ]

    @torch.no_grad()
    def label_order_gain(self, batch: Batch, step: int) -> tuple[float, float, float]:
        """Return what shuffled labels cost on this rank's share of a batch.

        Returns:
            The loss sum, the loss sum with the labels of each row in another order, the label
            tokens; zeros on a rank whose loss does not count.
        """
        total = torch.zeros(3, device=self._passes.device, dtype=torch.float64)
        with self._kept_attention_scores():
            for micro in self._batches.load_again(batch, step):
                orders = (micro.labels, shuffle_labels(micro.labels, seeds=micro.sample_ids))
                total += self._passes.measure_losses(micro.tokens, orders, micro.extra)
        if not self._counts_loss:
            return 0.0, 0.0, 0.0
        in_order, shuffled, tokens = total.tolist()
        return in_order, shuffled, tokens

    def rerun_forward(self) -> None:
        """Run the forward passes of the last step again, with the same RNG state."""
        self._passes.rerun_forward()

    @contextlib.contextmanager
    def _kept_attention_scores(self) -> Iterator[None]:
        """Restore afterwards what QK-clip has recorded of the last step."""
        if self._qk_clip is None:
            yield
            return
        scores = self._qk_clip.save_scores()
        try:
            yield
        finally:
            self._qk_clip.restore_scores(scores)
