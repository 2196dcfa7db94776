"""The script that counts old words finds them, and the texts for users hold none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import words
from tests.support.words import Text, find_old_words, long_sentences, sentences_of


def found_in(kind: str, text: str) -> set[str]:
    return {hit.word for hit in find_old_words([Text("x.py", 1, kind, text)])}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("The snapshot behind step 40", "behind"),
        ("two batches are left out", "leave out"),
        ("3 skips in a row", "in a row"),
        ("paused by a person", "a person"),
        ("the data is to blame", "to blame"),
        ("what was told", "told"),
    ],
)
def test_old_words_in_prose(text: str, word: str) -> None:
    assert word in found_in("comment", text)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("left_out", "leave out"),
        ("GhostRow", "ghost"),
        ("_told", "told"),
        ("is_trouble", "trouble"),
    ],
)
def test_old_words_in_names(name: str, word: str) -> None:
    assert found_in("name", name) == {word}


def test_other_words_are_not_found() -> None:
    assert found_in("comment", "A whole number after the step; `left_out` is code.") == set()
    assert found_in("name", "bearing_strength") == set()


def test_sentences_and_their_length() -> None:
    text = Text("a.md", 1, "document", f"One two three. {'word ' * 26}end.")
    assert len(sentences_of(text)) == 2
    (found,), count = long_sentences([text])
    assert count == 2
    assert len(found[1].split()) == 27


def test_a_module_gives_its_names_comments_docstrings_and_messages(tmp_path: Path) -> None:
    path = words.ROOT / "tests" / "support" / "places.py"
    kinds = {text.kind for text in words.texts_of_python(path)}
    assert {"name", "docstring"} <= kinds


@pytest.fixture(scope="module")
def texts() -> list[Text]:
    return list(words.texts_of(words.all_files()))


def test_no_old_word_is_left(texts: list[Text]) -> None:
    """`python -m tests.support.words --list` prints the places."""
    found = [f"{text.file}:{text.line}: {word}" for word, text in find_old_words(texts)]
    assert found == []


def test_sentences_of_messages_and_documents_are_short(texts: list[Text]) -> None:
    long, count = long_sentences(texts)
    assert count > 3000
    assert len(long) <= 0.01 * count
