"""Side effects of a forward pass: buffers (running statistics) and RNG state.

Saved before the pass, restored if the batch is skipped. Otherwise its NaN would stay in a running
mean, and the next batches would get other dropout masks than in a run without the bad batch. The
built-in trainer has neither side effect; a custom loop may have both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from guardrail.torch.state import foreach
from guardrail.torch.state.rng_state import RngStates, get_rng_states, set_rng_states
from guardrail.torch.state.training_state import TrainingState


class _SavedBuffer:
    """A buffer and its content before the pass.

    torch counts in-place changes, so an unchanged buffer is not copied again. Only the running
    statistics of normalisation layers change without being counted (`is_uncounted`).
    """

    def __init__(self, buffer: Tensor, *, is_uncounted: bool) -> None:
        self.buffer, self.is_uncounted = buffer, is_uncounted
        self.version = foreach.change_count(buffer)
        self.before = buffer.clone()
        self.after: Tensor | None = None

    def may_have_changed(self) -> bool:
        """Return whether the buffer may differ from its saved content."""
        return self.is_uncounted or foreach.change_count(self.buffer) != self.version


class ForwardSideEffects:
    """The side effects of one forward pass, or of the passes of one window.

    Call `begin` before the pass, then `undo`, and `redo` if the pass counts after all.

    Args:
        state: whose persistent buffers are saved. A buffer that a module replaces instead of
            changing it in place counts as a new one and is not restored.
    """

    def __init__(self, state: TrainingState) -> None:
        self._state = state
        self._uncounted: set[int] = set()
        for layer in state.model.modules():
            if foreach.is_running_norm(layer):
                self._uncounted.update(id(buffer) for buffer in layer.buffers(recurse=False))
        self._saved: dict[str, _SavedBuffer] = {}
        self._before: RngStates | None = None
        self._after: RngStates | None = None

    @torch.no_grad()
    def begin(self) -> None:
        """Save the RNG states, and copy the buffers that have changed since the last call."""
        self._before, self._after = get_rng_states(), None
        for name, buffer in self._state.buffers():
            saved = self._saved.get(name)
            if saved is None or saved.buffer is not buffer:
                is_uncounted = id(buffer) in self._uncounted
                self._saved[name] = _SavedBuffer(buffer, is_uncounted=is_uncounted)
            elif saved.may_have_changed():
                saved.before.copy_(buffer)
                saved.version = foreach.change_count(buffer)
            self._saved[name].after = None

    @torch.no_grad()
    def undo(self) -> None:
        """Restore buffers and RNG states as they were at `begin`."""
        assert self._before is not None
        self._after = get_rng_states()
        set_rng_states(self._before)
        for saved in self._saved.values():
            if saved.may_have_changed():
                saved.after = saved.buffer.clone()
                saved.buffer.copy_(saved.before)
                saved.version = foreach.change_count(saved.buffer)

    @torch.no_grad()
    def redo(self) -> None:
        """Restore buffers and RNG states as they were at `undo`."""
        assert self._after is not None
        set_rng_states(self._after)
        for saved in self._saved.values():
            if saved.after is not None:
                saved.buffer.copy_(saved.after)
                saved.after = None
