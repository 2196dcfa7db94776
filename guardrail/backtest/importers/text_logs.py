"""What training programs print: llm.c, nanoGPT and its relatives, Megatron, torchtitan, Hugging
Face's Trainer, verl.

The format is the one that most lines of the file have. Lines of other kinds (set-up, evaluations,
checkpoints) stand between the records in every real log.

A training line that lacks the loss which its neighbours have is a record whose loss is not finite:
Megatron prints no loss that is NaN, others print "None" or asterisks.
"""

from __future__ import annotations

import itertools
import math
import re
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from guardrail.backtest.importers.jsonlines import from_records
from guardrail.backtest.importers.names import rank
from guardrail.backtest.importers.recorded_log import Log, number
from guardrail.core.errors import DataError
from guardrail.core.records import GRAD_NORM, LOSS, LOSS_SCALE
from guardrail.core.text import clean_text

# Lines of one format after which no other is thought of any more.
SURE = 16
# Lines of a file that is found in a folder, not named, which are looked at to see whether it is a
# log at all.
LOOK = 20_000
MOST = 10_000  # characters of a line that are looked at

_N = r"[-+]?(?:nan|inf(?:inity)?|1\.#\w+|\d[\d,]*\.?\d*(?:e[-+]?\d+)?|\.\d+)"
_NO_NUMBER = r"none|null|n/a|\*+"  # where a number should stand
_STEP = r"(?P<step>\d[\d,]*)"


def _regex(pattern: str) -> re.Pattern[str]:
    """`{step}`, `{loss}`, `{grad_norm}`, `{loss_scale}` stand for named numbers, `{n}` for any
    number.
    """
    named = {name: f"(?P<{name}>{_N}|{_NO_NUMBER})" for name in (LOSS, GRAD_NORM, LOSS_SCALE)}
    return re.compile(pattern.format(step=_STEP, n=_N, **named), re.IGNORECASE)


# name -> the line of one step. Optional parts are looked for only behind what makes the line one of
# this format.
FORMATS = {
    # s:12 trl:10.2301 lr:0.000012 norm:3.11
    "llm.c": _regex(r"^s:{step} trl:{loss}(?:.*? norm:{grad_norm})?"),
    # step   12/19560 | loss 10.230143 (-0.21z)| norm 3.1122 (+0.33z)| lr 1.03e-05 | 3060.00 ms | ...
    "llm.c output": _regex(
        r"^step\s+{step}/\d+\s*\|\s*(?:train )?loss {loss}(?: \([^)]*\))?\s*(?:\|\s*norm {grad_norm})?"
    ),
    # iter 12: loss 10.2301, time 250.11ms, mfu 20.01%
    "nanoGPT": _regex(r"\biter {step}: (?:train )?loss {loss}"),
    # 12 train 10.230143
    "build-nanogpt": _regex(r"^{step} train {loss}\s*$"),
    # step    12 | loss: 10.230143 | lr 1.0e-05 | norm: 3.1122 | dt: ...
    # step 00012/21400 (0.06%) | loss: 10.230143 | lrm: 1.00 | ...
    "nanochat": _regex(
        r"\bstep\s+{step}(?:/\d+)?(?: \([^)]*\))?\s*\|\s*(?:train )?loss:\s*{loss}"
        r"(?:.*?\|\s*(?:grad )?norm:\s*{grad_norm})?"
    ),
    # step:12/5100 train_loss:10.2301 train_time:2100ms step_avg:250.11ms
    "modded-nanogpt": _regex(
        r"\bstep:{step}(?:/\d+)? train_loss:{loss}(?:.*?\bgrad_norm:{grad_norm})?"
    ),
    # iteration    12/  159576 | consumed samples: ... | lm loss: 1.02E+01 | loss scale: 4096.0 | grad norm: 3.112 | ...
    "Megatron": _regex(
        r"\biteration\s+{step}/\s*\d+\s*\|.*?\|\s*"
        r"(?:(?:lm[ _]loss|loss|reduced_train_loss|train loss|loss scale|grad norm): {n}|number of skipped iterations:)"
    ),
    # [rank0]:[titan] 2025-06-04 08:51:48,074 - root - INFO - step: 12  loss: 10.2301  grad_norm: 3.1122  memory: ...
    "torchtitan": _regex(
        r"\bstep:\s*{step}(?:/\d+ = [\d.]+%)?\s+loss:\s*{loss}(?:.*?\bgrad_norm:\s*{grad_norm})?"
    ),
    # {'loss': 10.2301, 'grad_norm': 3.1122, 'learning_rate': 1.0e-05, 'epoch': 0.01}: the Trainer
    # prints no step
    "Trainer output": _regex(r"\{{'loss': (?:'|tensor\()?{n}"),
    # (TaskRunner pid=7) step:12 - actor/pg_loss:-0.0129 - actor/grad_norm:0.317 -
    # critic/rewards/mean:0.010 - ...
    "verl": _regex(r"\bstep:\s?{step} - (?:.* - )?[\w/]*(?:loss|grad_norm)[\w/]*:\s?{n}"),
    # Train epoch [1/1]: 100%|####| 4/4 [00:10<00:00, 10.1s/it, act_loss=-0.0012, kl=0.0010, rm=0.010, actor_gn=0.31]
    "progress bar": _regex(r"\b{step}/\d+ \[\d[^\]]*?, \w*loss={n}"),
    # anything that names a step and then a loss
    "text": _regex(
        r"\b(?:global[ _]step|step|iteration|iter)\b\s*[:=#]?\s*\[?{step}\b(?:.*?[^\w/-])??"
        r"(?<!val )(?<!valid )(?<!validation )(?<!eval )(?<!test )(?<!aux )(?:train(?:ing)?[ _/])?loss\s*[:=]?\s*{loss}"
        r"(?:.*?\b(?:grad(?:ient)?[ _]?norm|gnorm|norm)\s*[:=]?\s*{grad_norm})?"
    ),
}
_MAY_TELL = re.compile("[lL]|train|norm").search
_RANK = re.compile(r"^\W*(?:default\d*\W+)?rank\W?(\d+)|^(\d+): ", re.IGNORECASE)


