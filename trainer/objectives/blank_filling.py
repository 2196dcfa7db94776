"""GLM's blank filling: a text with blanks, then the content of the blanks, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from trainer.objectives.examples import IGNORED, Examples, draw_bits, stack_rows


class BlankFilling:
    """GLM (Du et al. 2022): part A is the text with blanks, part B is their content.

    The tokens of part A attend to each other in both directions. A share of the samples has one
    blank from a random place to the end ([gMASK], as in GLM-130B). The others have short blanks
    ([MASK]). Their lengths follow a Poisson distribution without zero, until `noise` of the tokens
    are removed. Their places are uniform, with at least one token between two blanks. Part B has
    them in a random order.

    The content of a blank starts with [sop] and has the position of its mask. The tokens of a blank
    are counted from 1 in the second dimension of positions. With one dimension (GLM-130B) the
    positions of a [gMASK] count up from it. Short blanks end with [eop]; a [gMASK] has none, since
    its text ends with the sample.

    Rows are full: with more blanks, fewer tokens of a sample are used. Ids: [MASK], [gMASK], [sop],
    [eop].

    Args:
        seed: of all random choices, with the position of a sample.
        length: of a row, L.
        first_id: of the four ids.
        noise: least share of the tokens in short blanks (published: 0.15).
        span_length: lambda of the Poisson distribution (published: 3).
        tail_share: of the samples that have a [gMASK].
        two_dimensional: whether the model has the second dimension of positions.
    """

    extra_ids = 4

    def __init__(
        self,
        *,
        seed: int,
        length: int,
        first_id: int,
        noise: float,
        span_length: float,
        tail_share: float,
        two_dimensional: bool,
    ) -> None:
        self.seed, self.length, self.noise, self.tail_share = seed, length, noise, tail_share
        self.two_dimensional = two_dimensional
        self.mask, self.tail_mask, self.start, self.end = range(first_id, first_id + 4)
        self._up_to = _poisson(span_length)
        if length < 4:
            raise ValueError(f"a row of {length} tokens is too short for blanks")
        # A blank takes at least its mask, its start and a token, and a kept token before the next one.
        self._most = min(int(noise * length) + 1, (length + 1) // 4)

    def __call__(self, rows: np.ndarray, positions: Sequence[int]) -> Examples:
        made = [self._row(row, position) for row, position in zip(rows, positions, strict=True)]
        return Examples(
            stack_rows([row.tokens for row in made], self.length),
            stack_rows([row.labels for row in made], self.length),
            {
                "prefix_B": np.array([row.prefix for row in made], dtype=np.int64),
                "positions_BT": stack_rows([row.positions for row in made], self.length),
                "blanks_BT": stack_rows([row.counts for row in made], self.length),
            },
        )

    def _row(self, row: np.ndarray, position: int) -> _Row:
        raw = draw_bits(self.seed, position, 2 + 4 * self._most)
        if int(raw[0]) < self.tail_share * 2.0**64:
            text = row[: self.length - 1]
            return self._tail(text, 1 + int(raw[1]) % (len(text) - 1))
        draws = raw[2:].reshape(4, self._most)
        lengths = self._lengths(draws[0])
        count = len(lengths)
        # The last length is larger on average, since it ends the draw; so the order is shuffled.
        lengths = lengths[_order(draws[1, :count])]
        text = row[: self.length - 2 * count]
        # Tokens besides the one between two blanks.
        spaces = len(text) - int(lengths.sum()) - (count - 1)
        places = np.sort((draws[2, :count] % np.uint64(spaces + 1)).astype(np.int64))
        firsts = places + np.concatenate([[0], lengths[:-1] + 1]).cumsum()
        return self._short(text, firsts, firsts + lengths, _order(draws[3, :count]))

    def _lengths(self, raw: np.ndarray) -> np.ndarray:
        """Return the lengths of the blanks: as many as `noise` of the row's tokens need."""
        drawn = 1 + np.searchsorted(self._up_to, (raw >> np.uint64(11)) * 2.0**-53, side="right")
        found: list[int] = []
        gone = 0
        for length in drawn.tolist():
            tokens = self.length - 2 * len(found)
            if found and gone >= int(self.noise * tokens):
                break
            # At least one token is kept, and one between two blanks.
            room = tokens - 2 - gone - max(1, len(found))
            if room < 1:
                break
            found.append(min(length, room))
            gone += found[-1]
        return np.array(found)

    def _short(
        self, text: np.ndarray, firsts: np.ndarray, lasts: np.ndarray, order: np.ndarray
    ) -> _Row:
        """Return a row with blanks at [first, last); part B has them in `order`."""
        count = len(firsts)
        pieces = np.split(text, np.stack([firsts, lasts], axis=1).flatten())
        kept, blanks = pieces[::2], pieces[1::2]
        masks = [np.array([self.mask])] * count
        part_a = [
            part
            for pair in zip(kept, [*masks, np.empty(0, dtype=np.int64)], strict=True)
            for part in pair
        ]
        places = np.cumsum([len(piece) + 1 for piece in kept[:-1]]) - 1
        tokens = [part for index in order for part in (np.array([self.start]), blanks[index])]
        labels = [part for index in order for part in (blanks[index], np.array([self.end]))]
        counts = [np.arange(1, len(blanks[index]) + 2) for index in order]
        positions = [np.full(len(blanks[index]) + 1, places[index]) for index in order]
        return _joined(part_a, tokens, labels, positions, counts)

    def _tail(self, text: np.ndarray, at: int) -> _Row:
        """Return a row with one blank, from `at` to the end."""
        blank = text[at:]
        counts = np.arange(1, len(blank) + 1)
        positions = at + counts
        if self.two_dimensional:
            positions = np.full(len(blank), at)
        part_a = [text[:at], np.array([self.tail_mask])]
        return _joined(part_a, [np.array([self.start]), blank[:-1]], [blank], [positions], [counts])


class _Row(NamedTuple):
    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    counts: np.ndarray
    prefix: int


def _joined(
    part_a: Sequence[np.ndarray],
    tokens: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    positions: Sequence[np.ndarray],
    counts: Sequence[np.ndarray],
) -> _Row:
    """Return part A, whose labels are ignored and whose positions count up, followed by part B."""
    length = sum(map(len, part_a))
    return _Row(
        tokens=np.concatenate([*part_a, *tokens]),
        labels=np.concatenate([np.full(length, IGNORED), *labels]),
        positions=np.concatenate([np.arange(length), *positions]),
        counts=np.concatenate([np.zeros(length, dtype=np.int64), *counts]),
        prefix=length,
    )


def _order(raw: np.ndarray) -> np.ndarray:
    """Return a uniform random order."""
    return np.argsort(raw, kind="stable")


def _poisson(mean: float) -> np.ndarray:
    """Return the cumulative probabilities P(1), P(1 or 2), ... of a Poisson distribution.

    The range is 1 to 13 times the mean; the last value, which is 1, is dropped. For a mean of 3
    that is GLM's range, 1 to 39. The probability outside is below 1e-11 for any mean. Only
    products, sums and quotients are used, outwards from the mode: the same bits on every machine,
    and no overflow.
    """
    mode, longest = int(mean), math.ceil(13 * mean)
    weights = np.ones(longest + 1)
    for length in range(mode, 1, -1):
        weights[length - 1] = weights[length] * length / mean
    for length in range(mode, longest):
        weights[length + 1] = weights[length] * mean / (length + 1)
    up_to = np.cumsum(weights[1:])
    return up_to[:-1] / up_to[-1]
