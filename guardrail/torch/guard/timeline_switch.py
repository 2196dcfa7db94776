"""Where a run begins, goes on after a restart, and goes back to."""

from __future__ import annotations

import math
import secrets
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import msgspec

from guardrail.core.errors import UsageError
from guardrail.core.records import MAX_NAMED, Phase, Span, Verdict
from guardrail.decide.undo import UndoPlan
from guardrail.torch.checkpoint.snapshot_manager import Restored, Target
from guardrail.torch.guard.quarantine import amount
from guardrail.torch.guard.step_metrics import VERSIONS
from guardrail.torch.guard.written_settings import WrittenSettings
from guardrail.torch.state import rng_state as rng

if TYPE_CHECKING:
    from guardrail.torch.guard.guard import Guard

AHEAD = 8  # samples after the cursor that a checkpoint remembers


class TimelineSwitch:
    """Start, resume, rollback and undo of one guard: each but the first opens a new timeline.

    Args:
        fixed_loss: loss on one fixed batch, same on every rank; stored with a checkpoint and
        compared after a resume.
        lr_at: the scheduled learning rate as a function of the step, to be compared after a resume.
        identity: fingerprints stored with a checkpoint. A resume on other "data" is refused, any
        other change noted.
    """

    def __init__(
        self,
        guard: Guard,
        *,
        fixed_loss: Callable[[], float] | None,
        lr_at: Callable[[int], float] | None,
        identity: dict[str, Any],
    ) -> None:
        self._guard = guard
        self._fixed_loss, self._lr_at, self.identity = fixed_loss, lr_at, identity
        self._written: WrittenSettings | None = None
        self._first_timeline: int | None = None  # of this start

    def open(self) -> None:
        """Begin, or go on where the newest valid checkpoint and the journal say."""
        guard = self._guard
        self._written = WrittenSettings(guard.state)
        restored = guard.tiers.resume(guard.past)
        if guard.past.started is None and restored is None:
            self._begin()
        else:
            self._continue(restored)

    def _begin(self) -> None:
        guard = self._guard
        self._first_timeline = guard.timeline
        guard.say(
            "started",
            f"training begins on {guard.world} rank{'s' if guard.world > 1 else ''}",
            world=guard.world,
            samples=guard.ledger.order.n_samples,
            order_seed=guard.ledger.order.seed,
            shuffled=guard.ledger.order.shuffled,
            batch_size=guard.ledger.batch_size,
            host=socket.gethostname(),
            device=guard.probes.device.type,
            versions=VERSIONS,
            run_id=guard.shared(secrets.token_hex(8)),
            **self.identity,
        )
        guard.tiers.begin(self.facts, past=guard.past)

    def _continue(self, restored: Restored | None) -> None:
        """After a restart: the newest valid state of the present timeline, checked against what it
        says of itself.
        """
        guard = self._guard
        check: dict[str, str] = {}
        if restored is not None:
            self._refuse_other_order(restored.extra)
            saved_rate = float(guard.optimizers[0].param_groups[0]["lr"])
            self._adopt(restored.extra)
            guard.controller.resumed()
            check = restored.check | self._check_resume(restored.extra, saved_rate)
        guard.controller.incidents.rewind(guard.step, same_steps=True)
        guard.timeline = self._first_timeline = guard.past.timeline + 1
        where = (
            f"checkpoint {restored.name}"
            if restored
            else "the beginning: no valid checkpoint was found"
        )
        guard.say(
            "restarted",
            f"continues at step {guard.step} from {where}",
            checkpoint=restored.name if restored else "",
            world=guard.world,
            device=guard.probes.device.type,
            run_id=guard.past.run_id or guard.shared(secrets.token_hex(8)),
        )
        if check:
            wrong = [name for name, outcome in check.items() if outcome != "ok"]
            message = (
                f"resumed state differs in {', '.join(wrong)}"
                if wrong
                else "resumed state is what was saved"
            )
            guard.say("resume_check", message, **check)
        guard.tiers.begin(
            self.facts,
            past=guard.past,
            good=restored is None or restored.good,
            saved=restored is not None,
        )

    def _check_resume(self, extra: dict[str, Any], saved_rate: float) -> dict[str, str]:
        """Which of schedule, data order and loss differ from what the checkpoint says (weights: see
        TrainingState).
        """
        guard = self._guard
        check = {}
        if self._lr_at is not None:
            want = self._lr_at(guard.step + 1)
            good = math.isclose(saved_rate, want, rel_tol=0.01)
            check["schedule"] = (
                "ok" if good else f"learning rate {saved_rate:.4g}, the schedule says {want:.4g}"
            )
        check["data"] = "ok"
        if "frozen" in extra:
            check["trained"] = self._check_trained(extra)
        # ranks and configuration: then the arithmetic is the same to the bit
        same = extra.get("world") == guard.world
        for key, value in self.identity.items():
            saved = extra.get("identity", {}).get(key, value)
            if saved != value and key == "data":
                raise UsageError(
                    f"the data's fingerprint was {saved} when this run was saved and is {value} now: "
                    "resuming would train on something else"
                )
            if saved != value:
                same = False
                guard.say("note", f"{key} is not what it was when step {extra['step']} was saved")
        stored = extra.get("fixed_loss")
        if stored is not None and self._fixed_loss is not None:
            now = self._fixed_loss()
            good = now == stored if same else math.isclose(now, stored, rel_tol=1e-3)
            check["loss"] = "ok" if good else f"fixed batch gives {now!r}, was {stored!r}"
        return check

    def _refuse_other_order(self, extra: dict[str, Any]) -> None:
        """Raise UsageError where positions that the run has passed would hold other samples now."""
        guard = self._guard
        order, cursor = guard.ledger.order, int(extra["cursor"])
        started = guard.past.started or {}
        was = extra.get("order") or {
            "samples": started.get("samples"),
            "seed": started.get("order_seed"),
        }
        if not cursor and not guard.past.spans:
            return
        ahead = order.samples(cursor, cursor + AHEAD)
        changed = [
            f"{name} is {now} and was {was[name]} when step {extra['step']} was saved"
            for name, now in self._order_facts().items()
            if was.get(name) is not None and was[name] != now
        ]
        if not changed and extra.get("order_ahead", ahead) != ahead:
            changed = [
                f"the samples from position {cursor} on are {ahead} and were {extra['order_ahead']}"
            ]
        if changed:
            raise UsageError(
                f"the sample order has changed: {'; '.join(changed)}. The rest of the epoch would repeat some samples "
                "and never show others. Resume with the saved order (data.seed, data.order, the same data), or begin a "
                "new run"
            )

    def _order_facts(self) -> dict[str, Any]:
        order = self._guard.ledger.order
        return {"samples": order.n_samples, "seed": order.seed, "shuffled": order.shuffled}

    def _check_trained(self, extra: dict[str, Any]) -> str:
        """Whether the same parameters are trained as in the run that saved; gradients are watched
        from here on.
        """
        probes = self._guard.probes
        probes.expect_gradients(without=extra["without_gradient"])
        saved, now = set(extra["frozen"]) & probes.all_names, set(probes.frozen())
        differ = [f"{name} was trained and is frozen now" for name in sorted(now - saved)]
        differ += [f"{name} was frozen and is trained now" for name in sorted(saved - now)]
        if not differ:
            return "ok"
        rest = f", and {len(differ) - MAX_NAMED} more" if len(differ) > MAX_NAMED else ""
        return ", ".join(differ[:MAX_NAMED]) + rest

    def _order_ahead(self) -> list[int]:
        ledger = self._guard.ledger
        return ledger.order.samples(ledger.cursor, ledger.cursor + AHEAD)

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
        """Go back to a state from before `window` and leave the window out. False: there is no such
        state.

        The window depends on the onset alone, never on which state is at hand, so that a run which
        lost its ring in a crash still makes the same batches afterwards.

        Args:
            verdict: that asks for it; its rung and remedies are on the same line.
            allowed: by a user, although it leaves out more than the guard may by itself.
        """
        guard = self._guard
        guard.at(Phase.ROLLBACK)
        if target is None:
            before, settled = verdict.before_step if verdict else None, guard.controller.is_settled
            target = guard.tiers.target(window[0], before_step=before, settled=settled)
        if target is None:
            guard.say("note", f"no valid state from before position {window[0]} to roll back to")
            return False
        left = guard.step
        span = self.span(
            window=window, onset=onset, reason=reason, cause=cause, verdict=verdict, allowed=allowed
        )
        if verdict is not None and not allowed and (over := guard.over_share(span)):
            guard.say("note", f"no rollback: {over}")
            return False
        data = guard.quarantine.told(span)
        out = f"out {amount(data)}" if span.last > span.first else "nothing out"
        guard.say(
            "rollback",
            f"rolled back from step {left} to {target.step} ({target.tier}), left {out}",
            to_step=target.step,
            from_step=left,
            onset=onset,
            window=list(window),
            tier=target.tier,
            new_timeline=guard.timeline + 1,
            rung=verdict.rung if verdict else "",
            remedies=list(verdict.remedies) if verdict else [],
            **data,
        )
        guard.ledger.leave_out(span)
        self._adopt(guard.tiers.restore(target))
        guard.timeline += 1
        guard.controller.went_back(target.step, guard.past.rollbacks)
        guard.tiers.rolled_back(self.facts, target)
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
        """What a rollback leaves out; arguments as `roll_back` takes them."""
        ledger = self._guard.ledger
        batches = max(1, round((window[1] - window[0]) / ledger.batch_size))
        positions: tuple[int, ...] = ()
        if verdict is not None and verdict.positions:
            # What was rejected before goes with it, as it does with all of the window.
            positions = tuple(sorted(ledger.rejected(*window) | set(verdict.positions)))
        return Span(
            first=window[0],
            last=window[1],
            cause=cause,
            step=onset,
            reason=reason,
            batches=batches,
            positions=positions,
            allowed=allowed,
        )

    def undo(self, undoing: UndoPlan, target: Target, lines: Sequence[int]) -> None:
        """Take a decision back: go to `target`, from before it, with its samples no longer left
        out.

        The batches that it rejected are pardoned: what is found in them again is noted, and they
        are applied.

        Args:
            lines: seqs of all journal lines that this takes back.
        """
        guard = self._guard
        guard.at(Phase.ROLLBACK)
        guard.say(
            "undo",
            f"line {undoing.of} undone: back from step {guard.step} to {target.step} ({target.tier}), "
            f"{undoing.positions} samples taken back",
            lines=list(lines),
            spans=list(undoing.spans),
            pardons=[list(stretch) for stretch in undoing.pardons],
            rollbacks=list(undoing.rollbacks),
            samples=undoing.positions,
            to_step=target.step,
            from_step=guard.step,
            tier=target.tier,
            new_timeline=guard.timeline + 1,
            incident=undoing.incident,
        )
        guard.ledger.take_back(undoing.spans)
        self._adopt(guard.tiers.restore(target))
        guard.timeline += 1
        guard.controller.went_back(target.step, guard.past.rollbacks)
        guard.controller.pardon(undoing.pardons)
        guard.tiers.rolled_back(self.facts, target)

    def _adopt(self, extra: dict[str, Any]) -> None:
        """Take over what travelled with a snapshot besides tensors."""
        guard = self._guard
        guard.step = int(extra["step"])
        guard.tokens = int(extra["tokens"])
        self._take_written(extra)
        guard.ledger.restore(extra["ledger"])
        guard.controller.load_state_dict(extra["controller"])
        guard.checks.schedule_restored()
        rng.restore(extra["rng"])
        if guard.updates is not None:
            # A rank's own part, which means nothing among another number of ranks.
            guard.updates.restore(
                extra.get("update_square")
                if extra.get("world", guard.world) == guard.world
                else None
            )

    def _take_written(self, extra: dict[str, Any]) -> None:
        """Use and name settings that were changed since an earlier start has saved this state.

        A state of this start has none, and is restored exactly.
        """
        assert self._written is not None
        if self._first_timeline is not None and extra["timeline"] >= self._first_timeline:
            return
        differences = self._written.take(extra.get("written"), step=self._guard.step)
        if differences:
            sentences = "; ".join(difference.sentence() for difference in differences)
            self._guard.say(
                "note",
                f"settings that are not those of the checkpoint: {sentences}",
                settings=[asdict(difference) for difference in differences],
            )

    def facts(self, checkpoint: bool = False) -> dict[str, Any]:
        """What travels with a snapshot besides tensors; for a checkpoint also what a resume is
        checked against.
        """
        guard = self._guard
        facts: dict[str, Any] = {
            "step": guard.step,
            "cursor": guard.ledger.cursor,
            "timeline": guard.timeline,
            "tokens": guard.tokens,
            "ledger": msgspec.to_builtins(guard.ledger.state()),
            "controller": guard.controller.state_dict(),
            "rng": rng.capture(),
        }
        if guard.updates is not None:
            facts["update_square"] = guard.updates.facts()
        if checkpoint:
            assert self._written is not None
            # What the journal on disk does not have yet, nothing can be held against.
            journal = {} if guard.recorder.behind else {"journal_seq": guard.past.seq}
            facts |= {
                "world": guard.world,
                "order": self._order_facts(),
                "order_ahead": self._order_ahead(),
                "identity": {**self.identity, "run_id": guard.past.run_id, **journal},
                "written": self._written.facts(),
                "frozen": guard.probes.frozen(),
                "without_gradient": guard.probes.without_gradient(),
            }
            if self._fixed_loss is not None:
                facts["fixed_loss"] = self._fixed_loss()
        return facts
