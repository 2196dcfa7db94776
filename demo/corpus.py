"""Builds a folder of numbered text files from the standard library, with two groups of corrupted ones.

    python -m demo.corpus --out demo/corpus

The corrupted documents are typical of a careless extraction: binary files of this installation
decoded as text (as Latin-1, as UTF-16), and one phrase repeated for pages. Each batch of them is a
spike, so guardrail skips it before its update. The text of the second group gets worse from document
to document, like a bad scan. Its first batches are too close to normal text to be rejected. When the
loss has risen, their updates are in the weights, and guardrail rolls back. With
`data.order = "stream"` a byte-level run reads both groups at a known share of its samples.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import random
import re
import string
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from guardrail.core.errors import GuardrailError, UsageError
from trainer.data.document_reader import DocumentReader
from trainer.data.holdout import hash_threshold, origin_hash
from trainer.data.progress import Progress
from trainer.data.sources import discover
from trainer.sources.python_library import BUILTIN

MARKER = ".corpus.json"  # hidden, so that a run that reads the folder ignores it
# The end of the description of a document of the second group in the marker file.
WORN = "of its characters read wrongly"
PHRASES = (
    "click here to accept all cookies ",
    "404 Not Found | nginx | ",
    "buy now !!! best price !!! ",
    "0000000000000000 ",
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is built: more text than a run of `steps` x `batch` samples reads."""

    seed: int = 0
    steps: int = 300
    batch: int = 16
    # Tokens (bytes) of a sample, as data.sequence_length.
    sequence_length: int = 128
    # As data.eval_fraction: documents that the run holds out do not move the groups.
    eval_fraction: float = 0.02
    # Begin and length of the first group, as shares of the run.
    at: float = 0.56
    amount: float = 0.02
    # Begin and length of the second group, whose text gets worse, as shares of the run.
    worn_at: float = 0.78
    worn_amount: float = 0.04
    # Share of its characters that are wrong, in its first and in its last document.
    worn_from: float = 0.1
    worn_to: float = 1.0
    # Text after the end of the run, as a share of it: it replaces batches that are skipped.
    margin: float = 0.5
    # Size of a normal document. Short ones mix well in a batch of a few thousand tokens.
    document_bytes: int = 1000
    # Size of a corrupted document.
    corrupted_bytes: int = 3000

    @property
    def run_tokens(self) -> int:
        return self.steps * self.batch * self.sequence_length


@dataclass(frozen=True)
class Text:
    """A document: its content, and how it was corrupted ("" for a normal one)."""

    content: bytes
    corruption: str = ""


def build(out: Path, plan: Plan) -> dict[str, object]:
    """Write the corpus into `out`; return the content of its marker file.

    The same plan on the same installation gives the same bytes. Files with the right content are
    not written again.

    Raises:
        UsageError: `out` holds files that this function did not write.
    """
    _refuse_foreign(out)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / MARKER).exists():
        _write(out / MARKER, b"{}")  # first, so that an interrupted folder is recognised
    names, corrupted, train_tokens = set(), [], 0
    for name, text, tokens_before in _generate_documents(plan):
        names.add(name)
        _write(out / name, text.content)
        if not _is_held_out(name, plan):
            train_tokens += len(text.content) + 1
        if text.corruption:
            sample = tokens_before // plan.sequence_length
            corrupted.append({"name": name, "corruption": text.corruption, "first_sample": sample})
    for file in out.glob("*.txt"):
        if file.name not in names:
            file.unlink()
    description = {
        "plan": asdict(plan),
        "documents": len(names),
        "train_tokens": train_tokens,
        "corrupted": corrupted,
    }
    _write(out / MARKER, json.dumps(description, indent=1).encode())
    return description


