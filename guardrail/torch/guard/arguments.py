"""Check the arguments of `Guard` before anything is built from them.

Each error is one sentence with the name, the value and what is expected.
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
from guardrail.core.records.verdicts import Mode
from guardrail.core.schema import to_plain_tree
from guardrail.rundir.run_directory import RunDirectory
from guardrail.torch.guard.hooks import LoopHooks, RankLayout

_ORDER = ("n_samples", "seed", "shuffled", "epoch", "sample", "samples")
_STATEFUL = ("state_dict", "load_state_dict")


def check_config(config: Any) -> GuardConfig:
    """Return the configuration, converted and checked like a TOML file.

    Args:
        config: a GuardConfig, a dictionary of sections, the path of a TOML file; None: the
            defaults.

    Raises:
        ConfigError: names the key, the value and what is expected.
    """
    if config is None:
        return GuardConfig()
    if isinstance(config, (str, os.PathLike)):
        return load_config(config)
    schema = GuardConfig
    if isinstance(config, GuardConfig):
        schema = type(config)
    return check_settings(config, schema)


def check_mode(mode: Any) -> Mode:
    """Return the mode, which is given as a `Mode` or as its word. Raises ConfigError."""
    try:
        return Mode(mode)
    except ValueError as error:
        raise ConfigError(f"one of {', '.join(Mode)}", key="guard.mode", value=mode) from error


def check_parts(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `Guard` but config, hooks and ranks, by name.

    Numbers of numpy become plain Python numbers.

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
        checked_parts["batch_size"] = check_integer("batch_size", size, least=1)
    checked_parts["total_steps"] = check_integer("total_steps", parts["total_steps"], least=0)
    if parts["limit"] is not None:
        checked_parts["limit"] = check_integer("limit", parts["limit"], least=1)
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


def check_integer(name: str, value: Any, *, least: int) -> int:
    """Return a whole number of at least `least`. Raises ConfigError."""
    number = to_plain_tree(value)
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise ConfigError(f"a whole number >= {least}", key=name, value=value)
    return number


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        hint = ""
        if isinstance(model, type):
            hint = "this is a class: call it first"
        raise ConfigError("a torch.nn.Module", key="model", value=model, hint=hint)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "a model with a parameter that requires a gradient",
            key="model",
            value=type(model).__name__,
            hint="all of them are frozen, or it has none",
        )


def _check_optimizers(optimizer: Any) -> None:
    if not isinstance(optimizer, Sequence) or isinstance(optimizer, str):
        _check_optimizer(optimizer, "optimizer")
        return
    if not optimizer:
        raise ConfigError("at least one optimizer", key="optimizer", value=optimizer)
    for index, one in enumerate(optimizer):
        _check_optimizer(one, f"optimizer[{index}]")


def _check_optimizer(optimizer: Any, key: str) -> None:
    if isinstance(optimizer, Optimizer):
        return
    needed = ("param_groups", "step", *_STATEFUL)
    if isinstance(optimizer, type) or not all(hasattr(optimizer, name) for name in needed):
        raise ConfigError("a torch.optim optimizer, or a list of them", key=key, value=optimizer)


def _check_stateful(value: Any, name: str, *, needed: tuple[str, ...], example: str) -> None:
    """Check that an object, or each object of a list, has the methods that are needed."""
    several = [value]
    if isinstance(value, (list, tuple)):
        several = list(value)
    for one in several:
        missing = [method for method in needed if not callable(getattr(one, method, None))]
        if one is not None and (missing or isinstance(one, type)):
            methods = ", ".join(f"{method}()" for method in needed)
            expected = f"an object with {methods}, such as {example}"
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
        return check_integer(f"batch_size({step})", size(step), least=1)

    return of_step


def _checked_clip(clip: Any) -> Any:
    if callable(clip):
        return clip
    number = to_plain_tree(clip)
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    if not is_number or not math.isfinite(number) or number < 0:
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
    if run is None or isinstance(run, RunDirectory):
        return
    hint = "RunDirectory.create(...)"
    if isinstance(run, (str, os.PathLike)):
        hint = f"RunDirectory.open({str(run)!r})"
    raise ConfigError("a guardrail.RunDirectory, or None", key="run", value=run, hint=hint)


def _check_shard_ranks(ranks: Any, world: int) -> None:
    if ranks is None:
        return
    is_consecutive = isinstance(ranks, range) and ranks.step == 1
    if not is_consecutive or not 0 <= ranks.start < ranks.stop <= world:
        raise ConfigError(
            f"a range of ranks within 0 to {world}, or None", key="ranks.shard_ranks", value=ranks
        )


def check_loss(loss: Any) -> None:
    """Check the loss that `step.finish` is given. Raises UsageError."""
    if not isinstance(loss, Tensor):
        hint = ""
        if isinstance(loss, (int, float)):
            hint = ": give the tensor itself, without .item()"
        raise UsageError(f"step.finish(loss): expected a tensor, got {type(loss).__name__}{hint}")
    if loss.ndim:
        shape = tuple(loss.shape)
        raise UsageError(
            f"step.finish(loss): expected one number, 0-d, got shape {shape}: give its mean or sum"
        )
    if loss.is_complex():
        raise UsageError(f"step.finish(loss): expected a real number, got {loss.dtype}")


def check_numbers(*, tokens: Any, nominal_tokens: Any, signals: Any) -> None:
    """Check the further arguments of `step.finish`. Raises UsageError."""
    _check_number("tokens", tokens)
    if nominal_tokens is not None:
        _check_number("nominal_tokens", nominal_tokens)
    if signals is None:
        return
    if not isinstance(signals, Mapping):
        raise UsageError(
            "step.finish(signals): expected a dict of names and numbers, got "
            f"{type(signals).__name__}"
        )
    for name, value in signals.items():
        _check_number(f"signals[{name!r}]", value)


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        if value.ndim or value.is_complex():
            shape = tuple(value.shape)
            raise UsageError(
                f"step.finish({name}): expected one real number, 0-d, got shape {shape} of "
                f"{value.dtype}"
            )
    elif isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise UsageError(
            f"step.finish({name}): expected a number or a 0-d tensor, got {type(value).__name__}"
        )
