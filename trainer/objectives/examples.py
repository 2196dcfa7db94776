"""Inputs and labels of a sample: language modelling, prefix LM, span denoising.

Each random choice is a function of (seed, position of the sample in the order). The same sample at
the same position is therefore corrupted in the same way after a rollback, after a restart and on
any number of ranks. Shapes are constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from guardrail.decide.sample_order import mix64

IGNORED = -100  # label that no loss counts: the default `ignore_index` of torch's cross_entropy
_STREAM = 0x5EED0BEC  # separates these random numbers from others of the same seed and position


@dataclass(frozen=True, slots=True)
class Examples:
    """Inputs and labels of some samples.

    Attributes:
        tokens: int64 [B, T].
        labels: int64 [B, T]; labels[b, t] is the token after tokens[b, t], or IGNORED.
        extra: further arguments of the model by name, int64, the first dimension B.
    """

    tokens: np.ndarray
    labels: np.ndarray
    extra: dict[str, np.ndarray] = field(default_factory=dict)


class Objective(Protocol):
    """Makes inputs and labels of samples.

    Attributes:
        extra_ids: token ids that it needs besides the tokenizer's.
    """

    extra_ids: int

    def __call__(self, rows: np.ndarray, positions: Sequence[int]) -> Examples:
        """Return inputs and labels of samples [B, L + 1], given their positions in the order."""
        ...


class LanguageModelling:
    """Predicts each token from the tokens before it."""

    extra_ids = 0

    def __call__(self, rows: np.ndarray, positions: Sequence[int]) -> Examples:
        return Examples(rows[:, :-1], rows[:, 1:])


class PrefixLM:
    """Predicts the rest of a sample from its prefix (Raffel et al. 2020, section 3.2.3).

    With a prefix decoder the length of the prefix is uniform in 1 .. L - 1. With an encoder the
    prefix is the first half, since rows of a constant shape have no padding. The decoder starts
    with the last token of the prefix.
    """

    extra_ids = 0

    def __init__(self, *, seed: int, length: int, encoder: bool) -> None:
        self.seed, self.length, self.encoder = seed, length, encoder

    def __call__(self, rows: np.ndarray, positions: Sequence[int]) -> Examples:
        if self.encoder:
            half = self.length // 2
            return Examples(rows[:, half - 1 : -1], rows[:, half:], {"source_BS": rows[:, :half]})
        draws = [int(draw_bits(self.seed, position, 1)[0]) for position in positions]
        prefix_B = np.array([1 + draw % (self.length - 1) for draw in draws], dtype=np.int64)
        # Inside the prefix the model sees the next token; after its last token it does not.
        is_visible = np.arange(self.length) < prefix_B[:, None] - 1
        labels = np.where(is_visible, IGNORED, rows[:, 1:])
        return Examples(rows[:, :-1], labels, {"prefix_B": prefix_B})


class SpanDenoising:
    """T5 (Raffel et al. 2020, section 3.1.4): spans of a sample are replaced by one sentinel each.

    The target has each sentinel, followed by its span. The numbers of removed tokens and of spans
    are constant, their places are random: the lengths of spans and of the text between them are
    uniform compositions, as in T5's random_spans_noise_mask. The target ends with one more
    sentinel, as in the paper's figure 2 (T5's code has EOS there, and another one after the source).
    For a prefix decoder, source and target are one row.

    Ids: first the one that the decoder starts with, then the sentinels. The first sentinel is the
    last id of the vocabulary, the others precede it, as T5's <extra_id_0>, <extra_id_1>, ...
    """

    def __init__(
        self,
        *,
        seed: int,
        length: int,
        first_id: int,
        noise: float,
        span_length: float,
        encoder: bool,
    ) -> None:
        self.seed, self.encoder, self.first_id = seed, encoder, first_id
        self.cut = _largest_cut(length, noise, span_length, one_row=not encoder)
        self.extra_ids = self.cut.spans + 2

    def __call__(self, rows: np.ndarray, positions: Sequence[int]) -> Examples:
        pairs = [self._pair(row, position) for row, position in zip(rows, positions, strict=True)]
        source = stack_rows([pair[0] for pair in pairs], self.cut.kept + self.cut.spans)
        target = stack_rows([pair[1] for pair in pairs], self.cut.noise + self.cut.spans + 1)
        if self.encoder:
            start = np.full((len(pairs), 1), self.first_id)
            return Examples(np.hstack([start, target[:, :-1]]), target, {"source_BS": source})
        joined = np.hstack([source, target])
        labels = joined[:, 1:].copy()
        labels[:, : source.shape[1] - 1] = IGNORED
        prefix_B = np.full(len(pairs), source.shape[1], dtype=np.int64)
        return Examples(joined[:, :-1], labels, {"prefix_B": prefix_B})

    def _pair(self, row: np.ndarray, position: int) -> tuple[np.ndarray, np.ndarray]:
        raw = draw_bits(self.seed, position, self.cut.noise + self.cut.kept)
        gone = _composition(self.cut.noise, self.cut.spans, raw[: self.cut.noise])
        kept = _composition(self.cut.kept, self.cut.spans, raw[self.cut.noise :])
        pieces = np.split(
            row[: self.cut.tokens], np.stack([kept, gone], axis=1).flatten().cumsum()[:-1]
        )
        highest = self.first_id + self.extra_ids - 1
        sentinels = [np.array([highest - index]) for index in range(self.cut.spans + 1)]
        source = [part for pair in zip(pieces[::2], sentinels[:-1], strict=True) for part in pair]
        target = [part for pair in zip(sentinels[:-1], pieces[1::2], strict=True) for part in pair]
        return np.concatenate(source), np.concatenate([*target, sentinels[-1]])


class _Cut(NamedTuple):
    """Numbers of a sample's tokens that are used and removed, and of spans."""

    tokens: int
    noise: int
    spans: int

    @property
    def kept(self) -> int:
        return self.tokens - self.noise


def _largest_cut(length: int, noise: float, span_length: float, *, one_row: bool) -> _Cut:
    """Return the cut with the most tokens of a sample that fits into rows of `length`.

    Args:
        one_row: whether source and target share a row, in which each span needs two tokens more.
    """
    for tokens in range(length, 1, -1):
        gone = min(max(round(tokens * noise), 1), tokens - 1)
        spans = min(max(round(gone / span_length), 1), gone, tokens - gone)
        longest = max(tokens - gone + spans, gone + spans + 1)
        if one_row:
            longest = tokens + 2 * spans
        if spans >= 1 and longest <= length:
            return _Cut(tokens, gone, spans)
    raise ValueError(f"a row of {length} tokens is too short for spans")


def _composition(total: int, parts: int, raw: np.ndarray) -> np.ndarray:
    """Return `parts` lengths >= 1 with the sum `total`, uniform over all such choices.

    Args:
        raw: at least `total` - 1 random numbers.
    """
    cuts = np.sort(np.argsort(raw[: total - 1], kind="stable")[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def draw_bits(seed: int, position: int, count: int) -> np.ndarray:
    """Return uint64 random numbers [count].

    They are the bit stream itself, which numpy promises not to change; its distributions may change.
    """
    return np.asarray(np.random.PCG64(mix64(seed, position, _STREAM)).random_raw(count))


def stack_rows(rows: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Return rows as int64 [B, length]; B may be 0."""
    if not rows:
        return np.empty((0, length), dtype=np.int64)
    return np.stack(rows).astype(np.int64)
