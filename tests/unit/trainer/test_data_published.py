"""The objectives against their published definitions, written out anew: T5's spans (Raffel et al.
2020) and GLM's blanks (Du et al. 2022). Masks, ids, positions and sight are compared exactly; what
is drawn by its distribution."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from trainer.config.config import ModelSection
from trainer.model import Decoder
from trainer.objectives.blank_filling import BlankFilling, _poisson
from trainer.objectives.examples import IGNORED, PrefixLM, SpanDenoising, draw_bits

LENGTH, FIRST, SEED = 128, 1000, 5
SPAN: dict[str, Any] = {
    "seed": SEED,
    "length": LENGTH,
    "first_id": FIRST,
    "noise": 0.15,
    "span_length": 3.0,
}
BLANK: dict[str, Any] = {**SPAN, "two_dimensional": True}
ROW = np.arange(LENGTH + 1)  # each token is its own place
MASK, TAIL, START, END = range(FIRST, FIRST + 4)


def rows(count: int) -> np.ndarray:
    return np.tile(ROW, (count, 1))


# -- T5


def noise_mask(length: int, shuffles: Sequence[Callable[[list[bool]], list[bool]]]) -> list[bool]:
    """Raffel et al.'s random_spans_noise_mask at a density of 0.15 and a mean length of 3.

    Args:
        shuffles: of the places at which a span of noise begins, and of those at which one of text
        does.
    """
    noise = min(max(round(length * 0.15), 1), length - 1)
    spans = max(round(noise / 3.0), 1)

    def segments(items: int, shuffle: Callable[[list[bool]], list[bool]]) -> list[int]:
        lengths = [1]
        for begins in shuffle([index < spans - 1 for index in range(items - 1)]):
            if begins:
                lengths.append(0)
            lengths[-1] += 1
        return lengths

    gone, kept = segments(noise, shuffles[0]), segments(length - noise, shuffles[1])
    return [
        masked
        for pair in zip(kept, gone, strict=True)
        for masked in (False,) * pair[0] + (True,) * pair[1]
    ]


def with_sentinels(tokens: Sequence[int], mask: Sequence[bool], highest: int) -> list[int]:
    """Each run of the mask becomes one sentinel: the last id of the vocabulary, the one before it,
    ...
    """
    found, sentinel = [], highest
    for index, (token, masked) in enumerate(zip(tokens, mask, strict=True)):
        if not masked:
            found.append(token)
        elif index == 0 or not mask[index - 1]:
            found.append(sentinel)
            sentinel -= 1
    return found


def in_order_of(raw: np.ndarray) -> Callable[[list[bool]], list[bool]]:
    """The shuffle that puts the i-th thing where the i-th smallest draw lies."""

    def shuffled(things: list[bool]) -> list[bool]:
        places = np.argsort(raw[: len(things)]).tolist()
        return [thing for _, thing in sorted(zip(places, things, strict=True))]

    return shuffled


def test_spans_are_t5s_given_the_same_shuffles() -> None:
    objective = SpanDenoising(**SPAN, encoder=True)
    made = objective(rows(200), range(200))
    vocabulary = FIRST + objective.extra_ids
    noise = objective.cut.noise
    assert objective.cut.tokens == LENGTH and noise == 19 and objective.cut.spans == 6
    for position in range(200):
        raw = draw_bits(SEED, position, LENGTH)
        mask = noise_mask(LENGTH, [in_order_of(raw[:noise]), in_order_of(raw[noise:])])
        source = with_sentinels(ROW[:LENGTH].tolist(), mask, vocabulary - 1)
        target = with_sentinels(
            ROW[:LENGTH].tolist(), [not masked for masked in mask], vocabulary - 1
        )
        assert made.extra["source_BS"][position].tolist() == source
        # Figure 2 of the paper: the final sentinel closes the target.
        assert made.labels[position].tolist() == [*target, vocabulary - 1 - objective.cut.spans]


def test_spans_fall_where_t5s_fall() -> None:
    """Lengths of spans, and how often each token is taken out, of the reference with dice of its
    own.
    """
    dice_of_its_own = random.Random(1)

    def shuffle(things: list[bool]) -> list[bool]:
        return dice_of_its_own.sample(things, len(things))

    count = 2000
    theirs = np.array([noise_mask(LENGTH, [shuffle, shuffle]) for _ in range(count)])
    source = SpanDenoising(**SPAN, encoder=True)(rows(count), range(count)).extra["source_BS"]
    ours = np.array([~np.isin(ROW[:LENGTH], row) for row in source])
    assert_same_share(ours.mean(0), theirs.mean(0), count)
    assert_same_histogram(run_lengths(ours), run_lengths(theirs))


def run_lengths(mask: np.ndarray) -> Counter[int]:
    edges = np.diff(np.pad(mask.astype(int), ((0, 0), (1, 1))), axis=1)
    return Counter((np.nonzero(edges == -1)[1] - np.nonzero(edges == 1)[1]).tolist())


def assert_same_share(ours: np.ndarray, theirs: np.ndarray, count: int) -> None:
    """Shares of `count` draws each, within five sigmas of their difference."""
    sigma = np.sqrt((ours * (1 - ours) + theirs * (1 - theirs)) / count) + 1 / count
    assert (np.abs(ours - theirs) < 5 * sigma).all()


def assert_same_histogram(ours: Counter[int], theirs: Counter[int]) -> None:
    for value in ours.keys() | theirs.keys():
        a, b = ours[value] / ours.total(), theirs[value] / theirs.total()
        sigma = (
            math.sqrt(a * (1 - a) / ours.total() + b * (1 - b) / theirs.total()) + 1 / ours.total()
        )
        assert abs(a - b) < 5 * sigma, (value, a, b)


# -- GLM


def glm_lengths(dice_: random.Random) -> list[int]:
    """Lengths from Poisson(3), 1 to 39, until 15 % of the text is in blanks; a blank costs the row
    two tokens.
    """
    weights = [math.exp(-3) * 3**n / math.factorial(n) for n in range(1, 40)]
    found: list[int] = []
    while sum(found) < int(0.15 * (LENGTH - 2 * len(found))):
        found += dice_.choices(range(1, 40), weights)
    dice_.shuffle(found)
    return found


def glm_spans(lengths: Sequence[int], total: int, dice_: random.Random) -> list[tuple[int, int]]:
    """GLM's sample_spans: places from all with at least one kept token between two blanks."""
    spare = total - sum(lengths) - len(lengths) + 1
    places = sorted(dice_.randint(0, spare) for _ in lengths)
    shifts = [sum(lengths[:index]) + index for index in range(len(lengths))]
    return [(p + s, p + s + n) for p, s, n in zip(places, shifts, lengths, strict=True)]


