"""The sample order of a run: position -> sample id.

The order is a function of (seed, position), so a resume at any position costs as much as a start.
It is integer arithmetic only: all ranks, the report and the tests compute the same batches.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from guardrail.core.errors import DataError
from guardrail.core.events.event import Event
from guardrail.core.events.run_state import Started

_MASK = (1 << 64) - 1
_GOLDEN, _MIX_A, _MIX_B = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def find_sample_order(events: Iterable[Event]) -> SampleOrder | None:
    """Return the sample order that a journal names; None: it names none, or it cannot be read."""
    for event in events:
        if not isinstance(event, Started) or not event.samples or event.samples < 0:
            continue
        if "order_seed" in event.unreadable:
            return None
        is_shuffled = event.shuffled is not False
        return SampleOrder(event.samples, seed=event.sample_seed, shuffled=is_shuffled)
    return None


def mix64(*values: int) -> int:
    """Return a 64-bit hash of integers.

    The finaliser of SplitMix64 (Steele et al. 2014), folded over the values.
    """
    state = _GOLDEN
    for value in values:
        state = ((state ^ (value & _MASK)) + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * _MIX_A) & _MASK
        state = ((state ^ (state >> 27)) * _MIX_B) & _MASK
        state ^= state >> 31
    return state


def _mix64_array(values: np.ndarray) -> np.ndarray:
    """Apply the finaliser of `mix64` to a uint64 array, modulo 2^64."""
    state = values + np.uint64(_GOLDEN)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(_MIX_A)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(_MIX_B)
    return np.asarray(state ^ (state >> np.uint64(31)))


class SampleOrder:
    """Position -> sample id, over endless epochs.

    With `shuffled`, each epoch has another permutation of [0, n): a four-round Feistel network over
    the next power of four, repeated until the result is below n (a format-preserving cipher, Black
    & Rogaway 2002). It needs no table, so position 10^12 costs as much as position 0.

    Args:
        samples: number of samples of the training split, > 0.
        seed: of the permutations; not used without `shuffled`.
        shuffled: False gives the samples in the order of the data, epoch after epoch.

    Raises:
        DataError: `samples` is not a whole number > 0.
    """

    _ROUNDS = 4
    BLOCK = 1024
    KEPT_BLOCKS = 4

    def __init__(self, samples: int, *, seed: int = 0, shuffled: bool = True) -> None:
        if isinstance(samples, bool) or not isinstance(samples, (int, np.integer)) or samples <= 0:
            raise DataError(f"SampleOrder(samples): expected a whole number > 0, got {samples!r}")
        self.n_samples = int(samples)
        self.seed = seed
        self.shuffled = shuffled
        self._half = np.uint64(max(1, ((self.n_samples - 1).bit_length() + 1) // 2))
        self._half_mask = np.uint64((1 << int(self._half)) - 1)
        self._blocks: dict[tuple[int, int], list[int]] = {}  # (epoch, block) -> ids, oldest first

    def epoch(self, position: int) -> int:
        """Return the epoch of a position, counted from 0."""
        return position // self.n_samples

    def sample(self, position: int) -> int:
        """Return the sample id at `position` (>= 0)."""
        return self.samples(position, position + 1)[0]

    def samples(self, first: int, last: int) -> list[int]:
        """Return the sample ids at the positions [first, last)."""
        ids: list[int] = []
        while first < last:
            epoch, offset = divmod(first, self.n_samples)
            block, start = divmod(offset, self.BLOCK)
            found = self.block(epoch, block)[start : start + last - first]
            ids += found
            first += len(found)
        return ids

    def block(self, epoch: int, block: int) -> list[int]:
        """Return the ids of one block of an epoch.

        numpy needs hardly longer for a block of 1,024 than for one batch.
        """
        ids = self._blocks.get((epoch, block))
        if ids is None:
            begin = block * self.BLOCK
            end = min(begin + self.BLOCK, self.n_samples)
            ids = self._ids_at(np.arange(begin, end, dtype=np.uint64), epoch).tolist()
            if len(self._blocks) == self.KEPT_BLOCKS:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[epoch, block] = ids
        return ids

    def sample_array(self, first: int, last: int) -> np.ndarray:
        """Return the sample ids at positions [first, last) of one epoch, int64; keeps no block."""
        epoch, offset = divmod(first, self.n_samples)
        offsets = np.arange(offset, offset + last - first, dtype=np.uint64)
        return self._ids_at(offsets, epoch).astype(np.int64)

    def find_offsets(self, samples: np.ndarray, epoch: int) -> np.ndarray:
        """Return the offset of each sample in an epoch, int64: the inverse of the order."""
        if not self.shuffled:
            return samples.astype(np.int64)
        keys = self._round_keys(epoch)
        values = samples.astype(np.uint64)
        walking = np.ones(len(values), dtype=bool)
        while walking.any():
            left, right = values[walking] >> self._half, values[walking] & self._half_mask
            for key in reversed(keys):
                left, right = right ^ (_mix64_array(left ^ key) & self._half_mask), left
            values[walking] = (left << self._half) | right
            walking = values >= np.uint64(self.n_samples)
        return values.astype(np.int64)

    def _ids_at(self, offsets: np.ndarray, epoch: int) -> np.ndarray:
        """Return the sample ids at offsets of an epoch, uint64."""
        if not self.shuffled:
            return offsets
        keys = self._round_keys(epoch)
        walking = np.ones(len(offsets), dtype=bool)
        values = offsets.copy()
        while walking.any():
            left, right = values[walking] >> self._half, values[walking] & self._half_mask
            for key in keys:
                left, right = right, left ^ (_mix64_array(right ^ key) & self._half_mask)
            values[walking] = (left << self._half) | right
            walking = values >= np.uint64(self.n_samples)
        return values

    def _round_keys(self, epoch: int) -> list[np.uint64]:
        return [np.uint64(mix64(self.seed, epoch, turn)) for turn in range(self._ROUNDS)]
