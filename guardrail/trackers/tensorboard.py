"""The same story for TensorBoard: follows a run directory and writes event files, without torch or
tensorflow.

What a rollback or a restart abandoned is purged the way a restarted writer does it, with a
SessionLog START at the first step that is told anew, so that TensorBoard shows the present
timeline. Position and files survive a restart of the exporter: it goes on where it was.

Texts (what the journal reports, and the configuration) stand in event files of the subfolder
`journal`, which TensorBoard shows as a run of that name. Nothing there is ever purged, since what
happened stays true.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import logging
import math
import os
import re
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from guardrail.core.errors import RunDirectoryError
from guardrail.core.files import FILE_MODE, FOLDER_MODE, read_file, replace_file
from guardrail.core.records import METRIC_COLUMNS, Event, Record
from guardrail.core.text import clean
from guardrail.rundir.follow import Follower
from guardrail.rundir.run_directory import MetricsView, RunDirectory
from guardrail.trackers import tfevents

logger = logging.getLogger(__name__)

SECONDS = 2.0  # between two exports
_CHUNK = 4096  # rows written at once

TEXTS = "journal"  # the subfolder of the event files that hold texts
INCIDENT, COMMAND, CONFIG = "guard/incident", "guard/command", "config"
# Event kinds written as text, and under which tag. TensorBoard shows only a sample of the texts of
# a tag, so commands have a tag of their own, and consecutive events of one step that are new
# together are one text.
_TEXTS = {
    "command": COMMAND,
    **dict.fromkeys(
        (
            "finding",
            "verdict",
            "left_out",
            "rollback",
            "undo",
            "cause",
            "remedy",
            "incident",
            "paused",
            "resumed",
            "hung",
            "ranks_failed",
        ),
        INCIDENT,
    ),
    **dict.fromkeys(("restarted", "durability", "ended"), INCIDENT),
}
# Of rows whose update was applied: tag -> column. A step that was rejected and then made with other
# data has one point in these curves; the rejected values have their own tags.
_APPLIED = {
    "train/loss": "loss",
    "train/grad_norm": "grad_norm",
    "train/embed_grad_norm": "embed_grad_norm",
    "train/embed_share": "embed_share",
    "train/lr": "lr",
    "train/step_time": "step_time",
    "guard/loss_threshold": "loss_threshold",
    "guard/grad_norm_threshold": "grad_norm_threshold",
    "guard/embed_grad_norm_threshold": "embed_grad_norm_threshold",
}
_REJECTED = {
    "guard/rejected_loss": "loss",
    "guard/rejected_grad_norm": "grad_norm",
    "guard/rejected_embed_grad_norm": "embed_grad_norm",
}
# Where NaN is news; elsewhere it says that there is nothing to say.
_NEWS = ("train/loss", "train/grad_norm", "guard/rejected_loss", "guard/rejected_grad_norm")


class Position(Record, frozen=True, kw_only=True):
    """tensorboard/position.json: how far the event files tell the run."""

    rows: int = 0
    seq: int = 0
    timeline: int = 0
    config: str = ""  # digest of the configuration that was written


def export(
    run: RunDirectory, *, stop: Callable[[], bool] | threading.Event, seconds: float = SECONDS
) -> None:
    """Follow `run` until `stop`, then write what is left and return. For a thread of its own.

    A disk that fails is logged once and tried again; nothing is raised for it.
    """
    stopped = stop.is_set if isinstance(stop, threading.Event) else stop
    with _alone(run) as alone:
        if not alone:
            logger.info("%s: TensorBoard files are being written by another process", run.path)
            return
        exporter = Exporter(run)
        while True:
            last = stopped()
            exporter.try_catch_up()
            if last:
                exporter.close()
                return
            deadline = time.monotonic() + seconds
            while not stopped() and time.monotonic() < deadline:
                time.sleep(min(0.1, seconds))


def catch_up(run: RunDirectory) -> None:
    """Write what is there and return."""
    export(run, stop=lambda: True)


@contextlib.contextmanager
def _alone(run: RunDirectory) -> Iterator[bool]:
    """One exporter a run. Where no lock can be had at all, on a disk that is gone, there is nothing
    to protect.
    """
    descriptor = -1
    try:
        run.tensorboard.mkdir(mode=FOLDER_MODE, exist_ok=True)
        descriptor = os.open(
            run.tensorboard / ".lock",
            os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW,
            FILE_MODE,
        )
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = True
    except BlockingIOError:
        alone = False
    except OSError as error:
        logger.warning("%s: %s", run.tensorboard, error.strerror)
        alone = True
    try:
        yield alone
    finally:
        if descriptor >= 0:
            os.close(descriptor)


class Exporter:
    """Writes one run's event files. One at a time; `export` sees to that."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._follower = Follower(run)
        self._position = _read_position(run)
        self._saved = self._position
        self._file = tfevents.EventFile(run.tensorboard)
        self._texts = _TextWriter(run.tensorboard / TEXTS, seq=self._position.seq)
        self._events: list[Event] = []
        self._error = ""

    def try_catch_up(self) -> None:
        """`catch_up`, with one line in the log for a disk that fails and one when it works
        again.
        """
        try:
            self.catch_up()
        except (OSError, RunDirectoryError) as error:
            text = f"TensorBoard files cannot be written: {error}"
            if text != self._error:
                logger.warning("%s", text)
            self._error = text
        else:
            if self._error:
                logger.warning("TensorBoard files are written again")
            self._error = ""

    def catch_up(self) -> None:
        """Write all that is new. Raises OSError; then nothing counts as written that is not."""
        self._events += self._follower.poll().events
        config = self._config_text()
        changed = bool(config) and _digest(config) != self._position.config
        self._texts.write(self._events, config if changed else "")
        while True:
            data, position = self._next(config)
            moved = position != self._position
            if moved and data:
                self._file.append(data)
            self._position = position  # also when it cannot be noted now: it is written
            if self._position != self._saved:
                replace_file(
                    self._run.tensorboard / "position.json", msgspec.json.encode(self._position)
                )
                self._saved = self._position
            if not moved:
                return

    def close(self) -> None:
        self._follower.close()
        self._file.close()
        self._texts.close()

    def _next(self, config: str) -> tuple[bytes, Position]:
        """The next curves as records, and the position after them. Changes nothing."""
        was, timelines, view = self._position, self._follower.timelines, self._follower.view
        assert view is not None
        story = _Story(timelines.begins, timeline=was.timeline)
        first, last = was.rows, max(was.rows, min(len(view), was.rows + _CHUNK))
        if not self._file.begun:
            first = self._tell_again(story, view, first)
        digest = _digest(config) if config else was.config
        if digest != was.config:
            story.config(config, name=self._run.name)
        for event in self._events:
            if event.seq > was.seq:
                story.event(event)
        rows = view.array[first:last]
        present = timelines.current(
            view.column("step")[first:last], view.column("timeline")[first:last]
        )
        for row in rows[present].tolist():
            story.row(dict(zip(view.columns, row, strict=True)))
        seq = max((event.seq for event in self._events), default=was.seq)
        return story.data(), Position(rows=last, seq=seq, timeline=story.timeline, config=digest)

    def _tell_again(self, story: _Story, view: MetricsView, first: int) -> int:
        """A new file begins by purging what an exporter that died may have written without noting
        its position.

        All rows of the step that comes next are told once more, for the purge takes those that were
        noted too. Returns the first row to tell. TensorBoard's server purges nothing at the first
        START of all, so there must be one at the very beginning.
        """
        if first == 0:
            story.purge(0)
            return 0
        steps, present = view.column("step"), view.current(self._follower.timelines)
        ahead = present[first:].nonzero()[0]
        if not len(ahead):
            return first
        step = steps[first + int(ahead[0])]
        story.purge(int(step))
        behind = (present[:first] & (steps[:first] >= step)).nonzero()[0]
        return int(behind[0]) if len(behind) else first

    def _config_text(self) -> str:
        """The configuration as it may be shown, or "" while there is none."""
        try:
            return self._run.config_text(display=True)
        except RunDirectoryError:
            return ""


