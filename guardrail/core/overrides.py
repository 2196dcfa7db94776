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


def _present(parts: list[str], value: Any, schema: type[msgspec.Struct]) -> tuple[list[str], Any]:
    """The present name of an overridden key, and of its value."""
    tree = value
    for part in reversed(parts):
        tree = {part: tree}
    tree = rename_keys(tree, schema, file="--set", notice=True)
    new = present_key(".".join(parts), schema).split(".")
    for part in new:
        tree = tree[part]
    return new, tree


def _override_value(raw: str) -> Any:
    """A TOML value, or else the text itself: a bare word, a path, "007", and a name that looks like
    a date.
    """
    try:
        parsed = tomllib.loads(f"v = {raw}")
    except (ValueError, RecursionError):
        return raw
    is_date = isinstance(parsed["v"], datetime.date | datetime.time)
    return raw if is_date or len(parsed) > 1 else parsed["v"]


def find_source(
    key: str,
    *,
    file: str,
    overrides: Sequence[str],
    schema: type[msgspec.Struct] | None = None,
) -> str:
    """Where the value of a key came from: "--set" if an override set it, or something in it or
    around it; or `file`.
    """
    for text in overrides:
        named = present_key(".".join(_override_parts(text)), schema or msgspec.Struct)
        if _same_branch(named, key):
            return "--set"
    return file


def _override_parts(text: str) -> list[str]:
    """The parts of the key that an override names."""
    return [part.strip() for part in text.partition("=")[0].split(".")]


def _same_branch(one: str, other: str) -> bool:
    """Whether a key is, holds or lies in the other: guard, guard.window; data.sources,
    data.sources[0].
    """
    shorter, longer = sorted((one, other), key=len)
    return longer == shorter or (
        bool(shorter) and longer.startswith((f"{shorter}.", f"{shorter}["))
    )


def mask_override(text: str) -> str:
    """An override, or a part of one, for a message: nothing of one that may hold a secret."""
    return MASK if may_be_secret(text) or may_be_secret(text.partition("=")[0].strip()) else text


def apply_override(
    tree: dict[str, Any], text: str, schema: type[msgspec.Struct] | None = None
) -> None:
    """Set one key of the tree.

    Args:
        schema: the key and the value are renamed as it says; None: they stay as they are.
    """
    key, equals, raw = text.partition("=")
    parts = _override_parts(text)
    if (
        not equals
        or not 2 <= len(parts) <= MAX_DEPTH
        or not all(re.fullmatch(r"[\w-]{1,100}", p) for p in parts)
    ):
        shown = mask_override(text)
        raise ConfigError(
            "SECTION.KEY=VALUE", file="--set", value=shown, hint="e.g. --set train.steps=500"
        )
    value = _override_value(raw.strip())
    if schema is not None:
        parts, value = _present(parts, value, schema)
    at = tree
    for part in parts[:-1]:
        at = at.setdefault(part, {})
        if not isinstance(at, dict):
            raise ConfigError(
                "a key inside a section", file="--set", key=key.strip(), value=mask_override(raw)
            )
    at[parts[-1]] = value
