"""Builds a folder of numbered text files out of the standard library, with two stretches of really
corrupted ones.

    python -m demo.corpus --out demo/corpus

The corrupted documents are what a careless extraction leaves in a corpus: binary files of this
installation decoded as text (as Latin-1, as UTF-16), and one phrase repeated for pages. Each batch
of them is a spike, so guardrail skips it before its update. The text of the second stretch gets
worse from page to page, as a bad scan does. Its first batches are too close to normal text to be
rejected; when the loss has risen, their updates are in the weights, and guardrail rolls back. With
`[data] order = "stream"` a byte-level run meets both stretches at a known share of its samples.
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

MARKER = ".corpus.json"  # hidden, so that a run that reads the folder passes it over
# the end of what the marker file says of the second stretch
WORN = "of its characters read wrongly"
PHRASES = (
    "click here to accept all cookies ",
    "404 Not Found | nginx | ",
    "buy now !!! best price !!! ",
    "0000000000000000 ",
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is built. A run of `steps` x `batch` samples does not come to the end of it."""

    seed: int = 0
    steps: int = 300
    batch: int = 16
    # Tokens (bytes) of a sample, as data.sequence_length.
    sequence_length: int = 128
    # As data.eval_fraction: documents that the run holds out do not move the stretch.
    eval_fraction: float = 0.02
    # Where the corrupted stretch begins, and how long it is, as shares of the run.
    at: float = 0.56
    amount: float = 0.02
    # A second stretch, whose text gets worse from page to page: where it begins and how long it is,
    # as shares of the run.
    worn_at: float = 0.78
    worn_amount: float = 0.04
    # Share of its characters that are wrong, at its beginning and at its end.
    worn_from: float = 0.1
    worn_to: float = 1.0
    # Text beyond the run, as a share of it: batches that are skipped need others in their place.
    margin: float = 0.5
    # Size of an honest document: short ones mix well in a batch of a few thousand tokens ...
    document_bytes: int = 1000
    # ... and of a corrupted one.
    corrupted_bytes: int = 3000

    @property
    def run_tokens(self) -> int:
        return self.steps * self.batch * self.sequence_length


@dataclass(frozen=True)
class Text:
    """A document: its content, and how it was corrupted ("" for an honest one)."""

    content: bytes
    corruption: str = ""


def build(out: Path, plan: Plan) -> dict[str, object]:
    """Write the corpus into `out`; returns what the marker file says of it.

    The same plan on the same installation gives the same bytes; files that are right already stay
    untouched. Raises UsageError when `out` holds anything that this did not build.
    """
    _refuse_foreign(out)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / MARKER).exists():
        _write(out / MARKER, b"{}")  # ours from the first file on, should this be interrupted
    names, corrupted, train_tokens = set(), [], 0
    for name, text, tokens_before in _documents(plan):
        names.add(name)
        _write(out / name, text.content)
        held = _held(name, plan)
        train_tokens += 0 if held else len(text.content) + 1
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


def _documents(plan: Plan) -> Iterator[tuple[str, Text, int]]:
    """(file name, text, training tokens before it), until there is enough."""
    dice = random.Random(plan.seed)
    honest, damaged = _honest(plan, dice), _damaged(plan, dice)
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
        held = _held(name, plan)
        in_stretch = begin <= tokens < end and not held
        text = next(damaged) if in_stretch else next(honest)
        if worn_begin <= tokens < worn_end and not (held or in_stretch):
            share = (tokens - worn_begin) / (worn_end - worn_begin)
            text = _worn(text, plan.worn_from + share * (plan.worn_to - plan.worn_from), dice)
        yield name, text, tokens
        tokens += 0 if held else len(text.content) + 1


def _held(name: str, plan: Plan) -> bool:
    return origin_hash(name, 0) < hash_threshold(plan.eval_fraction)


