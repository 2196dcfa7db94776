"""Find the cause of an incident, and the bad samples of a skipped batch."""

from __future__ import annotations

from guardrail.core.events.run_state import Note
from guardrail.core.records.verdicts import Action, Diagnosis, Mode, Verdict
from guardrail.decide.sample_cursor import Batch
from guardrail.torch.checkpoint.memory_snapshots import SnapshotRing
from guardrail.torch.diagnose.attribution import Attribution, attribute_samples
from guardrail.torch.diagnose.batch_replay import Replays, needs_measurement
from guardrail.torch.diagnose.cause_test import FAR, CauseTest
from guardrail.torch.guard.context import RunContext
from guardrail.torch.guard.step import Step
from guardrail.torch.measure.reduced_step import ReducedStep


class StepDiagnosis:
    """Replays batches at a rejected step. Collectives; the run stays unchanged.

    Args:
        replays: runs forward and backward passes.
        ring: older snapshots.
        total_steps: applied updates after which the run is finished; 0: only the data ends it.
    """

    def __init__(
        self, ctx: RunContext, *, replays: Replays, ring: SnapshotRing, total_steps: int = 0
    ) -> None:
        self._ctx = ctx
        self._replays, self._ring, self._total_steps = replays, ring, total_steps

    def begin_step(self, batch: Batch) -> None:
        """Prepare for the step of `batch`, before its forward pass.

        Before the first step of this process, the journal notes whether a pass gives the same bits
        twice. That takes two passes. None is run where the bits cannot differ.
        """
        replays, ctx = self._replays, self._ctx
        replays.start_attempt()
        is_known = replays.repeatability is not None
        if is_known or not needs_measurement(replays.reduction.device):
            return
        found = replays.measure_repeatability(batch, step=ctx.progress.step + 1)
        repeatable = {"kernels": found.kernels, "reduction": found.reduction}
        ctx.recorder.write(Note(message=found.sentence(), data={"repeatable": repeatable}))

    def find_cause(self, step: Step, verdict: Verdict, reduced: ReducedStep) -> Diagnosis:
        """Return the cause of the incident that a rejected step belongs to."""
        ctx = self._ctx
        settings = ctx.controller.settings
        has_pause = any(one.action == "pause" for one in settings.escalation)
        reach = 0
        if settings.new_data == "accept":
            reach = FAR * settings.max_data_skips
        test = CauseTest(self._replays, ledger=ctx.order, ring=self._ring)
        return test.run(
            step.batch,
            verdict=verdict,
            reduced=reduced,
            applied=ctx.controller.applied,
            reach=reach,
            end=self._total_steps,
            # a user may still apply the update
            keep_gradients=ctx.progress.mode is Mode.ASK or has_pause,
        )

    def find_bad_samples(self, batch: Batch, verdict: Verdict) -> Attribution | None:
        """Return the samples that make a skipped batch bad.

        None: the batch is not skipped, or its data is not known to be the cause.
        """
        ctx = self._ctx
        if verdict.incident is None or verdict.action is not Action.SKIP:
            return None
        known = ctx.controller.memory.diagnoses.by_incident.get(verdict.incident)
        if known is None or not known.cause.of_data:
            return None
        return attribute_samples(
            batch,
            verdict=verdict,
            replays=self._replays,
            ledger=ctx.order,
            applied=ctx.controller.applied,
        )