def _generate_documents(plan: Plan) -> Iterator[tuple[str, Text, int]]:
    """Yield (file name, text, training tokens before it) for the run and its margin."""
    rng = random.Random(plan.seed)
    normal, damaged = _normal_texts(plan, rng), _corrupted_texts(plan, rng)
    begin = round(plan.at * plan.run_tokens)
    end = begin + round(plan.amount * plan.run_tokens)
    worn_begin = round(plan.worn_at * plan.run_tokens)
    worn_end = worn_begin + round(plan.worn_amount * plan.run_tokens)
    total = round((1 + plan.margin) * plan.run_tokens)
    width = max(4, len(str(2 * total // plan.document_bytes)))
    tokens, number = 0, 0
    while tokens < total:
        number += 1
        name = f"{number:0{width}d}.txt"
        if _is_held_out(name, plan):
            yield name, next(normal), tokens
            continue
        if begin <= tokens < end:
            text = next(damaged)
        else:
            text = next(normal)
        if worn_begin <= tokens < worn_end and not begin <= tokens < end:
            share = (tokens - worn_begin) / (worn_end - worn_begin)
            text = _wear_text(text, plan.worn_from + share * (plan.worn_to - plan.worn_from), rng)
        yield name, text, tokens
        tokens += len(text.content) + 1


def _is_held_out(name: str, plan: Plan) -> bool:
    """Return whether the run holds a document out."""
    return origin_hash(name, 0) < hash_threshold(plan.eval_fraction)


def _normal_texts(plan: Plan, rng: random.Random) -> Iterator[Text]:
    """Yield parts of the standard library, cut at line ends, in random order, without end."""
    found = discover((BUILTIN,))
    pulse = Progress(lambda text, share: None, lambda: False)
    reader = DocumentReader(found.files, text_field="text", max_bytes=1 << 26, pulse=pulse)
    texts = [
        piece for document in reader for piece in _cut_lines(document.text, plan.document_bytes)
    ]
    while True:
        rng.shuffle(texts)
        yield from (Text(text) for text in texts)


def _cut_lines(text: str, size: int) -> Iterator[bytes]:
    """Yield pieces of complete lines of about `size` bytes; a short rest is dropped."""
    lines, held = [], 0
    for line in text.encode("utf-8").splitlines(keepends=True):
        lines.append(line)
        held += len(line)
        if held >= size:
            yield b"".join(lines)
            lines, held = [], 0
    if held >= size // 4:
        yield b"".join(lines)


def _corrupted_texts(plan: Plan, rng: random.Random) -> Iterator[Text]:
    """Yield corrupted documents of three kinds in turn."""
    binaries = _find_binaries()
    while True:
        for encoding in ("latin-1", "utf-16-le"):
            path = rng.choice(binaries)
            text = _choose_dense_part(path, plan.corrupted_bytes, rng).decode(encoding, "replace")
            content = _shorten(text, plan.corrupted_bytes)
            yield Text(content, f"{os.path.basename(path)} decoded as {encoding}")
        phrase = rng.choice(PHRASES)
        content = _shorten(phrase * (plan.corrupted_bytes // len(phrase) + 1), plan.corrupted_bytes)
        yield Text(content, f"{phrase.strip()!r} repeated")


def _wear_text(text: Text, share: float, rng: random.Random) -> Text:
    """Return a text with a share of wrong characters, like a bad scan."""
    letters = string.ascii_letters + string.digits + string.punctuation
    characters = list(text.content.decode("utf-8", "replace"))
    for place in range(len(characters)):
        if rng.random() < share:
            characters[place] = rng.choice(letters)
    return Text("".join(characters).encode(), f"{share:.0%} {WORN}")


def _find_binaries() -> list[str]:
    """Return compiled modules and zip files of this installation; at least the interpreter."""
    library = sysconfig.get_path("stdlib")
    patterns = ("lib-dynload/*.so", "ensurepip/_bundled/*.whl")
    files: list[str] = []
    for pattern in patterns:
        files += glob.glob(os.path.join(glob.escape(library), pattern))
    large = sorted(path for path in files if os.path.getsize(path) >= 1 << 14)
    return large or [os.path.realpath(sys.executable)]


def _choose_dense_part(path: str, size: int, rng: random.Random) -> bytes:
    """Return the part of a binary file, of 16 random ones, with the most different bytes.

    Binary files have many pages of zeros.
    """
    content = Path(path).read_bytes()
    starts = [rng.randrange(max(1, len(content) - size)) for _ in range(16)]
    parts = [content[at : at + size] for at in starts]
    return max(parts, key=lambda part: len(set(part)))


def _shorten(text: str, size: int) -> bytes:
    """Return at most `size` bytes of UTF-8."""
    return text.encode("utf-8", "replace")[:size].decode("utf-8", "ignore").encode("utf-8")


def _write(path: Path, content: bytes) -> None:
    """Write a file unless it has this content: a new date would make the cached corpus invalid."""
    try:
        if path.read_bytes() == content:
            return
    except FileNotFoundError:
        pass
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def _refuse_foreign(out: Path) -> None:
    if not out.is_dir():
        return
    ours = re.compile(r"\d+\.txt|\..*")
    foreign = [entry.name for entry in out.iterdir() if not ours.fullmatch(entry.name)]
    if foreign or (any(out.glob("*.txt")) and not (out / MARKER).exists()):
        raise UsageError(
            f"{out} holds files that this program did not write: choose another folder with --out"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m demo.corpus",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo/corpus"),
        help="folder to build (default: %(default)s)",
    )
    for field, help_text in (
        ("seed", "seed of the choice of texts and of their corruption"),
        ("steps", "steps of the run"),
        ("batch", "samples of a step"),
        ("sequence_length", "tokens of a sample"),
        ("eval_fraction", "share of documents that the run holds out"),
        ("at", "share of the run at which the first corrupted group begins"),
        ("amount", "length of the first group as a share of the run; 0: none"),
        (
            "worn_at",
            "share of the run at which the second group begins, whose text gets worse",
        ),
        ("worn_amount", "length of the second group as a share of the run; 0: none"),
        ("worn_from", "share of wrong characters in its first document"),
        ("worn_to", "share of wrong characters in its last document"),
        ("margin", "text after the end of the run, as a share of it"),
        ("document_bytes", "size of a normal document"),
        ("corrupted_bytes", "size of a corrupted document"),
    ):
        default = getattr(Plan, field)
        option = f"--{field.replace('_', '-')}"
        parser.add_argument(
            option, type=type(default), default=default, help=f"{help_text} (default: %(default)s)"
        )
    options = vars(parser.parse_args(arguments))
    out = options.pop("out")
    plan = Plan(**options)
    sizes = (
        plan.steps,
        plan.batch,
        plan.sequence_length,
        plan.document_bytes,
        plan.corrupted_bytes,
    )
    if min(sizes) < 1 or min(plan.at, plan.amount, plan.margin) < 0:
        parser.error("sizes must be at least 1, shares at least 0")
    try:
        description = build(out, plan)
    except GuardrailError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    corrupted = description["corrupted"]
    assert isinstance(corrupted, list)
    damaged = [entry["name"] for entry in corrupted if not entry["corruption"].endswith(WORN)]
    worn = [entry["name"] for entry in corrupted if entry["corruption"].endswith(WORN)]
    ranges = [f"{names[0]} to {names[-1]}" for names in (damaged, worn) if names]
    print(
        f"{description['documents']} documents, corrupted: {', '.join(ranges) or 'none'}",
        file=sys.stderr,
    )
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
