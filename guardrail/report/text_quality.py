"""Finds what is unusual about a text, with the heuristics that clean a corpus. Pure.

Sources of the thresholds:

    Gopher      Rae et al. 2021, appendix A.1.1: word counts and lengths, symbols, letters; table A1: repetition
    C4          Raffel et al. 2020, section 2.2: curly brackets and "lorem ipsum" mark text that is none
    RefinedWeb  Penedo et al. 2023, appendix G.2: lines that are mostly capitals or mostly digits

The other checks find what a training sample may contain and a cleaned page does not: control
characters, wrongly decoded text, a script that the corpus lacks, constant or random characters.

Gopher's words are those of English. Scripts without spaces, such as Chinese, Japanese and Thai, are
judged by their characters instead. The time grows linearly with the length of the text.
"""

from __future__ import annotations

import math
import operator
import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from guardrail.core.format import format_plural

# Gopher, table A1: share of characters in the most frequent 2- to 4-gram of words, and in all
# duplicate 5- to 10-grams.
UNLIKE_CORPUS = "characters unlike the corpus"  # how its remark begins
TOP_GRAMS = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATE_GRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
DUPLICATE_LINES = 0.30  # Gopher, table A1: share of lines that occurred before
SYMBOLS_PER_WORD = 0.10  # Gopher: "#" and "..." per word
WORD_LENGTH = (3.0, 10.0)  # Gopher: mean length of a word
WORDS_WITH_A_LETTER = 0.80  # Gopher
# Share of the characters. C4 drops a page for a single "{"; a corpus of code may have some.
BRACES = 0.02
# Share of the letters, and of the characters. RefinedWeb drops such lines ("mainly").
CAPITALS, DIGITS = 0.60, 0.50
UNPRINTABLE = 0.01  # share of the characters
REPLACEMENT = 0.005  # share of the characters: U+FFFD, and pairs of UTF-8 that was read as Latin-1
# Bits per character. English prose has 4.1-4.4, code 4.5-5.0, random bytes as Latin-1 near 8.
ENTROPY = (2.0, 5.8)
# As ENTROPY, for scripts with hundreds or thousands of characters: Chinese prose has 8 to 9.8 bits,
# Korean 7.5.
ENTROPY_OF_MANY = (2.0, 11.0)
# As TOP_GRAMS and DUPLICATE_GRAMS, in characters, for scripts without spaces: a Thai word has about
# 4 characters, a Chinese one less than 2.
TOP_STRINGS = {4: 0.20, 8: 0.16}
DUPLICATE_STRINGS = {20: 0.15, 40: 0.10}
UNSPACED_SHARE = 0.3  # share of the letters that makes a text one of a script without spaces
# Where a text might repeat: the number of places that are checked, and the length of the string that
# is searched for after each.
PLACES, ANCHOR = 16, 8
MOST_PERIODS = 4  # lengths that are tried
SHOWN = 40  # most characters of the repeated string in a remark
REPEATS = 0.9  # least share of the characters that a repeating text has again one period later
FEW_WORDS, FEW_CHARACTERS = 12, 24  # in a shorter text a share means nothing
# Robust sigmas, and bits per character, above those of the corpus itself.
FOREIGN_SIGMAS, FOREIGN_BITS = 6.0, 1.0
COPY = "the very same text as another sample"

_WORD = re.compile(r"\S+")
# Thai, Lao, Tibetan, Burmese, Khmer, Japanese and Chinese.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
# Korean, Ethiopic and Yi have spaces, and one character per syllable.
_SYLLABLES = re.compile("[\u1200-\u139f\ua000-\ua4cf\uac00-\ud7af]")
_MOJIBAKE = re.compile("\ufffd|[ÃÂ][\x80-\xbf]|â[\x80-\xbf€]|ï»¿")
_SYMBOL = re.compile(r"#|\.\.\.|…")


