"""What a forward pass leaves behind besides gradients: running statistics, and dice that have been
thrown.

A batch that is left out must leave neither, or its NaN stays in a running mean, and the batches
after it meet other dropout than in a run that never saw it. The built-in trainer has neither; a
loop of one's own may have both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from guardrail.torch.state import foreach
from guardrail.torch.state import rng_state as rng
from guardrail.torch.state.training_state import TrainingState


class _SavedBuffer:
    """A buffer and its content before the attempt. torch counts in-place changes, so one that rests
    costs nothing.

    Only the running statistics of normalisation layers change without being counted (`silent`).
    """

    def __init__(self, buffer: Tensor, *, silent: bool) -> None:
        self.buffer, self.silent = buffer, silent
        self.version = foreach.change_count(buffer)
        self.before = buffer.clone()
        self.after: Tensor | None = None

    def touched(self) -> bool:
        return self.silent or foreach.change_count(self.buffer) != self.version


class ForwardSideEffects:
    """The side effects of one forward pass, or of a window of them: `begin` before, then `undo`,
    and `redo` if need be.

    Args:
        state: whose persistent buffers are meant. Buffers that a module replaces, instead of
            changing them in place, are seen as new ones and are not put back.
    """

    def __init__(self, state: TrainingState) -> None:
        self._state = state
        layers = (layer for layer in state.model.modules() if foreach.is_running_norm(layer))
        self._silent = {id(buffer) for layer in layers for buffer in layer.buffers(recurse=False)}
        self._kept: dict[str, _SavedBuffer] = {}
        self._before: rng.RngStates | None = None
        self._after: rng.RngStates | None = None

    @torch.no_grad()
    def begin(self) -> None:
        """Remember how things stand; copies only the buffers that have changed since the last
        time.
        """
        self._before, self._after = rng.look(), None
        for name, buffer in self._state.buffers():
            kept = self._kept.get(name)
            if kept is None or kept.buffer is not buffer:
                self._kept[name] = _SavedBuffer(buffer, silent=id(buffer) in self._silent)
            elif kept.touched():
                kept.before.copy_(buffer)
                kept.version = foreach.change_count(buffer)
            self._kept[name].after = None

    @torch.no_grad()
    def undo(self) -> None:
        """Back to where `begin` was called."""
        assert self._before is not None
        self._after = rng.look()
        rng.put_back(self._before)
        for kept in self._kept.values():
            if kept.touched():
                kept.after = kept.buffer.clone()
                kept.buffer.copy_(kept.before)
                kept.version = foreach.change_count(kept.buffer)

    @torch.no_grad()
    def redo(self) -> None:
        """Forward again to where `undo` was called: the attempt counts after all."""
        assert self._after is not None
        rng.put_back(self._after)
        for kept in self._kept.values():
            if kept.after is not None:
                kept.buffer.copy_(kept.after)
                kept.after = None
