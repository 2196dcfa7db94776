"""SHA-256 of a training state by component. Two runs with equal digests have equal states."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from guardrail.rundir.manifest import BUFFER, MODEL, OPTIM


def component_digests(tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> dict[str, str]:
    """Return the SHA-256 of weights, moments, schedule, and buffers if there are any.

    Args:
        tensors: live or copied local tensors, on any device.
        scalars: of `TrainingState.scalars`.
    """
    parts: dict[str, Any] = {
        "weights": hashlib.sha256(),
        "moments": hashlib.sha256(),
        "schedule": hashlib.sha256(),
    }
    for name in sorted(tensors):
        prefix = name.split("/", 1)[0] + "/"
        component = {MODEL: "weights", OPTIM: "moments", BUFFER: "buffers"}[prefix]
        digest = parts.setdefault(component, hashlib.sha256())
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(raw_bytes(tensor))
    parts["moments"].update(_canonical(scalars["state"]["numbers"]))
    for key in ("groups", "schedulers", "scalers"):
        parts["schedule"].update(_canonical(scalars[key]))
    return {name: digest.hexdigest() for name, digest in parts.items()}


def raw_bytes(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the elements in row-major order as bytes, [numel * itemsize] uint8.

    The array shares the tensor's memory where that is possible.
    """
    array: np.ndarray[Any, np.dtype[np.uint8]] = (
        tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    )
    return array


def _canonical(value: Any) -> bytes:
    return msgspec.json.encode(value, order="deterministic")
