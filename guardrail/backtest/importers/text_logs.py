"""What training programs print: llm.c, nanoGPT and its relatives, Megatron, torchtitan, the Trainer of
Hugging Face, verl.

The format is the one that most lines of the file have. Every real log has other lines between the
records: set-up, evaluations, checkpoints.

A training line without the loss that its neighbours have is a record whose loss is not finite.
Megatron prints no loss if it is NaN; others print "None" or asterisks.
"""

from __future__ import annotations

import itertools
import math
import re
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from guardrail.backtest.importers.base import Importer
from guardrail.backtest.importers.jsonlines import log_from_records
from guardrail.backtest.importers.log_file import LogFile
from guardrail.backtest.importers.names import rank_signal
from guardrail.backtest.importers.recorded_log import Log, parse_number
from guardrail.backtest.importers.text_formats import FORMATS, NUMBER, WITHOUT_LOSS
from guardrail.core.errors import DataError
from guardrail.core.records.signals import GRAD_NORM, LOSS, LOSS_SCALE
from guardrail.core.text import clean_text

# Lines of one format that decide: then no other format is tried.
SURE = 16
# Lines of a file that a search found, not the user, in which a training line is looked for.
LOOK = 20_000
MOST = 10_000  # characters of a line that are read
# Lines in which other columns are looked for, unless the user chose columns.
LOOKED_AT = 50

_MAY_BE_RECORD = re.compile("[lL]|train|norm").search
_RANK = re.compile(r"^\W*(?:default\d*\W+)?rank\W?(\d+)|^(\d+): ", re.IGNORECASE)
_OTHER_LINE = re.compile(r"loss|\beval|\bval|\btest", re.IGNORECASE)
_NAME = r"[A-Za-z_][\w/.\-]*(?: [A-Za-z_][\w/.\-]*){0,2}"
_PAIR = re.compile(rf"({_NAME})\s*[:=]\s*({NUMBER})(?![\w.])", re.IGNORECASE)
_DICT_PAIR = re.compile(r"'([^']+)':\s*('[^']*'|\w+(?:\.\w+)*\([^)]*\)|[^,}]+)")
_DICT = re.compile(r"\{('[^']+':.*)\}")
_MEGATRON = re.compile(r"\biteration\s+(\d+)/\s*\d+\s*\|(.*)")
_VERL = re.compile(r"\bstep:\s?(\d+) - (.*)")
_BAR = re.compile(r"\b(\d+)/\d+ \[(\d[^\]]*)\]")

Fields = dict[str, Any]


class TextLogs(Importer):
    name = "text"
    reads = (
        "text logs of llm.c, nanoGPT, Megatron, torchtitan, the Hugging Face Trainer, ms-swift,"
        " verl, OpenRLHF and others"
    )
    recognised_by = "the form of its lines"

    def recognises(self, file: LogFile) -> bool:
        if file.is_utf16:
            return True
        if not file.is_plain_text:
            return False
        return file.is_named or detect_format(file.path, lines=LOOK) is not None

    def read(self, path: Path, shown: str, columns: Mapping[str, str]) -> list[Log]:
        kind = detect_format(path)
        if kind is None:
            raise DataError(
                f"{shown}: no line has a step and a training loss, in any format that guardrail knows",
                kind="no_training_line",
            )
        with _open(path) as file:
            lines = _keep_one_rank(_training_lines(file), FORMATS[kind])
            fields = _parse_lines(lines, kind, all_columns=bool(columns))
            log = log_from_records(_fill_missing_losses(fields, kind), shown, kind, columns)
        if kind == "progress bar" and any(b <= a for a, b in itertools.pairwise(log.steps)):
            log.steps = array("q", range(1, len(log) + 1))  # one bar per epoch or rollout
        return [log]


def is_training_line(line: str) -> bool:
    """Return whether a line has a step and a training loss."""
    return any(pattern.search(line[:MOST]) for pattern in FORMATS.values())


def detect_format(path: Path, *, lines: int | None = None) -> str | None:
    """Return the format of most lines; None if no line has one.

    "text" fits lines of other formats too. So another format needs only half as many lines.

    Args:
        lines: only the first so many are read.
    """
    counts = dict.fromkeys(FORMATS, 0)
    with _open(path) as file:
        for line in itertools.islice(_training_lines(file), lines):
            for kind, pattern in FORMATS.items():
                if pattern.search(line):
                    counts[kind] += 1
                    if counts[kind] >= SURE and kind != "text":
                        return kind
    best = max(counts, key=lambda kind: counts[kind])
    special = max((kind for kind in FORMATS if kind != "text"), key=lambda kind: counts[kind])
    if counts[special] and 2 * counts[special] >= counts[best]:
        best = special
    if not counts[best]:
        return None
    return best


def _open(path: Path) -> TextIO:
    """Open a text file; UTF-16 if a console of Windows wrote it.

    A carriage return ends a line, because progress lines end in one.
    """
    with path.open("rb") as file:
        is_utf16 = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
    encoding = "utf-8-sig"
    if is_utf16:
        encoding = "utf-16"
    return path.open(encoding=encoding, errors="replace", newline=None)


def _training_lines(file: TextIO) -> Iterator[str]:
    """Give the lines that may hold a record, without colours."""
    for line in file:
        if not _MAY_BE_RECORD(line):
            continue
        line = line[:MOST]
        if "\x1b" in line:
            line = clean_text(line)
        yield line


