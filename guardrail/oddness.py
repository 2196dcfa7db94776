"""What is odd about a text: the heuristics by which corpora are cleaned, as sentences with numbers. Pure.

Sources of the thresholds:

    Gopher      Rae et al. 2021, appendix A.1.1: word counts and lengths, symbols, letters; table A1: repetition
    C4          Raffel et al. 2020, section 2.2: curly brackets and "lorem ipsum" mark text that is none
    RefinedWeb  Penedo et al. 2023, appendix G.2: lines that are mostly capitals or mostly digits

The rest is what a training sample may hold and a cleaned page does not: control characters, mis-decoded text, another
script than the corpus has, hardly or wholly random characters.
"""

from __future__ import annotations

import math
import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

# Gopher, table A1: share of characters in the most frequent 2- to 4-gram of words, and in all duplicate 5- to 10-grams.
TOP_GRAMS = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATE_GRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
DUPLICATE_LINES = 0.30  # Gopher, table A1: share of lines that stood there before
SYMBOLS_PER_WORD = 0.10  # Gopher: "#" and "..." to words
WORD_LENGTH = (3.0, 10.0)  # Gopher: mean length of a word
WORDS_WITH_A_LETTER = 0.80  # Gopher
BRACES = 0.02  # of the characters. C4 drops a page for a single "{"; a corpus of code may have some.
CAPITALS, DIGITS = 0.60, 0.50  # of the letters; of the characters. RefinedWeb drops such lines ("mainly").
UNPRINTABLE = 0.01  # of the characters
REPLACEMENT = 0.005  # of the characters: U+FFFD and pairs that UTF-8 read as Latin-1 gives
ENTROPY = (2.0, 5.8)  # bits a character. English prose has 4.1-4.4, code 4.5-5.0, random bytes as Latin-1 near 8.
FEW_WORDS, FEW_CHARACTERS = 12, 24  # below them a share means nothing
FOREIGN_SIGMAS, FOREIGN_BITS = 6.0, 1.0  # robust sigmas, and bits a character, beyond what the corpus itself has

_WORD = re.compile(r"\S+")
_MOJIBAKE = re.compile("\ufffd|[ÃÂ][\x80-\xbf]|â[\x80-\xbf€]|ï»¿")
_SYMBOL = re.compile(r"#|\.\.\.|…")


