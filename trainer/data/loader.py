"""The rows of a batch that belong to this rank, as micro-batches of a constant shape, read ahead by
one thread.

Which row goes where: with M = `micro_batch_size` and W ranks, row g of the global batch belongs to
micro-batch m = g // (M W) of rank r = (g // M) % W. So the ranks' m-th micro-batches stand side by
side in the order, and the global batch is the same set of samples whatever W is.

A batch that is shorter than the others (the end of the data) is filled up with rows whose labels
are all ignored.
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
        labels: int64 [micro_batch_size, sequence_length]; labels[b, t] is the token behind
            tokens[b, t], or `IGNORED` for padding and in rows that only fill up.
        position: of its first sample in the order; the end of the batch if it holds no sample at
        all.
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
        """Labels that count."""
        return int(np.count_nonzero(self.labels != IGNORED))


class Loader:
    """Args:
    split: the samples.
    pad: token id that is ignored as a label, None: none.
    world, rank: of the data-parallel group.
    micro_batches: of one rank in one batch; micro_batch_size: rows of each.
    objective: what is made of a sample; None: each next token.
    growing: smaller batches have fewer micro-batches, instead of filled up ones.
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
        """This rank's micro-batches of `batch`: read ahead if `prefetch` was told so, else read
        now.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            key, future = ahead
            if key == _key(batch):
                return future.result()
            future.cancel()
        return self._read(batch)

    def read(self, batch: Batch) -> list[MicroBatch]:
        """This rank's micro-batches of any batch; what is being read ahead stays what it is."""
        return self._read(batch)

    def row_positions(self, batch: Batch, number: int) -> tuple[int, ...]:
        """Positions of the real rows of this rank's micro-batch `number`."""
        first = (number * self.world + self.rank) * self.micro_batch_size
        return batch.positions[first : first + self.micro_batch_size]

    def prefetch(self, batch: Batch) -> None:
        """Begin to read the batch that will probably be next. A wrong guess costs nothing but the
        reading.
        """
        if self._ahead is not None:
            key, future = self._ahead
            if key == _key(batch):
                return
            future.cancel()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead = _key(batch), self._thread.submit(self._read, batch)

    def close(self) -> None:
        """End the thread. The loader can still be used; it starts another one then."""
        self._ahead = None
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None

    def _read(self, batch: Batch) -> list[MicroBatch]:
        if len(batch.samples) > self.batch_size:
            raise ValueError(
                f"a batch of {len(batch.samples)} samples for a loader of {self.batch_size}"
            )
        needed = -(-len(batch.samples) // (self.world * self.micro_batch_size))
        count = needed if self.growing else self.micro_batches
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
        position = positions[0] if ids else batch.last
        extra = {name: _filled(array, missing, 0) for name, array in made.extra.items()}
        return MicroBatch(tokens, labels, position, tuple(ids), extra)


def _filled(array: np.ndarray, missing: int, value: int) -> np.ndarray:
    """A copy with `missing` more rows of one value."""
    return np.pad(array, [(0, missing), *[(0, 0)] * (array.ndim - 1)], constant_values=value)


def _key(batch: Batch) -> object:
    """What the rows and their positions depend on: a predicted batch may be wrong in the rest."""
    return batch.samples, batch.positions, batch.last
