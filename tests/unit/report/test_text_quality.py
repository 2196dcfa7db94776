"""What is odd about a text, and which samples stand out: real text is ordinary, each kind of
rubbish is named.
"""

import inspect
import math
import random
import re
import textwrap

import pytest

from guardrail.decide.sample_outliers import Outlier, Sample, find_outliers, select_heaviest
from guardrail.report import text_quality as oddness
from guardrail.report.text_quality import (
    COPY,
    FEW_CHARACTERS,
    FOREIGN_BITS,
    CorpusStatistics,
    _find_character_runs,
    text_anomalies,
)

PROSE = inspect.cleandoc(textwrap.__doc__ or "") + (
    " Text wrapping and filling. A paragraph is given as one long string, and comes back as lines that are short "
    "enough for a terminal. White space is kept or dropped as the options say, and words that are longer than a line "
    "are broken where nothing else helps. Tabs become blanks first, because their width depends on where they stand."
)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("the same phrase " * 30, "phrase"),
        ("abcabcabc" * 20, "repeats"),
        ("one line of this\n" * 20, "lines"),
        (random.Random(1).randbytes(300).decode("latin-1"), "unprintable"),
        ("cafÃ© naÃ¯ve rÃ©sumÃ© dÃ©jÃ  vu and so on with more words", "decoded"),
        (
            "".join(chr(random.Random(2).randrange(0x21, 0x7F)) for _ in range(5)) * 40,
            "repeats",
        ),
        ("3.14159 2.71828 " + " ".join(str(n * 7919) for n in range(60)), "digits"),
        ("SHOUTING IS NO STYLE FOR A WHOLE PAGE OF TEXT AND WORDS", "capitals"),
        ("# a # b # c # d # e # f # g # h # i # j # k # l # m", "symbols"),
        ("{{a}} {{b}} {{c}} and some more text here", "curly"),
        ("Lorem ipsum dolor sit amet, consectetur adipiscing", "lorem ipsum"),
        ("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "entropy"),
    ],
)
def test_each_kind_of_rubbish_is_named(text: str, word: str) -> None:
    assert any(word in said for said in text_anomalies(text)), text_anomalies(text)


def test_ordinary_text_is_not_odd() -> None:
    usual = CorpusStatistics(PROSE[at : at + 120] for at in range(0, len(PROSE) - 120, 40))
    assert text_anomalies(PROSE) == []
    assert text_anomalies(PROSE[60:200], usual=usual) == []
    assert text_anomalies("") == [] and text_anomalies("x") == []


def test_another_language_and_a_copy() -> None:
    usual = CorpusStatistics(PROSE[at : at + 120] for at in range(0, len(PROSE) - 120, 40))
    text = "Это предложение написано другим алфавитом, которого нет в корпусе"
    alone, compared = text_anomalies(text), text_anomalies(text, usual=usual)
    (foreign,) = (said for said in compared if said not in alone)
    assert "CYRILLIC" in foreign
    bits, normal = map(float, re.findall(r"\d+\.\d", foreign))
    assert bits > normal + FOREIGN_BITS
    assert COPY in text_anomalies(PROSE, among=[PROSE]) and COPY not in text_anomalies(PROSE)


UNSPACED = {
    "Chinese": (
        "人类的语言是一种复杂的符号系统，它让我们能够表达思想、交流感情并传承文化。在漫长的历史中，不同的民族"
        "创造了各自的文字，有的以字母记录声音，有的以图形表示意义。今天，互联网使这些文字在同一块屏幕上相遇，"
        "翻译软件也在不断进步，但理解一门语言仍然需要时间和耐心。学习的过程常常充满惊喜。"
    ),
    "Japanese": (
        "日本語の文章は、漢字とひらがな、カタカナを組み合わせて書かれます。単語の間に空白を置かないため、機械"
        "で処理するときには、まず文を単語に分ける必要があります。新聞や小説、手紙など、場面によって言葉づかい"
        "が変わることも、この言語の面白いところです。春になると、人々は桜の下に集まり、短い季節を楽しみます。"
    ),
    "Thai": (
        "ภาษาไทยเป็นภาษาที่เขียนติดกันโดยไม่มีช่องว่างระหว่างคำ ผู้อ่านจึงต้องรู้จักคำศัพท์เพื่อแยกประโยคออกเ"
        "ป็นส่วนต่างๆ เมื่อเดินทางไปตามชนบท เราจะพบตลาดเล็กๆ ที่ขายผลไม้สด อาหารพื้นเมือง และงานฝีมือของชาวบ้"
        "าน เด็กๆ วิ่งเล่นอยู่ริมแม่น้ำในตอนเย็น ขณะที่พระอาทิตย์กำลังลับขอบฟ้า"
    ),
    "Korean": (
        "한국어 문장은 단어 사이에 띄어쓰기를 하지만 글자 하나하나가 음절을 나타낸다. 아침에 시장에 가면 상인"
        "들이 신선한 채소와 생선을 늘어놓고 손님을 기다린다. 오래된 골목에는 작은 서점이 남아 있고, 주인은 손"
        "님에게 좋아하는 시를 읽어 주기도 한다."
    ),
}


