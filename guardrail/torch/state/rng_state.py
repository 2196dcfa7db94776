"""The global RNG states of python, numpy, torch and the device, as objects and as JSON.

The built-in trainer draws no numbers from them: its random numbers are functions of seed and
position. A custom loop may draw from them.
"""

from __future__ import annotations

import base64
import random
from typing import Any, NamedTuple

import numpy as np
import torch


class RngStates(NamedTuple):
    """All states at one moment. `device` is that of the present CUDA device; None without one."""

    python: tuple[Any, ...]
    numpy: Any
    torch: torch.Tensor
    device: torch.Tensor | None


def get_rng_states() -> RngStates:
    """Return the present states; takes some ten microseconds."""
    device: torch.Tensor | None = None
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        device = torch.cuda.get_rng_state()
    return RngStates(random.getstate(), np.random.get_state(), torch.get_rng_state(), device)


def set_rng_states(states: RngStates) -> None:
    """Set all states."""
    random.setstate(states.python)
    np.random.set_state(states.numpy)
    torch.set_rng_state(states.torch)
    if states.device is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states.device)


def capture_rng_states() -> dict[str, Any]:
    """Return the present states as JSON, for a snapshot."""
    states = get_rng_states()
    version, internal, gauss = states.python
    name, keys, position, has_gauss, cached = states.numpy
    key_bytes = np.asarray(keys).tobytes()
    encoded = {
        "python": [version, list(internal), gauss],
        "numpy": [name, _to_text(key_bytes), int(position), int(has_gauss), float(cached)],
        "torch": _to_text(states.torch.numpy().tobytes()),
    }
    if states.device is not None:
        encoded["cuda"] = _to_text(states.device.numpy().tobytes())
    return encoded


def restore_rng_states(encoded: dict[str, Any]) -> None:
    """Set the states that `capture_rng_states` returned."""
    version, internal, gauss = encoded["python"]
    name, keys, position, has_gauss, cached = encoded["numpy"]
    numpy_keys = np.frombuffer(base64.b64decode(keys), dtype=np.uint32)
    device: torch.Tensor | None = None
    if "cuda" in encoded:
        device = _to_tensor(encoded["cuda"])
    set_rng_states(
        RngStates(
            python=(version, tuple(internal), gauss),
            numpy=(name, numpy_keys, position, has_gauss, cached),
            torch=_to_tensor(encoded["torch"]),
            device=device,
        )
    )


def _to_text(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def _to_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