def glm_row(spans: Sequence[tuple[int, int]], total: int) -> dict[str, list[int]]:
    """Part A and part B of the text 0 .. total - 1, as GLM's make_block_data has them.

    Args:
        spans: [first, last) in the order of part B.
    """
    position_of, position = {}, -1
    for token in range(total):  # all tokens of a span share the position of its mask
        position += not any(first < token < last for first, last in spans)
        position_of[token] = position
    tokens, positions = [], []
    for token in range(total):
        inside = [first for first, last in spans if first <= token < last]
        if not inside or inside[0] == token:
            tokens.append(MASK if inside else token)
            positions.append(position_of[token])
    prefix = len(tokens)
    labels, counts = [IGNORED] * prefix, [0] * prefix
    for first, last in spans:
        tokens += [START, *range(first, last)]
        labels += [*range(first, last), END]
        positions += [position_of[first]] * (last - first + 1)
        counts += range(1, last - first + 2)
    return {
        "tokens": tokens,
        "labels": labels,
        "positions": positions,
        "counts": counts,
        "prefix": [prefix],
    }


def spans_of(labels: Sequence[int]) -> list[tuple[int, int]]:
    """What was taken out, in the order of part B."""
    said = [label for label in labels if label != IGNORED]
    ends = [-1, *(index for index, label in enumerate(said) if label == END)]
    return [(said[a + 1], said[b - 1] + 1) for a, b in itertools.pairwise(ends)]


def test_rows_of_blanks_are_glms() -> None:
    made = BlankFilling(**BLANK, tail_share=0.0)(rows(300), range(300))
    orders = Counter()
    for index in range(300):
        spans = spans_of(made.labels[index].tolist())
        expected = glm_row(spans, LENGTH - 2 * len(spans))
        assert (
            made.tokens[index].tolist() == expected["tokens"] and len(expected["tokens"]) == LENGTH
        )
        assert made.labels[index].tolist() == expected["labels"]
        assert made.extra["positions_BT"][index].tolist() == expected["positions"]
        assert made.extra["blanks_BT"][index].tolist() == expected["counts"]
        assert [made.extra["prefix_B"][index]] == expected["prefix"]
        orders[spans[0] < spans[-1]] += 1
    # shuffled: the first of part B is as often behind the last as before it
    assert 110 < orders[True] < 190