class _TextWriter:
    """Writes each text once, into event files of its own folder.

    The step of a text is the number (`seq`) of its last journal line. Unlike the training step it
    only grows, so the texts stand in the order in which things happened, and no reader drops one
    because a step went back. Which texts have been written is read from the files, so that an
    exporter that died before it saved its position, or whose position file is lost, writes none
    again.

    Args:
        folder: made with the first text.
        seq: for a tag without a text in the files: journal lines up to this one have been written.
    """

    def __init__(self, folder: Path, *, seq: int) -> None:
        self._folder = folder
        self._seq = seq
        self._file = tfevents.EventFile(folder)
        self._last: dict[str, tfevents.Text] | None = None

    def write(self, events: list[Event], config: str) -> None:
        """Write what is new of `events`, all events so far, and of `config`, or "". Raises
        OSError.
        """
        if self._last is None:
            self._last = tfevents.last_texts(self._folder)
        texts = [
            text
            for tag in (INCIDENT, COMMAND)
            for text in self._new_texts(events, tag, self._last.get(tag))
        ]
        texts.sort(key=lambda text: text.step)
        if config:
            texts += _config_text(
                config, max((e.seq for e in events), default=0), self._last.get(CONFIG)
            )
        if not texts:
            return
        self._folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
        self._file.append(b"".join(tfevents.text(*text) for text in texts))
        self._last |= {text.tag: text for text in texts}

    def close(self) -> None:
        self._file.close()

    def _new_texts(
        self, events: list[Event], tag: str, last: tfevents.Text | None
    ) -> list[tfevents.Text]:
        written = self._seq if last is None else last.step
        new = [e for e in events if e.seq > written and e.message and _TEXTS.get(e.kind) == tag]
        groups = [
            list(group) for _, group in itertools.groupby(new, key=lambda e: (e.timeline, e.step))
        ]
        return [
            tfevents.Text(tag, _markdown(group), group[-1].seq, group[-1].time) for group in groups
        ]


