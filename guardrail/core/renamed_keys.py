"""Configuration keys that have a new name. The old one is still read, with one notice.

A section lists the old names of its keys in `RENAMED`, and of their values in `RENAMED_VALUES`.
Old names hold in TOML, in --set, in dictionaries and as keyword arguments in Python.
"""

from __future__ import annotations

import functools
import re
import sys
import typing
from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec

from guardrail.core.errors import ConfigError

_noticed: set[str] = set()  # old names of which a notice was printed


class SectionType(msgspec.StructMeta):
    """Lets `Section(old_name=...)` set the key with the new name."""

    def __call__(cls, *args: Any, **given: Any) -> Any:
        renamed = getattr(cls, "RENAMED", {})
        values = getattr(cls, "RENAMED_VALUES", {})
        if not any(name in renamed or name in values for name in given):
            return super().__call__(*args, **given)
        schema = typing.cast(type[msgspec.Struct], cls)
        new = rename_keys(given, schema, path="", file="")
        return super().__call__(*args, **_make_sections(new, schema))


class Renamed(msgspec.Struct, metaclass=SectionType, frozen=True, kw_only=True):
    """Base of sections whose keys may have had other names.

    Attributes:
        RENAMED: old key -> new key, with dots where it is in a section below.
        RENAMED_VALUES: new key -> old value -> new value.
    """

    RENAMED: ClassVar[Mapping[str, str]] = {}
    RENAMED_VALUES: ClassVar[Mapping[str, Mapping[str, str]]] = {}

    if not typing.TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Return the value of an old name. Raises AttributeError."""
            new = type(self).RENAMED.get(name)
            if new is None:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            value = self
            for part in new.split("."):
                value = getattr(value, part)
            return value


def rename_keys(
    tree: Any, schema: type[msgspec.Struct], *, file: str, path: str = "", notice: bool = False
) -> Any:
    """Return the tree with the present name of each key and value.

    Args:
        path: of `tree` in the complete configuration, with a dot at its end.
        notice: print one line on stderr for each old name, once in a process.

    Raises:
        ConfigError: a key is given under both names.
    """
    if not isinstance(tree, Mapping):
        return tree
    renamed: Mapping[str, str] = getattr(schema, "RENAMED", {})
    words: Mapping[str, Mapping[str, str]] = getattr(schema, "RENAMED_VALUES", {})
    result: dict[Any, Any] = {}
    old_names = {}
    for key, value in tree.items():
        new = renamed.get(key, key) if isinstance(key, str) else key
        if new != key:
            old_names[new] = key
            if notice:
                shown = re.sub(r"\[\d+\]", "[]", path)  # one notice for all entries of a list
                print_notice(f"{shown}{key}", f"{shown}{new}")
            continue
        result[key] = value
    for new, key in old_names.items():
        _put(result, new.split("."), tree[key], key=f"{path}{key}", name=f"{path}{new}", file=file)
    for key, table in words.items():
        if key in result:
            result[key] = _present_value(result[key], table, f"{path}{key}", notice=notice)
    for key, section in _sections(schema).items():
        if key in result:
            result[key] = _below(
                result[key], section, file=file, path=f"{path}{key}", notice=notice
            )
    return result


def _present_value(value: Any, words: Mapping[str, str], key: str, *, notice: bool) -> Any:
    """Return a value, or each value of a list, under its present name."""
    if isinstance(value, (list, tuple)):
        return type(value)(_present_value(one, words, key, notice=notice) for one in value)
    if not isinstance(value, str) or value not in words:
        return value
    if notice:
        print_notice(f'{key} = "{value}"', f'"{words[value]}"')
    return words[value]


def _make_sections(tree: dict[str, Any], schema: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the values of a section, with each table in it as its section."""
    made = dict(tree)
    for name, section in _sections(schema).items():
        if isinstance(made.get(name), dict):
            made[name] = section(**_make_sections(made[name], section))
    return made


def _put(
    tree: dict[Any, Any], parts: list[str], value: Any, *, key: str, name: str, file: str
) -> None:
    """Set the value of an old key under its new name."""
    at = tree
    for part in parts[:-1]:
        inner = at.get(part, {})
        if not isinstance(inner, Mapping):
            raise ConfigError("a table", file=file, key=name.rpartition(".")[0], value=inner)
        at[part] = dict(inner)
        at = at[part]
    if parts[-1] in at:
        raise ConfigError(f"only one of {key} and {name}, its present name", file=file, key=key)
    at[parts[-1]] = value


def _below(value: Any, section: type[msgspec.Struct], *, file: str, path: str, notice: bool) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(
            rename_keys(one, section, file=file, path=f"{path}[{index}].", notice=notice)
            for index, one in enumerate(value)
        )
    return rename_keys(value, section, file=file, path=f"{path}.", notice=notice)


@functools.cache
def _sections(schema: type[msgspec.Struct]) -> dict[str, type[msgspec.Struct]]:
    """Return the keys of a schema whose values are sections, or lists of them.

    Cached: reading the hints of a schema is slow.
    """
    found: dict[str, type[msgspec.Struct]] = {}
    for name, annotation in typing.get_type_hints(schema).items():
        for section in (annotation, *typing.get_args(annotation)):
            if isinstance(section, type) and issubclass(section, Renamed):
                found[name] = section
    return found


def present_key(key: str, schema: type[msgspec.Struct]) -> str:
    """Return the present name of a dotted key such as "guard.persist".

    A key without another name is returned itself.
    """
    first, _, rest = key.partition(".")
    first = getattr(schema, "RENAMED", {}).get(first, first)
    if not rest:
        return str(first)
    section = _sections(schema).get(first.partition("[")[0])
    return f"{first}.{rest if section is None else present_key(rest, section)}"


def print_notice(old: str, new: str) -> None:
    """Print one line on stderr, once for each old name."""
    if old not in _noticed:
        _noticed.add(old)
        print(f"guardrail: {old} is now {new}", file=sys.stderr)