class CorpusStatistics:
    """The usual character distribution of a corpus.

    Args:
        texts: some ordinary samples; those shorter than a line are ignored.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = [text for text in texts if len(text) >= FEW_CHARACTERS]
        self._counts: Counter[str] = Counter()
        for text in self._texts:
            self._counts.update(text)
        self._total = sum(self._counts.values())
        bits = [self.count_bits(text) for text in self._texts]
        self._centre = 0.0
        if bits:
            self._centre = statistics.median(bits)
        spread = 0.0
        if bits:
            spread = 1.4826 * statistics.median(abs(one - self._centre) for one in bits)
        self._limit = self._centre + max(FOREIGN_BITS, FOREIGN_SIGMAS * spread)

    def count_bits(self, text: str) -> float:
        """Return the cross-entropy of a text under the distribution, in bits per character. Unseen
        characters share one count.
        """
        kinds = len(self._counts) + 1
        cost = {c: math.log2((self._total + kinds) / (self._counts[c] + 1)) for c in set(text)}
        return sum(cost[c] for c in text) / max(1, len(text))

    def describe_foreign(self, text: str) -> str:
        """Return a sentence if the corpus rarely has the characters of a text, else ""."""
        if not self._texts or len(text) < FEW_CHARACTERS:
            return ""
        bits = self.count_bits(text)
        if bits <= self._limit:
            return ""
        normal = f"(normal {self._centre:.1f})"
        return f"{UNLIKE_CORPUS}: {bits:.1f} bits per character {normal}{_name_script(text)}"


def text_anomalies(
    text: str, *, usual: CorpusStatistics | None = None, among: Sequence[str] = ()
) -> list[str]:
    """Return what is unusual about a text, one short sentence each.

    Args:
        usual: what the corpus looks like.
        among: other samples, of the same batch or near it, of which it may be a copy.
    """
    found = [*_check_characters(text), *_check_words(text), *_check_repetition(text)]
    if usual is not None and (foreign := usual.describe_foreign(text)):
        found.append(foreign)
    if text and text in among:
        found.append(COPY)
    return found


def _check_characters(text: str) -> list[str]:
    if len(text) < FEW_CHARACTERS:
        return []
    size, found, counts = len(text), [], Counter(text)
    controls = sum(n for c, n in counts.items() if _is_control(c))
    if controls / size > UNPRINTABLE:
        found.append(f"{controls / size:.0%} unprintable characters")
    broken = len(_MOJIBAKE.findall(text))
    if broken / size > REPLACEMENT:
        found.append(f"{format_plural(broken, 'wrongly decoded character')}")
    entropy = -sum(n / size * math.log2(n / size) for n in counts.values())
    low, high = ENTROPY
    if _is_of(text, _UNSPACED) or _is_of(text, _SYLLABLES):
        low, high = ENTROPY_OF_MANY
    if entropy < low or entropy > high:
        found.append(f"{entropy:.1f} bits of entropy per character (normal {low:g} to {high:g})")
    if (braces := (counts["{"] + counts["}"]) / size) > BRACES:
        found.append(f"{braces:.0%} curly brackets")
    if "lorem ipsum" in text.lower():
        found.append("lorem ipsum")
    letters = sum(n for c, n in counts.items() if c.isalpha())
    capitals = sum(n for c, n in counts.items() if c.isupper())
    if letters >= FEW_CHARACTERS and (share := capitals / letters) > CAPITALS:
        found.append(f"{share:.0%} of the letters are capitals")
    if (share := sum(n for c, n in counts.items() if c.isdigit()) / size) > DIGITS:
        found.append(f"{share:.0%} digits")
    return found


def _is_control(character: str) -> bool:
    return (
        unicodedata.category(character) in ("Cc", "Cs", "Co", "Cn") and character not in "\t\n\r\f"
    )


def _is_of(text: str, script: re.Pattern[str]) -> bool:
    """Return whether much of a text is written in these characters."""
    return len(script.findall(text)) > UNSPACED_SHARE * sum(not c.isspace() for c in text)


def _check_words(text: str) -> list[str]:
    words = _WORD.findall(text)
    if len(text) < FEW_CHARACTERS or not words or _is_of(text, _UNSPACED):
        return []
    found = []
    length = sum(map(len, words)) / len(words)
    if not _is_of(text, _SYLLABLES) and not WORD_LENGTH[0] <= length <= WORD_LENGTH[1]:
        found.append(f"words of {length:.1f} characters on average")
    if len(words) < FEW_WORDS:
        return found
    symbols = len(_SYMBOL.findall(text)) / len(words)
    if symbols > SYMBOLS_PER_WORD:
        found.append(f"{symbols:.2f} symbols (# ...) per word")
    share = sum(map(_has_letter, words)) / len(words)
    if share < WORDS_WITH_A_LETTER:
        found.append(f"only {share:.0%} of the words have a letter")
    return found


def _has_letter(word: str) -> bool:
    return any(character.isalpha() for character in word)


def _check_repetition(text: str) -> list[str]:
    found = []
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 3 and (share := 1 - len(set(lines)) / len(lines)) > DUPLICATE_LINES:
        found.append(f"{share:.0%} of the lines are repeated")
    if _is_of(text, _UNSPACED):
        return [*found, *(_find_character_runs(text) or _find_repeated_strings(text))]
    words = _WORD.findall(text)
    if len(words) < FEW_WORDS:
        # One long string has no words that could repeat, but its characters may.
        return [*found, *_find_character_runs(text)]
    size = sum(map(len, words))
    for length, limit in TOP_GRAMS.items():
        (gram, count), *_ = Counter(
            zip(*(words[i:] for i in range(length)), strict=False)
        ).most_common(1)
        if count > 2 and (share := count * sum(map(len, gram)) / size) > limit:
            return [*found, f"{min(share, 1.0):.0%} of the text is one phrase of {length} words"]
    for length, limit in DUPLICATE_GRAMS.items():
        if (share := _count_duplicated(words, length) / size) > limit:
            return [*found, f"{share:.0%} of the text are repeated phrases of {length} words"]
    return found


def _count_duplicated(words: Sequence[str], length: int) -> int:
    """Return how many characters are in n-grams that the text had before, each counted once.

    The n-grams are of words, or of the characters of a text.
    """
    seen: set[Sequence[str]] = set()
    covered = [False] * len(words)
    for at in range(len(words) - length + 1):
        gram: Sequence[str] = words[at : at + length]
        if not isinstance(words, str):
            gram = tuple(gram)
        if gram in seen:
            covered[at : at + length] = [True] * length
        seen.add(gram)
    return sum(len(word) for word, inside in zip(words, covered, strict=True) if inside)


def _find_repeated_strings(text: str) -> list[str]:
    """Return as for phrases of words, for a script without spaces."""
    text = "".join(text.split())
    if len(text) < FEW_CHARACTERS:
        return []
    for length, limit in TOP_STRINGS.items():
        (_, count), *_ = Counter(
            text[at : at + length] for at in range(len(text) - length + 1)
        ).most_common(1)
        if count > 2 and (share := count * length / len(text)) > limit:
            return [f"{min(share, 1.0):.0%} of the text is one string of {length} characters"]
    for length, limit in DUPLICATE_STRINGS.items():
        if (share := _count_duplicated(text, length) / len(text)) > limit:
            return [f"{share:.0%} of the text are repeated strings of {length} characters"]
    return []


def _find_character_runs(text: str) -> list[str]:
    """Return whether a text repeats one short string: shifted by its length, the text equals
    itself.

    The string is at most a quarter of the text. Its length is learned at a few places of the text:
    how far after each place the next characters come again. So only a few lengths are tried.
    """
    if len(text) < FEW_CHARACTERS:
        return []
    for period in _find_periods(text):
        same = sum(map(operator.eq, text, text[period:]))
        if same >= REPEATS * (len(text) - period):
            return [f"repeats {text[:period][:SHOWN].strip() or 'white space'!r}"]
    return []


def _find_periods(text: str) -> list[int]:
    """Return the lengths after which a text may repeat itself, shortest first, at most
    `MOST_PERIODS`.
    """
    longest = len(text) // 4 - 1
    found: Counter[int] = Counter()
    for place in range(PLACES):
        # Each place lies in the first three quarters, so a full period follows it.
        at = place * (len(text) - longest - ANCHOR) // PLACES
        distance = text.find(text[at : at + ANCHOR], at + 1, at + longest + ANCHOR + 1) - at
        if 0 < distance <= longest:
            found[distance] += 1
    common = [period for period, _ in found.most_common(MOST_PERIODS)]
    return sorted(common)


def _name_script(text: str) -> str:
    """Return the script of most of its letters, by their Unicode names: " (mostly CYRILLIC)"; ""
    for Latin or none.
    """
    names = Counter(unicodedata.name(c, "").split(" ")[0] for c in text if c.isalpha())
    names.pop("", None)
    if not names:
        return ""
    script, count = names.most_common(1)[0]
    if script != "LATIN" and 2 * count > len(text) / 2:
        return f" (mostly {script})"
    return ""
