"""Counts, without a GPU, the calls that would make the host wait for a device.

On a CPU these calls cost nothing, so a test sees none of them by its clock. `WaitCounter` counts

- reads of one number: `item`, `float`, `bool`, `int` of a tensor (`aten::_local_scalar_dense`);
- operations whose result has a size that the host must know: `nonzero`, `masked_select`, `unique`,
  indexing by a bool tensor;
- `tolist`, `cpu` and `numpy`;
- device tensors made of numbers of the host (`torch.tensor` and `torch.as_tensor` with a device):
  a copy from pageable memory.

A call is attributed to the line of guardrail or trainer that made it. Calls of torch's optimizers
and of the test itself are left out.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.places import ROOT

ROOMS = (str(ROOT / "guardrail"), str(ROOT / "trainer"))
READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim"}
METHODS = ("tolist", "cpu", "numpy")
MAKERS = ("tensor", "as_tensor")


def find_caller() -> str | None:
    """Return "module.function: operation's caller" of guardrail or trainer; None: another's call."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/torch/optim/" in file:
            return None
        if file.startswith(ROOMS):
            return f"{Path(file).stem}.{frame.f_code.co_name}"
        frame = frame.f_back
    return None


class WaitCounter(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        calls: "operation in file.function" -> number of calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self._replaced: list[tuple[Any, str, Any]] = []

    def count(self, operation: str) -> None:
        caller = find_caller()
        if caller is not None:
            self.calls[f"{operation} in {caller}"] += 1

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name in READS:
            self.count(name)
        if name in ("index", "index_put", "index_put_") and _has_mask(arguments[1]):
            self.count(f"{name} by a mask")
        return function(*arguments, **(named or {}))

    def __enter__(self) -> Any:
        for method in METHODS:
            self._replace(Tensor, method, counts_if=lambda *_, **__: True)
        for maker in MAKERS:
            self._replace(torch, maker, counts_if=_copies_to_device)
        return super().__enter__()

    def __exit__(self, *given: Any) -> Any:
        for owner, name, original in self._replaced:
            setattr(owner, name, original)
        self._replaced = []
        return super().__exit__(*given)

    def _replace(self, owner: Any, name: str, *, counts_if: Any) -> None:
        original = getattr(owner, name)

        def counted(*given: Any, **named: Any) -> Any:
            if counts_if(*given, **named):
                self.count(name)
            return original(*given, **named)

        self._replaced.append((owner, name, original))
        setattr(owner, name, counted)


def _has_mask(indices: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)


def _copies_to_device(data: Any, *_: Any, device: Any = None, **__: Any) -> bool:
    return device is not None and not isinstance(data, Tensor)