def test_blanks_fall_where_glms_fall() -> None:
    """Lengths, number, share and places of the blanks of the reference with dice of its own."""
    dice_of_its_own, count = random.Random(2), 3000
    theirs = []
    for _ in range(count):
        lengths = glm_lengths(dice_of_its_own)
        theirs.append(glm_spans(lengths, LENGTH - 2 * len(lengths), dice_of_its_own))
    made = BlankFilling(**BLANK, tail_share=0.0)(rows(count), range(count))
    ours = [sorted(spans_of(labels)) for labels in made.labels.tolist()]
    for told in (
        lambda spans: [last - first for first, last in spans],
        lambda spans: [len(spans)],
        lambda spans: [sum(last - first for first, last in spans)],
        lambda spans: [spans[0][0] // 4],
        lambda spans: [spans[-1][0] // 8, 100 + spans[-1][1] - spans[-1][0]],
    ):
        histograms = [
            Counter(value for spans in all_spans for value in told(spans))
            for all_spans in (ours, theirs)
        ]
        assert_same_histogram(*histograms)
    shares = [sum(b - a for a, b in spans) / (LENGTH - 2 * len(spans)) for spans in ours]
    assert min(shares) >= 0.15 - 1 / LENGTH and sum(shares) / count == pytest.approx(0.17, abs=0.01)


@pytest.mark.parametrize("mean", [1.0, 3.0, 4.5, 12.0])
def test_lengths_are_poissons_without_its_zero(mean: float) -> None:
    weights = [
        math.exp(n * math.log(mean) - mean - math.lgamma(n + 1))
        for n in range(1, math.ceil(13 * mean) + 1)
    ]
    assert len(weights) == 39 if mean == 3.0 else True  # GLM's max_block_length of 40
    expected = np.cumsum(weights)[:-1] / sum(weights)
    np.testing.assert_allclose(_poisson(mean), expected, rtol=1e-9)


def test_a_tail_is_a_prefix_and_its_text_goes_on() -> None:
    """GLM's generation: [gMASK], [sop] and the rest of the text, of which no end is learnt, for
    there is none.
    """
    made = BlankFilling(**BLANK, tail_share=1.0)(rows(400), range(400))
    flat = BlankFilling(**{**BLANK, "two_dimensional": False}, tail_share=1.0)(
        rows(400), range(400)
    )
    cuts = Counter()
    for index in range(400):
        at = int(made.extra["prefix_B"][index]) - 1
        text = list(range(LENGTH - 1))
        assert made.tokens[index].tolist() == [*text[:at], TAIL, START, *text[at:-1]]
        assert made.labels[index].tolist() == [IGNORED] * (at + 1) + text[at:]
        assert made.extra["positions_BT"][index].tolist() == [*range(at + 1)] + [at] * (
            LENGTH - 1 - at
        )
        assert made.extra["blanks_BT"][index].tolist() == [0] * (at + 1) + [*range(1, LENGTH - at)]
        assert flat.extra["positions_BT"][index].tolist() == list(
            range(LENGTH)
        )  # GLM-130B, whose RoPE has one dimension
        cuts[at // 32] += 1
    assert sorted(cuts) == [0, 1, 2, 3] and min(cuts.values()) > 65  # evenly (GLM-130B)


@pytest.mark.parametrize("length", [4, 5, 6, 7, 9, 16])
@pytest.mark.parametrize(("noise", "mean"), [(0.15, 3.0), (0.9, 1.0), (0.5, 12.0)])
def test_short_rows_are_full_and_keep_something(length: int, noise: float, mean: float) -> None:
    sizes = {**BLANK, "length": length, "noise": noise, "span_length": mean}
    for share in (0.0, 1.0):
        made = BlankFilling(**sizes, tail_share=share)(rows(50)[:, : length + 1], range(50))
        assert made.tokens.shape == (50, length)
        for tokens, prefix in zip(made.tokens, made.extra["prefix_B"], strict=True):
            assert (tokens[:prefix] < FIRST).any()
    with pytest.raises(ValueError, match="too short"):
        BlankFilling(**{**sizes, "length": 3}, tail_share=0.0)


# -- sight


@pytest.mark.parametrize("objective", ["blank", "span", "prefix-lm"])
def test_part_a_sees_itself_and_part_b_what_came_before(objective: str) -> None:
    """The mask of the model, entry by entry, and that nothing that must be said is in it."""
    made = {
        "blank": BlankFilling(**BLANK, tail_share=0.5),
        "span": SpanDenoising(**SPAN, encoder=False),
        "prefix-lm": PrefixLM(seed=SEED, length=LENGTH, encoder=False),
    }[objective](rows(6), range(6))
    model = Decoder(
        ModelSection(layers=1, width=8, heads=2, kind="prefix"),
        vocabulary=5,
        sequence_length=LENGTH,
    )
    prefix, length = made.extra["prefix_B"], made.tokens.shape[1]
    mask = model.mask(length, torch.device("cpu"), torch.from_numpy(prefix))
    assert mask is not None
    seen = (mask.expand(6, 1, length, length)[:, 0] == 0).numpy()
    assert ((mask == 0) | (mask == -torch.inf)).all()
    for row in range(6):
        for query in range(length):
            part_a = query < prefix[row]
            expected = [
                key < prefix[row] if part_a else key < prefix[row] or key <= query
                for key in range(length)
            ]
            assert seen[row, query].tolist() == expected
            label = made.labels[row, query]
            if label != IGNORED and label < FIRST:  # sentinels and [eop] stand more than once
                assert label not in made.tokens[row, seen[row, query]]
