"""Carry out one command of a user, or refuse it with a reason; the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable

from guardrail.core.format import format_plural
from guardrail.core.records import CommandKind, Phase, Span
from guardrail.decide.questions import BY_HAND
from guardrail.decide.sample_order import Batch
from guardrail.decide.undo import UndoPlan, find, lines_of
from guardrail.operate.preview import not_acceptable
from guardrail.torch.guard.command_actions import CommandActions
from guardrail.torch.guard.command_inbox import CommandInbox
from guardrail.torch.guard.context import RunContext
from guardrail.torch.guard.questions import MODES, OpenQuestion

# Kinds that hold for what was shown with them alone; the others do the same whatever has happened
# since.
BOUND = (
    *BY_HAND,
    CommandKind.ANSWER,
    CommandKind.LR,
    CommandKind.SHRINK_EMBEDDING,
    CommandKind.MODE,
)


class UserCommands:
    """Checks and carries out commands.

    Args:
        actions: of the run.
        inbox: holds the command at hand, and acknowledges it.
        question: that is open.
        pause: waits until a command ends the pause.
    """

    def __init__(
        self,
        ctx: RunContext,
        actions: CommandActions,
        *,
        inbox: CommandInbox,
        question: OpenQuestion,
        pause: Callable[[], object],
    ) -> None:
        self._ctx, self._actions = ctx, actions
        self._inbox, self._question, self._pause = inbox, question, pause

    def carry_out(self, kind: CommandKind, value: float) -> bool:
        """Carry a command out, or refuse it with a reason; return whether it was taken.

        The file of one with an action of its own goes once that is on the record: a death before
        leaves it to be done.
        """
        taken = self._carry_out(kind, value)
        self._inbox.put_away()
        return taken

    def _carry_out(self, kind: CommandKind, value: float) -> bool:
        acknowledge = self._inbox.acknowledge
        if kind in BOUND and (refusal := self._inbox.why_outdated(kind)):
            return acknowledge(kind, value, refusal=refusal)
        match kind:
            case CommandKind.PAUSE:
                acknowledge(kind, value)
                self._pause()
            case CommandKind.RESUME:
                return acknowledge(kind, value, refusal="training is not paused")
            case CommandKind.ANSWER:
                return acknowledge(kind, value, refusal="no question is open")
            case CommandKind.STOP:
                acknowledge(kind, value)
                self._actions.end(Phase.STOPPED, "stopped by command")
            case CommandKind.LR | CommandKind.SHRINK_EMBEDDING:
                # the journal line itself is where the setting is read from; see RunHistory
                acknowledge(kind, value)
            case CommandKind.MODE:
                acknowledge(kind, value)
                self._ctx.set_mode(MODES[int(value)])
            case CommandKind.CHECKPOINT:
                acknowledge(kind, value)
                self._actions.save_checkpoint()
            case CommandKind.ACCEPT:
                return self._accept(value)
            case CommandKind.SKIP:
                self._skip(int(value))
            case CommandKind.ROLLBACK:
                return self._roll_back(value)
            case CommandKind.UNDO:
                return self._undo(value)
        return True

    def _accept(self, value: float) -> bool:
        """Accept the run as it is: open incidents end, and later states may become good."""
        ctx = self._ctx
        unresolved = ctx.controller.unresolved()
        if unresolved is not None:
            unresolved = ctx.history.unresolved(unresolved)
        refusal = not_acceptable(unresolved, asking=bool(self._question.text))
        batch = (ctx.order.cursor, ctx.order.cursor + ctx.order.batch_size)
        if not self._inbox.acknowledge(
            CommandKind.ACCEPT, value, refusal=refusal, batch=list(batch)
        ):
            return False
        self._actions.accept(batch)
        return True

    def _skip(self, batches: int) -> None:
        """Skip the next `batches` batches."""
        order = self._ctx.order
        ahead = self._next_batches(batches)
        # Not from the cursor on: after a restart, what was rejected before lies between.
        first, last = (ahead[0].first, ahead[-1].last) if ahead else (0, 0)
        refusal = order.nothing_left(first, last)
        if self._inbox.acknowledge(CommandKind.SKIP, batches, refusal=refusal) and ahead:
            span = Span(
                first=first,
                last=last,
                origin="user",
                step=self._ctx.progress.step + 1,
                reason=f"{format_plural(batches, 'batch')} skipped by command",
                batches=batches,
            )
            self._actions.skip(span)

    def _next_batches(self, count: int) -> list[Batch]:
        """Return the batches that would come next, fewer at the end of the data."""
        order = self._ctx.order
        position = order.state()
        batches: list[Batch] = []
        while len(batches) < count and (batch := order.next_batch()) is not None:
            batches.append(batch)
            order.passed(batch, applied=False)
        order.restore(position)
        return batches

    def _roll_back(self, value: float) -> bool:
        """Restore the named step, or the newest good state, and skip the data since then."""
        order = self._ctx.order
        to_step = None if math.isnan(value) else int(value)
        end = max(order.cursor, self._question.end)
        target = self._actions.find_target(order.cursor - 1, to_step=to_step)
        if target is None:
            where = f"step {to_step}" if to_step is not None else "an earlier step"
            refusal = f"there is no snapshot or valid checkpoint of {where}"
            return self._inbox.acknowledge(CommandKind.ROLLBACK, value, refusal=refusal)
        refusal = self._inbox.why_target_changed(target)
        refusal = refusal or order.nothing_left(target.cursor, end)
        if not self._inbox.acknowledge(CommandKind.ROLLBACK, value, refusal=refusal):
            return False
        return self._actions.roll_back(
            target,
            window=(target.cursor, end),
            reason=f"rollback to step {target.step} by command",
        )

    def _undo(self, value: float) -> bool:
        """Take back the decision of one journal line, or the newest; see guardrail.decide.undo."""
        ranks = self._ctx.ranks
        seq = None if math.isnan(value) else int(value)
        found, lines = ranks.broadcast(ranks.run_together(lambda: self._find_decision(seq)))
        if isinstance(found, str):
            return self._inbox.acknowledge(CommandKind.UNDO, value, refusal=found)
        assert found.first is not None
        target = self._actions.find_target(found.first, candidates=True)
        if target is None:
            refusal = f"no snapshot or checkpoint from before journal line {found.of} is left"
            return self._inbox.acknowledge(CommandKind.UNDO, value, refusal=refusal)
        refusal = self._inbox.why_target_changed(target)
        if not self._inbox.acknowledge(CommandKind.UNDO, value, refusal=refusal):
            return False
        self._actions.undo(found, target, lines)
        return True

    def _find_decision(self, seq: int | None) -> tuple[UndoPlan | str, list[int]]:
        """Return the decision and all journal lines that go with it, or why there is none.

        On rank 0, which alone knows the numbers of the lines.
        """
        ctx = self._ctx
        if ctx.ranks.rank or ctx.run is None:
            return "there is no journal", []
        if ctx.recorder.has_waiting:
            return "the journal cannot be written now, so its lines are not complete", []
        events = ctx.run.events()
        found = find(events, seq)
        return found, [] if isinstance(found, str) else lines_of(events, found)
