"""TOML files: read one as a tree of plain values, write settings as one."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import msgspec

from guardrail.core.errors import ConfigError
from guardrail.core.files import open_file
from guardrail.core.secret import mask_secrets

MAX_FILE_BYTES = 4 << 20  # of a configuration; a complete one has 5 KiB


def read_toml(file: Path, *, of_run: bool = False) -> dict[str, Any]:
    """Return a TOML file as a tree of plain values.

    Args:
        of_run: the file belongs to a run directory and must be a regular file. Any other one may be
            a pipe, as in `guardrail launch <(make_config)`.

    Raises:
        ConfigError: the file cannot be read, is too large, or is not TOML.
    """
    try:
        with open_file(file) if of_run else open(file, "rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
        text = content.decode("utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or an impossible file name
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"a readable TOML file ({reason})", file=str(file)) from error
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"a TOML file of at most {MAX_FILE_BYTES >> 20} MiB", file=str(file))
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ConfigError(
            "valid TOML (too many brackets within each other)", file=str(file)
        ) from error
    except ValueError as error:
        raise ConfigError(f"valid TOML ({_syntax_problem(error)})", file=str(file)) from error


def _syntax_problem(error: ValueError) -> str:
    """Return what tomllib reports.

    For a number with thousands of digits the interpreter's own error comes instead. It names a
    setting of the interpreter, so it is replaced.
    """
    if isinstance(error, tomllib.TOMLDecodeError):
        return str(error)
    return "a number with too many digits"


def dump_toml(settings: msgspec.Struct) -> str:
    """Return the complete configuration as TOML that starts the same run again.

    Secrets that are written out are masked.
    """
    import tomli_w

    return tomli_w.dumps(mask_secrets(_drop_none(msgspec.to_builtins(settings))))


def _drop_none(value: Any) -> Any:
    """Return plain values without the keys that are None: TOML has no null."""
    if isinstance(value, dict):
        return {key: _drop_none(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_drop_none(one) for one in value]
    return value
