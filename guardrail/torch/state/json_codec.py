"""Python values <-> strict JSON without loss: tuples stay tuples, NaN stays NaN.

A learning rate may be a tensor. A value that JSON does not have becomes an object with one key that
begins with "$". Anything else (functions, objects, tensors of more than one element) is refused
with its name: a state that could not be restored must not be saved.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from guardrail.core.errors import UsageError


def encode(value: Any, where: str = "state") -> Any:
    """Return a JSON-able copy.

    Args:
        where: name of the value in the error.

    Raises:
        UsageError: a value that cannot be saved.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return {"$float": repr(float(value))}
    if isinstance(value, (list, tuple)):
        items = [encode(item, f"{where}[{index}]") for index, item in enumerate(value)]
        if isinstance(value, list):
            return items
        return {"$tuple": items}
    if isinstance(value, Mapping):
        return _encode_mapping(value, where)
    if isinstance(value, Tensor) and value.numel() == 1:
        kind = str(value.dtype).removeprefix("torch.")
        return {"$tensor": [kind, list(value.shape), encode(value.item(), where)]}
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return encode(value.item(), where)
    what = type(value).__name__
    if isinstance(value, Tensor):
        what = f"a tensor of {value.numel()} elements"
    raise UsageError(
        f"{where} holds {what}, which guardrail cannot save and restore exactly. "
        "Use numbers, strings, lists and dicts there."
    )


def _encode_mapping(value: Mapping[Any, Any], where: str) -> dict[str, Any]:
    if isinstance(value, Counter):
        return {"$counter": [[encode(key, where), count] for key, count in value.items()]}
    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {key: encode(item, f"{where}.{key}") for key, item in value.items()}
    pairs: list[list[Any]] = []
    for key, item in value.items():
        pairs.append([encode(key, where), encode(item, f"{where}[{key!r}]")])
    return {"$dict": pairs}


def decode(value: Any) -> Any:
    """Return the value that `encode` was given.

    Mappings become dict or Counter; tensors are on the CPU.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (tag, held), *_ = value.items()
        match tag:
            case "$float":
                return float(held)
            case "$tuple":
                return tuple(decode(item) for item in held)
            case "$counter":
                return Counter({decode(key): count for key, count in held})
            case "$dict":
                return {decode(key): decode(item) for key, item in held}
            case "$tensor":
                kind, shape, number = held
                return torch.tensor(decode(number), dtype=getattr(torch, kind)).reshape(shape)
    return {key: decode(item) for key, item in value.items()}
