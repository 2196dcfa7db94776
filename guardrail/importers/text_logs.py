"""What training programs print: llm.c, nanoGPT and its relatives, Megatron, torchtitan, Hugging Face's Trainer.

The format is the one that most lines of the file have. Lines of other kinds (set-up, evaluations, checkpoints) stand
between the records in every real log.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

from guardrail.errors import DataError
from guardrail.importers.log import Log, number, whole
from guardrail.records import GRAD_NORM, LOSS, LOSS_SCALE
from guardrail.text import clean

# Lines of one format after which no other is thought of any more.
SURE = 16
# Lines of a file that is found in a folder, not named, which are looked at to see whether it is a log at all.
LOOK = 20_000
MOST = 10_000  # characters of a line that are looked at

_N = r"[-+]?(?:nan|inf(?:inity)?|\d[\d,]*\.?\d*(?:e[-+]?\d+)?|\.\d+)"
_STEP = r"(?P<step>\d[\d,]*)"


def _regex(pattern: str) -> re.Pattern[str]:
    """`{step}`, `{loss}`, `{grad_norm}`, `{loss_scale}` stand for named numbers, `{n}` for any number."""
    named = {name: f"(?P<{name}>{_N})" for name in (LOSS, GRAD_NORM, LOSS_SCALE)}
    return re.compile(pattern.format(step=_STEP, n=_N, **named), re.IGNORECASE)


# name -> the line of one step. Optional parts are looked for only behind what makes the line one of this format.
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
    "modded-nanogpt": _regex(r"\bstep:{step}(?:/\d+)? train_loss:{loss}(?:.*?\bgrad_norm:{grad_norm})?"),
    # iteration    12/  159576 | consumed samples: ... | lm loss: 1.02E+01 | loss scale: 4096.0 | grad norm: 3.112 | ...
    "Megatron": _regex(
        r"\biteration\s+{step}/\s*\d+\s*\|.*?\|\s*(?:lm[ _]loss|loss|reduced_train_loss|train loss): {loss}\s*"
        r"(?=(?:.*?\|\s*loss scale: {loss_scale})?)(?=(?:.*?\|\s*grad norm: {grad_norm})?)"
    ),
    # [rank0]:[titan] 2025-06-04 08:51:48,074 - root - INFO - step: 12  loss: 10.2301  grad_norm: 3.1122  memory: ...
    "torchtitan": _regex(r"\bstep:\s*{step}(?:/\d+ = [\d.]+%)?\s+loss:\s*{loss}(?:.*?\bgrad_norm:\s*{grad_norm})?"),
    # {'loss': 10.2301, 'grad_norm': 3.1122, 'learning_rate': 1.0e-05, 'epoch': 0.01}: the Trainer prints no step
    "Trainer output": _regex(r"\{{'loss': '?{loss}'?,(?: 'grad_norm': '?{grad_norm}'?,)?"),
    # anything that names a step and then a loss
    "text": _regex(
        r"\b(?:global[ _]step|step|iteration|iter)\b\s*[:=#]?\s*\[?{step}\b(?:.*?[^\w/-])??"
        r"(?<!val )(?<!valid )(?<!validation )(?<!eval )(?<!test )(?<!aux )(?:train(?:ing)?[ _/])?loss\s*[:=]?\s*{loss}"
        r"(?:.*?\b(?:grad(?:ient)?[ _]?norm|gnorm|norm)\s*[:=]?\s*{grad_norm})?"
    ),
}
_RANK = re.compile(r"^\W*(?:default\d*\W+)?rank\W?(\d+)|^(\d+): ", re.IGNORECASE)


def read(path: Path, shown: str, columns: Mapping[str, str]) -> list[Log]:
    """DataError if no line tells a step. Text names no columns, so `columns` cannot be had."""
    for name in columns.values():
        raise DataError(f"{shown}: plain text has no columns, so no {clean(name, 60)!r}")
    kind = format_of(path)
    if kind is None:
        raise DataError(f"{shown}: no line that tells a step and a training loss, in any format that I know")
    pattern = FORMATS[kind]
    log = Log(path=shown, format=kind)
    rank = None
    with _open(path) as file:
        for line in _lines(file):
            match = pattern.search(line)
            if match is None:
                continue
            who = _RANK.match(line)
            if who is not None and rank is None:
                rank = who[0]
            if who is not None and who[0] != rank:
                continue  # every rank of a job prints the same step
            told = match.groupdict()
            step = told.pop("step", None)
            cells = {signal: value for signal, text in told.items() if text and (value := number(text)) is not None}
            counted = len(log) + 1 if step is None else whole(number(step))
            if counted is not None:
                log.add(counted, cells)
    log.names = {signal: signal for signal in log.columns}
    return [log.finish()]


def format_of(path: Path, *, lines: int | None = None) -> str | None:
    """The format of most lines, among the first `lines`; of equally many, the more particular one."""
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
        if "l" not in line and "L" not in line and "train" not in line:
            continue
        line = line[:MOST]
        if "\x1b" in line:
            line = clean(line)
        yield line
