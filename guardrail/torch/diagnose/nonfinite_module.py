"""The module that made the first NaN or Inf: found on an incident, by one more forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from guardrail.torch.state import foreach
from guardrail.torch.state.wrappers import plain_name


@torch.no_grad()
def find_nonfinite_module(model: nn.Module, run: Callable[[], None]) -> str:
    """Return the name of the first module whose output holds NaN or Inf; "" if there is none.

    A module is checked before the one that contains it, so the name is the innermost one. The check
    waits for the device once per module.

    Args:
        run: passes the data through `model` again.
    """
    names: list[str] = []

    def check(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if names:
            return
        if not all(_is_finite(tensor) for tensor in _tensors_in(output)):
            names.append(plain_name(name).removeprefix("module."))

    handles = [
        module.register_forward_hook(partial(check, name))
        for name, module in model.named_modules()
        if name
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return names[0] if names else ""


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _tensors_in(output: Any) -> Iterator[Tensor]:
    if isinstance(output, DTensor):
        yield foreach.stored_shard(output)
    elif isinstance(output, Tensor):
        yield output
    elif isinstance(output, (list, tuple)):
        for item in output:
            yield from _tensors_in(item)
    elif isinstance(output, dict):
        yield from _tensors_in(list(output.values()))
