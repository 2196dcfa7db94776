"""What is odd about a text, and which samples stand out: real text is ordinary, each kind of rubbish is named."""

import inspect
import math
import random
import textwrap

import pytest

from guardrail.oddness import Usual, odd
from guardrail.outliers import Outlier, Sample, foremost, outliers

PROSE = inspect.cleandoc(textwrap.__doc__ or "") + (
    " Text wrapping and filling. A paragraph is given as one long string, and comes back as lines that are short "
    "enough for a terminal. White space is kept or dropped as the options say, and words that are longer than a line "
    "are broken where nothing else helps. Tabs become blanks first, because their width depends on where they stand."
)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("the same phrase " * 30, "phrase"),
        ("abcabcabc" * 20, "over and over"),
        ("one line of this\n" * 20, "lines are repeated"),
        (random.Random(1).randbytes(300).decode("latin-1"), "unprintable"),
        ("cafÃ© naÃ¯ve rÃ©sumÃ© dÃ©jÃ  vu and so on with more words", "decoded wrongly"),
        ("".join(chr(random.Random(2).randrange(0x21, 0x7F)) for _ in range(5)) * 40, "over and over"),
        ("3.14159 2.71828 " + " ".join(str(n * 7919) for n in range(60)), "digits"),
        ("SHOUTING IS NO STYLE FOR A WHOLE PAGE OF TEXT AND WORDS", "capitals"),
        ("# a # b # c # d # e # f # g # h # i # j # k # l # m", "symbols"),
        ("{{a}} {{b}} {{c}} and some more text here", "curly"),
        ("Lorem ipsum dolor sit amet, consectetur adipiscing", "lorem ipsum"),
        ("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "entropy"),
    ],
)
def test_each_kind_of_rubbish_is_named(text: str, word: str) -> None:
    assert any(word in said for said in odd(text)), odd(text)


def test_ordinary_text_is_not_odd() -> None:
    usual = Usual(PROSE[at : at + 120] for at in range(0, len(PROSE) - 120, 40))
    assert odd(PROSE) == []
    assert odd(PROSE[60:200], usual=usual) == []
    assert odd("") == [] and odd("x") == []


def test_another_language_and_a_copy() -> None:
    usual = Usual(PROSE[at : at + 120] for at in range(0, len(PROSE) - 120, 40))
    text = "Это предложение написано другим алфавитом, которого нет в корпусе"
    assert any("unlike the corpus" in said and "CYRILLIC" in said for said in odd(text, usual=usual))
    assert "the very same text as another sample" in odd(PROSE, among=[PROSE])


def samples(losses: list[float], gradients: list[float] | None = None) -> list[Sample]:
    pulls = gradients or [1.0 + 0.05 * (at % 3) for at in range(len(losses))]
    pairs = zip(losses, pulls, strict=True)
    return [Sample(position=at, loss=loss, tokens=10, gradient=pull) for at, (loss, pull) in enumerate(pairs)]


ORDINARY = samples([2.2, 2.3, 2.4, 2.25, 2.35, 2.1, 2.5, 2.3, 2.4, 2.2, 2.3, 2.6])


def test_a_sample_stands_out_by_its_loss_or_its_gradient() -> None:
    batch = samples([2.3, 9.0, 2.2, 2.4], [1.0, 1.1, 40.0, 1.0])
    found = outliers(batch, ORDINARY)
    assert {one.sample.position for one in found} == {1, 2}
    assert next(one.share for one in found if one.sample.position == 2) > 0.99
    assert outliers(samples([2.3, 2.7, 2.0, 2.4]), ORDINARY) == []


def test_a_number_that_is_none_stands_out_furthest() -> None:
    found = outliers(samples([2.3, 9.0, math.nan, 2.4]), ORDINARY)
    assert [one.sample.position for one in found] == [2, 1] and found[0].score == math.inf


def test_rows_without_labels_and_without_gradients_are_passed_over() -> None:
    batch = [Sample(position=0), *(Sample(position=at, loss=2.3, tokens=10) for at in (1, 2, 3))]
    assert outliers(batch, [Sample(position=at, loss=2.3, tokens=10) for at in range(10)]) == []


def test_without_healthy_batches_the_batch_itself_is_what_is_usual() -> None:
    found = outliers(samples([2.3, 2.2, 2.4, 2.3, 9.0]), [])
    assert [one.sample.position for one in found] == [4]


def test_those_that_weigh_are_told_from_those_that_merely_stand_out() -> None:
    """A hundredth of the worst one's excess is far out among samples that are all alike, and explains nothing."""
    ordinary = [Sample(position=at, loss=0.02, tokens=64, gradient=1.0) for at in range(9)]

    def chosen(part: float, *pairs: tuple[float, float]) -> list[int]:
        found = [
            Outlier(sample=Sample(position=at, loss=loss, tokens=64, gradient=gradient), score=9.0)
            for at, (loss, gradient) in enumerate(pairs)
        ]
        return [outlier.sample.position for outlier in foremost(found, ordinary, part=part)]

    pairs = [(5.02, 10.0), (0.22, 1.0), (0.037, 0.5), (0.03, 8.0)]
    assert chosen(0.1, *pairs) == [0, 3] and chosen(0.01, *pairs) == [0, 1, 3] and chosen(0.0, *pairs) == [0, 1, 2, 3]
    assert chosen(0.1, (math.nan, math.nan), (2.0, 1.0)) == [1], "an unknown number has no weight"
    broken = [Outlier(sample=Sample(position=0, loss=math.nan, tokens=4), score=math.inf)]
    assert foremost(broken, ordinary, part=0.1) == broken and foremost([], ordinary, part=0.1) == []
