"""Secrets of a configuration: references to them, reading and masking.

A secret is `{ env = "NAME" }` or `{ file = "PATH" }`. It is read when it is used. The configuration
may also contain the secret itself. It is then masked in every copy of the configuration, and
reaches the process that uses it through a pipe.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from guardrail.core.errors import ConfigError, may_be_secret
from guardrail.core.text import MASK

KEYS = ("command", "webhook", "apprise")  # of [notify]
EXPECTED = 'a string, { env = "NAME" } or { file = "PATH" }'
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LARGEST_FILE = 1 << 16
_USER_INFO = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/@\s]+@", re.IGNORECASE)


class SecretRef(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """Names an environment variable or a file that holds a secret. A last line end is removed."""

    env: str = ""
    file: str = ""

    def check(self, key: str) -> None:
        """Refuse an empty or invalid reference. Raises ConfigError."""
        if bool(self.env) == bool(self.file):
            raise ConfigError('either { env = "NAME" } or { file = "PATH" }', key=key)
        if self.env and not _NAME.fullmatch(self.env):
            raise ConfigError(
                "the name of an environment variable: letters, digits, _", key=f"{key}.env"
            )

    def read(self, key: str) -> str:
        """Return the secret.

        Raises:
            ConfigError: names the variable or the file, never its content.
        """
        if self.env:
            value = os.environ.get(self.env, "")
            if not value:
                raise ConfigError(
                    f"the environment variable {self.env} to be set", key=f"{key}.env"
                )
            return value
        try:
            with open(self.file, "rb") as file:
                content = file.read(_LARGEST_FILE + 1)
            value = content.decode("utf-8").rstrip("\r\n")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise ConfigError(
                f"a readable file ({self.file}: {reason})", key=f"{key}.file"
            ) from error
        if not value or len(content) > _LARGEST_FILE:
            raise ConfigError(
                f"a file of 1 to {_LARGEST_FILE} bytes ({self.file})", key=f"{key}.file"
            )
        return value


def read_secret(value: str | SecretRef, key: str) -> str:
    """Return a secret that is written out or referred to. Raises ConfigError."""
    return value.read(key) if isinstance(value, SecretRef) else value


# -- masking


def mask_secrets(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parsed configuration with masks for the secrets of [notify] that are written out."""
    notify = tree.get("notify")
    if not isinstance(notify, Mapping):
        return dict(tree)
    hidden = dict(notify)
    for name in hidden.keys() - {"on", "seconds"}:
        hidden[name] = _mask_text(hidden[name])
    if isinstance(hidden.get("command"), list):
        hidden["command"] = MASK
    return {**tree, "notify": hidden}


def _mask_text(value: Any) -> Any:
    """Return a value with all text masked, but for the names in references."""
    if isinstance(value, str):
        return MASK if value else value
    if isinstance(value, (list, tuple)):
        return [_mask_text(one) for one in value]
    if isinstance(value, Mapping):
        masked = dict(value)
        for name in masked.keys() - {"env", "file"}:
            masked[name] = _mask_text(masked[name])
        return masked
    return value


def mask_text(text: str, *, display: bool = False) -> str:
    """Return the text of a configuration file without secrets; the same text where it has none.

    Args:
        display: for a screen: also mask keys of other sections that are named like secrets, and
            passwords in addresses.
    """
    import tomllib

    try:
        tree = tomllib.loads(text)
    except (ValueError, RecursionError):
        return "\n".join(_mask_line(line) for line in text.split("\n"))
    hidden = mask_secrets(tree)
    if display:
        hidden = _mask_by_name(hidden, "")
    if hidden == tree:
        return text
    import tomli_w

    return tomli_w.dumps(hidden)


def _mask_by_name(value: Any, path: str) -> Any:
    if isinstance(value, dict):
        prefix = f"{path}." if path else ""
        return {name: _mask_by_name(one, f"{prefix}{name}") for name, one in value.items()}
    if path.startswith("notify."):
        return value  # masked already; the rest names a variable or a file
    if isinstance(value, list):
        return [_mask_by_name(one, path) for one in value]
    if not isinstance(value, str) or not value:
        return value
    return MASK if may_be_secret(path) else _USER_INFO.sub(rf"\g<1>{MASK}@", value)


def _mask_line(line: str) -> str:
    """Return a line of a file that is not TOML, with a mask for what may be a secret."""
    key = line.partition("=")[0]
    if may_be_secret(key) or "://" in line:
        return f"{key}= {MASK}" if "=" in line and "://" not in key else MASK
    return line


# -- secrets that are written out


def find_written_secrets(notify: msgspec.Struct) -> dict[str, Any]:
    """Return the secrets that a [notify] section holds itself.

    The process that uses them must be given them: its copy of the configuration has masks.
    """
    found = {}
    for name in KEYS:
        value = msgspec.to_builtins(getattr(notify, name))
        if _has_text(value) and not is_masked(value):
            found[name] = value
    return found


def is_masked(value: Any) -> bool:
    """Return whether a value was a secret and is masked."""
    return value == MASK or (isinstance(value, (list, tuple)) and MASK in value)


def _has_text(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(isinstance(one, str) for one in value)
    return isinstance(value, str) and bool(value)


def find_missing_secrets(notify: Mapping[str, Any]) -> list[str]:
    """Return the keys of [notify] whose secret is masked and was not given again."""
    return [f"notify.{name}" for name in KEYS if is_masked(notify.get(name))]


def restore_secrets(notify: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a [notify] table with the secrets that were given, and without the masked ones."""
    known = {name: value for name, value in given.items() if name in KEYS}
    return {name: value for name, value in {**notify, **known}.items() if not is_masked(value)}
