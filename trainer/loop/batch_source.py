"""The micro-batches of this rank, for a training step and for a replay."""

from __future__ import annotations

from guardrail.decide.sample_cursor import Batch
from guardrail.torch.guard.step import Step
from trainer.data.loader import Loader, MicroBatch
from trainer.faults.fault_injection import Faults


class BatchSource:
    """Reads batches and applies the data faults of `[[faults]]` to them.

    Args:
        vocabulary: token ids of the tokenizer.
    """

    def __init__(self, loader: Loader, faults: Faults, *, vocabulary: int) -> None:
        self.loader, self.faults, self.vocabulary = loader, faults, vocabulary

    def load(self, step: Step, following: Batch | None) -> list[MicroBatch]:
        """Return this rank's micro-batches of a step, and start to read the following batch."""
        micro_batches = self.loader.load(step.batch)
        if following is not None:
            self.loader.prefetch(following)
        if not self.faults:
            return micro_batches
        self.faults.choose_for_step(
            step=step.number, positions=step.batch.positions, repeated=step.repeated
        )
        return self._damage(step.batch, micro_batches)

    def load_again(self, batch: Batch, step: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of any batch, for a replay.

        Its data faults are in it again. No fault counts as used.
        """
        micro_batches = self.loader.read(batch)
        if not self.faults:
            return micro_batches
        self.faults.choose_for_replay(step=step, positions=batch.positions)
        return self._damage(batch, micro_batches)

    def _damage(self, batch: Batch, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        positions = [self.loader.row_positions(batch, index) for index in range(len(micro_batches))]
        return self.faults.damage_data(micro_batches, positions, vocabulary=self.vocabulary)