# The line of a step whose loss is not there, of formats that print it in the middle of the line.
WITHOUT_LOSS = {
    "llm.c": _regex(r"^s:{step} .*?norm:{grad_norm}"),
    "llm.c output": _regex(r"^step\s+{step}/\d+\s*\|.*?norm {grad_norm}"),
    "nanochat": _regex(r"\bstep\s+{step}(?:/\d+)?(?: \([^)]*\))?\s*\|.*?\bnorm:\s*{grad_norm}"),
    "modded-nanogpt": _regex(r"\bstep:{step}(?:/\d+)? .*?\bgrad_norm:{grad_norm}"),
    "torchtitan": _regex(r"\bstep:\s*{step}\b.*?\bgrad_norm:\s*{grad_norm}"),
    "text": _regex(
        r"\b(?:global[ _]step|step|iteration|iter)\b\s*[:=#]?\s*\[?{step}\b.*?"
        r"\b(?:grad(?:ient)?[ _]?norm|gnorm)\s*[:=]?\s*{grad_norm}"
    ),
}
_OTHER_LINE = re.compile(r"loss|\beval|\bval|\btest", re.IGNORECASE)
_NAME = r"[A-Za-z_][\w/.\-]*(?: [A-Za-z_][\w/.\-]*){0,2}"
_PAIR = re.compile(rf"({_NAME})\s*[:=]\s*({_N})(?![\w.])", re.IGNORECASE)
_DICT_PAIR = re.compile(r"'([^']+)':\s*('[^']*'|\w+(?:\.\w+)*\([^)]*\)|[^,}]+)")
_DICT = re.compile(r"\{('[^']+':.*)\}")
_MEGATRON = re.compile(r"\biteration\s+(\d+)/\s*\d+\s*\|(.*)")
_VERL = re.compile(r"\bstep:\s?(\d+) - (.*)")
_BAR = re.compile(r"\b(\d+)/\d+ \[(\d[^\]]*)\]")
# Lines whose further columns are looked for, where nothing but the usual ones was asked for.
LOOKED_AT = 50

Fields = dict[str, Any]


def read(path: Path, shown: str, columns: Mapping[str, str]) -> list[Log]:
    """DataError if no line holds a step and a signal."""
    kind = format_of(path)
    if kind is None:
        raise DataError(
            f"{shown}: no line that tells a step and a training loss, in any format that I know"
        )
    with _open(path) as file:
        lines = _of_one_rank(_lines(file), FORMATS[kind])
        records = _complete(_parsed(lines, kind, all_columns=bool(columns)), kind)
        log = from_records(records, shown, kind, columns)
    if kind == "progress bar" and any(b <= a for a, b in itertools.pairwise(log.steps)):
        log.steps = array("q", range(1, len(log) + 1))  # a bar for each epoch or rollout
    return [log]


def _of_one_rank(lines: Iterator[str], pattern: re.Pattern[str]) -> Iterator[str]:
    """Every rank of a job prints the same step: keep to the first rank that does."""
    first = None
    for line in lines:
        who = _RANK.match(line)
        if who is not None and first is None and pattern.search(line):
            first = who[0]
        if who is None or first is None or who[0] == first:
            yield line


def _parsed(lines: Iterator[str], kind: str, *, all_columns: bool) -> Iterator[Fields]:
    """The fields of each line that is a record or an evaluation."""
    parser = PARSERS.get(kind)
    if parser is not None:
        yield from (fields for line in lines if (fields := parser(line)) is not None)
        return
    found = 0
    for line in lines:
        fields = _fields(line, kind)
        if fields is None:
            continue
        found += 1
        if all_columns or found <= LOOKED_AT:
            fields = _others(line) | fields
        yield fields


