"""Old names of the arguments of `Guard`, accepted beside the new ones; wrong names are refused."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from guardrail.core.errors import ConfigError
from guardrail.core.section import Section
from guardrail.torch.guard.hooks import LoopHooks, RankLayout

P = ParamSpec("P")
Self = TypeVar("Self")

RENAMED = {"settings": "config", "order": "data"}
# Old argument -> field of `LoopHooks`.
HOOKS = {
    "replay": "replay",
    "structure": "label_order_gain",
    "rerun": "rerun_forward",
    "describe": "describe_samples",
    "texts": "sample_texts",
    "tokens": "describe_tokens",
    "fixed_loss": "fixed_batch_loss",
    "lr_at": "scheduled_lr",
    "identity": "fingerprints",
}
# Old argument -> field of `RankLayout`.
LAYOUT = {"device": "device", "counting": "counts_loss", "holders": "shard_ranks"}


def accept_old_arguments(
    init: Callable[Concatenate[Self, P], None],
) -> Callable[Concatenate[Self, P], None]:
    """Let a constructor accept its arguments by their old names as well, without a warning.

    `Guard(settings, model=..., optimizer=..., order=...)` works too: its first argument is then the
    configuration. The signature shows only the new names.
    """
    valid = list(inspect.signature(init).parameters)[1:]
    anything = cast("Callable[..., None]", init)

    @functools.wraps(init)
    def constructor(self: Self, *positional: Any, **named: Any) -> None:
        if positional and _is_old_call(positional, named):
            named["settings"], *rest = positional
            positional = tuple(rest)
        named = with_new_names(named)
        check_names([*valid[: len(positional)], *named], valid)
        anything(self, *positional, **named)

    return cast("Callable[Concatenate[Self, P], None]", constructor)


def _is_old_call(positional: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
    return "model" in named or isinstance(positional[0], (Section, Mapping))


def with_new_names(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments with old names replaced by new ones; unknown names stay as they are.

    Raises:
        ConfigError: the same argument by its old and its new name.
    """
    given = dict(named)
    for old, new in RENAMED.items():
        if old in given:
            if given.get(new) is not None:
                raise _given_twice(old, new)
            given[new] = given.pop(old)
    _move_into(given, "hooks", HOOKS, LoopHooks())
    _move_into(given, "ranks", LAYOUT, RankLayout())
    return given


def _move_into(given: dict[str, Any], name: str, fields: Mapping[str, str], empty: Any) -> None:
    """Move old arguments into the fields of the object that is argument `name` now."""
    moved = {new: given.pop(old) for old, new in fields.items() if old in given}
    if not moved:
        return
    present = given.get(name)
    if present is None:
        present = empty
    if not isinstance(present, type(empty)):
        return  # its type is refused later
    for old, new in fields.items():
        is_set = getattr(present, new) != getattr(empty, new)
        if new in moved and is_set:
            raise _given_twice(old, f"{name}.{new}")
    given[name] = dataclasses.replace(present, **moved)


def _given_twice(old: str, new: str) -> ConfigError:
    return ConfigError(f"one of {old} and {new}", key=old, hint=f"{old} is {new} now")


def check_names(names: Iterable[str], valid: Iterable[str]) -> None:
    """Refuse arguments that Guard does not have, with the nearest name, and find missing ones.

    Raises:
        ConfigError: names the argument.
    """
    names, valid = list(names), list(valid)
    places = {name: name for name in (*valid, *RENAMED, *HOOKS, *LAYOUT)}
    for kind, argument in ((LoopHooks, "hooks"), (RankLayout, "ranks")):
        for field in dataclasses.fields(kind):
            places[field.name] = f"{argument}={kind.__name__}({field.name}=...)"
    for name in names:
        if name not in valid:
            close = difflib.get_close_matches(name, places, n=1)
            hint = f"arguments: {', '.join(valid)}"
            if close:
                hint = f"did you mean {places[close[0]]}?"
            raise ConfigError("an argument of Guard", key=name, hint=hint)
    for name in ("model", "optimizer", "data", "batch_size"):
        if name not in names:
            raise ConfigError(f"{name}=...", key=name, hint="Guard needs it")
