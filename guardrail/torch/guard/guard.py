"""The guard: what a training loop calls.

    guard = Guard(model, optimizer, data=SampleOrder(len(dataset)), batch_size=32)
    for step in guard:                      # after a rollback it continues from the restored step
        loss = train_batch(step.samples)    # forward and backward, accumulation included
        step.finish(loss)                   # judge, clip, then update or skip

Every rank runs this code on the same reduced numbers, so all ranks reach the same verdict at the
same step. Only rank 0 writes the run directory, always before what it writes takes effect.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from guardrail.core.config import GuardConfig
from guardrail.core.events.run_state import Evaluated
from guardrail.core.records.status import Phase
from guardrail.core.records.verdicts import Action, Mode, Verdict
from guardrail.decide.run_history import RunHistory
from guardrail.decide.sample_cursor import Batch
from guardrail.decide.sample_order import SampleOrder
from guardrail.rundir.heartbeat import Heartbeat
from guardrail.rundir.run_directory import RunDirectory
from guardrail.rundir.stop_signals import StopSignals
from guardrail.torch.guard.arguments import check_config, check_hooks, check_layout, check_parts
from guardrail.torch.guard.hooks import LoopHooks, RankLayout
from guardrail.torch.guard.old_arguments import accept_old_arguments
from guardrail.torch.guard.parts import GuardParts
from guardrail.torch.guard.step import Step
from guardrail.torch.measure.loss_scaler import is_enabled
from guardrail.torch.measure.reduced_step import ReducedStep

__all__ = ["Guard", "Step"]


class Guard(GuardParts):
    """Checks each step of a training loop, skips bad updates, rolls back, and writes the journal.

    Args:
        model: any nn.Module: plain, DDP, FSDP2 (`fully_shard`).
        optimizer: one torch.optim optimizer or several.
        data: the sample order.
        batch_size: samples of a global batch, or a function that gives those of step 1, 2, ...
        config: a `GuardConfig`, a dictionary of its sections, or the path of a TOML file; None: the
            defaults. All are converted and checked like a configuration file.
        scheduler: anything with step(), state_dict() and load_state_dict(). The guard steps it once
            for each applied update.
        scaler: for fp16, a torch.amp.GradScaler. Backpropagate `scaler.scale(loss)`, and give
            `step.finish` the loss itself. The guard unscales, steps and updates.
        run: the run directory, the same on all ranks; None: no journal, commands, checkpoints.
        total_steps: applied updates after which the run is finished; 0: endless.
        limit: positions after which the data ends; None: endless.
        clip: global norm to which gradients are clipped; 0: no clipping; or a function of the norm
            (see `Gate`).
        hooks: functions of the loop that the guard calls; None: there are none.
        ranks: how model and data are spread over the ranks; None: each rank has the same model, and
            its own part of each batch.
        signals: stop signals of the process, installed by the caller; None: none.
        heartbeat: created by the caller early in set-up; None: the guard makes its own when there
            is a run.

    Old names of these arguments work too; see guardrail.torch.guard.old_arguments.

    Raises:
        ConfigError: a setting or an argument is not valid; names it and what is expected.
        UsageError: the ranks have different run directories; raised on every rank.
    """

    @accept_old_arguments
    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        data: SampleOrder,
        batch_size: int | Callable[[int], int],
        config: GuardConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        scheduler: Any = None,
        scaler: Any = None,
        run: RunDirectory | None = None,
        total_steps: int = 0,
        limit: int | None = None,
        clip: float | Callable[[float], float] = 1.0,
        hooks: LoopHooks | None = None,
        ranks: RankLayout | None = None,
        signals: StopSignals | None = None,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        rank, world = 0, 1
        if dist.is_initialized():
            rank, world = dist.get_rank(), dist.get_world_size()
        # All arguments are checked before the first collective, so no rank waits for one that
        # raises.
        checked_config = check_config(config)
        given = check_parts(
            {
                "model": model,
                "optimizer": optimizer,
                "scheduler": scheduler,
                "scaler": scaler,
                "data": data,
                "batch_size": batch_size,
                "total_steps": total_steps,
                "limit": limit,
                "clip": clip,
                "run": run,
            }
        )
        super().__init__(
            checked_config,
            rank=rank,
            world=world,
            model=model,
            optimizers=list(optimizer) if isinstance(optimizer, Sequence) else [optimizer],
            scheduler=scheduler,
            scaler=scaler if is_enabled(scaler) else None,
            order=data,
            batch_size=given["batch_size"],
            total_steps=given["total_steps"],
            limit=given["limit"],
            clip=given["clip"],
            run=run,
            hooks=check_hooks(hooks),
            layout=check_layout(ranks, world=world),
            signals=signals,
            heartbeat=heartbeat,
        )

    @classmethod
    def from_config(
        cls,
        config: GuardConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        **arguments: Any,
    ) -> Guard:
        """Return the guard of a custom loop, with its configuration first.

        Args:
            config: a `GuardConfig`, a dictionary of its sections, or the path of a TOML file; None:
                the defaults.
            arguments: those of `Guard`, all by name.

        Raises:
            ConfigError: a setting or an argument is not valid; names it, its value and what is
                expected.
        """
        return cls(config=config, **arguments)

    # -- the loop ----------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Step]:
        try:
            self.open()
            while self.phase is None:
                self.side_effects.discard_rest()
                seconds = self.finish_previous_step()
                self.between_steps.carry_out_requests()
                if self.phase is not None:
                    break
                if self.total_steps and self.step >= self.total_steps:
                    self.end(Phase.FINISHED, f"all {self.total_steps} steps are done")
                    break
                batch = self.cursor.next_batch()
                deferred = self.deferred_gate
                if batch is None and deferred is not None and deferred.pending is not None:
                    deferred.read_result()
                    continue
                if batch is None:
                    self.end(Phase.FINISHED, "the data has ended")
                    break
                step = self._begin_step(batch, seconds)
                yield step
                if not step.finished and self.phase is None:
                    raise RuntimeError("the loop took the next step without step.finish(loss)")
        finally:
            self.side_effects.discard_rest()  # memory then holds what was saved
            self.metrics.flush()
            self.close()

    def _begin_step(self, batch: Batch, seconds: float) -> Step:
        """Return the next step; finishing the previous one has taken `seconds`."""
        self.heartbeat.set_phase(Phase.STEP, self.step + 1)
        if self.step_diagnosis is not None:
            self.step_diagnosis.begin_step(batch)
        began = time.perf_counter()
        repeated = self.deferred_gate is not None and self.deferred_gate.begin()
        self.side_effects.begin()
        step = Step(
            self.finish,
            number=self.step + 1,
            batch=batch,
            began=began - seconds,
            repeated=repeated,
            share=self.data_share.of,
        )
        self.metrics.guarding = seconds + time.perf_counter() - began
        return step

    def finish_previous_step(self) -> float:
        """Write the row of the last step and copy the state; return the seconds that it took."""
        return self.between_steps.finish_previous_step()

    def peek(self, batch: Batch) -> Batch | None:
        """Return the batch after `batch`, if `batch` is applied. A loader may fetch it early."""
        return self.cursor.peek(batch)

    def share_of(self, batch: Batch) -> tuple[int, ...]:
        """Return the ids of this rank's samples of any batch; for the hooks."""
        return self.data_share.of(batch)

    def report_phase(self, phase: Phase) -> None:
        """Report what the loop does between steps. Call it again now and then during long work."""
        if self.phase is None:
            self.heartbeat.set_phase(phase)

    ahead = peek  # its old name
    enter = report_phase  # its old name

    def log_eval(self, loss: float) -> None:
        """Record the held-out loss after the present step (nats per token, equal on all ranks)."""
        self.metrics.set_eval_loss(loss)
        self.context.recorder.write(Evaluated(loss=loss))

    def poll_stop(self) -> bool:
        """Return on every rank whether any was asked to stop. A collective, for long evaluations."""
        return self.command_handler.agree_to_stop()

    # -- start and end -----------------------------------------------------------------------------

    def open(self) -> None:
        """Resume from checkpoint and journal, or begin. The iteration calls it."""
        self._resume_check.require_same_data()
        self.data_share.open()
        self.gate.open()
        if self.run is not None:
            self._open_run(self.run)
        for span in self.history.spans:
            self.cursor.skip_span(span)
        if self.history.mode is not None:
            self.set_mode(self.history.mode)
        self.timeline_switch.open()
        self.checks.note_unreduced_gradients()

    def _open_run(self, run: RunDirectory) -> None:
        """Start the heartbeat, read commands, and read the journal on rank 0 for all."""
        ctx = self.context
        is_first = ctx.ranks.rank == 0
        self.heartbeat.start(run, self.reduction.parameters)
        if is_first:
            self.command_handler.open(run)
        events = ctx.ranks.run_together(lambda: run.events() if is_first else None)
        events = ctx.ranks.broadcast(events)
        ctx.set_history(RunHistory.from_events(events))
        self.controller.rebuild(events)
        if is_first:
            self.heartbeat.write_status(self.status)

    def end(self, phase: Phase, reason: str, *, onset: int | None = None) -> None:
        """End the run: the last checkpoint, the last journal line; see `RunEnd.end`."""
        self._run_end.end(phase, reason, onset=onset)

    def close(self) -> None:
        """Release threads and files. The iteration calls it. May be called again."""
        self.timer.close()
        self.reduction.close()
        self.gate.close()
        self.command_handler.close()
        self.snapshots.close()
        self.context.recorder.close()
        self.heartbeat.close()

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
        """Judge a step and carry the verdict out; see `Step.finish`."""
        began = time.perf_counter()
        deferred = self.deferred_gate
        if deferred is not None and not deferred.read_result():
            self.side_effects.begin_rest()
            return None
        command = None
        if deferred is not None:
            command = deferred.first_command()
        if command is None:
            command = self.command_handler.next(step.number)
        total = loss
        if nominal is None:
            total = loss * tokens
        vector = self.reduction.start(
            total,
            tokens,
            step_time=self.timer.seconds(step.began, began),
            command=command,
            stop=self.stopping,
            incomplete=incomplete,
            failed_save=self.snapshots.failed_save,
            named=signals,
            update_square=self.applier.update_square,
        )
        safe_limits = None
        if deferred is not None:
            safe_limits = deferred.safe_limits(step, wait=wait)
        if deferred is not None and safe_limits is not None:
            self.metrics.measure_since(began)
            deferred.decide(step, vector, safe_limits, nominal=nominal)
            return None
        values, rate = self.applier.device_numbers.read_with(vector)
        computed = self.reduction.unpack(values, nominal, self.applier.loss_scale)
        verdict = self._finish(step, computed, began, rate)
        if not step.applied:
            self.side_effects.begin_rest()
        return verdict

    def _finish(self, step: Step, computed: ReducedStep, began: float, lr: float) -> Verdict | None:
        """Judge what the host has read, and carry the verdict out. `lr`: without any remedy."""
        reduced = computed
        if self.deferred_gate is not None:
            reduced = self.deferred_gate.first_numbers(computed)
        if reduced.incomplete:
            self.verdict_executor.end_incomplete()
            return None
        self.checks.refuse_without_gradients(step, computed)
        rate = lr * self.context.effects(step.number).lr
        before = self.controller.state_dict() if reduced is not computed else None
        observation, verdict = self.judge.judge(step, reduced, lr=rate)
        if before is not None and verdict.action is Action.APPLY:
            # The first numbers are fine, but they are not those of the present gradients.
            self.controller.load_state_dict(before)
            reduced = computed
            observation, verdict = self.judge.judge(step, reduced, lr=rate)
        if self.deferred_gate is not None:
            self.deferred_gate.record(observation.signals)
        self.metrics.measure_since(began)
        verdict = self.verdict_executor.carry_out(step, verdict, reduced, observation)
        self.between_steps.set_applied(step.applied)
        if step.applied:
            self.checks.note_lost_updates(step)
        seconds = time.perf_counter() - step.began
        self.metrics.add(step, reduced, seconds=seconds, guarding=self.metrics.guarding)
        if verdict.findings:
            self.metrics.write_now()
        self.between_steps.handle_requests(reduced)
        return verdict

    # -- where the run stands ----------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Applied updates so far."""
        return self.context.progress.step

    @property
    def timeline(self) -> int:
        """Number of the present timeline; each rollback and restart begins another one."""
        return self.context.progress.timeline

    @property
    def tokens(self) -> int:
        """Label tokens of the applied updates."""
        return self.context.progress.tokens

    @property
    def phase(self) -> Phase | None:
        """How the run has ended; None while it runs."""
        return self.context.progress.phase

    @property
    def mode(self) -> Mode:
        """What the guard may do by itself."""
        return self.context.progress.mode

    @property
    def incident(self) -> int | None:
        """Number of the incident that the present step belongs to."""
        return self.context.progress.incident

    @property
    def history(self) -> RunHistory:
        """What the journal says of the run."""
        return self.context.history

    def set_mode(self, mode: Mode) -> None:
        """Change what the guard may do by itself. Raises ConfigError for an unknown mode."""
        self.context.set_mode(mode)
