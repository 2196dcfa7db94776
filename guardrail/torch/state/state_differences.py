"""Why saved tensors cannot be loaded into a model: names, types, shapes, parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from guardrail.rundir.manifest import OPTIM, Box
from guardrail.rundir.safetensors_header import Shape
from guardrail.torch.state.optimizer_state import Trained, owner_of

TensorKind = tuple[torch.dtype, Shape]  # type and global shape
_MAX_NAMED = 3  # differences that a message names; the others are counted


def find_differences(
    live: Mapping[str, TensorKind],
    found: Mapping[str, TensorKind],
    trained: Mapping[str, Trained],
    *,
    weights_only: bool,
) -> list[str]:
    """Return one sentence per saved tensor that does not fit, and per missing one.

    Args:
        live: name -> kind of the tensors of this state.
        found: name -> kind of the saved tensors.
        trained: name -> parameter, optimizer and group.
        weights_only: do not compare the optimizer's tensors.
    """
    wanted = [name for name in live if not name.startswith(OPTIM)]
    problems = [f"{name} is missing" for name in wanted if name not in found]
    for name, kind in found.items():
        if name.startswith(OPTIM):
            if not weights_only:
                problems += _moment_differences(name, kind, live.get(name), trained)
        elif name not in live:
            problems.append(f"{name} is not in this model")
        elif live[name] != kind:
            problems.append(_wrong_kind(name, kind, live[name]))
    return problems


def _moment_differences(
    name: str, kind: TensorKind, live: TensorKind | None, trained: Mapping[str, Trained]
) -> list[str]:
    owner = owner_of(name)
    if owner not in trained:
        return [f"{name} belongs to a parameter that is not trained here"]
    if live is not None:
        return [] if live == kind else [_wrong_kind(name, kind, live)]
    parameter, shape = trained[owner][0], kind[1]
    if isinstance(parameter, DTensor) and shape and shape != tuple(parameter.shape):
        return [f"{name} of shape {list(shape)} has no place beside the sharded {owner}"]
    return []


def find_part_differences(
    tensors: Mapping[str, Tensor],
    boxes: Mapping[str, Box],
    trained: Mapping[str, Trained],
    box_of: Callable[[str, Shape], Box],
) -> list[str]:
    """Return one sentence per tensor that is another part than this rank holds.

    Args:
        boxes: name -> part that the tensor is.
        box_of: the part that this rank holds of a tensor, by name and global shape.
    """
    problems: list[str] = []
    for name, tensor in tensors.items():
        if name.startswith(OPTIM) and owner_of(name) not in trained:
            continue  # `find_differences` names it
        box = boxes[name]
        if tuple(tensor.shape) != box.size or box_of(name, box.global_shape) != box:
            problems.append(f"{name} holds another part of the tensor than this rank does")
    return problems


def _wrong_kind(name: str, kind: TensorKind, live: TensorKind) -> str:
    return f"{name} is {_format_kind(kind)} and should be {_format_kind(live)}"


def _format_kind(kind: TensorKind) -> str:
    dtype, shape = kind
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def name_some(items: Sequence[str], separator: str = ", ") -> str:
    """Return the first items, and how many more there are."""
    text = separator.join(items[:_MAX_NAMED])
    if len(items) > _MAX_NAMED:
        text += f"{separator}and {len(items) - _MAX_NAMED} more"
    return text
