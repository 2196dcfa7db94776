"""A set of integers, held as ranges [first, last). Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


class Ranges:
    """Disjoint ranges in ascending order. Ranges that touch are merged."""

    def __init__(self) -> None:
        self._firsts: list[int] = []
        self._lasts: list[int] = []

    def __len__(self) -> int:
        """Return the number of ranges."""
        return len(self._firsts)

    def pairs(self) -> list[tuple[int, int]]:
        """Return the ranges (first, last) in ascending order."""
        return list(zip(self._firsts, self._lasts, strict=True))

    def add(self, first: int, last: int) -> list[tuple[int, int]]:
        """Add [first, last); return the parts of it that are new, in ascending order."""
        begin, end = bisect_left(self._lasts, first), bisect_right(self._firsts, last)
        new, at = [], first
        for known_first, known_last in zip(
            self._firsts[begin:end], self._lasts[begin:end], strict=True
        ):
            if at < known_first:
                new.append((at, known_first))
            at = max(at, known_last)
        if at < last:
            new.append((at, last))
        if begin < end:
            first, last = min(first, self._firsts[begin]), max(last, self._lasts[end - 1])
        self._firsts[begin:end], self._lasts[begin:end] = [first], [last]
        return new

    def holds(self, value: int) -> bool:
        """Return whether an integer is in the set."""
        at = bisect_right(self._firsts, value) - 1
        return at >= 0 and value < self._lasts[at]

    def holds_each(self, values: np.ndarray) -> np.ndarray:
        """Return whether each integer is in the set: bool, shape of `values`."""
        import numpy as np

        at = np.searchsorted(np.asarray(self._firsts), values, side="right") - 1
        return np.asarray((at >= 0) & (values < np.asarray(self._lasts)[at]))
