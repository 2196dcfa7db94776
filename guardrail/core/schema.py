"""A tree of plain values -> typed settings. A message names the wrong key and what it must be.

This file checks names, then msgspec checks types and ranges, and this file words its findings.
"""

from __future__ import annotations

import difflib
import enum
import math
import numbers
import os
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import msgspec

from guardrail.core.errors import ConfigError, may_be_secret
from guardrail.core.secret import EXPECTED as EXPECTED_SECRET
from guardrail.core.secret import SecretRef

StructT = TypeVar("StructT", bound=msgspec.Struct)

MAX_DEPTH = 24  # tables and lists within each other; the schemas need four
_LARGEST = 2**63 - 1  # of a whole number: what TOML, JSON and a journal line can hold

# msgspec's name of a type -> its name in a message.
_WORDS = {
    "object": "a table",
    "array": "a list",
    "str": "a string",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "null": "nothing",
    "datetime": "a date",
    "date": "a date",
    "time": "a time of day",
}


def to_plain_tree(value: Any, depth: int = 0) -> Any:
    """Return settings built in Python as the plain values that TOML would give, for `typed`.

    Sections become dictionaries, enumerations their values, tuples lists, paths text, numbers of
    numpy plain numbers. What TOML cannot hold stays as it is, and `typed` refuses it by its key.
    """
    if depth > MAX_DEPTH:
        return value  # `typed` names the key
    if isinstance(value, msgspec.Struct):
        fields = zip(value.__struct_encode_fields__, value.__struct_fields__, strict=True)
        return {name: to_plain_tree(getattr(value, field), depth + 1) for name, field in fields}
    if isinstance(value, Mapping):
        return {key: to_plain_tree(one, depth + 1) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain_tree(one, depth + 1) for one in value]
    if isinstance(value, enum.Enum):
        return to_plain_tree(value.value, depth + 1)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return _plain_number(value)


def _plain_number(value: Any) -> Any:
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return value.item()
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def convert_tree(tree: dict[str, Any], schema: type[StructT], *, file: str) -> StructT:
    """Return typed settings. Checks names (with the nearest valid one), then types and ranges.

    Args:
        tree: with the present name of each key (`rename_keys`).

    Raises:
        ConfigError: names key, value and expectation.
    """
    if not isinstance(tree, dict):
        raise ConfigError("a table of sections", file=file, value=tree)
    refuse_deep(tree, file=file)
    _refuse_unknown(tree, schema, file=file, path="", root=schema)
    _refuse_unusable(tree, file=file, path="")
    try:
        return msgspec.convert(tree, schema)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at ")
        key = where.strip("`").removeprefix("$").removeprefix(".")
        if missing := re.search(r"missing required field `(\w+)`", message):
            key = f"{key}.{missing[1]}" if key else missing[1]
        wanted = _annotation(schema, key)
        choices = _choices(wanted)
        value = _value_at(tree, key)
        if choices:
            expected = _join_choices(choices)
        elif missing:
            expected = "a value"
        elif typing.get_origin(wanted) is not tuple and SecretRef in _structs_in(wanted):
            expected = EXPECTED_SECRET
        else:
            expected = _in_words(message)
        hint = _hint(choices, key, value, expected)
        raise ConfigError(expected, file=file, key=key, value=value, hint=hint) from error


def _in_words(message: str) -> str:
    """Return "a whole number, got a string" for msgspec's "Expected `int`, got `str`"."""
    text = re.sub(r"^[Ee]xpected\s+", "", message)
    text = re.sub(r"`([^`]+)`", lambda name: _WORDS.get(name[1], name[1]), text)
    text = text.replace("got a number", "got one with a fraction").replace(
        "got true or false", "got a truth value"
    )
    return re.sub(r"of length >= (\d+)", r"with at least \1 entry", text)


def _join_choices(choices: list[str]) -> str:
    """Return "a", or "a, b or c"."""
    *others, last = choices
    return f"{', '.join(others)} or {last}" if others else last


def _hint(choices: list[str], key: str, value: Any, expected: str) -> str:
    if choices:
        if not isinstance(value, str):
            return ""
        close = difflib.get_close_matches(value, choices, n=1)
        return f"did you mean {close[0]!r}?" if close else ""
    if expected.startswith("a list") and isinstance(value, str):
        shown = "..." if may_be_secret(key) else value
        return f'a list of one: ["{shown}"]'
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
    for given, value in tree.items():
        key = str(given)
        if key not in names:
            shown = _shorten_value(value)
            hint = _nearest_key(key, schema, path=path, root=root)
            raise ConfigError("a known key", file=file, key=f"{path}{key}", value=shown, hint=hint)
        for struct in _structs_in(names[key]):
            if isinstance(value, list):
                for index, item in enumerate(value):
                    _refuse_unknown(
                        item, struct, file=file, path=f"{path}{key}[{index}].", root=root
                    )
            else:
                _refuse_unknown(value, struct, file=file, path=f"{path}{key}.", root=root)


