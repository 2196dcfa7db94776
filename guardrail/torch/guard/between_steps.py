"""What is done after the loop body of a step: its row, a copy of the state, a command."""

from __future__ import annotations

import time
from collections.abc import Callable

from guardrail.core.records.status import Phase
from guardrail.torch.checkpoint.memory_snapshots import Facts
from guardrail.torch.checkpoint.snapshot_manager import SnapshotManager
from guardrail.torch.guard.command_handler import CommandHandler
from guardrail.torch.guard.context import RunContext
from guardrail.torch.guard.step_metrics import StepMetrics
from guardrail.torch.measure.reduced_step import ReducedStep


class BetweenSteps:
    """Keeps the results of a step until the loop body ends.

    Args:
        facts: returns what is saved with a copy of the state.
        end: ends the run.
    """

    def __init__(
        self,
        ctx: RunContext,
        *,
        metrics: StepMetrics,
        snapshots: SnapshotManager,
        facts: Facts,
        command_handler: CommandHandler,
        end: Callable[[Phase, str], None],
    ) -> None:
        self._ctx = ctx
        self._metrics, self._snapshots, self._facts = metrics, snapshots, facts
        self._command_handler, self._end = command_handler, end
        self._is_applied = False  # an update was applied, and no snapshot was taken since
        self._command = (0, 0.0)  # agreed on in the last reduction
        self._stop = 0  # ranks that were asked to stop, by the same reduction

    def set_applied(self, applied: bool) -> None:
        """Note whether the last step's update was applied."""
        self._is_applied = applied

    def handle_requests(self, reduced: ReducedStep) -> None:
        """Keep a command or a stop that came with a step's numbers; note saves that failed."""
        handler = self._command_handler
        command = (reduced.command_kind, reduced.command_value)
        self._command = command
        if handler.is_done_already:
            self._command = (0, 0.0)
        self._stop = reduced.stop
        handler.is_done_already = False
        self._snapshots.note_failures(reduced.failed_saves)

    def drop_requests(self) -> None:
        """Forget the command and the stop that came with the last step."""
        self._command, self._stop = (0, 0.0), 0

    def finish_previous_step(self) -> float:
        """Write the row of the last step, then copy the state; return the seconds that it took.

        A run that resumes from the copy finds the row of its last step. It continues after all
        that the loop did after that step, such as an evaluation that draws random numbers.
        """
        began = time.perf_counter()
        self._metrics.flush()
        if self._is_applied:
            self._is_applied = False
            controller = self._ctx.controller
            self._snapshots.after_step(
                self._ctx.progress.step,
                is_good=controller.is_good,
                facts=self._facts,
                since=controller.memory.incidents.since,
            )
        return time.perf_counter() - began

    def carry_out_requests(self) -> None:
        """Carry out the stop or the command that came with the last step."""
        (kind, value), self._command = self._command, (0, 0.0)
        if self._stop:
            world = self._ctx.ranks.world
            self._end(Phase.STOPPED, f"asked to stop by a signal on {self._stop} of {world} ranks")
        elif kind:
            self._command_handler.carry_out(kind, value)
