"""What a model is shown of a sample and what it is to say: language modelling, prefix LM, spans.

Each draw is a function of (seed, position of the sample in the order), so that the same sample at
the same position is corrupted in the same way after a rollback, a restart, and on any number of
ranks. Shapes are constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from guardrail.decide.sample_order import mix64

IGNORED = -100  # label that no loss counts: the default `ignore_index` of torch's cross_entropy
_DICE = 0x5EED0BEC  # keeps these draws apart from others of the same seed and position


@dataclass(frozen=True, slots=True)
class Examples:
    """Attributes:
    tokens, labels: int64 [B, T]; labels[b, t] is what follows tokens[b, t], or IGNORED.
    extra: further arguments of the model by name, int64, the first dimension B.
    """

    tokens: np.ndarray
    labels: np.ndarray
    extra: dict[str, np.ndarray] = field(default_factory=dict)


class Objective(Protocol):
    """Attributes:
    extra_ids: token ids that it needs beyond the tokenizer's.
    """

    extra_ids: int

    def __call__(self, rows: np.ndarray, positions: Sequence[int]) -> Examples:
        """Samples [B, L + 1] and their positions in the order -> what the model is given."""
        ...


class LanguageModelling:
    """Each token from those before it."""

    extra_ids = 0

    def __call__(self, rows: np.ndarray, positions: Sequence[int]) -> Examples:
        return Examples(rows[:, :-1], rows[:, 1:])


class PrefixLM:
    """The rest of a sample from its beginning (Raffel et al. 2020, section 3.2.3).

    With a prefix decoder the beginning has a length drawn evenly from 1 .. L - 1; with an encoder
    it is the first half, since rows of a constant shape have no padding, and the decoder starts
    from its last token.
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
        # What follows a token inside the prefix is in sight; what follows its last one is not.
        seen = np.arange(self.length) < prefix_B[:, None] - 1
        return Examples(rows[:, :-1], np.where(seen, IGNORED, rows[:, 1:]), {"prefix_B": prefix_B})


class SpanDenoising:
    """T5 (Raffel et al. 2020, section 3.1.4): spans of a sample are replaced by one sentinel each,
    and said in turn behind their sentinels.

    The number of tokens taken out and of spans is constant, their places are drawn: lengths of
    spans and of what is between them are even compositions, as in T5's random_spans_noise_mask. The
    target ends with one more sentinel, as in the paper's figure 2 (T5's code has its EOS there, and
    another one behind the source). Ids: the one that the decoder starts from, then the sentinels,
    the first of them the last id of the vocabulary and the others before it, as T5's <extra_id_0>,
    <extra_id_1>, ... For a prefix decoder source and target stand in one row.
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
        whole = np.hstack([source, target])
        labels = whole[:, 1:].copy()
        labels[:, : source.shape[1] - 1] = IGNORED
        prefix_B = np.full(len(pairs), source.shape[1], dtype=np.int64)
        return Examples(whole[:, :-1], labels, {"prefix_B": prefix_B})

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
    """How many tokens of a sample are used, taken out, and in how many spans."""

    tokens: int
    noise: int
    spans: int

    @property
    def kept(self) -> int:
        return self.tokens - self.noise


def _largest_cut(length: int, noise: float, span_length: float, *, one_row: bool) -> _Cut:
    """The most tokens of a sample that fit into rows of `length`.

    Args:
        one_row: source and target share a row, in which each span costs two tokens; else each has
        its own.
    """
    for tokens in range(length, 1, -1):
        gone = min(max(round(tokens * noise), 1), tokens - 1)
        spans = min(max(round(gone / span_length), 1), gone, tokens - gone)
        longest = tokens + 2 * spans if one_row else max(tokens - gone + spans, gone + spans + 1)
        if spans >= 1 and longest <= length:
            return _Cut(tokens, gone, spans)
    raise ValueError(f"a row of {length} tokens is too short for spans")


def _composition(total: int, parts: int, raw: np.ndarray) -> np.ndarray:
    """`parts` lengths >= 1 that make up `total`, each such choice equally likely; `raw`: at least
    `total` - 1 draws.
    """
    cuts = np.sort(np.argsort(raw[: total - 1], kind="stable")[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def draw_bits(seed: int, position: int, count: int) -> np.ndarray:
    """uint64 draws [count]. The bit stream itself, which numpy promises to keep; its distributions
    may change.
    """
    return np.asarray(np.random.PCG64(mix64(seed, position, _DICE)).random_raw(count))


def stack_rows(rows: Sequence[np.ndarray], length: int) -> np.ndarray:
    """int64 [B, length], also of no rows."""
    return np.stack(rows).astype(np.int64) if rows else np.empty((0, length), dtype=np.int64)
