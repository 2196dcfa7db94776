"""The exceptions of guardrail, and their exit codes.

GuardrailError
├── UsageError                  2   the request is impossible
│   ├── ConfigError             2   names file, key, value, expectation and a hint
│   ├── DataError               2   no usable record in the data
│   └── RunDirectoryError       2   no such run, no run directory, another owner, running
├── Halted                      3   the guard ended the run
├── WorkersFailed               4   the training processes failed
│   └── DiskRefuses             4   the run directory cannot be written
├── CheckFailed                 5   verify or replay found a difference
│   └── CheckpointInvalid       5   manifest, size or hash of a checkpoint is wrong
└── Interrupted               130   a stop command, SIGTERM, SIGUSR1 or Ctrl-C
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import IntEnum

from guardrail.core.text import MASK, escape_text, hide_credentials, redact_secrets

# Keys whose value may be a secret: all under [notify] except these two, and keys with such a name
# in other sections. A key may be misspelt or in the wrong section.
_PLAIN_NOTIFY = re.compile(r"notify\.(on|seconds)\b")
_SECRET_NAMES = re.compile(
    r"(^|\.)notify($|[.\[])|webhook|apprise|command|token(?!s\b|iz)|secret|password|api_?key|credential",
    re.IGNORECASE,
)
_ASSIGNMENT = re.compile(r"([\w.-]+)[ \t]*=[^\n]*")
# Characters. A shorter text occurs in too many words to be masked in a sentence.
_SHORTEST_SECRET = 4
_LONGEST = {"file": 300, "key": 160, "value": 160, "expected": 600, "hint": 1000}


class ExitCode(IntEnum):
    """Exit codes of every guardrail command."""

    FINISHED = 0
    USAGE = 2
    HALTED = 3
    WORKERS_FAILED = 4
    CHECK_FAILED = 5
    INTERRUPTED = 130


class GuardrailError(Exception):
    """Base of all. `str(error)` is a complete sentence for a user.

    Args:
        message: the sentence. It may be worded anew in any version.
        kind: what is wrong, in one or two words that stay, such as "no_such_run". Code and tests
            compare it, not the sentence.
    """

    exit_code = ExitCode.WORKERS_FAILED

    def __init__(self, message: str = "", *, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class UsageError(GuardrailError):
    exit_code = ExitCode.USAGE


class ConfigError(UsageError):
    """A configuration that cannot start a run.

    Args:
        expected: what the value must be, as the end of "expected ...".
        file: the TOML file (or "--set") that holds the key.
        key: dotted key, e.g. "optim.lr".
        value: the wrong value as written. Where the key may name a secret, the message masks it,
            also in `expected` and `hint`.
        hint: one more line: the nearest valid key, or what to do.

    The message escapes and shortens outside text.
    """

    def __init__(
        self, expected: str, *, file: str = "", key: str = "", value: object = None, hint: str = ""
    ) -> None:
        secrets = _find_secrets(key, value)
        expected, hint = redact_secrets(expected, secrets), redact_secrets(hint, secrets)
        self.expected, self.file, self.key, self.value, self.hint = expected, file, key, value, hint
        shown_key = hide_credentials(escape_text(key, _LONGEST["key"]))
        shown_file = hide_assignments(escape_text(file, _LONGEST["file"]))
        place = ": ".join(part for part in (shown_file, shown_key) if part)
        if value is not None:
            place += f" = {_format_value(key, value)}"
        message = f"expected {hide_credentials(escape_text(expected, _LONGEST['expected']))}"
        if place:
            message = f"{place}: {message}"
        if hint:
            message += f"\n  hint: {hide_credentials(escape_text(hint, _LONGEST['hint']))}"
        super().__init__(message)

    def at(self, file: str) -> ConfigError:
        """Return the same error with another file."""
        return ConfigError(self.expected, file=file, key=self.key, value=self.value, hint=self.hint)


def _format_value(key: str, value: object) -> str:
    """Return a value for a message: one line, escaped, shortened, and never a secret."""
    try:
        text = _repr(key, value)
    except Exception:  # of an object from outside
        text = f"<{type(value).__name__}>"
    return hide_credentials(escape_text(text, _LONGEST["value"]))


def _repr(key: str, value: object) -> str:
    """Return `repr` with masks for what may be a secret, also inside tables and lists."""
    if may_be_secret(key) and not isinstance(value, (bool, int, float)):
        return MASK
    if type(value) is dict:
        entries = [f"{name!r}: {_repr(f'{key}.{name}', one)}" for name, one in value.items()]
        return "{" + ", ".join(entries) + "}"
    if type(value) is list:
        return "[" + ", ".join(_repr(key, one) for one in value) + "]"
    return repr(value)


def _find_secrets(key: str, value: object) -> list[str]:
    """Return the texts in a value that may be secrets."""
    try:
        return list(_walk_secrets(key, value))
    except RecursionError:  # a list within itself, given in Python
        return []


def _walk_secrets(key: str, value: object) -> Iterator[str]:
    if type(value) is dict:
        for name, one in value.items():
            yield from _walk_secrets(f"{key}.{name}", one)
    elif type(value) is list:
        for one in value:
            yield from _walk_secrets(key, one)
    elif isinstance(value, str) and len(value) >= _SHORTEST_SECRET and may_be_secret(key):
        yield value


def may_be_secret(key: str) -> bool:
    """Return whether a message must not repeat the value of this configuration key."""
    return bool(_SECRET_NAMES.search(key)) and not _PLAIN_NOTIFY.match(key)


def hide_assignments(text: str) -> str:
    """Return text in which the rest of the line after KEY= is masked if KEY may name a secret."""

    def mask(found: re.Match[str]) -> str:
        return f"{found[1]}={MASK}" if may_be_secret(found[1]) else found[0]

    return _ASSIGNMENT.sub(mask, text)


class DataError(UsageError):
    pass


class RunDirectoryError(UsageError):
    pass


class Halted(GuardrailError):
    exit_code = ExitCode.HALTED


class WorkersFailed(GuardrailError):
    exit_code = ExitCode.WORKERS_FAILED


class DiskRefuses(WorkersFailed):
    """A run directory that takes no file when a run needs it.

    Args:
        path: of the run directory.
        why: the error of the system, such as "No space left on device".
    """

    def __init__(self, path: object, why: str) -> None:
        super().__init__(
            f"{path} cannot be written: {why}. "
            f"Free disk space, then: guardrail launch --resume {path}"
        )


class CheckFailed(GuardrailError):
    exit_code = ExitCode.CHECK_FAILED


class CheckpointInvalid(CheckFailed):
    """A checkpoint with a wrong manifest, file size or hash. It is never loaded."""


class Interrupted(GuardrailError):
    exit_code = ExitCode.INTERRUPTED