def _fields(line: str, kind: str) -> Fields | None:
    match = FORMATS[kind].search(line)
    if match is None and kind in WITHOUT_LOSS and not _OTHER_LINE.search(line):
        match = WITHOUT_LOSS[kind].search(line)
    if match is None:
        return None
    fields: Fields = {}
    for name, text in match.groupdict().items():
        if text is not None:
            value = number(text)
            fields[name] = math.nan if value is None else value
    return fields


def _others(line: str) -> Fields:
    """What else a line says in pairs; its loss and its norm are those of the format."""
    pairs = ((name.strip(), number(text)) for name, text in _PAIR.findall(line))
    return {name: value for name, value in pairs if rank(name) is None and name.lower() != "step"}


def _megatron(line: str) -> Fields | None:
    match = _MEGATRON.search(line)
    if match is None or not FORMATS["Megatron"].search(line):
        return None
    fields: Fields = {"iteration": match[1]}
    for part in match[2].split("|"):
        name, colon, text = part.partition(":")
        if colon and (value := number(text)) is not None:
            fields[name.strip()] = value
    return fields


def _trainer(line: str) -> Fields | None:
    """As Python prints a dictionary; numbers may stand in quotes, and tensors as they are
    printed.
    """
    found = _DICT.search(line)
    if found is None:
        return None
    return {name: text.strip().strip("'") for name, text in _DICT_PAIR.findall(found[1])}


def _verl(line: str) -> Fields | None:
    match = _VERL.search(line)
    if match is None:
        return None
    pairs = (part.rpartition(":") for part in match[2].split(" - "))
    return {"step": match[1]} | {name.strip(): text.strip() for name, colon, text in pairs if colon}


def _progress_bar(line: str) -> Fields | None:
    match = _BAR.search(line)
    if match is None or not FORMATS["progress bar"].search(line):
        return None
    pairs = (part.partition("=") for part in match[2].split(", "))
    return {"step": match[1]} | {name: text for name, equals, text in pairs if equals}


# Formats whose lines name every number that they hold.
PARSERS: dict[str, Callable[[str], Fields | None]] = {
    "Megatron": _megatron,
    "Trainer output": _trainer,
    "verl": _verl,
    "progress bar": _progress_bar,
}


def _complete(records: Iterator[Fields], kind: str) -> Iterator[Fields]:
    """Records of which each has a loss, where the ones before had one.

    Megatron counts iterations that its loss scaler skipped: such a line without a loss is an
    overflow, whose gradient is not finite and whose loss is not known.
    """
    loss = "lm loss" if kind == "Megatron" else None
    for fields in records:
        named = next(
            (name for name in fields if (found := rank(name)) is not None and found[0] == LOSS),
            None,
        )
        if named is not None:
            loss = named
        elif loss is not None and _is_training(fields):
            skipped = number(str(fields.get("number of skipped iterations", 0)))
            nans = number(str(fields.get("number of nan iterations", 0)))
            if skipped and not nans and (number(str(fields.get("loss scale", 1))) or 1.0) > 1.0:
                fields.setdefault("grad norm", math.inf)
            else:
                fields[loss] = math.nan
        yield fields


def _is_training(fields: Fields) -> bool:
    """Whether a record without a loss is one of training: it has a gradient norm, a loss scale or a
    learning rate.
    """
    if any(
        (found := rank(name)) is not None and found[0] in (GRAD_NORM, LOSS_SCALE) for name in fields
    ):
        return True
    return any(
        name.replace("_", " ") in ("learning rate", "number of skipped iterations")
        for name in fields
    )


def is_record(line: str) -> bool:
    """Whether a line tells a step and a training loss."""
    return any(pattern.search(line[:MOST]) for pattern in FORMATS.values())


def format_of(path: Path, *, lines: int | None = None) -> str | None:
    """The format of most lines, among the first `lines`; of equally many, the more particular
    one.
    """
    counts = dict.fromkeys(FORMATS, 0)
    with _open(path) as file:
        for line in itertools.islice(_lines(file), lines):
            for kind, pattern in FORMATS.items():
                if pattern.search(line):
                    counts[kind] += 1
                    if counts[kind] >= SURE and kind != "text":
                        return kind
    best = max(counts, key=lambda kind: counts[kind])
    particular = max((kind for kind in FORMATS if kind != "text"), key=lambda kind: counts[kind])
    if counts[particular] and 2 * counts[particular] >= counts[best]:
        best = particular
    return best if counts[best] else None


def _open(path: Path) -> TextIO:
    """Progress lines that end in a carriage return are lines; so is what a UTF-16 console wrote."""
    with path.open("rb") as file:
        wide = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
    return path.open(encoding="utf-16" if wide else "utf-8-sig", errors="replace", newline=None)


def _lines(file: TextIO) -> Iterator[str]:
    """Lines that may tell a step, without colours."""
    for line in file:
        if not _MAY_TELL(line):
            continue
        line = line[:MOST]
        if "\x1b" in line:
            line = clean_text(line)
        yield line
