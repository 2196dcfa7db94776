"""The status of a run, for status.json and the screens."""

from __future__ import annotations

import time

from guardrail.core.records.status import Phase, Status
from guardrail.torch.checkpoint.snapshot_manager import SnapshotManager
from guardrail.torch.guard.command_handler import CommandHandler
from guardrail.torch.guard.context import RunContext
from guardrail.torch.guard.step_metrics import StepMetrics
from guardrail.torch.guard.versions import VERSIONS


class RunStatus:
    """Makes the status of one run.

    Args:
        total_steps: applied updates after which the run is finished; 0: only the data ends it.
    """

    def __init__(
        self,
        ctx: RunContext,
        *,
        total_steps: int,
        metrics: StepMetrics,
        snapshots: SnapshotManager,
        command_handler: CommandHandler,
    ) -> None:
        self._ctx = ctx
        self._total_steps = total_steps
        self._metrics, self._snapshots, self._commands = metrics, snapshots, command_handler
        self._started = time.time()

    def current(self) -> Status:
        """Return the present state; the heartbeat's thread calls this too."""
        ctx, progress, question = self._ctx, self._ctx.progress, self._commands.question
        total = self._steps_in_all()
        unresolved = ctx.controller.unresolved()
        if unresolved is not None:
            unresolved = ctx.history.unresolved(unresolved)
        name = ""
        if ctx.run is not None:
            name = ctx.run.name
        return Status(
            run=name,
            phase=progress.phase or Phase.STEP,
            step=progress.step,
            total_steps=total,
            cursor=ctx.order.cursor,
            timeline=progress.timeline,
            mode=progress.mode,
            disk=ctx.recorder.disk,
            commands_problem=self._commands.problem,
            question=question.text,
            question_number=question.number,
            deadline=question.deadline,
            default=question.default,
            tokens=progress.tokens,
            tokens_per_second=self._metrics.tokens_per_second,
            eta_seconds=self._metrics.seconds_for(max(0, total - progress.step)),
            lr_factor=ctx.effects(progress.step + 1).lr,
            unresolved=unresolved,
            guard_share=self._metrics.guard_share,
            started=self._started,
            world=ctx.ranks.world,
            versions=VERSIONS,
            snapshots=self._snapshots.infos,
        )

    def _steps_in_all(self) -> int:
        """Return the number of applied updates of the complete run; 0: it is endless."""
        order = self._ctx.order
        if self._total_steps or order.limit is None:
            return self._total_steps
        # The run is given in epochs. Each later skip makes it shorter.
        return self._ctx.progress.step + order.batches_left()
