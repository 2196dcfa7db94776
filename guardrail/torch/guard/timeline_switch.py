"""Where a run begins, continues after a restart, and goes back to."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import msgspec

from guardrail.core.events.decisions import RolledBack, Undone
from guardrail.core.events.run_state import Note, Restarted, ResumeChecked, Started
from guardrail.core.records import Phase, Span, Verdict
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
    """Start, resume, rollback and undo of one guard: each but the first opens a new timeline.

    Args:
        snapshots: hold the states to go back to.
        quarantine: decides how much a rollback may skip, and describes it.
        resume_check: compares a resumed run with its checkpoint.
        state: of the training, before anything was loaded.
        scheduler: learns that its state was loaded.
        update_norm: its last value travels with a snapshot; None: it is not asked for.
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
        """Begin, or continue where the newest valid checkpoint and the journal say."""
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
        self._snapshots.take_first(self.facts, past=ctx.history)

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
        ctx.recorder.write(
            Restarted(
                checkpoint=restored.name if restored else "",
                world=ctx.ranks.world,
                device=ctx.ranks.device.type,
                run_id=ctx.history.run_id or ctx.ranks.broadcast(secrets.token_hex(8)),
            )
        )
        if check:
            ctx.recorder.write(ResumeChecked(data=check))
        self._snapshots.take_first(
            self.facts,
            past=ctx.history,
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

        The window depends on the onset alone, never on which state is at hand, so that a run which
        lost its ring in a crash still makes the same batches afterwards.

        Args:
            window: positions [first, last).
            onset: first bad step.
            target: the state to restore; None: the newest one that serves.
            verdict: that asks for it; its rung and remedies are on the same line.
            allowed: by a user, although it skips more than the guard may by itself.

        Returns:
            Whether there was such a state, and the window may be skipped.
        """
        ctx, progress = self._ctx, self._ctx.progress
        self._set_phase(Phase.ROLLBACK)
        if target is None:
            target = self._snapshots.find_target(
                window[0],
                before_step=verdict.before_step if verdict else None,
                settled=ctx.controller.is_settled,
            )
        if target is None:
            message = f"no valid state from before position {window[0]} to roll back to"
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
                escalation=verdict.escalation if verdict else "",
                remedies=verdict.remedies if verdict else (),
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
            # What was rejected before goes with it, as it does with all of the window.
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
        """Take a decision back: restore `target`, from before it, and allow its samples again.

        The batches that it rejected are allowed: what is found in them again is noted, and they
        are applied.

        Args:
            lines: seqs of all journal lines that this takes back.
        """
        ctx, progress = self._ctx, self._ctx.progress
        self._set_phase(Phase.ROLLBACK)
        where = f"from step {progress.step} to {target.step} ({target.tier})"
        ctx.recorder.write(
            Undone(
                message=f"line {plan.of} undone: back {where}, {plan.positions} samples allowed again",
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
        """Take over what travelled with a snapshot besides tensors."""
        ctx = self._ctx
        ctx.progress.step = int(extra["step"])
        ctx.progress.tokens = int(extra["tokens"])
        self._take_written(extra)
        ctx.order.restore(extra["ledger"])
        ctx.controller.load_state_dict(extra["controller"])
        self._scheduler.restored()
        rng.restore_rng_states(extra["rng"])
        if self._update_norm is not None:
            # A rank's own part, which means nothing among another number of ranks.
            is_same_world = extra.get("world", ctx.ranks.world) == ctx.ranks.world
            self._update_norm.restore(extra.get("update_square") if is_same_world else None)

    def _take_written(self, extra: dict[str, Any]) -> None:
        """Use and name settings that were changed since an earlier start has saved this state.

        A state of this start has none, and is restored exactly.
        """
        assert self._written is not None
        if self._first_timeline is not None and extra["timeline"] >= self._first_timeline:
            return
        step = self._ctx.progress.step
        differences = self._written.take(extra.get("written"), step=step)
        if differences:
            sentences = "; ".join(difference.sentence() for difference in differences)
            message = f"settings that are not those of the checkpoint: {sentences}"
            changed = [asdict(difference) for difference in differences]
            self._ctx.recorder.write(Note(message=message, data={"settings": changed}))

    def facts(self, checkpoint: bool = False) -> dict[str, Any]:
        """Return what travels with a snapshot besides tensors.

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
