"""The arguments of `Guard`, checked before anything is built from them: one sentence with name,
value, expectation.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from guardrail.core.config import GuardConfig, check_settings, load_config
from guardrail.core.errors import ConfigError, UsageError
from guardrail.core.records import Mode
from guardrail.core.schema import to_plain_tree
from guardrail.rundir.run_directory import RunDirectory
from guardrail.torch.guard.hooks import LoopHooks, RankLayout

_ORDER = ("n_samples", "seed", "shuffled", "epoch", "sample", "samples")
_STATEFUL = ("state_dict", "load_state_dict")


def check_config(config: Any) -> GuardConfig:
    """Return the configuration, converted and checked as a TOML file would be.

    Args:
        config: a GuardConfig, a dictionary of sections, the path of a TOML file; None: the
            defaults.

    Raises:
        ConfigError: names key, value and expectation.
    """
    if config is None:
        return GuardConfig()
    if isinstance(config, (str, os.PathLike)):
        return load_config(config)
    schema = type(config) if isinstance(config, GuardConfig) else GuardConfig
    return check_settings(config, schema)


def check_mode(mode: Any) -> Mode:
    """The mode, given as one or as its word. Raises ConfigError."""
    try:
        return Mode(mode)
    except ValueError as error:
        raise ConfigError(f"one of {', '.join(Mode)}", key="guard.mode", value=mode) from error


def check_parts(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `Guard` but config, hooks and ranks, by name.

    Numbers of numpy become plain ones.

    Raises:
        ConfigError: an argument that the guard cannot use.
    """
    checked_parts = dict(parts)
    _check_model(parts["model"])
    _check_optimizers(parts["optimizer"])
    _check_stateful(
        parts["scheduler"], "scheduler", needed=("step", *_STATEFUL), example="a torch LR scheduler"
    )
    _check_stateful(
        parts["scaler"],
        "scaler",
        needed=("scale", "get_scale", "is_enabled", *_STATEFUL),
        example="None",
    )
    _check_order(parts["data"])
    size = parts["batch_size"]
    if callable(size):
        checked_parts["batch_size"] = _checked_sizes(size)
    else:
        checked_parts["batch_size"] = whole("batch_size", size, least=1)
    checked_parts["total_steps"] = whole("total_steps", parts["total_steps"], least=0)
    if parts["limit"] is not None:
        checked_parts["limit"] = whole("limit", parts["limit"], least=1)
    checked_parts["clip"] = _checked_clip(parts["clip"])
    _check_run(parts["run"])
    return checked_parts


def check_hooks(hooks: Any) -> LoopHooks:
    """Return the hooks; None: there are none. Raises ConfigError."""
    if hooks is None:
        return LoopHooks()
    if not isinstance(hooks, LoopHooks):
        raise ConfigError("a guardrail.LoopHooks, or None", key="hooks", value=hooks)
    for field in dataclasses.fields(LoopHooks):
        value = getattr(hooks, field.name)
        if value is None:
            continue
        key = f"hooks.{field.name}"
        if field.name == "fingerprints":
            if not isinstance(value, dict):
                raise ConfigError("a dictionary of fingerprints, or None", key=key, value=value)
        elif not callable(value):
            raise ConfigError("a function, or None", key=key, value=value)
    return hooks


def check_layout(ranks: Any, *, world: int) -> RankLayout:
    """Return the layout of the ranks, its device as torch.device. Raises ConfigError."""
    if ranks is None:
        return RankLayout()
    if not isinstance(ranks, RankLayout):
        raise ConfigError("a guardrail.RankLayout, or None", key="ranks", value=ranks)
    if not isinstance(ranks.counts_loss, bool):
        raise ConfigError("True or False", key="ranks.counts_loss", value=ranks.counts_loss)
    _check_shard_ranks(ranks.shard_ranks, world)
    return dataclasses.replace(ranks, device=_checked_device(ranks.device))


def whole(name: str, value: Any, *, least: int) -> int:
    """A whole number of at least `least`. Raises ConfigError."""
    number = to_plain_tree(value)
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise ConfigError(f"a whole number >= {least}", key=name, value=value)
    return number


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        hint = "it was given a class: call it first" if isinstance(model, type) else ""
        raise ConfigError("a torch.nn.Module", key="model", value=model, hint=hint)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "a model with a parameter that requires a gradient",
            key="model",
            value=type(model).__name__,
            hint="all of them are frozen, or it has none",
        )


