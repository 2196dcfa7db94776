"""A tree of plain values -> typed settings, with messages that say which key is wrong and what would be right.

msgspec checks types and ranges; this file checks names first and puts msgspec's findings into words.
"""

from __future__ import annotations

import difflib
import enum
import math
import re
import typing
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec

from guardrail.errors import ConfigError

StructT = TypeVar("StructT", bound=msgspec.Struct)

# What a TOML value is called, by msgspec's name of its type.
_WORDS = {
    "object": "a table",
    "array": "a list",
    "str": "a string",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "datetime": "a date",
    "date": "a date",
    "time": "a time of day",
}


def typed(tree: dict[str, Any], schema: type[StructT], *, file: str) -> StructT:
    """Names first (with the nearest valid one), then types and ranges. Raises ConfigError."""
    _refuse_unknown(tree, schema, file=file, path="", root=schema)
    _refuse_infinite(tree, file=file, path="")
    try:
        return msgspec.convert(tree, schema)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at ")
        key = where.strip("`").removeprefix("$").removeprefix(".")
        if missing := re.search(r"missing required field `(\w+)`", message):
            key = f"{key}.{missing[1]}" if key else missing[1]
        choices = _choices(_annotation(schema, key))
        value = _value_at(tree, key)
        if missing:
            expected = _one_of(choices) if choices else "a value"
        elif choices:
            expected = _one_of(choices)
        else:
            expected = _in_words(message)
        raise ConfigError(expected, file=file, key=key, value=value, hint=_hint(choices, value, expected)) from error


def _in_words(message: str) -> str:
    """msgspec's "Expected `int`, got `str`" as "a whole number, got a string"."""
    text = re.sub(r"^[Ee]xpected\s+", "", message)
    text = re.sub(r"`([^`]+)`", lambda name: _WORDS.get(name[1], name[1]), text)
    text = text.replace("got a number", "got one with a fraction").replace("got true or false", "got a truth value")
    return re.sub(r"of length >= (\d+)", r"with at least \1 entry", text)


def _one_of(choices: list[str]) -> str:
    return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} or {choices[-1]}"


def _hint(choices: list[str], value: Any, expected: str) -> str:
    if choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        return f"did you mean {close[0]!r}?" if close and isinstance(value, str) else ""
    if expected.startswith("a list") and isinstance(value, str):
        return f'a list of one: ["{value}"]'
    if expected.startswith("a list") and expected.endswith("a table"):
        return "double brackets begin an entry of a list: [[...]]"
    return ""


# -- names


def _refuse_unknown(
    tree: Any, schema: type[msgspec.Struct], *, file: str, path: str, root: type[msgspec.Struct]
) -> None:
    if not isinstance(tree, dict):
        return
    names = _fields(schema)
    for key, value in tree.items():
        if key not in names:
            shown = None if isinstance(value, dict) else value
            hint = _nearest_key(key, schema, path=path, root=root)
            raise ConfigError("a known key", file=file, key=f"{path}{key}", value=shown, hint=hint)
        for struct in _structs_in(names[key]):
            if isinstance(value, list):
                for index, item in enumerate(value):
                    _refuse_unknown(item, struct, file=file, path=f"{path}{key}[{index}].", root=root)
            else:
                _refuse_unknown(value, struct, file=file, path=f"{path}{key}.", root=root)


def _nearest_key(key: str, schema: type[msgspec.Struct], *, path: str, root: type[msgspec.Struct]) -> str:
    """A key of the same table that is nearly this one; else the table to which it belongs; else all that are valid."""
    names = list(_fields(schema))
    close = difflib.get_close_matches(key, names, n=1)
    if close:
        return f"did you mean {path}{close[0]}?"
    elsewhere = [
        f"{table}.{name}"
        for table, annotation in _fields(root).items()
        for struct in _structs_in(annotation)
        for name in _fields(struct)
        if name == key
    ]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    return f"valid keys: {', '.join(sorted(names))}"


def _fields(schema: type[msgspec.Struct]) -> dict[str, Any]:
    hints = typing.get_type_hints(schema, include_extras=True)
    return {field.encode_name: hints[field.name] for field in msgspec.structs.fields(schema)}


def _structs_in(annotation: Any) -> Iterator[type[msgspec.Struct]]:
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _structs_in(argument)


# -- values


def _refuse_infinite(tree: Any, *, file: str, path: str) -> None:
    """TOML knows `inf` and `nan`; no setting means anything with them, and ranges let `inf` pass."""
    if isinstance(tree, float) and not math.isfinite(tree):
        raise ConfigError("a finite number", file=file, key=path, value=tree)
    if isinstance(tree, dict):
        for key, value in tree.items():
            _refuse_infinite(value, file=file, path=f"{path}.{key}" if path else key)
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            _refuse_infinite(value, file=file, path=f"{path}[{index}]")


def _parts(key: str) -> list[str]:
    """ "faults[0].kind" -> ["faults", "0", "kind"]."""
    return re.findall(r"[^.\[\]]+", key)


def _annotation(schema: type[msgspec.Struct], key: str) -> Any:
    """The annotation that the value at `key` must satisfy."""
    annotation: Any = schema
    for part in _parts(key):
        struct = next(_structs_in(annotation), None)
        if struct is not None and part in (fields := _fields(struct)):
            annotation = fields[part]
    return annotation


def _choices(annotation: Any) -> list[str]:
    """The values of a Literal or an Enum; empty for anything else."""
    if typing.get_origin(annotation) is typing.Literal:
        return [str(value) for value in typing.get_args(annotation)]
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return [str(member.value) for member in annotation]
    return []


def _value_at(tree: Any, key: str) -> Any:
    for part in _parts(key):
        try:
            tree = tree[int(part)] if isinstance(tree, list) else tree[part]
        except (KeyError, IndexError, ValueError, TypeError):
            return None
    return tree if not isinstance(tree, dict) else None
