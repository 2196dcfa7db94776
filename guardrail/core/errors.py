"""Every failure guardrail raises on purpose, and the exit code it becomes.

GuardrailError
├── UsageError                  2   the caller asked for something that cannot be
│   ├── ConfigError             2   names file, key, value, expectation and a hint
│   ├── DataError               2   no usable record in the data
│   └── RunDirectoryError       2   no such run, not a run, not yours, already running
├── Halted                      3   the guard ended the run
├── WorkersFailed               4   the training processes failed
│   └── DiskRefuses             4   the run directory cannot be written
├── CheckFailed                 5   verify or replay found a difference
│   └── CheckpointInvalid       5   manifest, size or hash of a checkpoint does not hold
└── Interrupted               130   a stop command, SIGTERM, SIGUSR1 or Ctrl-C
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import IntEnum

from guardrail.core.text import MASK, escape_text, hide_credentials, redact_secrets

# Settings whose value may be a secret: everything under [notify] but these two, and whatever is
# called like one, since a key may be misspelt or stand in the wrong section.
_PLAIN_NOTIFY = re.compile(r"notify\.(on|seconds)\b")
_SECRET_NAMES = re.compile(
    r"(^|\.)notify($|[.\[])|webhook|apprise|command|token(?!s\b|iz)|secret|password|api_?key|credential",
    re.IGNORECASE,
)
_ASSIGNMENT = re.compile(r"([\w.-]+)[ \t]*=[^\n]*")
# characters; a shorter text stands in too many words to be masked in a sentence
_SHORTEST_SECRET = 4
_LONGEST = {"file": 300, "key": 160, "value": 160, "expected": 600, "hint": 1000}


class ExitCode(IntEnum):
    """Exit codes of every guardrail command; the table stands in the README."""

    FINISHED = 0
    USAGE = 2
    HALTED = 3
    WORKERS_FAILED = 4
    CHECK_FAILED = 5
    INTERRUPTED = 130


class GuardrailError(Exception):
    """Base of the tree. `str(error)` is a complete sentence for a person."""

    exit_code = ExitCode.WORKERS_FAILED


class UsageError(GuardrailError):
    exit_code = ExitCode.USAGE


class ConfigError(UsageError):
    """A configuration that cannot start a run.

    Args:
        expected: what would have been right, as the end of "expected ...".
        file: the TOML file (or "--set") that holds the key.
        key: dotted key, e.g. "optim.lr".
        value: the offending value as written; masked in the message, also in its expectation and
            its hint, where the key may name a secret.
        hint: one more line: the nearest valid key, a way out.

    Text from outside stands in the message escaped and cut.
    """

    def __init__(
        self, expected: str, *, file: str = "", key: str = "", value: object = None, hint: str = ""
    ) -> None:
        secrets = _secrets(key, value)
        expected, hint = redact_secrets(expected, secrets), redact_secrets(hint, secrets)
        self.expected, self.file, self.key, self.value, self.hint = expected, file, key, value, hint
        shown_key = hide_credentials(escape_text(key, _LONGEST["key"]))
        shown_file = hide_assignments(escape_text(file, _LONGEST["file"]))
        place = ": ".join(part for part in (shown_file, shown_key) if part)
        shown = f" = {_shown(key, value)}" if value is not None else ""
        expected = hide_credentials(escape_text(expected, _LONGEST["expected"]))
        message = f"{place}{shown}: expected {expected}" if place else f"expected {expected}"
        hint = hide_credentials(escape_text(hint, _LONGEST["hint"]))
        super().__init__(f"{message}\n  hint: {hint}" if hint else message)

    def at(self, file: str) -> ConfigError:
        """The same error, of another file."""
        return ConfigError(self.expected, file=file, key=self.key, value=self.value, hint=self.hint)


def _shown(key: str, value: object) -> str:
    """A value for a message: one line, escaped, cut, and never a secret."""
    try:
        text = _repr(key, value)
    except Exception:  # of an object that somebody else wrote
        text = f"<{type(value).__name__}>"
    return hide_credentials(escape_text(text, _LONGEST["value"]))


def _repr(key: str, value: object) -> str:
    """`repr`, with a mask for what may be a secret: a table may hold one under a name of its
    own.
    """
    if may_be_secret(key) and not isinstance(value, (bool, int, float)):
        return MASK
    if type(value) is dict:
        return (
            "{"
            + ", ".join(f"{name!r}: {_repr(f'{key}.{name}', one)}" for name, one in value.items())
            + "}"
        )
    if type(value) is list:
        return "[" + ", ".join(_repr(key, one) for one in value) + "]"
    return repr(value)


def _secrets(key: str, value: object) -> list[str]:
    """The texts in a value that may be secrets."""
    try:
        return list(_walk(key, value))
    except RecursionError:  # a list within itself, given in Python
        return []


def _walk(key: str, value: object) -> Iterator[str]:
    if type(value) is dict:
        for name, one in value.items():
            yield from _walk(f"{key}.{name}", one)
    elif type(value) is list:
        for one in value:
            yield from _walk(key, one)
    elif isinstance(value, str) and len(value) >= _SHORTEST_SECRET and may_be_secret(key):
        yield value


def may_be_secret(key: str) -> bool:
    """Whether the value of a configuration key must not be repeated in a message."""
    return bool(_SECRET_NAMES.search(key)) and not _PLAIN_NOTIFY.match(key)


def hide_assignments(text: str) -> str:
    """Text in which what follows KEY= is masked, to the end of its line, where the key may name a
    secret.
    """
    return _ASSIGNMENT.sub(
        lambda found: f"{found[1]}={MASK}" if may_be_secret(found[1]) else found[0], text
    )


class DataError(UsageError):
    pass


class RunDirectoryError(UsageError):
    pass


class Halted(GuardrailError):
    exit_code = ExitCode.HALTED


class WorkersFailed(GuardrailError):
    exit_code = ExitCode.WORKERS_FAILED


class DiskRefuses(WorkersFailed):
    """A run directory into which nothing can be written, at a moment when a run needs it.

    Args:
        path: of the run directory.
        why: what the system says, such as "No space left on device".
    """

    def __init__(self, path: object, why: str) -> None:
        super().__init__(
            f"{path} cannot be written: {why}. Free the disk, then: guardrail launch --resume {path}"
        )


class CheckFailed(GuardrailError):
    exit_code = ExitCode.CHECK_FAILED


class CheckpointInvalid(CheckFailed):
    """A checkpoint whose manifest, file sizes or hashes do not hold; it is never loaded."""


class Interrupted(GuardrailError):
    exit_code = ExitCode.INTERRUPTED
