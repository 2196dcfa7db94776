"""The guard: what a training loop calls.

    guard = Guard.from_config(settings, model=model, optimizer=optimizer, scheduler=scheduler, data=order)
    for step in guard:                      # rewinds by itself after a rollback
        loss = train_batch(step.batch)      # forward and backward, accumulation included
        step.finish(loss)                   # observe, decide, apply or not

Every rank runs this same code on the same reduced numbers, so all reach the same verdict at the
same step. Rank 0 alone writes the run directory, always before what it writes takes effect.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from guardrail.core.config import GuardConfig
from guardrail.core.records import (
    GRAD_NORM,
    Action,
    CommandKind,
    Mode,
    Observation,
    Phase,
    Span,
    Verdict,
)
from guardrail.decide.controller import Controller
from guardrail.decide.run_history import Effects, RunHistory
from guardrail.decide.sample_order import Batch, SampleCursor, SampleOrder
from guardrail.rundir.heartbeat import Heartbeat
from guardrail.rundir.recorder import Recorder
from guardrail.rundir.run_directory import RunDirectory
from guardrail.rundir.stop_signals import StopSignals
from guardrail.torch.checkpoint.disk_checkpoints import CheckpointStore
from guardrail.torch.checkpoint.snapshot_manager import SnapshotManager
from guardrail.torch.diagnose.attribution import Texts
from guardrail.torch.diagnose.batch_replay import Replay, Replays, Structure
from guardrail.torch.diagnose.embedding_tokens import DescribeTokens
from guardrail.torch.guard.arguments import check_mode, check_names, check_parts, check_settings
from guardrail.torch.guard.command_handler import CommandHandler
from guardrail.torch.guard.deferred_gate import DeferredGate
from guardrail.torch.guard.loop_checks import LoopChecks
from guardrail.torch.guard.quarantine import Describe, Quarantine
from guardrail.torch.guard.step import Step
from guardrail.torch.guard.step_metrics import StepMetrics
from guardrail.torch.guard.timeline_switch import TimelineSwitch
from guardrail.torch.guard.verdict_executor import VerdictExecutor
from guardrail.torch.measure.loss_scaler import LossScale, enabled
from guardrail.torch.measure.rank_timing import GpuMeter, RankTimer
from guardrail.torch.measure.reduction import ReducedStep, StepReduction
from guardrail.torch.measure.update_gate import Gate
from guardrail.torch.measure.update_norm import UpdateNorm
from guardrail.torch.state.forward_side_effects import ForwardSideEffects
from guardrail.torch.state.rank_agreement import require_equal
from guardrail.torch.state.slow_work import T, run_together
from guardrail.torch.state.training_state import TrainingState

__all__ = ["Guard", "Step"]

logger = logging.getLogger(__name__)


class Guard:
    """Watches a training loop, leaves bad updates out, rolls back, keeps the record.

    Args:
        settings: the [guard], [snapshots] and [checkpoint] sections: `Settings(...)`, or a
            dictionary as TOML would give it. Both are converted and checked like a configuration
            file.
        model: any nn.Module: plain, DDP, FSDP2 (`fully_shard`).
        optimizer: one torch.optim optimizer or several.
        scheduler: anything with step(), state_dict() and load_state_dict(); stepped once an applied
        update.
        scaler: for fp16, a torch.amp.GradScaler: backpropagate `scaler.scale(loss)`, hand
            `step.finish` the loss itself, and leave unscaling, stepping and updating to the guard.
        order: the sample order.
        batch_size: samples of a global batch, or a function that gives those of step 1, 2, ...
        total_steps: applied updates after which the run is finished; 0: endless.
        limit: positions after which the data ends; None: endless.
        clip: global norm to which gradients are clipped, 0: none; or a function of the norm (see
        Gate).
        run: the run directory; None keeps everything in memory (no commands, no disk tier).
        device: that computes; None: where the parameters lie, which is the host when they are
        offloaded.
        counting: whether this rank's loss and tokens enter the sums; False on all but one of the
            ranks that compute the same loss, as those of a tensor-parallel group do.
        holders: the ranks, a contiguous stretch, that hold the same part of the model as this one,
            such as a stage of a pipeline; None: all.
        signals: stop signals of the process, installed by the caller; None: none.
        heartbeat: created by the caller early in set-up; None: the guard makes its own when there
        is a run.
        texts: sample ids -> their texts as the model met them, for what is odd about them. Called
        on rank 0.
        describe: sample ids -> (documents as dicts, number of documents), for the journal. Called
        on rank 0.
        tokens: (token ids, sample ids of a batch) -> of each token a dict with "text" and "count",
            for the journal, where the embedding is in trouble. Called on rank 0.
        rerun: runs the forward passes of this rank's share of the last batch again, with the same
            dice. Called on every rank when a loss was not finite, to name the module that it came
            from.
        replay: runs forward and backward over this rank's share of any batch (see
            guardrail.torch.diagnose.batch_replay). With it the cause of an incident is looked for.
            Called on every rank.
        structure: what the order of a batch's labels is worth to the model (see
            guardrail.torch.diagnose.batch_replay). With it text of another kind is told from labels
            that are as good as drawn by lot.
        fixed_loss: loss on one fixed batch, same on every rank; stored with a checkpoint and
        compared after a resume.
        lr_at: the scheduled learning rate as a function of the step, to be compared after a resume.
        identity: fingerprints stored with a checkpoint. A resume on other "data" is refused, any
        other change noted.

    Raises:
        ConfigError: a setting or an argument that cannot be; names it, its value, and what is
        expected.
    """

    def __init__(
        self,
        settings: GuardConfig,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        scheduler: Any = None,
        scaler: Any = None,
        order: SampleOrder,
        batch_size: int | Callable[[int], int],
        total_steps: int = 0,
        limit: int | None = None,
        clip: float | Callable[[float], float] = 1.0,
        run: RunDirectory | None = None,
        device: torch.device | None = None,
        counting: bool = True,
        holders: range | None = None,
        signals: StopSignals | None = None,
        heartbeat: Heartbeat | None = None,
        describe: Describe | None = None,
        texts: Texts | None = None,
        tokens: DescribeTokens | None = None,
        rerun: Callable[[], None] | None = None,
        replay: Replay | None = None,
        structure: Structure | None = None,
        fixed_loss: Callable[[], float] | None = None,
        lr_at: Callable[[int], float] | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        self.settings = settings = check_settings(settings)
        self.rank, self.world = (
            (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        )
        # Everything is looked at before the first collective, so that no rank waits for one that
        # refuses.
        given = check_parts(
            {
                **{
                    "model": model,
                    "optimizer": optimizer,
                    "scheduler": scheduler,
                    "scaler": scaler,
                    "order": order,
                },
                **{
                    "batch_size": batch_size,
                    "total_steps": total_steps,
                    "limit": limit,
                    "clip": clip,
                    "run": run,
                },
                **{
                    "device": device,
                    "counting": counting,
                    "holders": holders,
                    "describe": describe,
                    "texts": texts,
                },
                **{"tokens": tokens, "rerun": rerun, "replay": replay, "structure": structure},
                **{"fixed_loss": fixed_loss, "lr_at": lr_at, "identity": identity},
            },
            world=self.world,
        )
        batch_size, total_steps, limit = given["batch_size"], given["total_steps"], given["limit"]
        clip, device = given["clip"], given["device"]
        self.run = run
        self.total_steps = total_steps
        self.ledger = SampleCursor(order, batch_size=batch_size, limit=limit)
        self.past = RunHistory()
        self.controller = Controller(settings.guard)
        self.probes = StepReduction(
            model,
            rank=self.rank,
            world=self.world,
            device=device,
            holders=holders,
            counting=counting,
            layers=settings.guard.layers,
            named=settings.guard.signals,
            updates=settings.guard.update_norm,
        )
        self.pace = RankTimer(self.probes.parameters)
        self.updates = (
            UpdateNorm(self.probes.parameters, self.probes.weights)
            if settings.guard.update_norm
            else None
        )
        self.recorder = Recorder(
            run,
            active=self.rank == 0,
            learn=lambda event: self.past.add(event),
            columns=[*(f"{GRAD_NORM}/{block}" for block in self.probes.blocks), *self.probes.named],
        )
        optimizers = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
        self.gate = Gate(
            optimizers,
            parameters=self.probes.parameters,
            embedding=self.probes.embedding,
            clip=clip,
        )
        self.loss_scale = LossScale(scaler) if enabled(scaler) else None
        self.state = TrainingState(
            model, optimizers, scheduler, scaler if enabled(scaler) else None, holders
        )
        self.attempt = ForwardSideEffects(self.state)
        self.scheduler = scheduler
        self.optimizers = optimizers
        self._signals = signals
        self.heartbeat = heartbeat
        self.tiers = SnapshotManager(
            settings,
            state=self.state,
            store=self._store(run),
            recorder=self.recorder,
            say=self.say,
            gathered=self.gathered,
            alive=lambda: self.at(Phase.SAVE),
        )
        self.desk = CommandHandler(self)
        self.replays = self._replays(replay, structure) if replay is not None else None
        self.account = StepMetrics(self)
        self.checks = LoopChecks(self)
        self.quarantine = Quarantine(self, describe)
        self.timelines = TimelineSwitch(
            self, fixed_loss=fixed_loss, lr_at=lr_at, identity=identity or {}
        )
        self.verdicts = VerdictExecutor(self, texts=texts, tokens=tokens, rerun=rerun)

        self.step = 0  # applied updates so far
        self.timeline = 0
        self.tokens = 0
        self.phase: Phase | None = None  # set when the run has ended
        self.mode = settings.guard.mode
        self.lagged = DeferredGate(self) if settings.guard.gate == "lagged" else None
        self._to_keep = False  # an update was applied and the tiers do not know of it yet
        self._command = (0, 0.0)  # agreed on in the last reduction, carried out between two steps
        self._stop = 0  # ranks that were asked to stop, by the same reduction
        # the loop is in the rest of its body, after a step that was not applied
        self._resting = False
        self.incident: int | None = None  # that the present step belongs to
        self._data_size: int | None = None  # samples of which the guard may leave a share out
        # the last ones, and what they hold for
        self._effects: tuple[tuple[int, int], Effects] | None = None

    # -- the loop ----------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, settings: GuardConfig, *, data: SampleOrder, **parts: Any) -> Guard:
        """The guard of a custom loop: `data` is the sample order, `parts` the arguments of the
        constructor.

        Raises:
            ConfigError: a setting or an argument that cannot be; names it, its value, and what is
            expected.
        """
        check_names(list(parts), cls.__init__)
        return cls(settings, order=data, **parts)

    def __iter__(self) -> Iterator[Step]:
        try:
            self.open()
            while self.phase is None:
                self._discard_rest()
                kept = self.keep()
                self._obey()
                if self.phase is not None:
                    break
                if self.total_steps and self.step >= self.total_steps:
                    self.end(Phase.FINISHED, f"all {self.total_steps} steps are done")
                    break
                batch = self.ledger.next_batch()
                if batch is None and self.lagged is not None and self.lagged.flight is not None:
                    self.lagged.land()
                    continue
                if batch is None:
                    self.end(Phase.FINISHED, "the data has been passed to its end")
                    break
                self.at(Phase.STEP, self.step + 1)
                began = time.perf_counter()
                repeated = self.lagged is not None and self.lagged.begin()
                self.attempt.begin()
                if self.replays is not None:
                    self.replays.begin()
                step = Step(
                    self, number=self.step + 1, batch=batch, began=began - kept, repeated=repeated
                )
                self.account.guarding = kept + time.perf_counter() - began
                yield step
                if not step.finished and self.phase is None:
                    raise RuntimeError("the loop went on without step.finish(loss)")
        finally:
            self._discard_rest()  # what is left in memory is what was saved
            self.account.flush()
            self.close()

    def keep(self) -> float:
        """Once the loop has done with a step, write its row and then copy the state; returns the
        seconds it took.

        Who resumes from a copy finds the row of its last step, and goes on behind whatever the loop
        did after that step, such as an evaluation that draws random numbers.
        """
        began = time.perf_counter()
        self.account.flush()
        if self._to_keep:
            self._to_keep = False
            controller = self.controller
            self.tiers.after_step(
                self.step,
                is_good=controller.is_good,
                facts=self.timelines.facts,
                since=controller.incidents.since,
            )
        return time.perf_counter() - began

    def _obey(self) -> None:
        """Carry out the stop or the command that came with the last step."""
        (kind, value), self._command = self._command, (0, 0.0)
        if self._stop:
            self.end(
                Phase.STOPPED, f"asked to stop by a signal on {self._stop} of {self.world} ranks"
            )
        elif kind:
            self.desk.execute(list(CommandKind)[kind - 1], value)

    @property
    def stopping(self) -> bool:
        """Whether this process was asked to stop; all ranks learn of it in the next reduction."""
        return self._signals is not None and self._signals.requested

    def ahead(self, batch: Batch) -> Batch | None:
        """The batch that follows `batch` if it is applied: what a loader may fetch meanwhile."""
        return self.ledger.after(batch)

    def enter(self, phase: Phase) -> None:
        """Say what the loop does between steps, and that it gets ahead; call it again now and
        then.
        """
        if self.phase is None:
            self.at(phase)

    def log_eval(self, loss: float) -> None:
        """Record the held-out loss after the present step (nats a token, equal on all ranks)."""
        self.account.evaluated(loss)
        self.say("eval", f"held-out loss {loss:.4f} after step {self.step}", loss=loss)

    def poll_stop(self) -> bool:
        """Agree on whether any rank was asked to stop. For long phases between steps (evaluation);
        a collective.
        """
        return self.desk.agree((0, 0.0))[2] > 0

    # -- start and end -----------------------------------------------------------------------------

    def open(self) -> None:
        """Resume from checkpoint + journal, or begin; called by the iteration."""
        order = self.ledger.order
        require_equal(
            {
                "the number of samples": order.n_samples,
                "the seed of the sample order": order.seed,
                "the sample order": "shuffled" if order.shuffled else "as stored",
                **{
                    f"the fingerprint of {name}": value
                    for name, value in self.timelines.identity.items()
                },
            },
            self.gathered,
        )
        self.gate.open()
        if self.run is not None:
            if self.heartbeat is None:
                self.heartbeat = Heartbeat(self.run, self.rank).start()
            self.heartbeat.meter = (
                GpuMeter(self.probes.parameters[0].device) if self.probes.parameters else None
            )
            if self.rank == 0:
                self.desk.open(self.run)
            run = self.run
            events = self.shared(self.slow_work(lambda: run.events() if self.rank == 0 else None))
            self.past, self._effects = RunHistory.of(events), None
            self.controller.rebuild(events)
            if self.rank == 0:
                self.heartbeat.status = self.account.status
        for span in self.past.spans:
            self.ledger.leave_out(span)
        if self.past.mode is not None:
            self.set_mode(self.past.mode)
        self.timelines.open()

    def end(self, phase: Phase, reason: str, *, onset: int | None = None) -> None:
        """A deliberate end: the last checkpoint, the last word in the journal.

        A run whose end could not be saved has failed, whatever it was about to be: a resume goes on
        with it.

        Args:
            onset: first step of an incident that nothing was done about: no resume begins with what
            holds it.
        """
        self.account.flush()
        self.at(Phase.SAVE)
        unsaved = self._unsaved(onset)
        planned = phase
        if unsaved:
            phase = Phase.FAILED
            reason = f"{planned.value}: {reason}; but {unsaved}. Resume the run when the disk takes writes again"
        self.phase = phase
        self.say(
            "ended",
            f"{phase.value} at step {self.step}: {reason}",
            phase=phase.value,
            reason=reason,
            saved=not unsaved,
            planned=planned.value,
        )
        if self.rank == 0 and phase in (Phase.HALTED, Phase.FAILED):
            # The loop just ends. Without this a script would go on as if all of its steps had been
            # made.
            logger.error("guardrail: %s at step %d: %s", phase.value, self.step, reason)
        self.at(phase)

    def _unsaved(self, onset: int | None) -> str:
        """Save the end of the run; what of it could not be written and why, "" when all of it is. A
        collective.
        """
        why = self.tiers.finish(self.timelines.facts, onset=onset)
        if why:
            return f"the final checkpoint could not be written ({why})"
        self.slow_work(self.recorder.settle)
        journal = self.gathered(self.recorder.waiting_because)[0]
        return f"the journal could not be written ({journal})" if journal else ""

    def close(self) -> None:
        """Release threads and files. Part of the iteration's `finally`; harmless when called
        again.
        """
        self.pace.close()
        self.probes.close()
        self.gate.close()
        self.desk.close()
        self.tiers.close()
        self.recorder.close()
        if self.heartbeat is not None:
            self.heartbeat.stop()
            self.heartbeat = None

    # -- one step ----------------------------------------------------------------------------------

    def finish(
        self,
        step: Step,
        loss: Tensor,
        tokens: Tensor | float,
        nominal: float | None,
        incomplete: bool,
        signals: Mapping[str, Tensor | float] | None,
        wait: bool,
    ) -> Verdict | None:
        """What `Step.finish` does; see there."""
        began = time.perf_counter()
        lagged = self.lagged
        if lagged is not None and not lagged.land():
            self._expect_rest()
            return None
        vector = self.probes.launch(
            loss if nominal is not None else loss * tokens,
            tokens,
            step_time=self.pace.seconds(step.began, began),
            command=(lagged.command() if lagged is not None else None)
            or self.desk.next(step.number),
            stop=self.stopping,
            incomplete=incomplete,
            failed_save=self.tiers.failed_save,
            named=signals,
            update_square=self.updates.square if self.updates is not None else None,
        )
        safe_limits = lagged.safe_limits(step, wait=wait) if lagged is not None else None
        if lagged is not None and safe_limits is not None:
            self.account.guarding += time.perf_counter() - began
            lagged.launch(step, vector, safe_limits, nominal=nominal)
            return None
        scale = self.loss_scale.value if self.loss_scale is not None else None
        verdict = self._finish(step, self.probes.unpack(vector.tolist(), nominal, scale), began)
        if not step.applied:
            self._expect_rest()
        return verdict

    def _expect_rest(self) -> None:
        """A step is not applied, and its loop body may go on to draw random numbers: remember how
        things stand.
        """
        self.attempt.begin()
        self._resting = True

    def _discard_rest(self) -> None:
        """Undo what the loop did after `finish` with a step that was not applied: the next try
        begins without it.
        """
        if self._resting:
            self._resting = False
            self.attempt.undo()

    def _finish(self, step: Step, computed: ReducedStep, began: float) -> Verdict | None:
        """Judge what the host has read, and carry the verdict out."""
        reduced = computed if self.lagged is None else self.lagged.first_numbers(computed)
        if reduced.incomplete:
            self.end_incomplete()
            return None
        self.checks.refuse_without_gradients(step, computed)
        before = self.controller.state_dict() if reduced is not computed else None
        observation, verdict = self.judge(step, reduced, lr=self.rate(step.number))
        if before is not None and verdict.action is Action.APPLY:
            # Nothing wrong with the first numbers, and they are not those of the gradients at hand.
            self.controller.load_state_dict(before)
            reduced = computed
            observation, verdict = self.judge(step, reduced, lr=self.rate(step.number))
        self.account.guarding += time.perf_counter() - began
        verdict = self.verdicts.carry_out(step, verdict, reduced, observation)
        self._to_keep = step.applied
        if step.applied:
            self.checks.note_lost_updates(step)
        seconds = time.perf_counter() - step.began
        self.account.add(step, reduced, seconds=seconds, guarding=self.account.guarding)
        if verdict.findings:
            self.account.write()
        self.heed(reduced)
        return verdict

    def rate(self, step: int) -> float:
        """The learning rate that an update of this step is made with."""
        return float(self.optimizers[0].param_groups[0]["lr"]) * self.effects(step).lr

    def judge(self, step: Step, reduced: ReducedStep, *, lr: float) -> tuple[Observation, Verdict]:
        """What the controller says of a step's numbers; begins its row."""
        observation = Observation(
            step=step.number,
            first=step.batch.first,
            last=step.batch.last,
            signals=reduced.signals(),
            nonfinite_loss=reduced.nonfinite_loss,
            nonfinite_grad=reduced.nonfinite_grad,
            tokens=reduced.tokens,
            streak=step.batch.streak,
            overflow=reduced.overflow,
        )
        if reduced.lacking:
            self.checks.name_lacking(step)
        bands = self.controller.bands()
        verdict = self.controller.observe(observation)
        step.verdict = verdict
        self.account.begin(step, reduced, verdict, bands, lr)
        if self.lagged is not None:
            self.lagged.saw(observation.signals)
        return observation, verdict

    def heed(self, reduced: ReducedStep) -> None:
        """Keep a command or a stop that came with a step's numbers until the loop has done with the
        step.
        """
        command = (reduced.command_kind, reduced.command_value)
        self._command, self._stop = (0, 0.0) if self.desk.obeyed else command, reduced.stop
        self.desk.obeyed = False
        self.tiers.note_failures(reduced.failed_saves)

    def applied(self) -> None:
        """An update was applied; the tiers hear of it when the loop has done with the step."""
        self._to_keep = True

    def end_incomplete(self) -> None:
        """Some rank was asked to stop and left a part of the batch out."""
        self.attempt.undo()
        self.gate.leave_out()
        self.end(Phase.STOPPED, "asked to stop; the unfinished batch was given back")

    def effects(self, step: int) -> Effects:
        """What the update of a step is made with: what a person has set, and remedies. A new line
        may change it.
        """
        key, known = (step, self.past.lines), self._effects  # the heartbeat's thread asks too
        if known is None or known[0] != key:
            known = self._effects = key, self.past.effects(step, self.settings.guard)
        return known[1]

    def over_share(self, span: Span) -> str:
        """Why the guard may not leave a span out by itself; "" where it may. See
        `guard.max_skipped_share`.
        """
        if self._data_size is None:
            self._data_size = self.ledger.data_size(self.total_steps)
        share = self.settings.guard.max_skipped_share
        return self.ledger.over_share(span, share=share, data=self._data_size)

    def set_mode(self, mode: Mode) -> None:
        self.mode = check_mode(mode)
        self.controller.set_mode(self.mode)

    def say(self, kind: str, message: str, **data: Any) -> None:
        self.recorder.event(kind, message, step=self.step, timeline=self.timeline, **data)

    def _replays(self, replay: Replay, structure: Structure | None) -> Replays:
        scale = self.loss_scale
        return Replays(
            replay,
            structure,
            state=self.state,
            probes=self.probes,
            loss_scale=lambda: scale.value if scale is not None else None,
            gathered=self.gathered,
            alive=lambda: self.at(Phase.STEP, self.step + 1),
        )

    # -- small things ------------------------------------------------------------------------------

    def at(self, phase: Phase, step: int | None = None) -> None:
        if self.heartbeat is not None:
            self.heartbeat.at(phase, self.step if step is None else step)

    def _store(self, run: RunDirectory | None) -> CheckpointStore | None:
        if run is None:
            return None
        guard, checkpoint = self.settings.guard, self.settings.checkpoint
        return CheckpointStore(
            run.checkpoints,
            self.state,
            rank=self.rank,
            world=self.world,
            keep=checkpoint.keep,
            delay_steps=2 * guard.divergence_steps + guard.window_before + guard.confirm,
            retry_seconds=checkpoint.retry_seconds,
            commit_seconds=self.settings.launch.save_seconds,
        )

    def shared(self, value: Any) -> Any:
        """Rank 0's value on every rank: facts read from the disk once, at a start."""
        if self.world == 1:
            return value
        box = [value if self.rank == 0 else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def slow_work(self, work: Callable[[], T]) -> T:
        """`work()` of this rank, once all ranks have done theirs: none waits in a collective for a
        slow disk.
        """
        return run_together(work, self.gathered, world=self.world)

    def gathered(self, value: Any) -> list[Any]:
        if self.world == 1:
            return [value]
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, value)
        return everyone
