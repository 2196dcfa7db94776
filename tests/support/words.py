"""Count words that guardrail no longer uses, and sentences that are too long.

    python -m tests.support.words                       a table: word, names, prose
    python -m tests.support.words --list guardrail/tui  each place in these files or folders
    python -m tests.support.words --long docs           each sentence of more than 25 words
    python -m tests.support.words --sample 10 --seed X  random sentences of README, help, report, errors

A newcomer knows the words of the field ("RNG state", "skip", "after"). The words below are private
ones that the code used for the same things. `NAMES` are parts of identifiers, `PROSE` are patterns
in docstrings, comments, messages and documents. `EXCEPTIONS` says where one of them is right.
"""

from __future__ import annotations

import ast
import io
import random
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import click

from tests.support.places import ROOT

LONGEST = 25  # words of a sentence

# The old word -> the pattern that finds it in prose.
PROSE = {
    "told": r"\b(told|tells?|telling)\b",
    "behind": r"\bbehind\b",
    "deed": r"\bdeeds?\b",
    "dice": r"\bdice\b",
    "stretch": r"\bstretch(es)?\b",
    "trouble": r"\btroubles?\b",
    "whole": r"\b(whole|wholly)\b(?! numbers?\b)",
    "a person": r"\b(a person|nobody|somebody)\b",
    "one's own": r"\bone's own\b",
    "to blame": r"\bto blame\b|\bblam(es?|ed|ing)\b",
    "leave out": r"\b(leaves?|left|leaving) (\w+ )?out\b|\bleft-out\b",
    "pass over": r"\bpass(es|ed|ing)? (over|by)\b(?! (\w+ )?(global )?(batch|micro|tokens|parameters|them\b|code))",
    "give up": r"\b(gives?|given|gave|giving) up\b",
    "bear": r"\b(bears?|borne)\b",
    "foremost": r"\b(foremost|gravest)\b",
    "in a row": r"\bin a row\b",
    "heed": r"\b(heeds?|heeded|flown|in flight)\b",
    "pen": r"\b(pen|front desk|lookout|the books)\b",
    "ghost": r"\bghosts?\b",
    "rung": r"\b(rungs?|ladder)\b",
    "pardon": r"\bpardon(s|ed)?\b",
    "throw dice": r"\bthrown?\b(?= dice)",
}

# The old word -> the parts of identifiers that it makes.
NAMES = {
    "told": {"told", "tell", "tells", "telling", "untold"},
    "behind": {"behind"},
    "deed": {"deed", "deeds"},
    "dice": {"dice"},
    "stretch": {"stretch", "stretches"},
    "trouble": {"trouble", "troubles"},
    "whole": {"whole", "wholly"},
    "a person": {"person", "nobody", "somebody"},
    "to blame": {"blame", "blamed"},
    "leave out": {"left_out", "leave_out", "leaves_out"},
    "pass over": {"passed_over", "pass_over", "passed_by", "pass_by", "let_pass"},
    "give up": {"given_up", "give_up", "gives_up"},
    "bear": {"bear", "borne"},
    "foremost": {"foremost", "gravest"},
    "in a row": {"in_a_row"},
    "heed": {"heed", "saw", "flight", "flown"},
    "pen": {"pen", "desk", "lookout"},
    "ghost": {"ghost", "ghosts"},
    "rung": {"rung", "rungs", "ladder"},
    "pardon": {"pardon", "pardoned", "pardons", "unpardonable"},
}


class Exemption(NamedTuple):
    """A place where an old word is right.

    Attributes:
        files: pattern of paths, as `fnmatch` reads it.
        text: pattern (regex) that the line holds.
    """

    files: str
    text: str
    reason: str


EXCEPTIONS = (
    Exemption("guardrail/core/old_names.py", ".", "the old names of older versions"),
    Exemption("docs/configuration.md", r"\| old name|`guard\.", "the column of old names"),
    Exemption("CHANGELOG.md", ".", "says what was renamed"),
    Exemption("guardrail/*", r"\bpardons\b", "key of `undo` lines in every journal"),
    Exemption("guardrail/*", r"\bborne\b", "key of `diagnosis` lines in every journal"),
    Exemption("guardrail/*", r"let_pass", "key of status.json"),
    Exemption("guardrail/*", r"\b(by_person|troubles)\b", "keys of `report --json`"),
    Exemption("guardrail/core/events/decisions.py", r"\brung\b", "key of rollback lines"),
)


class Text(NamedTuple):
    """One piece of prose, or one name."""

    file: str
    line: int
    kind: str  # "name", "comment", "docstring", "message", "document"
    text: str


