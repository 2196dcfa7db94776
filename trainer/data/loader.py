"""The rows of a batch that belong to this rank, as micro-batches of a constant shape.

With M = `micro_batch_size` and W ranks, row g of the global batch belongs to micro-batch
m = g // (M W) of rank r = (g // M) % W. The m-th micro-batches of the ranks are therefore
consecutive in the sample order, and the global batch has the same samples for every W.

A shorter batch, at the end of the data, is filled up with rows whose labels are all ignored. One
thread reads the next batch ahead.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from guardrail.decide.sample_cursor import Batch
from trainer.data.corpus import Split
from trainer.objectives.examples import IGNORED, LanguageModelling, Objective


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward and backward pass of one rank.

    Attributes:
        tokens: int64 [micro_batch_size, sequence_length].
        labels: int64 [micro_batch_size, sequence_length]; labels[b, t] is the token after
            tokens[b, t], or `IGNORED` for padding and in rows that fill up the batch.
        position: of its first sample in the order; the end of the batch if it has no sample.
        sample_ids: of its real rows; fewer than micro_batch_size only in a short batch.
        extra: further arguments of the model by name, int64; see trainer.objectives.examples.
    """

    tokens: np.ndarray
    labels: np.ndarray
    position: int
    sample_ids: tuple[int, ...]
    extra: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def label_count(self) -> int:
        """Number of labels that count."""
        return int(np.count_nonzero(self.labels != IGNORED))


class Loader:
    """Reads the micro-batches of one rank.

    Args:
        split: the samples.
        pad: token id that is ignored as a label; None: none.
        world, rank: of the data-parallel group.
        micro_batches: of one rank in one batch.
        micro_batch_size: rows of a micro-batch.
        objective: makes inputs and labels of a sample; None: the label is the next token.
        growing: whether a smaller batch has fewer micro-batches; else it is filled up.
    """

    def __init__(
        self,
        split: Split,
        *,
        pad: int | None,
        world: int,
        rank: int,
        micro_batches: int,
        micro_batch_size: int,
        objective: Objective | None = None,
        growing: bool = False,
    ) -> None:
        self.split, self.pad, self.world, self.rank = split, pad, world, rank
        self.micro_batches, self.micro_batch_size = micro_batches, micro_batch_size
        self.objective = objective or LanguageModelling()
        self.growing = growing
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: tuple[object, Future[list[MicroBatch]]] | None = None

    @property
    def batch_size(self) -> int:
        """Rows of a full batch, over all ranks."""
        return self.world * self.micro_batches * self.micro_batch_size

    def load(self, batch: Batch) -> list[MicroBatch]:
        """Return this rank's micro-batches of `batch`, from `prefetch` if it has read this one."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            key, future = ahead
            if key == _key(batch):
                return future.result()
            future.cancel()
        return self._read(batch)

    def read(self, batch: Batch) -> list[MicroBatch]:
        """Return this rank's micro-batches of any batch; `prefetch` is not affected."""
        return self._read(batch)

    def row_positions(self, batch: Batch, number: int) -> tuple[int, ...]:
        """Return the positions of the real rows of this rank's micro-batch `number`."""
        first = (number * self.world + self.rank) * self.micro_batch_size
        return batch.positions[first : first + self.micro_batch_size]

    def prefetch(self, batch: Batch) -> None:
        """Begin to read the batch that will probably be next. `load` works with any other too."""
        if self._ahead is not None:
            key, future = self._ahead
            if key == _key(batch):
                return
            future.cancel()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead = _key(batch), self._thread.submit(self._read, batch)

    def close(self) -> None:
        """End the thread. A later `prefetch` starts another one."""
        self._ahead = None
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None

    def _read(self, batch: Batch) -> list[MicroBatch]:
        if len(batch.samples) > self.batch_size:
            raise ValueError(
                f"a batch has {len(batch.samples)} samples: this loader reads at most {self.batch_size}"
            )
        needed = -(-len(batch.samples) // (self.world * self.micro_batch_size))
        count = self.micro_batches
        if self.growing:
            count = needed
        return [self._micro_batch(batch, number) for number in range(count)]

    def _micro_batch(self, batch: Batch, number: int) -> MicroBatch:
        first = (number * self.world + self.rank) * self.micro_batch_size
        ids = batch.samples[first : first + self.micro_batch_size]
        positions = self.row_positions(batch, number)
        made = self.objective(self.split.tokens(ids), positions)
        missing = self.micro_batch_size - len(ids)
        tokens = _filled(made.tokens, missing, 0)  # id 0 is in every vocabulary
        labels = _filled(made.labels, missing, IGNORED)
        if self.pad is not None:
            labels[labels == self.pad] = IGNORED
        position = batch.last
        if ids:
            position = positions[0]
        extra = {name: _filled(array, missing, 0) for name, array in made.extra.items()}
        return MicroBatch(tokens, labels, position, tuple(ids), extra)


def _filled(array: np.ndarray, missing: int, value: int) -> np.ndarray:
    """Return a copy with `missing` more rows of one value."""
    return np.pad(array, [(0, missing), *[(0, 0)] * (array.ndim - 1)], constant_values=value)


def _key(batch: Batch) -> object:
    """Return what the rows depend on; other fields of a predicted batch may be wrong."""
    return batch.samples, batch.positions, batch.last
