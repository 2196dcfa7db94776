"""The resolved configuration of a run, line by line, with what differs from the defaults."""

from __future__ import annotations

import importlib
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from guardrail.core.config import GuardConfig
from guardrail.core.format import clean_and_shorten
from guardrail.core.renamed_keys import present_key

# The package whose defaults are known. A package that a run directory names is never imported.
TRAINER = "trainer"
_MAX_LINES = 2000
_MAX_DEPTH = 8  # of tables


@dataclass(frozen=True)
class ConfigLine:
    """One line.

    Attributes:
        default: "" where the value is the default.
        known: False where the default is not known.
    """

    section: str
    key: str
    value: str
    default: str = ""
    differs: bool = False
    known: bool = True


def read_config_lines(text: str) -> tuple[ConfigLine, ...]:
    """Return the lines of a config.toml; a text that is no TOML is shown as it is. Never raises."""
    try:
        tree = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError):
        lines = text.splitlines()[:_MAX_LINES]
        return tuple(_plain_line(line) for line in lines if line.strip())
    launch = tree.get("launch")
    package = launch.get("trainer", TRAINER) if isinstance(launch, dict) else TRAINER
    schema = _find_schema(with_trainer=package == TRAINER)
    defaults = _find_defaults(schema)
    found = []
    for path, value in _iterate_values(tree, ()):
        present = path
        if path not in defaults:  # a run of an older version has older names
            present = tuple(present_key(".".join(path), schema).split("."))
        found.append(_line_of(path, value, defaults.get(present, msgspec.NODEFAULT)))
        if len(found) >= _MAX_LINES:
            break
    return tuple(found)


def _plain_line(line: str) -> ConfigLine:
    return ConfigLine("", "", clean_and_shorten(line, 200), known=False)


def _line_of(path: tuple[str, ...], value: Any, default: Any) -> ConfigLine:
    known = default is not msgspec.NODEFAULT
    differs = known and not _is_default(value, default)
    return ConfigLine(
        section=clean_and_shorten(".".join(path[:-1]), 60),
        key=clean_and_shorten(path[-1], 60),
        value=_format_value(value),
        default=_format_value(default) if differs else "",
        differs=differs,
        known=known,
    )


def _iterate_values(
    tree: dict[str, Any], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield (path, value); plain values come before tables, as in TOML."""
    for name, value in sorted(tree.items(), key=lambda item: isinstance(item[1], dict)):
        if isinstance(value, dict) and value and len(path) < _MAX_DEPTH:
            yield from _iterate_values(value, (*path, name))
        else:
            yield (*path, name), value


def _find_schema(*, with_trainer: bool) -> type[GuardConfig]:
    """Return the schema of the trainer, or the part of it that guardrail knows."""
    if not with_trainer:
        return GuardConfig
    try:
        schema: type[GuardConfig] = importlib.import_module(f"{TRAINER}.config").Config
    except (ImportError, AttributeError):
        return GuardConfig
    return schema


def _find_defaults(schema: type[GuardConfig]) -> dict[tuple[str, ...], Any]:
    """Return path of a key -> default, of each section that can be made without arguments."""
    found: dict[tuple[str, ...], Any] = {}
    for field in msgspec.structs.fields(schema):
        made = _make_default(field)
        if made is not msgspec.NODEFAULT:
            found.update(_iterate_values({field.encode_name: msgspec.to_builtins(made)}, ()))
    return found


def _make_default(field: Any) -> Any:
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    if field.default is not msgspec.NODEFAULT:
        return field.default
    try:
        return field.type()  # a required section, all of whose keys have defaults
    except TypeError:
        return msgspec.NODEFAULT


def _is_default(value: Any, default: Any) -> bool:
    if isinstance(default, list | tuple):
        return value == default or list(default) == value
    return bool(value == default)


def _format_value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = value if isinstance(value, str) else repr(value)
    return clean_and_shorten(text, 200) or '""'