def _nearest_key(
    key: str, schema: type[msgspec.Struct], *, path: str, root: type[msgspec.Struct]
) -> str:
    """Return a hint: a similar key of the same table, else the key in another table, else all valid
    keys of this table.
    """
    names = list(_fields(schema))
    old_names: Mapping[str, str] = getattr(schema, "RENAMED", {})
    close = difflib.get_close_matches(key, [*names, *old_names], n=1)
    if close:
        return f"did you mean {path}{old_names.get(close[0], close[0])}?"
    elsewhere = []
    for table, annotation in _fields(root).items():
        for struct in _structs_in(annotation):
            present: dict[str, str] = {name: name for name in _fields(struct)}
            present |= getattr(struct, "RENAMED", {})
            if key in present:
                elsewhere.append(f"{table}.{present[key]}")
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


def refuse_deep(tree: Any, *, file: str) -> None:
    """Refuse more than MAX_DEPTH levels: later steps walk the tree by recursion.

    Raises:
        ConfigError: the tree has too many levels.
    """
    level: list[tuple[str, Any]] = [("", tree)]
    for _ in range(MAX_DEPTH + 1):
        below: list[tuple[str, Any]] = []
        for name, value in level:
            if isinstance(value, dict):
                below += [(name or str(key), child) for key, child in value.items()]
            elif isinstance(value, list):
                below += [(name or str(index), child) for index, child in enumerate(value)]
        level = below
        if not level:
            return
    raise ConfigError(f"at most {MAX_DEPTH} levels of tables and lists", file=file, key=level[0][0])


def _refuse_unusable(tree: Any, *, file: str, path: str) -> None:
    """Refuse values that no setting can use, whatever their type: `inf`, `nan`, NUL, large numbers.

    Raises:
        ConfigError: names the key of the value.
    """
    if isinstance(tree, float) and not math.isfinite(tree):
        raise ConfigError("a finite number", file=file, key=path, value=tree)
    if isinstance(tree, int) and not -_LARGEST <= tree <= _LARGEST:
        raise ConfigError("a number of at most 63 bits", file=file, key=path, value=tree)
    if isinstance(tree, str) and (bad := _UNUSABLE.search(tree)):
        raise ConfigError(f"text without the character {bad[0]!a}", file=file, key=path, value=tree)
    if isinstance(tree, dict):
        for key, value in tree.items():
            _refuse_unusable(value, file=file, path=f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            _refuse_unusable(value, file=file, path=f"{path}[{index}]")


# Controls but tab and line ends (a command may have several lines), and lone surrogates, which no
# file can hold.
_UNUSABLE = re.compile("[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def _split_key(key: str) -> list[str]:
    """Return "faults[0].kind" as ["faults", "0", "kind"]."""
    return re.findall(r"[^.\[\]]+", key)


def _annotation(schema: type[msgspec.Struct], key: str) -> Any:
    """Return the annotation that the value at `key` must satisfy."""
    annotation: Any = schema
    for part in _split_key(key):
        struct = next(_structs_in(annotation), None)
        if part.isdigit():
            annotation = _annotation_of_item(annotation, int(part))
        elif struct is not None and part in (fields := _fields(struct)):
            annotation = fields[part]
    return annotation


def _annotation_of_item(annotation: Any, index: int) -> Any:
    """Return the annotation of one item: X of tuple[X, ...], the one at `index` of tuple[X, Y].

    A union or an Annotated is searched for a tuple.
    """
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple:
        if arguments[-1] is Ellipsis:
            return arguments[0]
        return arguments[min(index, len(arguments) - 1)]
    inner = (_annotation_of_item(one, index) for one in arguments if typing.get_args(one))
    return next((found for found in inner if found is not None), None)


def _choices(annotation: Any) -> list[str]:
    """Return the values of a Literal or an Enum; [] for anything else."""
    if typing.get_origin(annotation) is typing.Literal:
        return [str(value) for value in typing.get_args(annotation)]
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return [str(member.value) for member in annotation]
    return []


def _value_at(tree: Any, key: str) -> Any:
    for part in _split_key(key):
        try:
            tree = tree[int(part)] if isinstance(tree, list) else tree[part]
        except (KeyError, IndexError, ValueError, TypeError):
            return None
    return _shorten_value(tree)


def _shorten_value(value: Any) -> Any:
    """Return a value for a message; None for tables, which are long and hold further keys."""
    if isinstance(value, dict):
        return None
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        return None
    return value
