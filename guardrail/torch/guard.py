"""The guard: what a training loop calls.

    guard = Guard.from_config(settings, model=model, optimizer=optimizer, scheduler=scheduler, data=order)
    for step in guard:                      # rewinds by itself after a rollback
        loss = train_batch(step.batch)      # forward and backward, accumulation included
        step.finish(loss)                   # observe, decide, apply or not

Every rank runs this same code on the same reduced numbers, so all reach the same verdict at the same step. Rank 0
alone writes the run directory, always before what it writes takes effect.
"""

from __future__ import annotations

import math
import platform
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn

from guardrail.config import Settings
from guardrail.controller import Controller
from guardrail.errors import UsageError
from guardrail.heartbeat import Heartbeat
from guardrail.ledger import Batch, Ledger, SampleOrder
from guardrail.past import Effects, Past
from guardrail.recorder import Recorder
from guardrail.records import (
    GRAD_NORM,
    LOSS,
    MAX_NAMED,
    Action,
    Cause,
    CommandKind,
    Diagnosis,
    Kind,
    Mode,
    Observation,
    Phase,
    Remedy,
    Span,
    Status,
    Verdict,
)
from guardrail.rundir import RunDirectory
from guardrail.signals import StopSignals
from guardrail.torch import rng
from guardrail.torch.attempt import Attempt
from guardrail.torch.attribution import Attribution, Texts, attribute, told
from guardrail.torch.blame import first_nonfinite
from guardrail.torch.cause import CauseTest
from guardrail.torch.checkpoints import CheckpointStore
from guardrail.torch.desk import Answer, Desk
from guardrail.torch.gate import Gate
from guardrail.torch.probes import Probes, Reduced
from guardrail.torch.replays import Replay, Replays
from guardrail.torch.scaling import LossScale, enabled
from guardrail.torch.state import TrainingState
from guardrail.torch.tiers import Restored, Target, Tiers
from guardrail.torch.updates import UpdateNorm
from guardrail.undoing import Undoing

VERSIONS = {"python": platform.python_version(), "torch": torch.__version__, "guardrail": version("guardrail")}

# (rejected try, its verdict, its numbers) -> the cause of its incident; a collective that leaves the run as it was.
Judge = Callable[["Step", Verdict, Reduced], Diagnosis]
Describe = Callable[[Sequence[int]], tuple[list[dict[str, Any]], int]]


class Step:
    """One try at an update. `number` is the step it becomes when it is applied."""

    def __init__(self, guard: Guard, *, number: int, batch: Batch, began: float) -> None:
        self._guard = guard
        self.number = number
        self.batch = batch
        self.verdict: Verdict | None = None
        self.applied = False
        self._began = began

    def finish(
        self,
        loss: Tensor,
        *,
        tokens: Tensor | float = 1.0,
        nominal_tokens: float | None = None,
        incomplete: bool = False,
        signals: Mapping[str, Tensor | float] | None = None,
    ) -> Verdict | None:
        """Observe, decide, and apply the update or leave it out. Call once, on every rank, after the last backward.

        Args:
            loss: without `nominal_tokens` this rank's mean loss, whose gradients are in `.grad` (averaged over ranks,
                as DDP and FSDP do); with it the SUM of this rank's token losses, 0-d.
            tokens: label tokens behind the sum.
            nominal_tokens: the number, summed over ranks, that the sums were divided by before backward. The guard
                rescales the gradients by nominal / actual tokens, so that every token weighs the same.
            incomplete: this rank was asked to stop and left micro-batches out: nothing is decided, the run ends.
            signals: further numbers of this rank that `guard.signals` announces, 0-d; their mean over the ranks that
                give one is watched. They travel in the step's one reduction.

        Returns:
            The verdict; None when a stop made the window incomplete.
        """
        if self.verdict is not None:
            raise RuntimeError("step.finish was called twice")
        return self._guard._finish(self, loss, tokens, nominal_tokens, incomplete, signals)


