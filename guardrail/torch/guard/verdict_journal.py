"""Write the verdict of a step into the journal, and how it changes an incident."""

from __future__ import annotations

from typing import Any

from guardrail.core.events.decisions import FindingNoted, StepJudged, VerdictGiven
from guardrail.core.records.verdicts import Action, Verdict
from guardrail.decide.advised_incidents import advised_words
from guardrail.decide.incident_line import make_incident_line
from guardrail.torch.checkpoint.snapshot_manager import SnapshotManager
from guardrail.torch.guard.context import RunContext
from guardrail.torch.guard.step import Step


class VerdictJournal:
    """Writes verdicts and incidents; the same on every rank.

    Args:
        snapshots: those after the onset of an open incident are no longer good.
    """

    def __init__(self, ctx: RunContext, snapshots: SnapshotManager) -> None:
        self._ctx, self._snapshots = ctx, snapshots

    def record(self, step: Step, verdict: Verdict, evidence: dict[str, Any]) -> None:
        """Write the findings, and how they change an incident."""
        memory = self._ctx.controller.memory
        if verdict.findings:
            self._write_verdict(step, verdict, evidence)
        if verdict.incident_state:
            self._ctx.recorder.write(make_incident_line(memory, verdict))
        self._snapshots.note_incident(memory.incidents.since)

    def _write_verdict(self, step: Step, verdict: Verdict, evidence: dict[str, Any]) -> None:
        """Write the verdict with its evidence."""
        reason = verdict.reason
        if modules := evidence.get("modules"):
            names = ", ".join(f"{module} on rank {rank}" for rank, module in modules.items())
            reason += f"; first non-finite output: {names}"
        line: type[StepJudged] = VerdictGiven
        what = f"{verdict.action.value} at step"
        if verdict.action is Action.APPLY and verdict.would is None:
            line, what = FindingNoted, "step"
        elif verdict.would is not None and verdict.action in (Action.APPLY, Action.FP16_OVERFLOW):
            what = f"{advised_words(verdict.would.value)} at step"
        would, beyond = None, None
        if verdict.would is not None:
            would = verdict.would.value
        if verdict.beyond is not None:
            beyond = verdict.beyond.value
        self._ctx.recorder.write(
            line(
                message=f"{what} {step.number}: {reason}",
                action=verdict.action.value,
                would=would,
                beyond=beyond,
                findings=verdict.findings,
                onset=verdict.onset,
                window=verdict.window,
                incident=self._ctx.progress.incident,
                batch=(step.batch.first, step.batch.last),
                at_step=step.number,
                **evidence,
            )
        )
