"""Least and greatest values of ranges of a long curve, without reading all of its points.

Level 0 are the points. A block of level k + 1 sums up `BLOCK` blocks of level k. A range is put
together from complete blocks of the highest level that fits, and at its two ends from the levels
below. The result is exact, and costs some hundred values for a range of any length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

BLOCK = 32


@dataclass(frozen=True, slots=True)
class Level:
    """Complete blocks of one size.

    Attributes:
        low, high: float [n], least and greatest value; NaN where a block has no value.
        bad: bool [n], whether any point of a block was NaN or Inf.
    """

    low: np.ndarray
    high: np.ndarray
    bad: np.ndarray

    def __len__(self) -> int:
        return len(self.low)

    def folded(self) -> Level:
        """Return the level above."""
        count = len(self) // BLOCK * BLOCK
        low, high, bad = (
            part[:count].reshape(-1, BLOCK) for part in (self.low, self.high, self.bad)
        )
        return Level(
            np.fmin.reduce(low, axis=1), np.fmax.reduce(high, axis=1), np.asarray(bad.any(axis=1))
        )


def levels_above(first: Level) -> tuple[Level, ...]:
    """Return `first` and the levels above it, up to the first one of at most a block."""
    found = [first]
    while len(found[-1]) > BLOCK:
        found.append(found[-1].folded())
    return tuple(found)


def reduce_ranges(
    points: Level, above: tuple[Level, ...], starts: np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return least and greatest value, and whether there is a bad point, of points [starts, ends).

    Args:
        points: level 0.
        above: levels over them, each with the complete blocks of the points.
        starts, ends: int [C].

    Returns:
        float64 [C], float64 [C] (NaN where there is no value), bool [C]
    """
    low, high = np.full(len(starts), np.nan), np.full(len(starts), np.nan)
    wrong = np.zeros(len(starts), dtype=bool)
    levels = [points, *above]
    for index, level in enumerate(levels):
        blocks = len(levels[index + 1]) if index + 1 < len(levels) else 0
        first, last = -(-starts // BLOCK), np.minimum(ends // BLOCK, blocks)
        inside = last > first  # the level above has complete blocks for these
        for begin, end in _outside(starts, ends, first, last, inside):
            _take(level, begin, end, low, high, wrong)
        if not inside.any():
            break
        starts, ends = np.where(inside, first, 0), np.where(inside, last, 0)
    return low, high, wrong


def _outside(
    starts: np.ndarray, ends: np.ndarray, first: np.ndarray, last: np.ndarray, inside: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the parts that the level above does not cover.

    That is all of a range, or its beginning and its end, outside of the complete blocks.
    """
    yield starts, np.where(inside, first * BLOCK, ends)
    yield np.where(inside, last * BLOCK, 0), np.where(inside, ends, 0)


def _take(
    level: Level,
    begin: np.ndarray,
    end: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    wrong: np.ndarray,
) -> None:
    """Merge blocks [begin, end) of a level into the results."""
    lengths = np.maximum(0, end - begin)
    some = lengths > 0
    if not some.any():
        return
    lengths = lengths[some]
    offsets = np.cumsum(lengths) - lengths
    at = np.repeat(begin[some] - offsets, lengths) + np.arange(int(lengths.sum()))
    low[some] = np.fmin(low[some], np.fmin.reduceat(level.low[at], offsets))
    high[some] = np.fmax(high[some], np.fmax.reduceat(level.high[at], offsets))
    wrong[some] |= np.logical_or.reduceat(level.bad[at], offsets)
