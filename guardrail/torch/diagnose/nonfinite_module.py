"""Which module made the first NaN or Inf: asked on an incident only, by running the forward pass
once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from guardrail.torch.state.wrappers import plain_name


@torch.no_grad()
def first_nonfinite(model: nn.Module, run: Callable[[], None]) -> str:
    """Name of the module whose output is the first that holds NaN or Inf, "" if none does.

    Args:
        run: passes the data through `model` again. A module is asked before the one that contains
            it, so the name is the most precise there is. One wait on the device a module.
    """
    found: list[str] = []

    def look(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if not found and any(
            t.is_floating_point() and not bool(t.isfinite().all()) for t in _tensors(output)
        ):
            found.append(plain_name(name).removeprefix("module."))

    handles = [
        m.register_forward_hook(partial(look, name)) for name, m in model.named_modules() if name
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield getattr(output, "_local_tensor", output)
    elif isinstance(output, (list, tuple)):
        for item in output:
            yield from _tensors(item)
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))
