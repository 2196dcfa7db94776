"""Begin a run, continue it after a restart, and restore an earlier state of it."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import msgspec

from guardrail.core.events.decisions import RolledBack, Undone
from guardrail.core.events.run_state import Note, Restarted, ResumeChecked, Started
from guardrail.core.format import format_plural
from guardrail.core.records.spans import Span
from guardrail.core.records.status import Phase
from guardrail.core.records.verdicts import Remedy, Verdict
from guardrail.decide.undo import UndoPlan
from guardrail.torch.checkpoint.rollback_target import Target
from guardrail.torch.checkpoint.snapshot_manager import Restored, SnapshotManager
from guardrail.torch.guard.context import RunContext
from guardrail.torch.guard.guarded_scheduler import GuardedScheduler
from guardrail.torch.guard.quarantine import Quarantine
from guardrail.torch.guard.resume_check import ResumeCheck
from guardrail.torch.guard.versions import VERSIONS
from guardrail.torch.guard.written_settings import WrittenSettings
from guardrail.torch.measure.update_norm import UpdateNorm
from guardrail.torch.state import rng_state as rng
from guardrail.torch.state.training_state import TrainingState


class TimelineSwitch:
    """Start, resume, rollback and undo of one guard. Each but the start begins a new timeline.

    Args:
        snapshots: hold the states that can be restored.
        quarantine: limits how much a rollback may skip, and describes it.
        resume_check: compares a resumed run with its checkpoint.
        state: of the training, before anything was loaded.
        scheduler: takes over a position that was loaded.
        update_norm: its last value is saved with a snapshot; None: it is not measured.
        set_phase: reports what this rank does.
    """

    def __init__(
        self,
        ctx: RunContext,
        snapshots: SnapshotManager,
        quarantine: Quarantine,
        *,
        resume_check: ResumeCheck,
        state: TrainingState,
        scheduler: GuardedScheduler,
        update_norm: UpdateNorm | None = None,
        set_phase: Callable[[Phase], None],
    ) -> None:
        self._ctx = ctx
        self._snapshots, self._quarantine = snapshots, quarantine
        self._resume_check, self._state, self._scheduler = resume_check, state, scheduler
        self._update_norm, self._set_phase = update_norm, set_phase
        self._written: WrittenSettings | None = None
        self._first_timeline: int | None = None  # of this start

    def open(self) -> None:
        """Begin, or continue from the newest valid checkpoint and the journal."""
        self._written = WrittenSettings(self._state)
        restored = self._snapshots.resume(self._ctx.history)
        if self._ctx.history.started is None and restored is None:
            self._begin()
        else:
            self._continue(restored)

    def _begin(self) -> None:
        ctx = self._ctx
        world = ctx.ranks.world
        self._first_timeline = ctx.progress.timeline
        ctx.recorder.write(
            Started(
                world=world,
                samples=ctx.order.order.n_samples,
                order_seed=ctx.order.order.seed,
                shuffled=ctx.order.order.shuffled,
                batch_size=ctx.order.batch_size,
                host=socket.gethostname(),
                device=ctx.ranks.device.type,
                versions=VERSIONS,
                run_id=ctx.ranks.broadcast(secrets.token_hex(8)),
                data=dict(self._resume_check.fingerprints),
            )
        )
        self._snapshots.take_first(self.facts, history=ctx.history)

    def _continue(self, restored: Restored | None) -> None:
        """Continue after a restart, from the newest valid state of the present timeline."""
        ctx, progress = self._ctx, self._ctx.progress
        check: dict[str, str] = {}
        if restored is not None:
            self._resume_check.refuse_other_order(restored.extra)
            saved_rate = float(self._state.optimizers[0].param_groups[0]["lr"])
            self._adopt(restored.extra)
            ctx.controller.note_resume()
            check = restored.check | self._resume_check.check(restored.extra, saved_rate)
        ctx.controller.memory.incidents.rewind(progress.step, same_steps=True)
        progress.timeline = self._first_timeline = ctx.history.timeline + 1
        checkpoint = ""
        if restored is not None:
            checkpoint = restored.name
        ctx.recorder.write(
            Restarted(
                checkpoint=checkpoint,
                world=ctx.ranks.world,
                device=ctx.ranks.device.type,
                run_id=ctx.history.run_id or ctx.ranks.broadcast(secrets.token_hex(8)),
            )
        )
        if check:
            ctx.recorder.write(ResumeChecked(data=check))
        self._snapshots.take_first(
            self.facts,
            history=ctx.history,
            good=restored is None or restored.good,
            saved=restored is not None,
        )

    def roll_back(
        self,
        *,
        window: tuple[int, int],
        onset: int,
        reason: str,
        cause: str = "rollback",
        target: Target | None = None,
        verdict: Verdict | None = None,
        allowed: bool = False,
    ) -> bool:
        """Restore a state from before `window` and skip the window.

        The window depends on the onset alone, not on the states that are left. So a run that lost
        its snapshots in a crash computes the same batches afterwards.

        Args:
            window: positions [first, last).
            onset: first bad step.
            reason: of the rollback, for the journal.
            cause: origin of the skipped span.
            target: the state to restore; None: the newest one that fits.
            verdict: that asks for it; the same line holds its escalation step and its remedies.
            allowed: a user has allowed to skip more than the guard may by itself.

        Returns:
            Whether there was such a state, and the window may be skipped.
        """
        ctx, progress = self._ctx, self._ctx.progress
        self._set_phase(Phase.ROLLBACK)
        escalation = ""
        remedies: tuple[Remedy, ...] = ()
        before_step: int | None = None
        if verdict is not None:
            escalation, remedies = verdict.escalation, verdict.remedies
            before_step = verdict.before_step
        if target is None:
            target = self._snapshots.find_target(
                window[0], before_step=before_step, settled=ctx.controller.is_settled
            )
        if target is None:
            message = f"no rollback: no valid state from before position {window[0]}"
            ctx.recorder.write(Note(message=message))
            return False
        left = progress.step
        span = self.span(
            window=window, onset=onset, reason=reason, cause=cause, verdict=verdict, allowed=allowed
        )
        if verdict is not None and not allowed and (over := self._quarantine.over_share(span)):
            ctx.recorder.write(Note(message=f"no rollback: {over}"))
            return False
        ctx.recorder.write(
            RolledBack(
                to_step=target.step,
                from_step=left,
                onset=onset,
                window=window,
                tier=target.tier,
                new_timeline=progress.timeline + 1,
                escalation=escalation,
                remedies=remedies,
                **self._quarantine.fields_of(span),
            )
        )
        ctx.order.skip_span(span)
        self._restore(target)
        self._snapshots.finish_rollback(self.facts, target)
        return True

    def span(
        self,
        *,
        window: tuple[int, int],
        onset: int,
        reason: str,
        cause: str = "rollback",
        verdict: Verdict | None = None,
        allowed: bool = False,
    ) -> Span:
        """Return what a rollback skips; arguments as `roll_back` takes them."""
        order = self._ctx.order
        batches = max(1, round((window[1] - window[0]) / order.batch_size))
        positions: tuple[int, ...] = ()
        if verdict is not None and verdict.positions:
            # Batches of the window that were rejected before are skipped too.
            positions = tuple(sorted(order.rejected_positions(*window) | set(verdict.positions)))
        return Span(
            first=window[0],
            last=window[1],
            origin=cause,
            step=onset,
            reason=reason,
            batches=batches,
            positions=positions,
            allowed=allowed,
        )

    def undo(self, plan: UndoPlan, target: Target, lines: Sequence[int]) -> None:
        """Undo a decision: restore `target`, from before it, and allow its samples again.

        The batches that it rejected are allowed. Findings on them are only noted, and they are
        applied.

        Args:
            lines: seqs of all journal lines that are undone.
        """
        ctx, progress = self._ctx, self._ctx.progress
        self._set_phase(Phase.ROLLBACK)
        restored = f"restored step {target.step} ({target.tier}) from step {progress.step}"
        samples = format_plural(plan.positions, "sample")
        ctx.recorder.write(
            Undone(
                message=f"line {plan.of} undone: {restored}, {samples} allowed again",
                lines=tuple(lines),
                spans=plan.spans,
                pardons=plan.pardons,
                rollbacks=plan.rollbacks,
                samples=plan.positions,
                to_step=target.step,
                from_step=progress.step,
                tier=target.tier,
                new_timeline=progress.timeline + 1,
                incident=plan.incident,
            )
        )
        ctx.order.undo_skips(plan.spans)
        self._restore(target)
        ctx.controller.memory.allow(plan.pardons)
        self._snapshots.finish_rollback(self.facts, target)

    def _restore(self, target: Target) -> None:
        """Load a state, on a new timeline."""
        ctx = self._ctx
        self._adopt(self._snapshots.restore(target))
        ctx.progress.timeline += 1
        ctx.controller.memory.go_back(target.step, ctx.history.rollbacks)

    def _adopt(self, extra: dict[str, Any]) -> None:
        """Take over what was saved with a snapshot besides tensors."""
        ctx = self._ctx
        ctx.progress.step = int(extra["step"])
        ctx.progress.tokens = int(extra["tokens"])
        self._take_written(extra)
        ctx.order.restore(extra["ledger"])
        ctx.controller.load_state_dict(extra["controller"])
        self._scheduler.restored()
        rng.restore_rng_states(extra["rng"])
        if self._update_norm is not None:
            # It is the part of one rank, so it has no meaning with another number of ranks.
            square = None
            if extra.get("world", ctx.ranks.world) == ctx.ranks.world:
                square = extra.get("update_square")
            self._update_norm.restore(square)

    def _take_written(self, extra: dict[str, Any]) -> None:
        """Use settings that were changed since an earlier start saved this state, and note them.

        A state that this start saved has no changed settings, and is restored exactly.
        """
        assert self._written is not None
        if self._first_timeline is not None and extra["timeline"] >= self._first_timeline:
            return
        step = self._ctx.progress.step
        differences = self._written.take(extra.get("written"), step=step)
        if differences:
            sentences = "; ".join(difference.sentence() for difference in differences)
            message = f"settings differ from those of the checkpoint: {sentences}"
            changed = [asdict(difference) for difference in differences]
            self._ctx.recorder.write(Note(message=message, data={"settings": changed}))

    def facts(self, checkpoint: bool = False) -> dict[str, Any]:
        """Return what is saved with a snapshot besides tensors.

        Args:
            checkpoint: also what a resume is checked against.
        """
        ctx = self._ctx
        facts: dict[str, Any] = {
            "step": ctx.progress.step,
            "cursor": ctx.order.cursor,
            "timeline": ctx.progress.timeline,
            "tokens": ctx.progress.tokens,
            "ledger": msgspec.to_builtins(ctx.order.state()),
            "controller": ctx.controller.state_dict(),
            "rng": rng.capture_rng_states(),
        }
        if self._update_norm is not None:
            facts["update_square"] = self._update_norm.facts()
        if checkpoint:
            assert self._written is not None
            facts |= self._resume_check.facts() | {"written": self._written.facts()}
        return facts