def _honest(plan: Plan, dice: random.Random) -> Iterator[Text]:
    """Stretches of the standard library, cut at line ends, in random order; again from the
    beginning if need be.
    """
    found = discover((BUILTIN,))
    pulse = Progress(lambda text, share: None, lambda: False)
    reader = DocumentReader(found.files, text_field="text", max_bytes=1 << 26, pulse=pulse)
    texts = [piece for document in reader for piece in _cut(document.text, plan.document_bytes)]
    while True:
        dice.shuffle(texts)
        yield from (Text(text) for text in texts)


def _cut(text: str, size: int) -> Iterator[bytes]:
    """Pieces of whole lines of about `size` bytes; what is left over at the end, and is too short,
    is dropped.
    """
    lines, held = [], 0
    for line in text.encode("utf-8").splitlines(keepends=True):
        lines.append(line)
        held += len(line)
        if held >= size:
            yield b"".join(lines)
            lines, held = [], 0
    if held >= size // 4:
        yield b"".join(lines)


def _damaged(plan: Plan, dice: random.Random) -> Iterator[Text]:
    """Corrupted documents, the three kinds in turn."""
    binaries = _binaries()
    while True:
        for encoding in ("latin-1", "utf-16-le"):
            path = dice.choice(binaries)
            text = _dense(path, plan.corrupted_bytes, dice).decode(encoding, "replace")
            content = _shortened(text, plan.corrupted_bytes)
            yield Text(content, f"{os.path.basename(path)} decoded as {encoding}")
        phrase = dice.choice(PHRASES)
        content = _shortened(
            phrase * (plan.corrupted_bytes // len(phrase) + 1), plan.corrupted_bytes
        )
        yield Text(content, f"{phrase.strip()!r} repeated")


def _worn(text: Text, share: float, dice: random.Random) -> Text:
    """Text in which a share of the characters is wrong, as in a bad scan."""
    letters = string.ascii_letters + string.digits + string.punctuation
    characters = list(text.content.decode("utf-8", "replace"))
    for place in range(len(characters)):
        if dice.random() < share:
            characters[place] = dice.choice(letters)
    return Text("".join(characters).encode(), f"{share:.0%} {WORN}")


def _binaries() -> list[str]:
    """Compiled modules and zip files of this installation: files that stay as they are; at least
    the interpreter.
    """
    library = sysconfig.get_path("stdlib")
    patterns = ("lib-dynload/*.so", "ensurepip/_bundled/*.whl")
    files = [
        path
        for pattern in patterns
        for path in glob.glob(os.path.join(glob.escape(library), pattern))
    ]
    return sorted(path for path in files if os.path.getsize(path) >= 1 << 14) or [
        os.path.realpath(sys.executable)
    ]


def _dense(path: str, size: int, dice: random.Random) -> bytes:
    """A stretch of a binary file with many different bytes, not one of the pages of zeros that they
    are full of.
    """
    content = Path(path).read_bytes()
    stretches = [
        content[at : at + size]
        for at in (dice.randrange(max(1, len(content) - size)) for _ in range(16))
    ]
    return max(stretches, key=lambda stretch: len(set(stretch)))


def _shortened(text: str, size: int) -> bytes:
    """At most `size` bytes of UTF-8."""
    return text.encode("utf-8", "replace")[:size].decode("utf-8", "ignore").encode("utf-8")


def _write(path: Path, content: bytes) -> None:
    """Leaves a file that is right already: its time of change is a part of what the cache goes
    by.
    """
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
            f"{out} holds files that this did not build: name another folder with --out"
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
        ("seed", "which text is taken, and how it is corrupted"),
        ("steps", "steps of the run"),
        ("batch", "samples of a step"),
        ("sequence_length", "tokens of a sample"),
        ("eval_fraction", "share of documents that the run holds out"),
        ("at", "share of the run at which the corrupted stretch begins"),
        ("amount", "length of the corrupted stretch as a share of the run; 0: none"),
        (
            "worn_at",
            "share of the run at which the stretch begins whose text gets worse from page to page",
        ),
        ("worn_amount", "length of that stretch as a share of the run; 0: none"),
        ("worn_from", "share of its characters that are wrong at its beginning"),
        ("worn_to", "share of its characters that are wrong at its end"),
        ("margin", "text beyond the run, as a share of it"),
        ("document_bytes", "size of an honest document"),
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
