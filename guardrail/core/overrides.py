"""Overrides, as `--set section.key=value` gives them."""

from __future__ import annotations

import datetime
import re
import tomllib
from collections.abc import Sequence
from typing import Any

import msgspec

from guardrail.core.errors import ConfigError, may_be_secret
from guardrail.core.renamed_keys import present_key, rename_keys
from guardrail.core.schema import MAX_DEPTH
from guardrail.core.text import MASK


def _rename_override(
    parts: list[str], value: Any, schema: type[msgspec.Struct]
) -> tuple[list[str], Any]:
    """Return the parts of an overridden key, and its value, with their present names."""
    tree = value
    for part in reversed(parts):
        tree = {part: tree}
    tree = rename_keys(tree, schema, file="--set", notice=True)
    new = present_key(".".join(parts), schema).split(".")
    for part in new:
        tree = tree[part]
    return new, tree


def _parse_value(raw: str) -> Any:
    """Return a TOML value, or the text itself.

    A bare word, a path, "007" and a name that looks like a date stay text.
    """
    try:
        parsed = tomllib.loads(f"v = {raw}")
    except (ValueError, RecursionError):
        return raw
    if len(parsed) > 1 or isinstance(parsed["v"], datetime.date | datetime.time):
        return raw
    return parsed["v"]


def find_source(
    key: str,
    *,
    file: str,
    overrides: Sequence[str],
    schema: type[msgspec.Struct] | None = None,
) -> str:
    """Return "--set" if an override set the key, or a key inside or around it; else `file`."""
    for text in overrides:
        named = present_key(".".join(_split_override(text)), schema or msgspec.Struct)
        if _same_branch(named, key):
            return "--set"
    return file


def _split_override(text: str) -> list[str]:
    """Return the parts of the key that an override names."""
    return [part.strip() for part in text.partition("=")[0].split(".")]


def _same_branch(one: str, other: str) -> bool:
    """Return whether one key is or contains the other: guard, guard.mode; data.sources[0]."""
    shorter, longer = sorted((one, other), key=len)
    if longer == shorter:
        return True
    return bool(shorter) and longer.startswith((f"{shorter}.", f"{shorter}["))


def mask_override(text: str) -> str:
    """Return an override, or a part of one, for a message; a mask if it may hold a secret."""
    key = text.partition("=")[0].strip()
    return MASK if may_be_secret(text) or may_be_secret(key) else text


def apply_override(
    tree: dict[str, Any], text: str, schema: type[msgspec.Struct] | None = None
) -> None:
    """Set one key of the tree.

    Args:
        schema: gives the key and the value their present names; None: they stay as they are.

    Raises:
        ConfigError: the text is not SECTION.KEY=VALUE, or the key is not inside a section.
    """
    key, equals, raw = text.partition("=")
    parts = _split_override(text)
    if (
        not equals
        or not 2 <= len(parts) <= MAX_DEPTH
        or not all(re.fullmatch(r"[\w-]{1,100}", p) for p in parts)
    ):
        shown = mask_override(text)
        raise ConfigError(
            "SECTION.KEY=VALUE", file="--set", value=shown, hint="e.g. --set train.steps=500"
        )
    value = _parse_value(raw.strip())
    if schema is not None:
        parts, value = _rename_override(parts, value, schema)
    at = tree
    for depth, part in enumerate(parts[:-1], start=1):
        at = at.setdefault(part, {})
        if not isinstance(at, dict):
            raise ConfigError(
                f"a key of a section ({'.'.join(parts[:depth])} is a value, not a section)",
                file="--set",
                key=key.strip(),
                value=mask_override(raw),
            )
    at[parts[-1]] = value
