"""Sends the events of a run: to a command, to a webhook, or to any service that apprise knows.

The supervisor runs it on a thread and reads the journal, so neither a rank nor a step waits for a
network. The number of the event is written to disk before it is sent. So a crash may lose a
message, but never sends one twice. A failure is a `notified` line of the journal and nothing else.
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
from guardrail.core.events.event import Event
from guardrail.core.events.faults import Notified
from guardrail.core.events.run_state import Paused
from guardrail.core.files import encode_json, open_file
from guardrail.core.records.record import Record
from guardrail.core.secret import SecretRef
from guardrail.core.sections import NotifySection, check_webhook
from guardrail.core.text import clean_text, redact_secrets
from guardrail.rundir import journal
from guardrail.rundir.run_directory import RunDirectory

_SCRIPT_VARIABLE = "GUARDRAIL_COMMAND"  # in the environment of the shell that runs notify.command
_RUN_SCRIPT = f'script=${_SCRIPT_VARIABLE}; unset {_SCRIPT_VARIABLE}; eval "$script"'
LOOK_SECONDS = 1.0  # between two looks at the journal
# The fields of an event that leave the machine. Documents and excerpts of the data do not.
_SENT_FIELDS = (
    *("state", "reason", "phase", "exit_code", "incident", "number", "onset"),
    *("rank", "deadline", "default", "to_step"),
)

AppendEvent = Callable[[Event], object]
Spawn = Callable[..., "contextlib.AbstractContextManager[subprocess.Popen[bytes]]"]


class Notice(Record, frozen=True, kw_only=True):
    """What is sent, as JSON.

    Attributes:
        event: one of the words of `[notify] on`.
        text: one sentence; Slack, Mattermost and others show a field of this name.
        choices: the possible answers to the guard's question, a sentence each.
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


def build_notice(event: Event, *, run: str, path: str, host: str) -> Notice:
    """Return what is sent for a journal line. Outside text is cleaned for a terminal."""
    message = clean_text(event.message, 600)
    data = {}
    for name in _SENT_FIELDS:
        value = event.data.get(name)
        if value is not None:
            data[name] = clean_text(value, 600) if isinstance(value, str) else value
    return Notice(
        event=event.notice,
        text=f"{clean_text(run, 120)}, step {event.step:,}: {message}",
        run=clean_text(run, 120),
        path=clean_text(path),
        host=clean_text(host, 80),
        seq=event.seq,
        step=event.step,
        timeline=event.timeline,
        time=event.time,
        message=message,
        choices=tuple(_list_choices(event)),
        data=data,
    )


def _list_choices(event: Event) -> Iterator[str]:
    """Yield the possible answers to the question of a journal line."""
    for one in event.proposals if isinstance(event, Paused) else ():
        if isinstance(one, dict):
            yield clean_text(str(one.get("text") or one.get("action") or ""), 300)