def _check_optimizers(optimizer: Any) -> None:
    several = isinstance(optimizer, Sequence) and not isinstance(optimizer, str)
    if several and not optimizer:
        raise ConfigError("at least one optimizer", key="optimizer", value=optimizer)
    for index, one in enumerate(optimizer if several else [optimizer]):
        key = f"optimizer[{index}]" if several else "optimizer"
        if isinstance(one, Optimizer):
            continue
        if isinstance(one, type) or any(
            not hasattr(one, name) for name in ("param_groups", "step", *_STATEFUL)
        ):
            raise ConfigError("a torch.optim optimizer, or a list of them", key=key, value=one)


def _check_stateful(value: Any, name: str, *, needed: tuple[str, ...], example: str) -> None:
    """Of several schedulers, each."""
    for one in value if isinstance(value, (list, tuple)) else [value]:
        missing = [method for method in needed if not callable(getattr(one, method, None))]
        if one is not None and (missing or isinstance(one, type)):
            expected = (
                f"an object with {', '.join(f'{method}()' for method in needed)}, such as {example}"
            )
            raise ConfigError(expected, key=name, value=one)


def _check_order(order: Any) -> None:
    if isinstance(order, type) or any(not hasattr(order, name) for name in _ORDER):
        raise ConfigError(
            "the sample order, a guardrail.SampleOrder",
            key="data",
            value=order,
            hint="SampleOrder(len(dataset), seed=0); each step names its samples in step.samples",
        )


def _checked_sizes(size: Callable[[int], int]) -> Callable[[int], int]:
    def of_step(step: int) -> int:
        return whole(f"batch_size({step})", size(step), least=1)

    return of_step


def _checked_clip(clip: Any) -> Any:
    if callable(clip):
        return clip
    number = to_plain_tree(clip)
    if (
        isinstance(number, bool)
        or not isinstance(number, (int, float))
        or not (math.isfinite(number) and number >= 0)
    ):
        raise ConfigError(
            "a number >= 0 (0: no clipping), or a function of the norm", key="clip", value=clip
        )
    return number


def _checked_device(device: Any) -> torch.device | None:
    if device is None or isinstance(device, torch.device):
        return device
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            'a torch.device, or the name of one such as "cuda:0"', key="ranks.device", value=device
        ) from error


def _check_run(run: Any) -> None:
    if run is not None and not isinstance(run, RunDirectory):
        path = (
            f"RunDirectory.open({str(run)!r})"
            if isinstance(run, (str, os.PathLike))
            else "RunDirectory.create(...)"
        )
        raise ConfigError(
            "a guardrail.RunDirectory, or None",
            key="run",
            value=run,
            hint=path,
        )


def _check_shard_ranks(ranks: Any, world: int) -> None:
    if ranks is None:
        return
    if (
        not isinstance(ranks, range)
        or ranks.step != 1
        or not 0 <= ranks.start < ranks.stop <= world
    ):
        raise ConfigError(
            f"a range of ranks within 0 to {world}, or None", key="ranks.shard_ranks", value=ranks
        )


def check_loss(loss: Any) -> None:
    """The argument of `step.finish`. Raises UsageError."""
    if not isinstance(loss, Tensor):
        hint = ": give the tensor itself, without .item()" if isinstance(loss, (int, float)) else ""
        raise UsageError(f"step.finish(loss): expected a tensor, got {type(loss).__name__}{hint}")
    if loss.ndim:
        shape = tuple(loss.shape)
        raise UsageError(
            f"step.finish(loss): expected one number, 0-d, got shape {shape}: give its mean, or its sum"
        )
    if loss.is_complex():
        raise UsageError(f"step.finish(loss): expected a real number, got {loss.dtype}")


def check_numbers(*, tokens: Any, nominal_tokens: Any, signals: Any) -> None:
    """Further arguments of `step.finish`. Raises UsageError."""
    _check_number("tokens", tokens)
    if nominal_tokens is not None:
        _check_number("nominal_tokens", nominal_tokens)
    if signals is None:
        return
    if not isinstance(signals, Mapping):
        raise UsageError(
            f"step.finish(signals): expected a dict of names and numbers, got {type(signals).__name__}"
        )
    for name, value in signals.items():
        _check_number(f"signals[{name!r}]", value)


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        if value.ndim or value.is_complex():
            shape = tuple(value.shape)
            raise UsageError(
                f"step.finish({name}): expected one real number, 0-d, got shape {shape} of {value.dtype}"
            )
    elif isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise UsageError(
            f"step.finish({name}): expected a number or a 0-d tensor, got {type(value).__name__}"
        )
