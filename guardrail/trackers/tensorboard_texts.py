"""The journal and the configuration as texts of TensorBoard.

They are in the event files of a separate folder. Nothing there is purged: what happened stays true
after a rollback.

The step of a text is the number (`seq`) of its last journal line. Unlike the training step it only
grows. So the texts keep their order, and no reader drops one because a step went back.

Which texts are written is read from the files. So an exporter that died before it saved its
position, or lost it, writes no text twice.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from guardrail.core.events.decisions import SamplesTaken
from guardrail.core.events.event import COMMAND, INCIDENT, Event
from guardrail.core.files import FOLDER_MODE
from guardrail.core.text import clean_text
from guardrail.rundir.run_directory import RunDirectory
from guardrail.trackers import tfevents
from guardrail.trackers.base import Entry, NewConfig

CONFIG = "config"  # tag of the configuration
# Topic of an event -> tag of its text. TensorBoard shows only a sample of the texts of a tag, so
# commands have their own. Consecutive new events of one step are one text.
TAGS = {topic: f"guard/{topic}" for topic in (INCIDENT, COMMAND)}
MOST_OF_MESSAGE = 2000  # characters
MOST_OF_PATH = 300
MOST_OF_EXCERPT = 160


class JournalTexts:
    """Writes each text once.

    Args:
        folder: made with the first text.
        run: whose journal it is.
    """

    def __init__(self, folder: Path, run: RunDirectory) -> None:
        self._folder = folder
        self._run = run
        self._file = tfevents.EventFile(folder)
        self._seq = 0  # of the newest journal line that was seen
        self._known = 0  # for a tag without a text: lines up to this one are written
        self._last: dict[str, tfevents.Text] = {}  # tag -> its last text
        self._missed: list[Event] = []

    def open(self, seq: int) -> None:
        """Read which texts are written, and find those that a crash lost after the position.

        Args:
            seq: of the position: journal lines up to this one do not come again.

        Raises:
            OSError: the event files cannot be read.
        """
        self._last = tfevents.read_last_texts(self._folder)
        self._seq = self._known = seq
        with contextlib.suppress(OSError):
            self._missed = [event for event in self._run.events() if event.seq <= seq]

    def write(self, entries: Sequence[Entry]) -> None:
        """Write the texts of new events and of a new configuration. Raises OSError."""
        events = [*self._missed, *(entry for entry in entries if isinstance(entry, Event))]
        seq = max((event.seq for event in events), default=self._seq)
        texts = [text for topic in TAGS for text in self._new_texts(events, topic)]
        texts.sort(key=lambda text: text.step)
        for entry in entries:
            if isinstance(entry, NewConfig):
                texts += _config_texts(entry.toml, seq, self._last.get(CONFIG))
        if texts:
            self._folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
            self._file.append(b"".join(tfevents.encode_text(*text) for text in texts))
        self._last |= {text.tag: text for text in texts}
        self._seq = seq
        self._missed = []

    def close(self) -> None:
        self._file.close()

    def _new_texts(self, events: list[Event], topic: str) -> list[tfevents.Text]:
        tag, written = TAGS[topic], self._known
        if tag in self._last:
            written = self._last[tag].step
        new = [
            event
            for event in events
            if event.topic == topic and event.seq > written and event.message
        ]
        texts = []
        for _, group in itertools.groupby(new, key=lambda event: (event.timeline, event.step)):
            of_step = list(group)
            newest = of_step[-1]
            texts.append(tfevents.Text(tag, _format_events(of_step), newest.seq, newest.time))
        return texts


def _config_texts(toml: str, seq: int, last: tfevents.Text | None) -> list[tfevents.Text]:
    """Return the configuration as a text; nothing if it is the `last` one.

    Its step lies after that of `last`, because readers keep one text per step of a tag.
    """
    lines = [clean_text(line.replace("```", "'''")) for line in toml.splitlines()]
    markdown = "\n".join(["```toml", *lines, "```"])
    if last is None:
        return [tfevents.Text(CONFIG, markdown, seq, time.time())]
    if last.markdown == markdown:
        return []
    return [tfevents.Text(CONFIG, markdown, max(seq, last.step + 1), time.time())]


def _format_events(events: list[Event]) -> str:
    """Return events of one step and timeline as Markdown.

    The step is part of the text, because TensorBoard shows the journal line as the step.
    """
    head = f"*step {events[0].step}, timeline {events[0].timeline}*"
    return "\n\n".join([head, *map(_format_event, events)])


def _format_event(event: Event) -> str:
    lines = [f"**{event.kind.replace('_', ' ')}** {_escape(event.message)}"]
    if not isinstance(event, SamplesTaken):
        return lines[0]
    for document in event.documents:
        if isinstance(document, dict):
            lines.append("- " + _escape(_format_document(document)))
    if event.documents and event.documents_total > len(event.documents):
        lines.append(f"- and {event.documents_total - len(event.documents)} more documents")
    return "\n".join(lines)


def _format_document(document: dict[str, Any]) -> str:
    """Return a document of the journal as "FILE:RECORD bytes 10-20  EXCERPT"."""
    text = clean_text(str(document.get("path", "?")), MOST_OF_PATH)
    if document.get("record"):
        text += f":{document['record']}"
    if isinstance(document.get("last_byte"), int):
        text += f" bytes {document.get('first_byte', 0)}-{document['last_byte']}"
    excerpt = document.get("excerpt")
    if isinstance(excerpt, str) and excerpt:
        text += f"  {clean_text(excerpt, MOST_OF_EXCERPT)}"
    return text


def _escape(text: str) -> str:
    """Return text in which no character is Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", clean_text(text, MOST_OF_MESSAGE))
