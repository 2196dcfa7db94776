"""Build and connect the parts of a guard. Only this module knows every part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from guardrail.core.config import GuardConfig
from guardrail.core.events.event import Event
from guardrail.core.records.signals import GRAD_NORM
from guardrail.core.records.status import Phase, Status
from guardrail.decide.controller import Controller
from guardrail.decide.run_history import RunHistory
from guardrail.decide.sample_cursor import SampleCursor
from guardrail.decide.sample_order import SampleOrder
from guardrail.rundir.heartbeat import Heartbeat
from guardrail.rundir.run_directory import RunDirectory
from guardrail.rundir.stop_signals import StopSignals
from guardrail.torch.checkpoint.disk_checkpoints import CheckpointStore
from guardrail.torch.checkpoint.snapshot_manager import SnapshotManager
from guardrail.torch.diagnose.batch_replay import Replays, assumed_tolerance
from guardrail.torch.guard.between_steps import BetweenSteps
from guardrail.torch.guard.command_actions import GuardActions
from guardrail.torch.guard.command_handler import CommandHandler
from guardrail.torch.guard.context import Progress, RankInfo, RunContext, RunRecorder
from guardrail.torch.guard.data_share import DataShare
from guardrail.torch.guard.deferred_gate import DeferredGate
from guardrail.torch.guard.guarded_scheduler import GuardedScheduler
from guardrail.torch.guard.hooks import LoopHooks, RankLayout
from guardrail.torch.guard.loop_checks import LoopChecks
from guardrail.torch.guard.quarantine import Quarantine
from guardrail.torch.guard.rank_heartbeat import RankHeartbeat
from guardrail.torch.guard.resume_check import ResumeCheck
from guardrail.torch.guard.run_end import RunEnd
from guardrail.torch.guard.run_status import RunStatus
from guardrail.torch.guard.side_effects import StepSideEffects
from guardrail.torch.guard.step_diagnosis import StepDiagnosis
from guardrail.torch.guard.step_evidence import StepEvidence
from guardrail.torch.guard.step_judge import StepJudge
from guardrail.torch.guard.step_metrics import StepMetrics
from guardrail.torch.guard.timeline_switch import TimelineSwitch
from guardrail.torch.guard.update_applier import UpdateApplier
from guardrail.torch.guard.verdict_executor import VerdictExecutor
from guardrail.torch.measure.loss_scaler import LossScale
from guardrail.torch.measure.rank_timing import RankTimer
from guardrail.torch.measure.reduction import StepReduction
from guardrail.torch.measure.update_gate import Gate
from guardrail.torch.measure.update_norm import UpdateNorm
from guardrail.torch.state.rank_agreement import require_same_run
from guardrail.torch.state.training_state import TrainingState
from guardrail.torch.state.wrappers import combines_gradients


class GuardParts:
    """Builds the parts of a guard; `Guard` adds the loop.

    Args:
        config: checked.
        rank, world: of the default process group.
        model, optimizers, scheduler, order, batch_size, total_steps, limit, clip, run, hooks,
            signals, heartbeat: checked arguments of `Guard`.
        scaler: of fp16; None: nothing scales the loss.
        layout: where the model and the data are.
    """

    def __init__(
        self,
        config: GuardConfig,
        *,
        rank: int,
        world: int,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        scheduler: Any,
        scaler: Any,
        order: SampleOrder,
        batch_size: int | Callable[[int], int],
        total_steps: int,
        limit: int | None,
        clip: float | Callable[[float], float],
        run: RunDirectory | None,
        hooks: LoopHooks,
        layout: RankLayout,
        signals: StopSignals | None,
        heartbeat: Heartbeat | None,
    ) -> None:
        self.config = config
        self.run = run
        self.total_steps = total_steps
        self.scheduler = scheduler
        self.optimizers = optimizers
        self._signals = signals
        self.cursor = SampleCursor(order, batch_size=batch_size, limit=limit)
        self.controller = Controller(config.guard)
        self.reduction = StepReduction(
            model,
            rank=rank,
            world=world,
            device=layout.device,
            holders=layout.shard_ranks,
            counting=layout.counts_loss,
            layers=config.guard.log_block_norms,
            named=config.guard.extra_signals,
            updates=config.guard.log_update_norm,
        )
        self.timer = RankTimer(self.reduction.parameters)
        self.update_norm: UpdateNorm | None = None
        if config.guard.log_update_norm:
            self.update_norm = UpdateNorm(self.reduction.parameters, self.reduction.weights)
        self.gate = Gate(
            optimizers,
            parameters=self.reduction.parameters,
            embedding=self.reduction.embedding,
            clip=clip,
        )
        self.loss_scale: LossScale | None = None
        if scaler is not None:
            self.loss_scale = LossScale(scaler)
        self.state = TrainingState(model, optimizers, scheduler, scaler, layout.shard_ranks)
        self.side_effects = StepSideEffects(self.state)
        self.context = self._build_context(rank, world)
        self._require_same_run()
        self.data_share = DataShare(self.context.ranks, layout)
        averages_gradients = layout.shard_ranks is not None or combines_gradients(model)
        self._build_parts(hooks, heartbeat, averages_gradients)
        self._build_commands()
        self._build_gates(hooks)

    def _build_context(self, rank: int, world: int) -> RunContext:
        reduction = self.reduction
        progress = Progress(mode=self.config.guard.mode)
        blocks = [f"{GRAD_NORM}/{block}" for block in reduction.blocks]

        def learn(event: Event) -> None:
            self.context.history.add(event)

        recorder = RunRecorder(
            self.run,
            progress=progress,
            active=rank == 0,
            learn=learn,
            columns=[*blocks, *reduction.named],
        )
        return RunContext(
            config=self.config,
            ranks=RankInfo(rank=rank, world=world, device=reduction.device, dtype=reduction.dtype),
            recorder=recorder,
            order=self.cursor,
            history=RunHistory(),
            controller=self.controller,
            progress=progress,
            run=self.run,
        )

    def _require_same_run(self) -> None:
        """Check that all ranks have the same run directory, before they use it together."""
        path = None
        if self.run is not None:
            path = self.run.path
        require_same_run(path, self.context.ranks.gather)

    def _build_parts(
        self, hooks: LoopHooks, heartbeat: Heartbeat | None, averages_gradients: bool
    ) -> None:
        ctx = self.context
        self.heartbeat = RankHeartbeat(ctx, heartbeat)
        set_phase = self.heartbeat.set_phase
        self.metrics = StepMetrics(ctx, set_step_time=self.heartbeat.set_step_time)
        guarded_scheduler = GuardedScheduler(self.scheduler)
        self.applier = UpdateApplier(
            ctx,
            self.gate,
            self.loss_scale,
            guarded_scheduler,
            self.update_norm,
            state=self.state,
            metrics=self.metrics,
        )
        self.checks = LoopChecks(
            ctx,
            reduction=self.reduction,
            learning_rate=self.applier.learning_rate,
            averages_gradients=averages_gradients,
        )
        self.judge = StepJudge(ctx, checks=self.checks, metrics=self.metrics)
        self.snapshots = SnapshotManager(
            self.config,
            state=self.state,
            store=self._store(),
            recorder=ctx.recorder,
            gather=ctx.ranks.gather,
            report_progress=lambda: set_phase(Phase.SAVE),
        )
        self.quarantine = Quarantine(
            ctx, describe_samples=hooks.describe_samples, total_steps=self.total_steps
        )
        self._resume_check = ResumeCheck(
            ctx,
            reduction=self.reduction,
            fixed_batch_loss=hooks.fixed_batch_loss,
            scheduled_lr=hooks.scheduled_lr,
            fingerprints=hooks.fingerprints,
        )
        self.timeline_switch = TimelineSwitch(
            ctx,
            self.snapshots,
            self.quarantine,
            resume_check=self._resume_check,
            state=self.state,
            scheduler=guarded_scheduler,
            update_norm=self.update_norm,
            set_phase=set_phase,
        )
        self._run_end = RunEnd(
            ctx,
            metrics=self.metrics,
            snapshots=self.snapshots,
            facts=self.timeline_switch.facts,
            set_phase=set_phase,
        )

    def _build_commands(self) -> None:
        ctx = self.context
        actions = GuardActions(
            ctx,
            snapshots=self.snapshots,
            quarantine=self.quarantine,
            timeline_switch=self.timeline_switch,
            end=self._run_end.end,
            status=self.status,
            set_phase=self.heartbeat.set_phase,
            is_stop_requested=lambda: self.stopping,
        )
        self.command_handler = CommandHandler(ctx, actions)
        self._run_status = RunStatus(
            ctx,
            total_steps=self.total_steps,
            metrics=self.metrics,
            snapshots=self.snapshots,
            command_handler=self.command_handler,
        )
        self.between_steps = BetweenSteps(
            ctx,
            metrics=self.metrics,
            snapshots=self.snapshots,
            facts=self.timeline_switch.facts,
            command_handler=self.command_handler,
            end=self._run_end.end,
        )

    def _build_gates(self, hooks: LoopHooks) -> None:
        ctx = self.context
        self.replays = self._build_replays(hooks)
        self.step_diagnosis: StepDiagnosis | None = None
        if self.replays is not None:
            self.step_diagnosis = StepDiagnosis(
                ctx,
                replays=self.replays,
                ring=self.snapshots.ring,
                total_steps=self.total_steps,
            )
        evidence = StepEvidence(
            ctx,
            reduction=self.reduction,
            state=self.state,
            rerun_forward=hooks.rerun_forward,
            describe_tokens=hooks.describe_tokens,
        )
        self.verdict_executor = VerdictExecutor(
            ctx,
            self.applier,
            self.quarantine,
            self.timeline_switch,
            snapshots=self.snapshots,
            metrics=self.metrics,
            side_effects=self.side_effects,
            evidence=evidence,
            diagnosis=self.step_diagnosis,
            ask=self.command_handler.park,
            end=self._run_end.end,
            sample_texts=hooks.sample_texts,
        )
        self.deferred_gate: DeferredGate | None = None
        if self.config.guard.decide == "deferred":
            self.deferred_gate = DeferredGate(
                ctx,
                self.applier,
                reduction=self.reduction,
                metrics=self.metrics,
                judge=self.judge,
                executor=self.verdict_executor,
                side_effects=self.side_effects,
                between_steps=self.between_steps,
                needs_outcome=self._needs_outcome,
                tolerance=self._tolerance,
            )

    def _build_replays(self, hooks: LoopHooks) -> Replays | None:
        if hooks.replay is None:
            return None
        ctx = self.context
        return Replays(
            hooks.replay,
            hooks.label_order_gain,
            state=self.state,
            reduction=self.reduction,
            loss_scale=lambda: self.applier.loss_scale,
            gather=ctx.ranks.gather,
            report_progress=lambda: self.heartbeat.set_phase(Phase.STEP, ctx.progress.step + 1),
        )

    def _store(self) -> CheckpointStore | None:
        if self.run is None:
            return None
        guard, checkpoint = self.config.guard, self.config.checkpoint
        return CheckpointStore(
            self.run.checkpoints,
            self.state,
            rank=self.context.ranks.rank,
            world=self.context.ranks.world,
            keep=checkpoint.keep,
            delay_steps=2 * guard.detectors.divergence.steps
            + guard.skip_before
            + guard.steps_until_good,
            retry_seconds=checkpoint.retry_seconds,
            commit_seconds=self.config.launch.save_timeout,
        )

    def _tolerance(self) -> float:
        """Return the relative difference within which two computations of a step are the same."""
        if self.replays is None:
            return assumed_tolerance(self.reduction.device)
        return self.replays.tolerance

    def _needs_outcome(self, step: int) -> bool:
        """Return whether the run ends, or the state is copied, right after a step."""
        return step == self.total_steps or self.snapshots.will_copy(step)

    @property
    def stopping(self) -> bool:
        """Whether this process was asked to stop. The next reduction reports it to all ranks."""
        return self._signals is not None and self._signals.requested

    def status(self) -> Status:
        """Return the present state of the run."""
        return self._run_status.current()