class Hit(NamedTuple):
    word: str
    where: Text


def texts_of_python(path: Path) -> Iterator[Text]:
    """Yield the names, comments, docstrings and messages of one module."""
    source = path.read_text()
    file = str(path.relative_to(ROOT))
    tree = ast.parse(source)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield Text(file, token.start[0], "comment", token.string.lstrip("# "))
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                docstrings.add(first.value)
        yield from _defined_names(file, node)
    inside = {
        part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield Text(file, node.lineno, "message", _text_of_template(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
            kind = "docstring" if node in docstrings else "message"
            if kind == "docstring" or " " in node.value.strip():
                yield Text(file, node.lineno, kind, node.value)


def _text_of_template(node: ast.JoinedStr) -> str:
    """Return the text of an f-string, with X for each value."""
    parts = []
    for part in node.values:
        constant = isinstance(part, ast.Constant) and isinstance(part.value, str)
        parts.append(part.value if constant else "X")
    return "".join(parts)


def _defined_names(file: str, node: ast.AST) -> Iterator[Text]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield Text(file, node.lineno, "name", node.name)
    elif isinstance(node, ast.arg):
        yield Text(file, node.lineno, "name", node.arg)
    elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
        name = node.id if isinstance(node, ast.Name) else node.attr
        yield Text(file, node.lineno, "name", name)


def texts_of_document(path: Path) -> Iterator[Text]:
    """Yield the paragraphs of a Markdown page (without code blocks), or the comments of a TOML."""
    file = str(path.relative_to(ROOT))
    lines = path.read_text().splitlines()
    if path.suffix == ".toml":
        for number, line in enumerate(lines, 1):
            comment = line.partition("#")[2].strip()
            if comment:
                yield Text(file, number, "comment", comment)
        return
    paragraph: list[str] = []
    in_block = False
    for number, line in enumerate([*lines, ""], 1):
        fence = line.lstrip().startswith("```")
        begins = not line.strip() or re.match(r"\s*([-*|#]|\d+\.)\s?", line)
        if paragraph and (fence or begins):
            yield Text(file, number - len(paragraph), "document", "\n".join(paragraph))
            paragraph = []
        if fence:
            in_block = not in_block
        elif not in_block and line.strip():
            paragraph.append(line)


def all_files(places: Iterable[str] = ()) -> Iterator[Path]:
    """Yield the files that speak to a reader; with `places`, those in these files and folders."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/**/*.toml")]
    for package in ("guardrail", "trainer", "demo"):
        found += [*(ROOT / package).rglob("*.py"), *(ROOT / package).rglob("*.toml")]
    wanted = [ROOT / place for place in places]
    for path in sorted(set(found)):
        if not wanted or any(path == place or place in path.parents for place in wanted):
            yield path


def texts_of(paths: Iterable[Path]) -> Iterator[Text]:
    for path in paths:
        yield from texts_of_python(path) if path.suffix == ".py" else texts_of_document(path)


def find_old_words(texts: Iterable[Text]) -> Iterator[Hit]:
    """Yield each old word, but those of `EXCEPTIONS`."""
    for text in texts:
        for word in _old_words(text):
            if not _is_exempt(text):
                yield Hit(word, text)


def _old_words(text: Text) -> list[str]:
    if text.kind != "name":
        prose = re.sub(r"`[^`]*`", "", text.text)
        return [word for word, pattern in PROSE.items() if re.search(pattern, prose, re.IGNORECASE)]
    snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", text.text).lower().strip("_")
    parts = set(snake.split("_"))
    found = []
    for word, forms in NAMES.items():
        single = {form for form in forms if "_" not in form}
        phrases = forms - single
        if parts & single or any(f"_{form}_" in f"_{snake}_" for form in phrases):
            found.append(word)
    return found


def _is_exempt(text: Text) -> bool:
    for exemption in EXCEPTIONS:
        if fnmatch(text.file, exemption.files) and re.search(exemption.text, text.text):
            return True
    return False


def sentences_of(text: Text) -> list[str]:
    """Split prose into sentences. Lists, tables and headings end a sentence too."""
    if text.kind == "document" and re.match(r"\s*(\||#|!\[|<)", text.text):
        return []
    plain = re.sub(r"`[^`]*`", "code", text.text)
    plain = re.sub(r"\n\s*\n|\n\s*(?=[-*•])|:\s*\n", ".\n", plain)
    parts = re.split(r"(?<=[.!?:;])\s+", " ".join(plain.split()))
    return [part for part in parts if len(part.split()) > 2]


def long_sentences(texts: Iterable[Text]) -> tuple[list[tuple[Text, str]], int]:
    """Return the sentences of more than `LONGEST` words in messages and documents, and the count
    of all sentences there.
    """
    found, count = [], 0
    for text in texts:
        if text.kind not in ("message", "document"):
            continue
        for sentence in sentences_of(text):
            count += 1
            if len(sentence.split()) > LONGEST:
                found.append((text, sentence))
    return found, count


# Where the sentences of a surface stand, for `--sample`.
SURFACES = {
    "README": ("README.md",),
    "help": ("tests/golden/help.txt",),
    "report": ("tests/golden/report_*.txt",),
    "errors": ("tests/golden/errors.txt",),
}


def sample_sentences(surface: str, count: int, seed: str) -> list[str]:
    """Return random sentences of a surface, the same ones for the same seed.

    An error counts as one sentence, with its hint. Elsewhere a sentence has five words or more.
    """
    sentences: set[str] = set()
    for pattern in SURFACES[surface]:
        for path in ROOT.glob(pattern):
            if path.suffix == ".md":
                for text in texts_of_document(path):
                    lines = text.text.strip("- ").splitlines()
                    if lines[0][0] not in "|#<!":
                        sentences.update(_split_paragraph(lines))
            elif surface == "errors":
                sentences.update(_errors(path.read_text()))
            else:
                sentences.update(_sentences_of_output(path.read_text()))
    readable = sorted(one for one in sentences if len(re.findall(r"[A-Za-z]{2,}", one)) >= 5)
    return random.Random(f"{surface} {seed}").sample(readable, min(count, len(readable)))


def _errors(golden: str) -> Iterator[str]:
    """Yield each message of errors.txt, without the input above it, in one line."""
    for block in golden.split("\n\n"):
        lines = [line for line in block.splitlines() if not line.startswith("    ")]
        yield " ".join(line.strip() for line in lines)


def _sentences_of_output(golden: str) -> Iterator[str]:
    """Yield the sentences of help or of a report; rows of tables, usage and headings are none."""
    paragraph: list[str] = []
    for line in [*golden.splitlines(), ""]:
        text = line.strip()
        is_row = bool(re.search(r"\S {3,}\S", text)) or text.startswith(("$", "Usage:", "/"))
        option = re.match(r"\s+(-\S.*?|[a-z-]+) {2,}(?=\S)", line)
        if not text or is_row or option or line.startswith("#"):
            yield from _split_paragraph(paragraph)
            paragraph = [line[option.end() :]] if option else []
        else:
            paragraph.append(text)


def _split_paragraph(lines: list[str]) -> list[str]:
    parts = re.split(r"(?<=[.!?])\s+", " ".join(" ".join(lines).split()))
    return [part for part in parts if not part.endswith(":") and "](" not in part]


@click.command()
@click.argument("places", nargs=-1)
@click.option("--list", "listed", is_flag=True, help="Print each place.")
@click.option("--long", "long_", is_flag=True, help="Print each sentence that is too long.")
@click.option("--sample", default=0, help="Print this many random sentences of each surface.")
@click.option("--seed", default="", help="Seed of --sample, such as the hash of a commit.")
def main(places: tuple[str, ...], listed: bool, long_: bool, sample: int, seed: str) -> None:
    """Count old words and long sentences. Exit code 1 if an old word is left."""
    if sample:
        for surface in SURFACES:
            for sentence in sample_sentences(surface, sample, seed):
                print(f"{surface}: {sentence}")
        return
    texts = list(texts_of(all_files(places)))
    hits = list(find_old_words(texts))
    long, count = long_sentences(texts)
    if long_:
        for text, sentence in long:
            print(f"{text.file}:{text.line}: {sentence}")
    if listed:
        for word, text in hits:
            print(f"{text.file}:{text.line}: {word}: {' '.join(text.text.split())[:150]}")
    names = Counter(word for word, text in hits if text.kind == "name")
    prose = Counter(word for word, text in hits if text.kind != "name")
    print(f"{'word':<12}{'names':>7}{'prose':>7}")
    for word in PROSE:
        print(f"{word:<12}{names[word]:>7}{prose[word]:>7}")
    print(f"{'all':<12}{names.total():>7}{prose.total():>7}")
    share = 100 * len(long) / max(count, 1)
    print(f"sentences over {LONGEST} words: {len(long)} of {count} ({share:.1f} %)")
    sys.exit(1 if hits else 0)


if __name__ == "__main__":
    main()