class Guard:
    """Watches a training loop, leaves bad updates out, rolls back, keeps the record.

    Args:
        settings: the [guard], [snapshots] and [checkpoint] sections.
        model: any nn.Module: plain, DDP, FSDP2 (`fully_shard`).
        optimizer: one torch.optim optimizer or several.
        scheduler: anything with step(), state_dict() and load_state_dict(); stepped once an applied update.
        scaler: for fp16, a torch.amp.GradScaler: backpropagate `scaler.scale(loss)`, hand `step.finish` the loss
            itself, and leave unscaling, stepping and updating to the guard.
        order: the sample order.
        batch_size: samples of a global batch, or a function that gives those of step 1, 2, ...
        total_steps: applied updates after which the run is finished; 0: endless.
        limit: positions after which the data ends; None: endless.
        clip: global norm to which gradients are clipped, 0: none; or a function of the norm (see Gate).
        run: the run directory; None keeps everything in memory (no commands, no disk tier).
        device: that computes; None: where the parameters lie, which is the host when they are offloaded.
        counting: whether this rank's loss and tokens enter the sums; False on all but one of the ranks that compute the
            same loss, as those of a tensor-parallel group do.
        holders: the ranks, a contiguous stretch, that hold the same part of the model as this one, such as a stage of a
            pipeline; None: all.
        signals: stop signals of the process, installed by the caller; None: none.
        heartbeat: created by the caller early in set-up; None: the guard makes its own when there is a run.
        texts: sample ids -> their texts as the model met them, for what is odd about them. Called on rank 0.
        describe: sample ids -> (documents as dicts, number of documents), for the journal. Called on rank 0.
        rerun: runs the forward passes of this rank's share of the last batch again, with the same dice. Called on every
            rank when a loss was not finite, to name the module that it came from.
        replay: runs forward and backward over this rank's share of any batch (see guardrail.torch.replays). With it the
            cause of an incident is looked for. Called on every rank.
        fixed_loss: loss on one fixed batch, same on every rank; stored with a checkpoint and compared after a resume.
        lr_at: the scheduled learning rate as a function of the step, to be compared after a resume.
        identity: fingerprints stored with a checkpoint. A resume on other "data" is refused, any other change noted.
    """

    def __init__(
        self,
        settings: Settings,
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
        rerun: Callable[[], None] | None = None,
        replay: Replay | None = None,
        fixed_loss: Callable[[], float] | None = None,
        lr_at: Callable[[int], float] | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        self.settings = settings
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.run = run
        self.total_steps = total_steps
        self.ledger = Ledger(order, batch_size=batch_size, limit=limit)
        self.past = Past()
        self.controller = Controller(settings.guard)
        self.probes = Probes(
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
        self.updates = UpdateNorm(self.probes.parameters, self.probes.weights) if settings.guard.update_norm else None
        self.recorder = Recorder(
            run,
            active=self.rank == 0,
            learn=lambda event: self.past.add(event),
            columns=[*(f"{GRAD_NORM}/{block}" for block in self.probes.blocks), *self.probes.named],
        )
        optimizers = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
        self.gate = Gate(optimizers, parameters=self.probes.parameters, embedding=self.probes.embedding, clip=clip)
        self.loss_scale = LossScale(scaler) if enabled(scaler) else None
        self.state = TrainingState(model, optimizers, scheduler, scaler if enabled(scaler) else None, holders)
        self.attempt = Attempt(self.state)
        self._scheduler = scheduler
        self._optimizers = optimizers
        self._texts = texts
        self._describe, self._fixed_loss, self._lr_at, self._rerun = describe, fixed_loss, lr_at, rerun
        self._identity = identity or {}
        self._signals = signals
        self._heartbeat = heartbeat
        self.tiers = Tiers(
            settings,
            state=self.state,
            store=self._store(run),
            recorder=self.recorder,
            say=self.say,
            shared=self._shared,
        )

        self.desk = Desk(self)
        self.replays = self._replays(replay) if replay is not None else None
        self.judge: Judge | None = self._find_cause if self.replays is not None else None

        self.step = 0  # applied updates so far
        self.timeline = 0
        self.tokens = 0
        self.phase: Phase | None = None  # set when the run has ended
        self.mode = settings.guard.mode
        self._row: dict[str, float] | None = None
        self._to_keep = False  # an update was applied and the tiers do not know of it yet
        self._command = (0, 0.0)  # agreed on in the last reduction, carried out between two steps
        self._incident: int | None = None
        self._recent: list[tuple[float, int]] = []  # (seconds, tokens) of the last applied steps
        self._guarding = 0.0  # seconds that the guard took of the present step
        self._guard_seconds = self._step_seconds = 0.0  # of all applied steps
        self._started = time.time()

    # -- the loop ------------------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, settings: Settings, *, data: SampleOrder, **parts: Any) -> Guard:
        """The guard of a loop of one's own: `data` is the sample order, `parts` the arguments of the constructor."""
        return cls(settings, order=data, **parts)

    def __iter__(self) -> Iterator[Step]:
        try:
            self.open()
            while self.phase is None:
                kept = self._keep()
                self._obey()
                if self.phase is not None:
                    break
                if self.total_steps and self.step >= self.total_steps:
                    self.end(Phase.FINISHED, f"all {self.total_steps} steps are done")
                    break
                batch = self.ledger.next_batch()
                if batch is None:
                    self.end(Phase.FINISHED, "the data has been passed to its end")
                    break
                self.at(Phase.STEP, self.step + 1)
                began = time.perf_counter()
                self.attempt.begin()
                if self.replays is not None:
                    self.replays.begin()
                step = Step(self, number=self.step + 1, batch=batch, began=began - kept)
                self._guarding = kept + time.perf_counter() - began
                yield step
                if step.verdict is None and self.phase is None:
                    raise RuntimeError("the loop went on without step.finish(loss)")
        finally:
            self._flush_row()
            self.close()

    def _keep(self) -> float:
        """Once the loop has done with a step, write its row and then copy the state; returns the seconds it took.

        Who resumes from a copy finds the row of its last step, and goes on behind whatever the loop did after that
        step, such as an evaluation that draws random numbers.
        """
        began = time.perf_counter()
        self._flush_row()
        if self._to_keep:
            self._to_keep = False
            self.tiers.after_step(self.step, healthy_through=self.controller.healthy_through, facts=self.facts)
        return time.perf_counter() - began

    def _obey(self) -> None:
        """Carry out the command that came with the last step."""
        kind, value = self._command
        self._command = (0, 0.0)
        if kind:
            self.desk.execute(list(CommandKind)[kind - 1], value)

    @property
    def stopping(self) -> bool:
        """Whether this process was asked to stop; all ranks learn of it in the next reduction."""
        return self._signals is not None and self._signals.requested

    def ahead(self, batch: Batch) -> Batch | None:
        """The batch that follows `batch` if it is applied: what a loader may fetch meanwhile."""
        return self.ledger.after(batch)

    def enter(self, phase: Phase) -> None:
        """Say what the loop does between steps, and that it gets ahead; call it again now and then."""
        if self.phase is None:
            self.at(phase)

    def log_eval(self, loss: float) -> None:
        """Record the held-out loss after the present step (nats a token, equal on all ranks)."""
        if self._row is not None:
            self._row["eval_loss"] = loss
        self.say("eval", f"held-out loss {loss:.4f} after step {self.step}", loss=loss)

    def poll_stop(self) -> bool:
        """Agree on whether any rank was asked to stop. For long phases between steps (evaluation); a collective."""
        return self.desk.agree((0, 0.0))[2] > 0

    # -- start and end -------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Resume from checkpoint + journal, or begin; called by the iteration."""
        if self.run is not None:
            if self._heartbeat is None:
                self._heartbeat = Heartbeat(self.run, self.rank).start()
            if self.rank == 0:
                self.desk.open(self.run)
            events = self._shared(self.run.events() if self.rank == 0 else None)
            self.past = Past.of(events)
            self.controller.rebuild(events)
            if self.rank == 0:
                self._heartbeat.status = self.status
        for span in self.past.spans:
            self.ledger.leave_out(span)
        if self.past.mode is not None:
            self.set_mode(self.past.mode)
        restored = self.tiers.resume(self.past)
        if self.past.started is None and restored is None:
            self._begin()
        else:
            self._continue(restored)

    def _begin(self) -> None:
        self.say(
            "started",
            f"training begins on {self.world} rank{'s' if self.world > 1 else ''}",
            world=self.world,
            samples=self.ledger.order.n_samples,
            order_seed=self.ledger.order.seed,
            shuffled=self.ledger.order.shuffled,
            batch_size=self.ledger.batch_size,
            host=socket.gethostname(),
            device=self.probes.device.type,
            versions=VERSIONS,
            **self._identity,
        )
        self.tiers.begin(self.facts, past=self.past)

    def _continue(self, restored: Restored | None) -> None:
        """After a restart: the newest valid state of the present timeline, checked against what it says of itself."""
        check: dict[str, str] = {}
        if restored is not None:
            self._adopt(restored.extra)
            self.controller.resumed()
            check = restored.check | self._check_resume(restored.extra)
        self.timeline = self.past.timeline + 1
        where = f"checkpoint {restored.name}" if restored else "the beginning: no valid checkpoint was found"
        self.say(
            "restarted",
            f"continues at step {self.step} from {where}",
            checkpoint=restored.name if restored else "",
            world=self.world,
            device=self.probes.device.type,
        )
        if check:
            wrong = [name for name, outcome in check.items() if outcome != "ok"]
            message = f"resumed state differs in {', '.join(wrong)}" if wrong else "resumed state is what was saved"
            self.say("resume_check", message, **check)
        self.tiers.begin(self.facts, past=self.past, good=restored is None or restored.good, saved=restored is not None)

    def _check_resume(self, extra: dict[str, Any]) -> dict[str, str]:
        """Which of schedule, data order and loss differ from what the checkpoint says (weights: see TrainingState)."""
        check = {}
        if self._lr_at is not None:
            have, want = float(self._optimizers[0].param_groups[0]["lr"]), self._lr_at(self.step + 1)
            good = math.isclose(have, want, rel_tol=0.01)
            check["schedule"] = "ok" if good else f"learning rate {have:.4g}, the schedule says {want:.4g}"
        ahead = self._order_ahead()
        check["data"] = "ok" if extra.get("order_ahead") == ahead else "the sample order is another one"
        for key, value in self._identity.items():
            saved = extra.get("identity", {}).get(key, value)
            if saved != value and key == "data":
                raise UsageError(
                    f"the data's fingerprint was {saved} when this run was saved and is {value} now: "
                    "resuming would train on something else"
                )
            if saved != value:
                self.say("note", f"{key} is not what it was when {extra['step']} steps were saved")
        stored = extra.get("fixed_loss")
        if stored is not None and self._fixed_loss is not None:
            now = self._fixed_loss()
            same = now == stored if extra.get("world") == self.world else math.isclose(now, stored, rel_tol=1e-3)
            check["loss"] = "ok" if same else f"fixed batch gives {now!r}, was {stored!r}"
        return check

    def _order_ahead(self) -> list[int]:
        cursor = self.ledger.cursor
        return self.ledger.order.samples(cursor, cursor + 8)

    def end(self, phase: Phase, reason: str) -> None:
        """A deliberate end: the last checkpoint, the last word in the journal."""
        self._flush_row()
        self.at(Phase.SAVE)
        saved = self.tiers.finish(self.facts)
        if not saved:
            reason += "; the final checkpoint could not be written"
        self.phase = phase
        self.say("ended", f"{phase.value} at step {self.step}: {reason}", phase=phase.value, reason=reason, saved=saved)
        self.at(phase)

    def close(self) -> None:
        """Release threads and files. Part of the iteration's `finally`; harmless when called again."""
        self.desk.close()
        self.tiers.close()
        self.recorder.close()
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._heartbeat = None

    # -- one step ------------------------------------------------------------------------------------------------

    def _finish(
        self,
        step: Step,
        loss: Tensor,
        tokens: Tensor | float,
        nominal: float | None,
        incomplete: bool,
        signals: Mapping[str, Tensor | float] | None,
    ) -> Verdict | None:
        began = time.perf_counter()
        reduced = self.probes.reduce(
            loss if nominal is not None else loss * tokens,
            tokens,
            nominal_tokens=nominal,
            step_time=began - step._began,
            command=self.desk.next(step.number),
            stop=self.stopping,
            incomplete=incomplete,
            loss_scale=self.loss_scale.value if self.loss_scale is not None else None,
            named=signals,
            update_square=self.updates.square if self.updates is not None else None,
        )
        if reduced.incomplete:
            self.attempt.undo()
            self.gate.leave_out()
            self.end(Phase.STOPPED, "asked to stop; the unfinished batch was given back")
            return None
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
        bands = self.controller.bands()
        verdict = self.controller.observe(observation)
        self._guarding += time.perf_counter() - began
        step.verdict = verdict
        lr = float(self._optimizers[0].param_groups[0]["lr"]) * self.effects(step.number).lr
        self._row = self._metrics_row(step, reduced, verdict, bands, lr)
        verdict = self._act(step, verdict, reduced, observation)
        self._account(step, reduced)
        self._command = reduced.command_kind, reduced.command_value
        if reduced.stop and self.phase is None:
            self.end(Phase.STOPPED, f"asked to stop by a signal on {reduced.stop} of {self.world} ranks")
        return verdict

    def _act(self, step: Step, verdict: Verdict, reduced: Reduced, observation: Observation) -> Verdict:
        self._incident = verdict.incident
        if verdict.action is not Action.APPLY:
            self.attempt.undo()
        evidence = self._evidence(verdict)
        verdict = self._reconsidered(step, verdict, reduced, observation)
        if verdict.findings:
            self._explain(step, verdict, evidence)
        if verdict.incident_state:
            message, data = self.controller.incident_line(verdict)
            self.say("incident", message, **data)
        match verdict.action:
            case Action.APPLY:
                self._apply(step, reduced)
            case Action.SKIP:
                self._skip(step, verdict)
            case Action.OVERFLOW:
                self._overflowed(step, verdict)
            case Action.ROLLBACK:
                self._roll_back_for(step, verdict)
            case Action.PAUSE:
                self._ask(step, verdict, reduced, observation)
            case Action.RETRY:  # the ledger has not moved: the same batch is formed again
                self.gate.leave_out()
            case Action.HALT:
                self.gate.leave_out()
                self._halt(verdict)
        return verdict

    def _reconsidered(self, step: Step, verdict: Verdict, reduced: Reduced, observation: Observation) -> Verdict:
        """The verdict in the light of its incident's cause, which is on the record before anything takes effect."""
        if self.judge is None or not self.controller.wants_cause(verdict):
            return verdict
        diagnosis = self.judge(step, verdict, reduced)
        self.say(
            "cause",
            f"cause of incident {verdict.incident}: {diagnosis.cause.value}: {diagnosis.reason}",
            **msgspec.to_builtins(diagnosis),
            incident=verdict.incident,
            at_step=step.number,
        )
        step.verdict = self.controller.reconsider(observation, verdict, diagnosis)
        if self._row is not None:
            self._row["verdict"] = list(Action).index(step.verdict.action)
        return step.verdict

    def _find_cause(self, step: Step, verdict: Verdict, reduced: Reduced) -> Diagnosis:
        assert self.replays is not None
        return CauseTest(self.replays, ledger=self.ledger, ring=self.tiers.ring).run(
            step.batch,
            verdict=verdict,
            reduced=reduced,
            applied=self.controller.applied,
            keep_gradients=self.mode is Mode.ASK,  # a person may have the update applied all the same
        )

    def _apply(self, step: Step, reduced: Reduced) -> None:
        effects = self.effects(step.number)
        if effects.reset:
            self.gate.reset_moments()
        factor = self.gate.factor(reduced, embed_alpha=effects.embed_alpha, clip=effects.clip)
        if self.updates is not None:
            self._measured(self.updates.before)
        self.gate.apply(factor, lr_factor=effects.lr, embed_alpha=effects.embed_alpha)
        if self.updates is not None:
            self._measured(self.updates.after)
        if self.loss_scale is not None:
            self.loss_scale.update(overflow=False)
        if self._scheduler is not None:
            self._scheduler.step()
        step.applied = True
        self.step = step.number
        self.tokens += reduced.tokens
        self.ledger.passed(step.batch, applied=True)
        self.state.settle()
        self._to_keep = True

    def _measured(self, what: Callable[[], None]) -> None:
        """Do something that only the guard needs: it is part of what it costs."""
        began = time.perf_counter()
        what()
        self._guarding += time.perf_counter() - began

    def _skip(self, step: Step, verdict: Verdict) -> None:
        self.gate.leave_out()
        batch, reason = step.batch, verdict.reason
        span = Span(first=batch.first, last=batch.last, cause="rejected", step=step.number, reason=reason)
        named = self._attribution(batch, verdict)
        if named is None:
            self.leave_out(span, verdict.remedies)
        else:
            span = msgspec.structs.replace(span, positions=named.positions)
            described = self._describe if self.rank == 0 else None
            texts = self._texts if self.rank == 0 else None
            self.leave_out(
                span, verdict.remedies, samples=told(named, ledger=self.ledger, texts=texts, documents=described)
            )
        if not span.positions:
            self.ledger.passed(batch, applied=False)
        # Else it is given back, and the next batch is formed from the same place without those samples.

    def _attribution(self, batch: Batch, verdict: Verdict) -> Attribution | None:
        """The samples that a skipped batch owes its trouble to, where a replay has shown that it is the data."""
        cause = self.controller.causes.get(verdict.incident) if verdict.incident is not None else None
        if self.replays is None or cause is None or verdict.action is not Action.SKIP:
            return None
        if cause.cause not in (Cause.DATA, Cause.DATA_AND_STATE):
            return None
        applied = self.controller.applied
        return attribute(batch, verdict=verdict, replays=self.replays, ledger=self.ledger, applied=applied)

    def _overflowed(self, step: Step, verdict: Verdict) -> None:
        """Leave the update out at a lower loss scale. The data is not to blame, so nothing is quarantined."""
        assert self.loss_scale is not None
        self.gate.leave_out()
        scale = self.loss_scale.update(overflow=True)
        batch = step.batch
        passed = f"positions {batch.first} to {batch.last - 1} are passed by"
        self.say("note", f"{verdict.reason}: {passed}, and it is {scale:g} now", overflow=True, loss_scale=scale)
        self.ledger.passed(batch, applied=False)

    def effects(self, step: int) -> Effects:
        """What the update of a step is made with: what a person has set, and remedies."""
        return self.past.effects(step, self.settings.guard)

    def leave_out(self, span: Span, remedies: Sequence[Remedy] = (), **more: Any) -> None:
        """Journal first, then quarantine."""
        data = self._span_data(span) | more
        if remedies:
            data["remedies"] = list(remedies)
        self.say("left_out", f"left out {_amount(data)}", **data)
        self.ledger.leave_out(span)

    def _span_data(self, span: Span) -> dict[str, Any]:
        ids = self.ledger.samples_of(span)
        data: dict[str, Any] = {"span": span, "count": len(ids), "incident": self._incident}
        if self.rank == 0 and self._describe is not None and ids:
            documents, total = self._describe(ids)
            data |= {"documents": documents[:MAX_NAMED], "documents_total": total}
        return data

    # -- rollback ------------------------------------------------------------------------------------------------

    def _roll_back_for(self, step: Step, verdict: Verdict) -> None:
        assert verdict.window is not None
        self.gate.leave_out()
        onset = verdict.onset or step.number
        if not self.roll_back(window=verdict.window, onset=onset, reason=verdict.reason, verdict=verdict):
            self._halt(verdict)

    def roll_back(
        self,
        *,
        window: tuple[int, int],
        onset: int,
        reason: str,
        cause: str = "rollback",
        target: Target | None = None,
        verdict: Verdict | None = None,
    ) -> bool:
        """Go back to a state from before `window` and leave the window out. False: there is no such state.

        The window depends on the onset alone, never on which state is at hand, so that a run which lost its ring in a
        crash still makes the same batches afterwards.

        Args:
            verdict: that asks for it; its rung and remedies are on the same line.
        """
        self.at(Phase.ROLLBACK)
        target = target or self.tiers.target(window[0], before_step=verdict.before_step if verdict else None)
        if target is None:
            self.say("note", f"no valid state from before position {window[0]} to roll back to")
            return False
        left = self.step
        batches = max(1, round((window[1] - window[0]) / self.ledger.batch_size))
        span = Span(first=window[0], last=window[1], cause=cause, step=onset, reason=reason, batches=batches)
        data = self._span_data(span)
        out = f"out {_amount(data)}" if span.last > span.first else "nothing out"
        self.say(
            "rollback",
            f"rolled back from step {left} to {target.step} ({target.tier}), left {out}",
            to_step=target.step,
            from_step=left,
            onset=onset,
            window=list(window),
            tier=target.tier,
            new_timeline=self.timeline + 1,
            rung=verdict.rung if verdict else "",
            remedies=list(verdict.remedies) if verdict else [],
            **data,
        )
        self.ledger.leave_out(span)
        self._adopt(self.tiers.restore(target))
        self.timeline += 1
        self.controller.load_rollbacks(self.past.rollbacks)
        self.tiers.rolled_back(self.facts, target)
        return True

    def undo(self, undoing: Undoing, target: Target, lines: Sequence[int]) -> None:
        """Take a decision back: go to `target`, from before it, with its samples no longer left out.

        The batches that it rejected are pardoned: what is found in them again is noted, and they are applied.

        Args:
            lines: seqs of all journal lines that this takes back.
        """
        self.at(Phase.ROLLBACK)
        self.say(
            "undo",
            f"line {undoing.of} undone: back from step {self.step} to {target.step} ({target.tier}), "
            f"{undoing.positions} samples taken back",
            lines=list(lines),
            spans=list(undoing.spans),
            pardons=[list(stretch) for stretch in undoing.pardons],
            rollbacks=list(undoing.rollbacks),
            samples=undoing.positions,
            to_step=target.step,
            from_step=self.step,
            tier=target.tier,
            new_timeline=self.timeline + 1,
            incident=undoing.incident,
        )
        self.ledger.take_back(undoing.spans)
        self._adopt(self.tiers.restore(target))
        self.timeline += 1
        self.controller.load_rollbacks(self.past.rollbacks)
        self.controller.pardon(undoing.pardons)
        self.tiers.rolled_back(self.facts, target)

    def _adopt(self, extra: dict[str, Any]) -> None:
        """Take over what travelled with a snapshot besides tensors."""
        self.step = int(extra["step"])
        self.tokens = int(extra["tokens"])
        self.ledger.restore(extra["ledger"])
        self.controller.load_state_dict(extra["controller"])
        rng.restore(extra["rng"])
        if self.updates is not None:
            # A rank's own part, which means nothing among another number of ranks.
            self.updates.restore(extra.get("update_square") if extra.get("world", self.world) == self.world else None)

    def facts(self, checkpoint: bool = False) -> dict[str, Any]:
        """What travels with a snapshot besides tensors; for a checkpoint also what a resume is checked against."""
        facts: dict[str, Any] = {
            "step": self.step,
            "cursor": self.ledger.cursor,
            "timeline": self.timeline,
            "tokens": self.tokens,
            "ledger": msgspec.to_builtins(self.ledger.state()),
            "controller": self.controller.state_dict(),
            "rng": rng.capture(),
        }
        if self.updates is not None:
            facts["update_square"] = self.updates.facts()
        if checkpoint:
            facts |= {"world": self.world, "order_ahead": self._order_ahead(), "identity": self._identity}
            if self._fixed_loss is not None:
                facts["fixed_loss"] = self._fixed_loss()
        return facts

    # -- asking and halting --------------------------------------------------------------------------------------

    def _halt(self, verdict: Verdict) -> None:
        self.end(Phase.HALTED, verdict.reason)
        if verdict.onset is not None:
            # A resume must not begin with what made the guard give up.
            self.tiers.suspect_from(verdict.onset)

    def _ask(self, step: Step, verdict: Verdict, reduced: Reduced, observation: Observation) -> None:
        """Park with the gradients kept, until a person (or the deadline) has decided."""
        would = verdict.would or Action.ROLLBACK
        asked = time.perf_counter()
        answer = self.desk.park(f"{verdict.reason}; proposed: {would.value}", verdict=verdict, batch=step.batch)
        step._began += time.perf_counter() - asked  # a person's time is not the step's
        if answer is Answer.GO_ON and math.isfinite(reduced.loss) and math.isfinite(reduced.grad_norm):
            self.controller.overrule(observation)
            self.attempt.redo()
            self._apply(step, reduced)
            if self._row is not None:
                self._row["verdict"] = list(Action).index(Action.APPLY)
        elif answer is Answer.GO_ON:
            self._skip(step, verdict)
        elif answer is Answer.AS_PROPOSED and would is Action.ROLLBACK:
            self._roll_back_for(step, verdict)
        elif answer is Answer.AS_PROPOSED:
            self.gate.leave_out()
            self._halt(verdict)
        else:  # stopped, rolled back or skipped by hand: it is done
            self.gate.leave_out()

    def set_mode(self, mode: Mode) -> None:
        self.mode = mode
        self.controller.set_mode(mode)

    # -- the record ----------------------------------------------------------------------------------------------

    def say(self, kind: str, message: str, **data: Any) -> None:
        self.recorder.event(kind, message, step=self.step, timeline=self.timeline, **data)

    def _evidence(self, verdict: Verdict) -> dict[str, Any]:
        """Where non-finite numbers come from: parameters of a gradient on every rank, the module of a loss."""
        data: dict[str, Any] = {}
        nonfinite = {f.signal for f in verdict.findings if f.kind in (Kind.NONFINITE, Kind.SCALE_COLLAPSE)}
        if nonfinite - {LOSS}:
            named = self._gathered(self.probes.names_of_nonfinite())
            data["parameters"] = {str(r): names[:MAX_NAMED] for r, names in enumerate(named) if names}
        if LOSS in nonfinite and self._rerun is not None:
            modules = {str(rank): name for rank, name in enumerate(self._gathered(self._culprit(self._rerun))) if name}
            if modules:
                data["modules"] = modules
        return data

    def _explain(self, step: Step, verdict: Verdict, evidence: dict[str, Any]) -> None:
        """The verdict with what led to it."""
        reason = verdict.reason
        if modules := evidence.get("modules"):
            reason += "; first non-finite output: " + ", ".join(f"{m} on rank {r}" for r, m in modules.items())
        noted = verdict.action is Action.APPLY and verdict.would is None
        kind, what = ("finding", "step") if noted else ("verdict", f"{verdict.action.value} at step")
        self.say(
            kind,
            f"{what} {step.number}: {reason}",
            action=verdict.action.value,
            would=verdict.would.value if verdict.would else None,
            findings=list(verdict.findings),
            onset=verdict.onset,
            window=list(verdict.window) if verdict.window else None,
            incident=self._incident,
            batch=[step.batch.first, step.batch.last],
            at_step=step.number,
            **evidence,
        )

    def _culprit(self, rerun: Callable[[], None]) -> str:
        aside = Attempt(self.state)
        aside.begin()
        try:
            return first_nonfinite(self.state.model, rerun)
        finally:
            aside.undo()
            self.state.settle()

    def _metrics_row(
        self, step: Step, reduced: Reduced, verdict: Verdict, bands: dict[str, tuple[float, float]], lr: float
    ) -> dict[str, float]:
        row = {
            "step": step.number,
            "timeline": self.timeline,
            "time": time.time(),
            "first": step.batch.first,
            "last": step.batch.last,
            "lr": lr,
            "tokens": reduced.tokens,
            "step_time_max": max(reduced.step_times),
            "slowest_rank": reduced.step_times.index(max(reduced.step_times)),
            "verdict": list(Action).index(verdict.action),
            "eval_loss": math.nan,
            **reduced.signals(),
        }
        for signal, (baseline, threshold) in bands.items():
            row[f"{signal}_baseline"], row[f"{signal}_threshold"] = baseline, threshold
        return row

    def _account(self, step: Step, reduced: Reduced) -> None:
        """Times of this step, for the row and the status. The guard's own: reduction, verdict, copies, the row."""
        seconds = time.perf_counter() - step._began
        if self._row is not None:
            self._row["step_time"], self._row["guard_time"] = seconds, self._guarding
        if self._heartbeat is not None:
            self._heartbeat.step_seconds = reduced.step_times[self.rank]
        if step.applied:
            self._recent = [*self._recent[-19:], (seconds, reduced.tokens)]
            self._guard_seconds += self._guarding
            self._step_seconds += seconds

    def _flush_row(self) -> None:
        if self._row is not None:
            self.recorder.row(self._row)
            self._row = None

    def status(self) -> Status:
        """The present state for status.json; called by the heartbeat's thread."""
        recent = self._recent
        seconds, tokens = sum(s for s, _ in recent), sum(t for _, t in recent)
        ahead = max(0, self.total_steps - self.step)
        return Status(
            run=self.run.name if self.run is not None else "",
            phase=self.phase or Phase.STEP,
            step=self.step,
            total_steps=self.total_steps,
            cursor=self.ledger.cursor,
            timeline=self.timeline,
            mode=self.mode,
            durability=self.recorder.durability,
            question=self.desk.question,
            deadline=self.desk.deadline,
            default=self.desk.default,
            tokens=self.tokens,
            tokens_per_second=tokens / seconds if seconds else 0.0,
            eta_seconds=ahead * seconds / len(recent) if recent else 0.0,
            lr_factor=self.effects(self.step + 1).lr,
            guard_share=self._guard_seconds / self._step_seconds if self._step_seconds else 0.0,
            started=self._started,
            world=self.world,
            versions=VERSIONS,
            snapshots=self.tiers.infos,
        )

    def _replays(self, replay: Replay) -> Replays:
        scale = self.loss_scale
        return Replays(
            replay,
            state=self.state,
            probes=self.probes,
            loss_scale=lambda: scale.value if scale is not None else None,
            gathered=self._gathered,
            alive=lambda: self.at(Phase.STEP, self.step + 1),
        )

    # -- small things --------------------------------------------------------------------------------------------

    def at(self, phase: Phase, step: int | None = None) -> None:
        if self._heartbeat is not None:
            self._heartbeat.at(phase, self.step if step is None else step)

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
        )

    def _shared(self, value: Any) -> Any:
        """Rank 0's value on every rank: facts read from the disk once, at a start."""
        if self.world == 1:
            return value
        box = [value if self.rank == 0 else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def _gathered(self, value: Any) -> list[Any]:
        if self.world == 1:
            return [value]
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, value)
        return everyone


def _amount(data: dict[str, Any]) -> str:
    """ "64 samples of 2 documents (0357.txt, 0358.txt)", from the data of a `left_out` event."""
    total = data.get("documents_total", 0)
    samples = f"{data['count']} sample{'' if data['count'] == 1 else 's'}"
    if not total:
        return samples
    names = list(dict.fromkeys(str(d["path"]).rsplit("/", 1)[-1] for d in data["documents"]))
    more = ", ..." if len(names) > 3 or total > len(data["documents"]) else ""
    return f"{samples} of {total} document{'s' if total > 1 else ''} ({', '.join(names[:3])}{more})"
