"""Nothing that comes out of `clean` can command a terminal."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardrail.core.text import clean_text

BIDI = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

# Random characters rarely make a sequence, so pieces of sequences are drawn as often.
PIECES = st.sampled_from(
    [
        "\x1b",
        "\x1b[",
        "\x1b]",
        "\x9b",
        "\x9d",
        "\x90",
        "31m",
        "2J",
        "\x07",
        "\x1b\\",
        "\x9c",
        "52;c;",
        "\u202e",
        "\ud800",
    ]
)
TEXT = st.lists(st.one_of(PIECES, st.text(), st.characters(categories=["Cs", "Cc", "Cf"]))).map(
    "".join
)


def assert_harmless(text: str) -> None:
    for character in text:
        assert unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp"), ascii(character)
        assert character not in BIDI, ascii(character)
    text.encode("utf-8")


@given(TEXT, st.one_of(st.none(), st.integers(-3, 40)))
def test_no_control_survives_in_text(text: str, limit: int | None) -> None:
    cleaned = clean_text(text, limit)
    assert_harmless(cleaned)
    assert limit is None or len(cleaned) <= max(0, limit)


@given(st.one_of(st.binary(), TEXT.map(lambda text: text.encode("utf-8", "surrogatepass"))))
def test_no_control_survives_in_bytes(data: bytes) -> None:
    assert_harmless(clean_text(data))


@given(TEXT)
def test_cleaning_again_changes_nothing(text: str) -> None:
    assert clean_text(clean_text(text)) == clean_text(text)


@given(st.text(st.characters(categories=["L", "N", "P", "S", "Zs"])))
def test_plain_text_is_left_alone(text: str) -> None:
    assert clean_text(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b[38;2;1;2;3mx\x1b[?25l", "x"),
        ("a\x1b]52;c;ZXZpbA==\x07b", "ab"),
        ("a\x1b]0;title\x1b\\b", "ab"),
        ("a\x9d0;title\x9cb\x9b2Jc", "abc"),
        ("a\x1bPq#0\x1b\\b", "ab"),
        ("lost \x1b]0;never ended", "lost 0;never ended"),
        ("\x1bcreset \x1b(Bset", "reset set"),
        ("tab\tnew\r\nline\rend\x0b", "tab new line end "),
        ("\u202edetrever\u202c \u2066x\u2069", "detrever x"),
        ("nul\0bell\x07del\x7f", "nulbelldel"),
        ("\ud800x\udcff", "\ufffdx\ufffd"),
        ("żółć 日本語 👩‍🚀 ✓", "żółć 日本語 👩‍🚀 ✓"),
        (b"caf\xc3\xa9 \xff\xfe", "café \ufffd\ufffd"),
        ("[/red] {x} %s", "[/red] {x} %s"),
    ],
)
def test_examples(text: str | bytes, expected: str) -> None:
    assert clean_text(text) == expected


def test_a_limit_ends_in_an_ellipsis() -> None:
    assert clean_text("abcdef", 4) == "abc…" and clean_text("abcd", 4) == "abcd"
    assert clean_text("abc", 0) == "" and clean_text("abc", 1) == "…"


def test_time_grows_with_the_length_only() -> None:
    """A million introducers without an end: quadratic matching would outlast the test's timeout."""
    for piece in ("\x1b]", "\x9d", "\x1b[", "\x1b]\x9d", "\x1b[0;", "\x1b(", "\x90\x1b"):
        assert_harmless(clean_text(piece * 1_000_000))
