"""Tells somebody what happens to a run: a command, a webhook, or any service that apprise knows.

The supervisor does it in a thread of its own, from the journal, so neither a rank nor a step ever
waits for a network. What an event was about is remembered on disk before it is sent: after a crash
it is rather not told than told twice. A failure is a `notified` line of the journal and nothing
else.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from guardrail.core import secret
from guardrail.core.errors import ConfigError
from guardrail.core.files import encode_json, open_file
from guardrail.core.records import Event, Record
from guardrail.core.secret import SecretRef
from guardrail.core.sections import NotifySection, check_webhook
from guardrail.core.text import clean_text, redact_secrets
from guardrail.rundir import journal
from guardrail.rundir.run_directory import RunDirectory

_SCRIPT_VARIABLE = "GUARDRAIL_COMMAND"  # in the environment of the shell that runs notify.command
_RUN_SCRIPT = f'script=${_SCRIPT_VARIABLE}; unset {_SCRIPT_VARIABLE}; eval "$script"'
LOOK_SECONDS = 1.0  # between two looks at the journal
# Of an event's own fields, what leaves the machine. Documents and excerpts of the data stay.
_TOLD = (
    *("state", "reason", "phase", "exit_code", "incident", "number", "onset"),
    *("rank", "deadline", "default", "to_step"),
)

Say = Callable[..., object]
Spawn = Callable[..., "contextlib.AbstractContextManager[subprocess.Popen[bytes]]"]


class Notice(Record, frozen=True, kw_only=True):
    """What is sent, as JSON.

    Attributes:
        event: one of the words of `[notify] on`.
        text: one sentence; Slack, Mattermost and others show a field of this name.
        choices: what may be answered to the guard's question, a sentence each.
        data: further fields of the journal line.
    """

    event: str
    text: str
    run: str
    path: str
    host: str
    seq: int
    step: int
    timeline: int
    time: float
    message: str
    choices: tuple[str, ...] = ()
    data: dict[str, Any] = msgspec.field(default_factory=dict)


def kind_of(event: Event) -> str:
    """Under which word of `[notify] on` a journal line is told; "" for one that nobody is told
    of.
    """
    data = event.data
    match event.kind:
        case "incident":
            state = str(data.get("state", ""))
            return "incident" if state == "open" else state
        case "paused":
            return "paused" if data.get("proposals") else ""  # a person who pauses knows it
        case "disk":
            return "disk_ok" if data.get("state") == "ok" else "disk_failing"
        case "ended":
            return str(data.get("phase", ""))
        case "rollback" | "undo" | "rank_hung" | "rank_failed":
            return event.kind
    return ""


def notice_of(event: Event, *, run: str, path: str, host: str) -> Notice:
    """What is said of a journal line. Text from outside is cleaned: it ends on somebody's
    screen.
    """
    message = clean_text(event.message, 600)
    proposals = event.data.get("proposals")
    choices = [
        clean_text(str(one.get("text") or one.get("action") or ""), 300)
        for one in (proposals if isinstance(proposals, list) else [])
        if isinstance(one, dict)
    ]
    kept = {name: event.data[name] for name in _TOLD if event.data.get(name) is not None}
    data = {
        name: clean_text(value, 600) if isinstance(value, str) else value
        for name, value in kept.items()
    }
    return Notice(
        event=kind_of(event),
        text=f"{clean_text(run, 120)}, step {event.step:,}: {message}",
        run=clean_text(run, 120),
        path=clean_text(path),
        host=clean_text(host, 80),
        seq=event.seq,
        step=event.step,
        timeline=event.timeline,
        time=event.time,
        message=message,
        choices=tuple(choices),
        data=data,
    )


class Notifier:
    """Sends the notices of one run. `work` is the thread's own.

    Args:
        say: appends to the journal: (kind, message, **data).
        spawn: starts a command, as `subprocess.Popen` does, for the time of a `with` block.
        since: events from before this wall time are old news where nothing has been remembered yet.
    """

    def __init__(
        self,
        settings: NotifySection,
        run: RunDirectory,
        *,
        say: Say,
        spawn: Spawn | None = None,
        since: float = 0.0,
    ) -> None:
        self._settings, self._run, self._say = settings, run, say
        self._spawn: Spawn = spawn or subprocess.Popen
        self._since = since
        self._host = socket.gethostname()
        self._seq = run.notified()  # the newest event that has been dealt with
        self._offset = 0  # bytes of the journal that have been read
        self._ways = [(name, send) for name, send, used in self._all_ways() if used]
        self._used: set[str] = set()  # secrets that were read, which no message may repeat

    def _all_ways(self) -> Iterator[tuple[str, Callable[[Notice], str], bool]]:
        settings = self._settings
        yield "command", self._command, bool(settings.command)
        yield "webhook", self._webhook, bool(settings.webhook)
        yield "apprise", self._apprise, bool(settings.apprise)

    def work(self, stop: threading.Event) -> None:
        """Until `stop`, and once more after it."""
        while not stop.wait(LOOK_SECONDS):
            self.look()
        self.look()

    def look(self) -> None:
        """Tell of what is new in the journal."""
        for event in self._new():
            if event.seq <= (self._seq or 0) or (self._seq is None and event.time < self._since):
                continue
            if kind_of(event) in self._settings.on:
                self._tell(event)

    def _new(self) -> list[Event]:
        try:
            with open_file(self._run.journal_path) as lines:
                lines.seek(self._offset)
                events, size = journal.parse(lines.read())
        except OSError:
            return []  # not there yet, or a file system that does not answer
        self._offset += size
        return events

    def _tell(self, event: Event) -> None:
        self._seq = event.seq
        # A disk that cannot remember it must not keep the news of that very disk from a person.
        with contextlib.suppress(OSError):
            self._run.write_notified(event.seq)
        notice = notice_of(event, run=self._run.name, path=str(self._run.path), host=self._host)
        for way, send in self._ways:
            began = time.monotonic()
            try:
                failure = send(notice)
            except ConfigError as error:  # a secret that cannot be read
                failure = str(error)
            # whatever a service or its library does, the run must not notice
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
            failure = redact_secrets(failure, self._used)
            outcome = f"failed: {clean_text(failure, 300)}" if failure else "sent"
            self._say(
                "notified",
                f"{notice.event} of line {event.seq} by {way}: {outcome}",
                of=event.seq,
                event=notice.event,
                way=way,
                ok=not failure,
                reason=clean_text(failure, 300),
                seconds=round(time.monotonic() - began, 3),
            )

    # -- the ways; each returns why it failed, "" if it did not

    def _secret(self, value: str | SecretRef, key: str) -> str:
        text = secret.read_secret(value, key)
        self._used.add(text)
        return text

    def _command(self, notice: Notice) -> str:
        given, environment = self._settings.command, {**os.environ, **variables(notice)}
        if isinstance(given, (str, SecretRef)):
            # A command line can be seen by every user of the machine; an environment by its owner
            # alone.
            environment[_SCRIPT_VARIABLE] = self._secret(given, "notify.command")
            arguments = ["/bin/sh", "-c", _RUN_SCRIPT]
        else:
            arguments = [self._secret(word, "notify.command") for word in given]
        with self._spawn(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        ) as process:
            try:
                _, errors = process.communicate(encode_json(notice), timeout=self._settings.seconds)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                return f"not done after notify.seconds = {self._settings.seconds:g}"
        if process.returncode == 0:
            return ""
        last = errors.decode(errors="replace").strip().splitlines()[-1:] or [""]
        return f"exit code {process.returncode}: {last[0]}".rstrip(": ")

    def _webhook(self, notice: Notice) -> str:
        address = self._secret(self._settings.webhook, "notify.webhook")
        check_webhook(address)
        address, authorization = _split_user(address)
        headers = {"Content-Type": "application/json", "User-Agent": "guardrail", **authorization}
        request = urllib.request.Request(
            address, data=encode_json(notice), headers=headers, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=self._settings.seconds):
                return ""
        except urllib.error.HTTPError as error:
            with error:
                return f"the server answers {error.code} {error.reason}"
        except OSError as error:  # the address is a secret in many a webhook, and is not repeated
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                return f"not done after notify.seconds = {self._settings.seconds:g}"
            return str(getattr(reason, "strerror", None) or reason or type(error).__name__)

    def _apprise(self, notice: Notice) -> str:
        """In a thread of its own, since a service may have its own idea of how long to wait."""
        outcome: list[str] = []
        addresses = [
            self._secret(one, f"notify.apprise[{at}]")
            for at, one in enumerate(self._settings.apprise)
        ]

        def send() -> None:
            try:
                import apprise

                _silence("apprise")  # it writes addresses into its log
                services = apprise.Apprise()
                for url in addresses:
                    services.add(url)
                body = "\n".join(
                    [
                        notice.message,
                        *(f"{at}: {choice}" for at, choice in enumerate(notice.choices)),
                    ]
                )
                title = f"{notice.run}: {notice.event} at step {notice.step:,}"
                outcome.append(
                    ""
                    if services.notify(title=title, body=body)
                    else "apprise could not deliver it to all"
                )
            except Exception as error:
                outcome.append(f"{type(error).__name__}: {error}")

        thread = threading.Thread(target=send, name="apprise", daemon=True)
        thread.start()
        thread.join(self._settings.seconds)
        return (
            outcome[0] if outcome else f"not done after notify.seconds = {self._settings.seconds:g}"
        )


def _split_user(address: str) -> tuple[str, dict[str, str]]:
    """An address without USER:PASSWORD@, which urllib takes for a part of the host, and the header
    that says it.
    """
    parts = urllib.parse.urlsplit(address)
    user, at, host = parts.netloc.rpartition("@")
    if not at:
        return address, {}
    code = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
    return parts._replace(netloc=host).geturl(), {"Authorization": f"Basic {code}"}


def _silence(name: str) -> None:
    logger = logging.getLogger(name)
    logger.propagate = False
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())


def variables(notice: Notice) -> dict[str, str]:
    """The environment of a command. Not GUARDRAIL_RUN: that makes a process one of the run's
    own.
    """
    return {
        "GUARDRAIL_EVENT": notice.event,
        "GUARDRAIL_TEXT": notice.text,
        "GUARDRAIL_MESSAGE": notice.message,
        "GUARDRAIL_NAME": notice.run,
        "GUARDRAIL_DIRECTORY": notice.path,
        "GUARDRAIL_HOST": notice.host,
        "GUARDRAIL_STEP": str(notice.step),
        "GUARDRAIL_SEQ": str(notice.seq),
    }