def _keep_one_rank(lines: Iterator[str], pattern: re.Pattern[str]) -> Iterator[str]:
    """Give the lines of the first rank that prints records, and lines without a rank.

    Every rank of a job prints the same step.
    """
    first = None
    for line in lines:
        rank = _RANK.match(line)
        if rank is not None and first is None and pattern.search(line):
            first = rank[0]
        if rank is None or first is None or rank[0] == first:
            yield line


def _parse_lines(lines: Iterator[str], kind: str, *, all_columns: bool) -> Iterator[Fields]:
    """Give the fields of each line that is a record or an evaluation."""
    parser = PARSERS.get(kind)
    if parser is not None:
        for line in lines:
            parsed = parser(line)
            if parsed is not None:
                yield parsed
        return
    found = 0
    for line in lines:
        fields = _match_format(line, kind)
        if fields is None:
            continue
        found += 1
        if all_columns or found <= LOOKED_AT:
            fields = _other_pairs(line) | fields
        yield fields


def _match_format(line: str, kind: str) -> Fields | None:
    match = FORMATS[kind].search(line)
    if match is None and kind in WITHOUT_LOSS and not _OTHER_LINE.search(line):
        match = WITHOUT_LOSS[kind].search(line)
    if match is None:
        return None
    fields: Fields = {}
    for name, text in match.groupdict().items():
        if text is not None:
            value = parse_number(text)
            if value is None:
                value = math.nan  # "None", or asterisks
            fields[name] = value
    return fields


def _other_pairs(line: str) -> Fields:
    """Return the other pairs of name and number. The format itself gives loss and norm."""
    fields: Fields = {}
    for name, text in _PAIR.findall(line):
        name = name.strip()
        if rank_signal(name) is None and name.lower() != "step":
            fields[name] = parse_number(text)
    return fields


# -- formats whose lines name every number that they hold


def _parse_megatron(line: str) -> Fields | None:
    match = _MEGATRON.search(line)
    if match is None or not FORMATS["Megatron"].search(line):
        return None
    fields: Fields = {"iteration": match[1]}
    for part in match[2].split("|"):
        name, colon, text = part.partition(":")
        value = parse_number(text)
        if colon and value is not None:
            fields[name.strip()] = value
    return fields


def _parse_trainer(line: str) -> Fields | None:
    """Parse a dictionary as Python prints it. Numbers may be in quotes, or inside of `tensor(...)`."""
    found = _DICT.search(line)
    if found is None:
        return None
    return {name: text.strip().strip("'") for name, text in _DICT_PAIR.findall(found[1])}


def _parse_verl(line: str) -> Fields | None:
    match = _VERL.search(line)
    if match is None:
        return None
    fields: Fields = {"step": match[1]}
    for part in match[2].split(" - "):
        name, colon, text = part.rpartition(":")
        if colon:
            fields[name.strip()] = text.strip()
    return fields


def _parse_progress_bar(line: str) -> Fields | None:
    match = _BAR.search(line)
    if match is None or not FORMATS["progress bar"].search(line):
        return None
    fields: Fields = {"step": match[1]}
    for part in match[2].split(", "):
        name, equals, text = part.partition("=")
        if equals:
            fields[name] = text
    return fields


PARSERS: dict[str, Callable[[str], Fields | None]] = {
    "Megatron": _parse_megatron,
    "Trainer output": _parse_trainer,
    "verl": _parse_verl,
    "progress bar": _parse_progress_bar,
}


# -- records without a loss


def _fill_missing_losses(records: Iterator[Fields], kind: str) -> Iterator[Fields]:
    """Give the records; one without a loss, after others with one, gets a loss of NaN.

    Megatron counts iterations that its loss scaler skipped. Such a line without a loss is an
    overflow: its gradient is not finite, and its loss is not known.
    """
    loss = None
    if kind == "Megatron":
        loss = "lm loss"
    for fields in records:
        named = _find_signal(fields, (LOSS,))
        if named is not None:
            loss = named
        elif loss is not None and _is_training(fields):
            if _is_overflow(fields):
                fields.setdefault("grad norm", math.inf)
            else:
                fields[loss] = math.nan
        yield fields


def _is_overflow(fields: Fields) -> bool:
    """Return whether Megatron's loss scaler skipped this iteration."""
    skipped = parse_number(str(fields.get("number of skipped iterations", 0)))
    nans = parse_number(str(fields.get("number of nan iterations", 0)))
    scale = parse_number(str(fields.get("loss scale", 1))) or 1.0
    return bool(skipped) and not nans and scale > 1.0


def _is_training(fields: Fields) -> bool:
    """Return whether a record without a loss is one of training.

    It is if it has a gradient norm, a loss scale or a learning rate.
    """
    if _find_signal(fields, (GRAD_NORM, LOSS_SCALE)) is not None:
        return True
    plain = {name.replace("_", " ") for name in fields}
    return not plain.isdisjoint({"learning rate", "number of skipped iterations"})


def _find_signal(fields: Fields, signals: tuple[str, ...]) -> str | None:
    """Return the first field that holds one of these signals."""
    for name in fields:
        found = rank_signal(name)
        if found is not None and found[0] in signals:
            return name
    return None
