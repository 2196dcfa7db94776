"""The global random states of python, numpy, torch and the device, as they are and as JSON.

The built-in trainer draws nothing from them (its dice are functions of seed and position); a user's
own loop may.
"""

from __future__ import annotations

import base64
import random
from typing import Any, NamedTuple

import numpy as np
import torch


class RngStates(NamedTuple):
    """All states at one moment. `device` is that of the present CUDA device, None without one."""

    python: tuple[Any, ...]
    numpy: Any
    torch: torch.Tensor
    device: torch.Tensor | None


def look() -> RngStates:
    """The states as they are, in some ten microseconds."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    device = torch.cuda.get_rng_state() if cuda else None
    return RngStates(random.getstate(), np.random.get_state(), torch.get_rng_state(), device)


def put_back(dice: RngStates) -> None:
    random.setstate(dice.python)
    np.random.set_state(dice.numpy)
    torch.set_rng_state(dice.torch)
    if dice.device is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(dice.device)


def capture() -> dict[str, Any]:
    """The states as JSON, for a snapshot."""
    dice = look()
    version, internal, gauss = dice.python
    name, keys, at, has_gauss, cached = dice.numpy
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [name, _text(np.asarray(keys).tobytes()), int(at), int(has_gauss), float(cached)],
        "torch": _text(dice.torch.numpy().tobytes()),
    }
    if dice.device is not None:
        state["cuda"] = _text(dice.device.numpy().tobytes())
    return state


def restore(state: dict[str, Any]) -> None:
    """Put back what `capture` gave."""
    version, internal, gauss = state["python"]
    name, keys, at, has_gauss, cached = state["numpy"]
    put_back(
        RngStates(
            python=(version, tuple(internal), gauss),
            numpy=(name, np.frombuffer(_bytes(keys), dtype=np.uint32), at, has_gauss, cached),
            torch=_tensor(state["torch"]),
            device=_tensor(state["cuda"]) if "cuda" in state else None,
        )
    )


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def _bytes(text: str) -> bytes:
    return base64.b64decode(text)


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(_bytes(text)), dtype=torch.uint8)
