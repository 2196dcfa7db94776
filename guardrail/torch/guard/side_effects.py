"""Side effects of the step that is being computed: saved before it, undone if it is skipped."""

from __future__ import annotations

from guardrail.torch.state.forward_side_effects import ForwardSideEffects
from guardrail.torch.state.training_state import TrainingState


class StepSideEffects:
    """RNG states and buffers before the present step.

    With `guard.decide = "deferred"` also those before the previous step.

    Attributes:
        current: of the step that was begun last.
    """

    def __init__(self, state: TrainingState) -> None:
        self._state = state
        self.current = ForwardSideEffects(state)
        self._spare: ForwardSideEffects | None = None
        # the loop is in the rest of its body, after a step that was not applied
        self._in_rest = False

    def begin(self) -> None:
        """Save RNG states and buffers before a step."""
        self.current.begin()

    def undo(self) -> None:
        """Restore what was saved before the present step."""
        self.current.undo()

    def redo(self) -> None:
        """Reverse the last `undo`."""
        self.current.redo()

    def swap(self) -> None:
        """Exchange the saved state of the present step with that of the other one."""
        other = self._spare
        if other is None:
            other = ForwardSideEffects(self._state)
        self._spare, self.current = self.current, other

    def begin_rest(self) -> None:
        """Save the state after `finish` of a step that was not applied.

        The rest of the loop body may draw random numbers.
        """
        self.begin()
        self._in_rest = True

    def discard_rest(self) -> None:
        """Undo what the loop body did after a step that was not applied."""
        if self._in_rest:
            self._in_rest = False
            self.undo()