@pytest.mark.fault("A6")
@pytest.mark.parametrize("language", UNSPACED)
def test_scripts_without_spaces_are_ordinary_text(language: str) -> None:
    text = UNSPACED[language]
    assert text_anomalies(text) == [] and text_anomalies(text[:60]) == []
    assert text_anomalies("\n".join(text[at : at + 10] for at in range(0, len(text), 10))) == [], (
        "in short lines"
    )


@pytest.mark.fault("A6")
@pytest.mark.parametrize("language", ["Chinese", "Japanese", "Thai"])
def test_repetition_in_scripts_without_spaces(language: str) -> None:
    text = UNSPACED[language]
    assert any("repeats" in said for said in text_anomalies(text[:30] * 20))
    mixed = "".join(text[:25] + text[at : at + 12] for at in range(25, 120))
    assert any(re.search(r"\bstrings?\b", said) for said in text_anomalies(mixed)), text_anomalies(
        mixed
    )


@pytest.mark.parametrize("period", [1, 2, 7, 8, 9, 40, 99])
@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_a_string_over_and_over_is_found_at_any_length(period: int, noise: float) -> None:
    draw = random.Random(period)
    string = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=period))
    text = "".join(
        draw.choice("XYZ") if draw.random() < noise else one for one in string * (600 // period)
    )
    (said,) = _find_character_runs(text)
    assert said.startswith("repeats ")


def test_random_characters_are_no_repetition() -> None:
    draw = random.Random(0)
    for size in (FEW_CHARACTERS, 100, 8192):
        assert (
            _find_character_runs("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=size))) == []
        )


@pytest.mark.fault("A6")
def test_the_time_grows_with_the_length_and_not_with_its_square(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Characters that are compared, of a text without a space."""
    compared = 0

    def counted(text: str, other: str) -> bool:
        nonlocal compared
        compared += 1
        return text == other

    text = "".join(random.Random(0).choices("abcdefgh", k=40_000))
    monkeypatch.setattr(oddness.operator, "eq", counted)
    assert _find_character_runs(text) == [] and compared <= 4 * len(text)


def samples(losses: list[float], gradients: list[float] | None = None) -> list[Sample]:
    pulls = gradients or [1.0 + 0.05 * (at % 3) for at in range(len(losses))]
    pairs = zip(losses, pulls, strict=True)
    return [
        Sample(position=at, loss=loss, tokens=10, gradient=pull)
        for at, (loss, pull) in enumerate(pairs)
    ]


ORDINARY = samples([2.2, 2.3, 2.4, 2.25, 2.35, 2.1, 2.5, 2.3, 2.4, 2.2, 2.3, 2.6])


def test_a_sample_stands_out_by_its_loss_or_its_gradient() -> None:
    batch = samples([2.3, 9.0, 2.2, 2.4], [1.0, 1.1, 40.0, 1.0])
    found = find_outliers(batch, ORDINARY)
    assert {one.sample.position for one in found} == {1, 2}
    assert next(one.share for one in found if one.sample.position == 2) > 0.99
    assert find_outliers(samples([2.3, 2.7, 2.0, 2.4]), ORDINARY) == []


def test_a_number_that_is_none_stands_out_furthest() -> None:
    found = find_outliers(samples([2.3, 9.0, math.nan, 2.4]), ORDINARY)
    assert [one.sample.position for one in found] == [2, 1] and found[0].score == math.inf


def test_rows_without_labels_and_without_gradients_are_skipped() -> None:
    batch = [Sample(position=0), *(Sample(position=at, loss=2.3, tokens=10) for at in (1, 2, 3))]
    assert (
        find_outliers(batch, [Sample(position=at, loss=2.3, tokens=10) for at in range(10)]) == []
    )


def test_without_healthy_batches_the_batch_itself_is_what_is_usual() -> None:
    found = find_outliers(samples([2.3, 2.2, 2.4, 2.3, 9.0]), [])
    assert [one.sample.position for one in found] == [4]


def test_only_outliers_with_much_weight_are_selected() -> None:
    """A hundredth of the worst one's excess is far out among samples that are all alike, and
    explains nothing.
    """
    ordinary = [Sample(position=at, loss=0.02, tokens=64, gradient=1.0) for at in range(9)]

    def chosen(part: float, *pairs: tuple[float, float]) -> list[int]:
        found = [
            Outlier(sample=Sample(position=at, loss=loss, tokens=64, gradient=gradient), score=9.0)
            for at, (loss, gradient) in enumerate(pairs)
        ]
        return [outlier.sample.position for outlier in select_heaviest(found, ordinary, part=part)]

    pairs = [(5.02, 10.0), (0.22, 1.0), (0.037, 0.5), (0.03, 8.0)]
    assert (
        chosen(0.1, *pairs) == [0, 3]
        and chosen(0.01, *pairs) == [0, 1, 3]
        and chosen(0.0, *pairs) == [0, 1, 2, 3]
    )
    assert chosen(0.1, (math.nan, math.nan), (2.0, 1.0)) == [1], "an unknown number has no weight"
    broken = [Outlier(sample=Sample(position=0, loss=math.nan, tokens=4), score=math.inf)]
    assert (
        select_heaviest(broken, ordinary, part=0.1) == broken
        and select_heaviest([], ordinary, part=0.1) == []
    )