class Usual:
    """The usual character distribution of a corpus.

    Args:
        texts: some ordinary samples; those shorter than a line are passed over.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = [text for text in texts if len(text) >= FEW_CHARACTERS]
        self._counts: Counter[str] = Counter()
        for text in self._texts:
            self._counts.update(text)
        self._total = sum(self._counts.values())
        bits = [self.bits(text) for text in self._texts]
        self._centre = statistics.median(bits) if bits else 0.0
        spread = 1.4826 * statistics.median(abs(one - self._centre) for one in bits) if bits else 0.0
        self._limit = self._centre + max(FOREIGN_BITS, FOREIGN_SIGMAS * spread)

    def bits(self, text: str) -> float:
        """Cross-entropy of a text under the distribution, bits a character; unseen ones share one count."""
        kinds = len(self._counts) + 1
        cost = {c: math.log2((self._total + kinds) / (self._counts[c] + 1)) for c in set(text)}
        return sum(cost[c] for c in text) / max(1, len(text))

    def foreign(self, text: str) -> str:
        """A sentence where the characters of a text are others than the corpus has, else ""."""
        if not self._texts or len(text) < FEW_CHARACTERS:
            return ""
        bits = self.bits(text)
        if bits <= self._limit:
            return ""
        return f"characters unlike the corpus: {bits:.1f} bits a character against {self._centre:.1f}{_script(text)}"


def odd(text: str, *, usual: Usual | None = None, among: Sequence[str] = ()) -> list[str]:
    """What is odd about a text, one short sentence each; empty where nothing is.

    Args:
        usual: what the corpus looks like.
        among: other samples, of the same batch or near it, of which it may be a copy.
    """
    found = [*_characters(text), *_words(text), *_repetition(text)]
    if usual is not None and (foreign := usual.foreign(text)):
        found.append(foreign)
    if text and text in among:
        found.append("the very same text as another sample")
    return found


def _characters(text: str) -> list[str]:
    if len(text) < FEW_CHARACTERS:
        return []
    size, found = len(text), []
    controls = sum(unicodedata.category(c) in ("Cc", "Cs", "Co", "Cn") and c not in "\t\n\r\f" for c in text)
    if controls / size > UNPRINTABLE:
        found.append(f"{controls / size:.0%} unprintable characters")
    broken = len(_MOJIBAKE.findall(text))
    if broken / size > REPLACEMENT:
        found.append(f"{broken} traces of text decoded wrongly")
    counts = Counter(text)
    entropy = -sum(n / size * math.log2(n / size) for n in counts.values())
    if entropy < ENTROPY[0] or entropy > ENTROPY[1]:
        found.append(f"{entropy:.1f} bits of entropy a character, usual are {ENTROPY[0]:g} to {ENTROPY[1]:g}")
    if (braces := (counts["{"] + counts["}"]) / size) > BRACES:
        found.append(f"{braces:.0%} curly brackets")
    if "lorem ipsum" in text.lower():
        found.append("lorem ipsum")
    letters = [c for c in text if c.isalpha()]
    if len(letters) >= FEW_CHARACTERS and (share := sum(c.isupper() for c in letters) / len(letters)) > CAPITALS:
        found.append(f"{share:.0%} of the letters are capitals")
    if (share := sum(c.isdigit() for c in text) / size) > DIGITS:
        found.append(f"{share:.0%} digits")
    return found


def _words(text: str) -> list[str]:
    words = _WORD.findall(text)
    if len(text) < FEW_CHARACTERS or not words:
        return []
    found = []
    length = sum(map(len, words)) / len(words)
    if not WORD_LENGTH[0] <= length <= WORD_LENGTH[1]:
        found.append(f"words of {length:.1f} characters on average")
    if len(words) < FEW_WORDS:
        return found
    if (symbols := len(_SYMBOL.findall(text)) / len(words)) > SYMBOLS_PER_WORD:
        found.append(f"{symbols:.2f} symbols (# ...) a word")
    if (share := sum(any(c.isalpha() for c in word) for word in words) / len(words)) < WORDS_WITH_A_LETTER:
        found.append(f"only {share:.0%} of the words have a letter")
    return found


def _repetition(text: str) -> list[str]:
    found = []
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 3 and (share := 1 - len(set(lines)) / len(lines)) > DUPLICATE_LINES:
        found.append(f"{share:.0%} of the lines are repeated")
    words = _WORD.findall(text)
    if len(words) < FEW_WORDS:
        # Without words that could repeat (one long string, a script without spaces), the characters may.
        return [*found, *_character_runs(text)]
    size = sum(map(len, words))
    for length, limit in TOP_GRAMS.items():
        (gram, count), *_ = Counter(zip(*(words[i:] for i in range(length)), strict=False)).most_common(1)
        if count > 2 and (share := count * sum(map(len, gram)) / size) > limit:
            return [*found, f"{min(share, 1.0):.0%} of the text is one phrase of {length} words"]
    for length, limit in DUPLICATE_GRAMS.items():
        if (share := _duplicated(words, length) / size) > limit:
            return [*found, f"{share:.0%} of the text are repeated phrases of {length} words"]
    return found


def _duplicated(words: Sequence[str], length: int) -> int:
    """Characters in n-grams that stood there before, each counted once."""
    seen: set[tuple[str, ...]] = set()
    covered = [False] * len(words)
    for at in range(len(words) - length + 1):
        gram = tuple(words[at : at + length])
        if gram in seen:
            covered[at : at + length] = [True] * length
        seen.add(gram)
    return sum(len(word) for word, inside in zip(words, covered, strict=True) if inside)


def _character_runs(text: str) -> list[str]:
    """Whether a text is a short string over and over: shifted by its length it meets itself."""
    if len(text) < FEW_CHARACTERS:
        return []
    for period in range(1, len(text) // 4):
        same = sum(a == b for a, b in zip(text, text[period:], strict=False))
        if same >= 0.9 * (len(text) - period):
            return [f"{text[:period].strip() or 'white space'!r} over and over"]
    return []


def _script(text: str) -> str:
    """The script of most of its letters, by their Unicode names: " (mostly CYRILLIC)"; "" for Latin or none."""
    names = Counter(unicodedata.name(c, "").split(" ")[0] for c in text if c.isalpha())
    names.pop("", None)
    if not names:
        return ""
    script, count = names.most_common(1)[0]
    return f" (mostly {script})" if script != "LATIN" and 2 * count > len(text) / 2 else ""
