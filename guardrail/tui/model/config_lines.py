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

TRAINER = "trainer"  # whose defaults are known; nothing that a run directory names is imported
_MAX_LINES = 2000


@dataclass(frozen=True)
class ConfigLine:
    """One line. `default` is "" where it is the same, and `known` False where nobody can say."""

    section: str
    key: str
    value: str
    default: str = ""
    differs: bool = False
    known: bool = True


def read_config_lines(text: str) -> tuple[ConfigLine, ...]:
    """The lines of a config.toml; one that is no TOML is shown as it stands. Never raises."""
    try:
        tree = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError):
        lines = text.splitlines()[:_MAX_LINES]
        return tuple(
            ConfigLine("", "", clean_and_shorten(line, 200), known=False)
            for line in lines
            if line.strip()
        )
    launch = tree.get("launch")
    package = launch.get("trainer", TRAINER) if isinstance(launch, dict) else TRAINER
    schema = _schema(with_trainer=package == TRAINER)
    defaults = _defaults(schema)
    found = []
    for path, value in _leaves(tree, ()):
        section, key = ".".join(path[:-1]), path[-1]
        present = path
        if path not in defaults:  # a run of an older version has older names
            present = tuple(present_key(".".join(path), schema).split("."))
        known = present in defaults
        differs = known and not _same(value, defaults[present])
        default = _shown(defaults[present]) if differs else ""
        found.append(
            ConfigLine(
                clean_and_shorten(section, 60),
                clean_and_shorten(key, 60),
                _shown(value),
                default,
                differs,
                known,
            )
        )
        if len(found) >= _MAX_LINES:
            break
    return tuple(found)


def _leaves(tree: dict[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Plain values first, then tables, as TOML wants them."""
    for name, value in sorted(tree.items(), key=lambda item: isinstance(item[1], dict)):
        if isinstance(value, dict) and value and len(path) < 8:
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _schema(*, with_trainer: bool) -> type[GuardConfig]:
    """Return the schema of the trainer, or the part of it that guardrail knows."""
    if not with_trainer:
        return GuardConfig
    try:
        schema: type[GuardConfig] = importlib.import_module(f"{TRAINER}.config").Config
    except (ImportError, AttributeError):
        return GuardConfig
    return schema


def _defaults(schema: type[GuardConfig]) -> dict[tuple[str, ...], Any]:
    """Return path of a key -> default, of every section that can be made without an argument."""
    found: dict[tuple[str, ...], Any] = {}
    for field in msgspec.structs.fields(schema):
        made = _made(field)
        if made is not msgspec.NODEFAULT:
            found.update(_leaves({field.encode_name: msgspec.to_builtins(made)}, ()))
    return found


def _made(field: Any) -> Any:
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    if field.default is not msgspec.NODEFAULT:
        return field.default
    try:
        return field.type()  # a section that must be given, all of whose keys have defaults
    except TypeError:
        return msgspec.NODEFAULT


def _same(value: Any, default: Any) -> bool:
    return value == default or (isinstance(default, list | tuple) and list(default) == value)


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    return clean_and_shorten(value if isinstance(value, str) else repr(value), 200) or '""'