class Notifier:
    """Sends the notices of one run. `run` is for a thread.

    Args:
        record: appends to the journal.
        spawn: starts a command, as `subprocess.Popen` does, for the time of a `with` block.
        since: where no event was sent yet, events from before this wall time are not sent.
    """

    def __init__(
        self,
        settings: NotifySection,
        run: RunDirectory,
        *,
        record: AppendEvent,
        spawn: Spawn | None = None,
        since: float = 0.0,
    ) -> None:
        self._settings, self._run, self._record = settings, run, record
        self._spawn: Spawn = spawn or subprocess.Popen
        self._since = since
        self._host = socket.gethostname()
        self._last_seq = run.notified()  # of the newest event that was sent
        self._offset = 0  # bytes of the journal that have been read
        self._ways = [(name, send) for name, send, is_used in self._all_ways() if is_used]
        self._used_secrets: set[str] = set()  # that were read, and that no message may repeat

    def _all_ways(self) -> Iterator[tuple[str, Callable[[Notice], str], bool]]:
        settings = self._settings
        yield "command", self._run_command, bool(settings.command)
        yield "webhook", self._post_webhook, bool(settings.webhook)
        yield "apprise", self._send_by_apprise, bool(settings.apprise)

    def run(self, stop: threading.Event) -> None:
        """Send what is new until `stop`, and once more after it."""
        while not stop.wait(LOOK_SECONDS):
            self.send_new_events()
        self.send_new_events()

    def send_new_events(self) -> None:
        """Send what is new in the journal."""
        for event in self._read_new_events():
            if self._is_old(event):
                continue
            if event.notice in self._settings.on:
                self._send(event)

    def _is_old(self, event: Event) -> bool:
        """Return whether an event was sent already, or is from before this supervisor."""
        if self._last_seq is None:
            return event.seq <= 0 or event.time < self._since
        return event.seq <= self._last_seq

    def _read_new_events(self) -> list[Event]:
        try:
            with open_file(self._run.journal_path) as lines:
                lines.seek(self._offset)
                events, size = journal.parse(lines.read())
        except OSError:
            return []  # not there yet, or a file system that does not answer
        self._offset += size
        return events

    def _send(self, event: Event) -> None:
        self._last_seq = event.seq
        # A disk that takes no file must not stop the message that says so.
        with contextlib.suppress(OSError):
            self._run.write_notified(event.seq)
        notice = build_notice(event, run=self._run.name, path=str(self._run.path), host=self._host)
        for way, send in self._ways:
            began = time.monotonic()
            failure = clean_text(redact_secrets(self._try(send, notice), self._used_secrets), 300)
            self._record(
                Notified(
                    of=event.seq,
                    event=notice.event,
                    way=way,
                    ok=not failure,
                    reason=failure,
                    seconds=round(time.monotonic() - began, 3),
                )
            )

    @staticmethod
    def _try(send: Callable[[Notice], str], notice: Notice) -> str:
        """Return why a way failed, "" if it did not. No error of a service reaches the run."""
        try:
            return send(notice)
        except ConfigError as error:  # a secret that cannot be read
            return str(error)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    @property
    def _time_is_over(self) -> str:
        return f"not done after notify.seconds = {self._settings.seconds:g}"

    # -- the ways; each returns why it failed, "" if it did not

    def _read_secret(self, value: str | SecretRef, key: str) -> str:
        text = secret.read_secret(value, key)
        self._used_secrets.add(text)
        return text

    def _run_command(self, notice: Notice) -> str:
        command = self._settings.command
        environment = {**os.environ, **command_variables(notice)}
        if isinstance(command, (str, SecretRef)):
            # Every user of the machine can see a command line. Only the owner of a process can see
            # its environment.
            environment[_SCRIPT_VARIABLE] = self._read_secret(command, "notify.command")
            arguments = ["/bin/sh", "-c", _RUN_SCRIPT]
        else:
            arguments = [self._read_secret(word, "notify.command") for word in command]
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
                return self._time_is_over
        if process.returncode == 0:
            return ""
        last_line = errors.decode(errors="replace").strip().splitlines()[-1:] or [""]
        return f"exit code {process.returncode}: {last_line[0]}".rstrip(": ")

    def _post_webhook(self, notice: Notice) -> str:
        address = self._read_secret(self._settings.webhook, "notify.webhook")
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
        except OSError as error:  # the address is not repeated: for many services it is a secret
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                return self._time_is_over
            return str(getattr(reason, "strerror", None) or reason or type(error).__name__)

    def _send_by_apprise(self, notice: Notice) -> str:
        """Send on a thread, since a service may wait longer than notify.seconds."""
        outcome: list[str] = []
        addresses = [
            self._read_secret(one, f"notify.apprise[{index}]")
            for index, one in enumerate(self._settings.apprise)
        ]

        def send() -> None:
            try:
                outcome.append(_notify_by_apprise(notice, addresses))
            except Exception as error:
                outcome.append(f"{type(error).__name__}: {error}")

        thread = threading.Thread(target=send, name="apprise", daemon=True)
        thread.start()
        thread.join(self._settings.seconds)
        return outcome[0] if outcome else self._time_is_over


def _notify_by_apprise(notice: Notice, addresses: list[str]) -> str:
    """Send to every address; return why that failed, "" if it did not."""
    import apprise

    _silence_logger("apprise")  # it logs addresses
    services = apprise.Apprise()
    for url in addresses:
        services.add(url)
    choices = [f"{number}: {choice}" for number, choice in enumerate(notice.choices)]
    title = f"{notice.run}: {notice.event} at step {notice.step:,}"
    if services.notify(title=title, body="\n".join([notice.message, *choices])):
        return ""
    return "apprise did not deliver it to every address"


def _split_user(address: str) -> tuple[str, dict[str, str]]:
    """Return an address without USER:PASSWORD@, and the header that replaces it.

    urllib would take USER:PASSWORD for a part of the host name.
    """
    parts = urllib.parse.urlsplit(address)
    user, at, host = parts.netloc.rpartition("@")
    if not at:
        return address, {}
    code = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
    return parts._replace(netloc=host).geturl(), {"Authorization": f"Basic {code}"}


def _silence_logger(name: str) -> None:
    logger = logging.getLogger(name)
    logger.propagate = False
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())


def command_variables(notice: Notice) -> dict[str, str]:
    """Return the environment of `notify.command`.

    GUARDRAIL_RUN is not in it: that variable marks the processes of a run.
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
