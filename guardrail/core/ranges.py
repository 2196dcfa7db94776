"""A set of integers as the ranges [first, last) that make it up. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


class Ranges:
    """Disjoint ranges, ascending; those that touch are one."""

    def __init__(self) -> None:
        self._firsts: list[int] = []
        self._lasts: list[int] = []

    def __len__(self) -> int:
        """How many ranges there are."""
        return len(self._firsts)

    def pairs(self) -> list[tuple[int, int]]:
        return list(zip(self._firsts, self._lasts, strict=True))

    def add(self, first: int, last: int) -> list[tuple[int, int]]:
        """Add [first, last); returns the parts of it that were not there before, ascending."""
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
        at = bisect_right(self._firsts, value) - 1
        return at >= 0 and value < self._lasts[at]

    def holds_each(self, values: np.ndarray) -> np.ndarray:
        """bool, as long as `values`."""
        import numpy as np

        at = np.searchsorted(np.asarray(self._firsts), values, side="right") - 1
        return np.asarray((at >= 0) & (values < np.asarray(self._lasts)[at]))