def _config_text(config: str, seq: int, last: tfevents.Text | None) -> list[tfevents.Text]:
    """The configuration as a text, unless it is the `last` one. Readers keep one text for each step
    of a tag.
    """
    markdown = f"```toml\n{_block(config)}\n```"
    if last is None:
        return [tfevents.Text(CONFIG, markdown, seq, time.time())]
    if last.markdown == markdown:
        return []
    return [tfevents.Text(CONFIG, markdown, max(seq, last.step + 1), time.time())]


class _Story:
    """Turns events and rows into the records of the curves, in order.

    Args:
        begins: timeline -> step at which it began.
        timeline: the one that was told last.
    """

    def __init__(self, begins: dict[int, int], *, timeline: int) -> None:
        self.timeline = timeline
        self._begins = begins
        self._parts: list[bytes] = []
        self._last_step = -1

    def data(self) -> bytes:
        """All records so far."""
        return b"".join(self._parts)

    def event(self, event: Event) -> None:
        begun = event.data.get("new_timeline", event.timeline)
        if isinstance(begun, int) and begun in self._begins:
            self._turn(begun)
        if event.kind == "ended":
            good = event.data.get("phase") in ("finished", "stopped")
            self._parts.append(tfevents.hparams_end(good=good, at=event.time))

    def row(self, row: dict[str, float]) -> None:
        self._turn(int(row["timeline"]))
        step, applied = int(row["step"]), row.get("verdict", 0.0) == 0.0
        values = {
            tag: row[column]
            for tag, column in (_APPLIED if applied else _REJECTED).items()
            if column in row
        }
        if applied and row.get("step_time", 0.0) > 0:
            values["train/tokens_per_second"] = row.get("tokens", math.nan) / row["step_time"]
            values["guard/time_share"] = row.get("guard_time", math.nan) / row["step_time"]
        if applied:
            values |= {
                f"train/{name}": value for name, value in row.items() if name not in METRIC_COLUMNS
            }
        values = {
            tag: value for tag, value in values.items() if tag in _NEWS or not math.isnan(value)
        }
        if not math.isnan(row.get("eval_loss", math.nan)):
            values["eval/loss"] = row["eval_loss"]
        if not applied or step != self._last_step:
            # Of several attempts at a step the rejections count: readers keep one value a step.
            values["guard/verdict"] = row.get("verdict", 0.0)
        values["timeline"] = row["timeline"]
        self._last_step = step
        self._parts.append(tfevents.scalars(values, step=step, at=row.get("time", math.nan)))

    def purge(self, step: int) -> None:
        """Readers forget all points from `step` on."""
        self._parts.append(tfevents.restart(step))

    def config(self, text: str, *, name: str) -> None:
        with contextlib.suppress(tomllib.TOMLDecodeError):
            values, metrics = dict(_flat(tomllib.loads(text))), ("eval/loss", "train/loss")
            self._parts.append(tfevents.hparams(values, name=name, at=time.time(), metrics=metrics))

    def _turn(self, timeline: int) -> None:
        if timeline > self.timeline:
            begins = [
                step for other, step in self._begins.items() if self.timeline < other <= timeline
            ]
            self.timeline = timeline
            if begins:
                self.purge(min(begins) + 1)


def _read_position(run: RunDirectory) -> Position:
    """Unreadable or lost: tell everything again; the first purge removes what was told."""
    try:
        return msgspec.json.decode(read_file(run.tensorboard / "position.json"), type=Position)
    except (OSError, msgspec.DecodeError):
        return Position()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _markdown(events: list[Event]) -> str:
    """Events of one step and timeline as one text. The step stands in it, for TensorBoard shows the
    journal line.
    """
    head = f"*step {events[0].step}, timeline {events[0].timeline}*"
    return "\n\n".join([head, *map(_words, events)])


def _words(event: Event) -> str:
    """One event as Markdown."""
    lines = [f"**{event.kind.replace('_', ' ')}** {_plain(event.message)}"]
    documents = event.data.get("documents")
    for document in documents if isinstance(documents, list) else []:
        if isinstance(document, dict):
            lines.append("- " + _plain(document_words(document)))
    total = event.data.get("documents_total")
    if isinstance(total, int) and isinstance(documents, list) and total > len(documents):
        lines.append(f"- and {total - len(documents)} more documents")
    return "\n".join(lines)


def document_words(document: dict[str, Any]) -> str:
    """A document reference of the journal for a person: "FILE:RECORD bytes 10-20  EXCERPT"."""
    record = document.get("record")
    text = clean(str(document.get("path", "?")), 300) + (f":{record}" if record else "")
    if isinstance(document.get("last_byte"), int):
        text += f" bytes {document.get('first_byte', 0)}-{document['last_byte']}"
    excerpt = document.get("excerpt")
    return text + (f"  {clean(excerpt, 160)}" if isinstance(excerpt, str) and excerpt else "")


def _plain(text: str) -> str:
    """Text that means itself in Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", clean(text, 2000))


def _block(text: str) -> str:
    return "\n".join(clean(line.replace("```", "'''")) for line in text.splitlines())


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (bool, int, float, str)):
            yield f"{prefix}{key}", value
        else:
            yield f"{prefix}{key}", str(value)
