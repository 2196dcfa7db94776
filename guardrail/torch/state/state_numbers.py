"""The numbers of a training state: hyperparameters, optimizer numbers, schedules, loss scale."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from guardrail.core.errors import CheckpointInvalid
from guardrail.torch.state import json_codec
from guardrail.torch.state.optimizer_state import Trained, collect_numbers
from guardrail.torch.state.state_differences import name_some

# Settings of how an update is computed. They belong to the machine that trains now, not to the one
# that saved.
_IMPLEMENTATION = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})


class StateNumbers:
    """Collects, checks and restores everything of a training state that is not a tensor.

    Args:
        scalers: gradient scalers.
        trained: name -> parameter, optimizer and group.
        group_names: parameter names of each group of each optimizer, on all ranks together.
        all_names: names of the parameters on all ranks.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        schedulers: Sequence[Any],
        scalers: Sequence[Any],
        *,
        trained: Mapping[str, Trained],
        group_names: Sequence[Sequence[Sequence[str]]],
        all_names: frozenset[str],
    ) -> None:
        self._optimizers, self._schedulers, self._scalers = optimizers, schedulers, scalers
        self._trained, self._group_names, self._all_names = trained, group_names, all_names

    def collect(self) -> dict[str, Any]:
        """Return all numbers, JSON-able."""
        groups: list[list[dict[str, Any]]] = []
        for optimizer, names_of_groups in zip(self._optimizers, self._group_names, strict=True):
            pairs = zip(optimizer.param_groups, names_of_groups, strict=True)
            groups.append([_collect_group(group, names) for group, names in pairs])
        return {
            "groups": groups,
            "state": collect_numbers(self._trained),
            "schedulers": [_encode_state(scheduler) for scheduler in self._schedulers],
            "scalers": [_encode_state(scaler) for scaler in self._scalers],
        }

    @torch.no_grad()
    def load(self, scalars: Mapping[str, Any]) -> None:
        """Restore what `collect` returned.

        Schedules come first, so the saved learning rates overwrite what a schedule sets.
        """
        self.check(scalars)
        for scheduler, saved in zip(self._schedulers, scalars["schedulers"], strict=True):
            scheduler.load_state_dict(json_codec.decode(saved))
        for scaler, saved in zip(self._scalers, scalars["scalers"], strict=True):
            scaler.load_state_dict(json_codec.decode(saved))
        for optimizer, groups in zip(self._optimizers, scalars["groups"], strict=True):
            for group, saved in zip(optimizer.param_groups, groups, strict=True):
                for key, value in json_codec.decode(saved["values"]).items():
                    set_group_value(group, key, value)
        for name, numbers in scalars["state"]["numbers"].items():
            if name in self._trained:  # else it is of another pipeline stage
                parameter, optimizer, _ = self._trained[name]
                optimizer.state[parameter].update(json_codec.decode(numbers))

    def check(self, scalars: Mapping[str, Any]) -> None:
        """Raise CheckpointInvalid if the numbers do not fit these optimizers and schedules."""
        counts = {
            "schedulers": ("schedulers", len(self._schedulers)),
            "scalers": ("gradient scalers", len(self._scalers)),
            "groups": ("optimizers", len(self._optimizers)),
        }
        for key, (noun, count) in counts.items():
            saved = len(scalars[key])
            if saved != count:
                raise CheckpointInvalid(f"saved with {saved} {noun}, and there are {count} now")
        for names_of_groups, groups in zip(self._group_names, scalars["groups"], strict=True):
            hashes = [_hash_names(names) for names in names_of_groups]
            if [group["parameters"] for group in groups] != hashes:
                raise CheckpointInvalid(
                    "the optimizer's groups held other parameters when this was saved",
                    kind="other_groups",
                )
        unknown = sorted(set(scalars["state"]["numbers"]) - self._all_names)
        if unknown:
            raise CheckpointInvalid(
                f"optimizer state of parameters that are not trained here: {name_some(unknown)}"
            )


def set_group_value(group: dict[str, Any], key: str, value: Any) -> None:
    """Change a setting of a parameter group.

    A tensor is changed in place, because a compiled or captured step reads it.
    """
    if isinstance(group.get(key), Tensor):
        group[key].copy_(torch.as_tensor(value))
    else:
        group[key] = value


def _collect_group(group: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    values = {key: value for key, value in group.items() if key not in _IMPLEMENTATION}
    return {
        "parameters": _hash_names(names),
        "values": json_codec.encode(values, "a parameter group"),
    }


def _encode_state(item: Any) -> Any:
    return json_codec.encode(item.state_dict(), type(item).__name__)


def _hash_names(names: Sequence[str]) -> str:
    return hashlib.sha256(",".join(names).encode()).hexdigest()[:16]
