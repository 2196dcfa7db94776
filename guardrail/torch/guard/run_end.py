"""The deliberate end of a run: the last checkpoint and the last journal line."""

from __future__ import annotations

import logging
from collections.abc import Callable

from guardrail.core.events.run_state import Ended
from guardrail.core.records.status import Phase
from guardrail.torch.checkpoint.memory_snapshots import Facts
from guardrail.torch.checkpoint.snapshot_manager import SnapshotManager
from guardrail.torch.guard.context import RunContext
from guardrail.torch.guard.step_metrics import StepMetrics

logger = logging.getLogger(__name__)


class RunEnd:
    """Ends one run; every rank calls it at the same step.

    Args:
        metrics: whose last row is written first.
        snapshots: write the last checkpoint.
        facts: returns what is saved with that checkpoint.
        set_phase: reports what this rank does.
    """

    def __init__(
        self,
        ctx: RunContext,
        *,
        metrics: StepMetrics,
        snapshots: SnapshotManager,
        facts: Facts,
        set_phase: Callable[[Phase], None],
    ) -> None:
        self._ctx = ctx
        self._metrics, self._snapshots = metrics, snapshots
        self._facts, self._set_phase = facts, set_phase

    def end(self, phase: Phase, reason: str, *, onset: int | None = None) -> None:
        """Save, write the last journal line, and set `progress.phase`.

        A run whose end could not be saved has failed, whichever phase was planned. A resume
        continues it.

        Args:
            phase: how the run ends.
            onset: first step of an incident that was not resolved. No resume begins from a state
                with that step.
        """
        ctx, step = self._ctx, self._ctx.progress.step
        self._metrics.flush()
        self._set_phase(Phase.SAVE)
        unsaved = self._unsaved(onset)
        planned = phase
        if unsaved:
            phase = Phase.FAILED
            reason = f"{planned.value}: {reason}; but {unsaved}. Resume the run when the disk can be written"
        ctx.progress.phase = phase
        ctx.recorder.write(
            Ended(phase=phase.value, reason=reason, saved=not unsaved, planned=planned.value)
        )
        if ctx.ranks.rank == 0 and phase in (Phase.HALTED, Phase.FAILED):
            # The loop ends without an exception. Only this line shows a script that steps are
            # missing.
            logger.error("guardrail: %s at step %d: %s", phase.value, step, reason)
        self._set_phase(phase)

    def _unsaved(self, onset: int | None) -> str:
        """Save; return what could not be written and why, "" when all was. A collective."""
        ctx = self._ctx
        why = self._snapshots.save_final(self._facts, onset=onset)
        if why:
            return f"the final checkpoint could not be written ({why})"
        ctx.ranks.run_together(ctx.recorder.settle)
        journal = ctx.ranks.gather(ctx.recorder.waiting_because)[0]
        if journal:
            return f"the journal could not be written ({journal})"
        return ""
