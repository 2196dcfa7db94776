"""Carry out one command of a user, or refuse it with a reason; the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from guardrail.core.records.spans import Span
from guardrail.core.records.status import Phase, Unresolved
from guardrail.core.records.verdicts import Action, Mode, Verdict
from guardrail.decide.control_commands.base import ControlCommand, RestorableState
from guardrail.decide.questions import ParkResult
from guardrail.decide.sample_cursor import Batch
from guardrail.decide.step_setting import StepSetting
from guardrail.decide.undo import UndoPlan, find_undo_plan, lines_to_undo
from guardrail.torch.checkpoint.rollback_target import Target
from guardrail.torch.guard.command_actions import CommandActions
from guardrail.torch.guard.command_inbox import CommandInbox
from guardrail.torch.guard.context import RunContext
from guardrail.torch.guard.questions import OpenQuestion


class LiveFacts:
    """Where the run stands, for commands; see `RunFacts` in guardrail.decide.control_commands.base.

    Args:
        question: that is open.

    Attributes:
        is_paused: whether training is paused.
    """

    def __init__(self, ctx: RunContext, question: OpenQuestion) -> None:
        self._ctx, self._question = ctx, question
        self.is_paused = False

    @property
    def step(self) -> int:
        return self._ctx.progress.step

    @property
    def mode(self) -> Mode:
        return self._ctx.progress.mode

    @property
    def is_asking(self) -> bool:
        return bool(self._question.text)

    @property
    def question(self) -> int:
        return self._question.number

    @property
    def unresolved(self) -> Unresolved | None:
        ctx = self._ctx
        one = ctx.controller.unresolved()
        if one is None:
            return None
        return ctx.history.unresolved(one)

    def setting_of(self, factor: str) -> StepSetting:
        return self._ctx.history.setting_of(factor)


class UserCommands:
    """Checks and carries out commands; see `RunActions` in guardrail.decide.control_commands.base.

    Args:
        actions: of the run.
        inbox: holds the command at hand, and acknowledges it.
        question: that is open.
        pause: waits until a command ends the pause.

    Attributes:
        facts: what a command may ask of the run.
        proposal: what the open question proposes; None: nothing.
        result: how the wait ends; None: it continues.
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
        self.facts = LiveFacts(ctx, question)
        self.proposal: Verdict | None = None
        self.result: ParkResult | None = None

    def carry_out(self, command: ControlCommand) -> bool:
        """Carry a command out, or refuse it with a reason; return whether it was taken.

        A command whose action has a journal line keeps its file until that line is written. After a
        death in between, a restart does it again.
        """
        refusal = self._inbox.why_outdated(command, self.facts)
        if not refusal:
            # Only rank 0 knows the numbers of journal lines.
            refusal = self._ctx.ranks.broadcast(command.refuse(self.facts))
        if refusal:
            taken = self._inbox.acknowledge(command, refusal=refusal)
        else:
            taken = command.execute(self)
        self._inbox.put_away()
        return taken

    # -- what a command may do ---------------------------------------------------------------------

    @property
    def sender(self) -> str:
        return self._inbox.last_who or "a command"

    def acknowledge(
        self, command: ControlCommand, *, refusal: str = "", batch: tuple[int, int] | None = None
    ) -> bool:
        return self._inbox.acknowledge(command, refusal=refusal, batch=batch)

    def pause(self) -> None:
        self._pause()

    def end_pause(self, result: ParkResult) -> None:
        self.result = result

    def end_question(self) -> None:
        if self._question.text:
            self.result = ParkResult.BY_HAND

    def end_run(self, reason: str) -> None:
        self._actions.end(Phase.STOPPED, reason)

    def set_mode(self, mode: Mode) -> None:
        self._ctx.set_mode(mode)

    def save_checkpoint(self) -> None:
        self._actions.save_checkpoint()

    def next_batch(self) -> tuple[int, int]:
        order = self._ctx.order
        return order.cursor, order.cursor + order.batch_size

    def accept(self, batch: tuple[int, int]) -> None:
        self._actions.accept(batch)

    def next_window(self, batches: int) -> tuple[int, int]:
        # Not from the cursor on: after a restart, what was rejected before lies between.
        ahead = self._next_batches(batches)
        if not ahead:
            return 0, 0
        return ahead[0].first, ahead[-1].last

    def _next_batches(self, count: int) -> list[Batch]:
        """Return the batches that would come next, fewer at the end of the data."""
        order = self._ctx.order
        position = order.state()
        batches: list[Batch] = []
        while len(batches) < count and (batch := order.next_batch()) is not None:
            batches.append(batch)
            order.advance(batch, applied=False)
        order.restore(position)
        return batches

    def nothing_left(self, window: tuple[int, int]) -> str:
        return self._ctx.order.why_user_may_not_skip(*window)

    def skip(self, window: tuple[int, int], *, batches: int, reason: str) -> None:
        first, last = window
        if first == last:
            return  # the data have ended
        self._actions.skip(
            Span(
                first=first,
                last=last,
                origin="user",
                step=self._ctx.progress.step + 1,
                reason=reason,
                batches=batches,
            )
        )

    def find_state(
        self, cursor: int | None = None, *, to_step: int | None = None, candidates: bool = False
    ) -> Target | None:
        if cursor is None:
            cursor = self._ctx.order.cursor - 1
        return self._actions.find_target(cursor, to_step=to_step, candidates=candidates)

    def window_since(self, state: RestorableState) -> tuple[int, int]:
        return state.cursor, max(self._ctx.order.cursor, self._question.end)

    def why_state_changed(self, state: RestorableState) -> str:
        return self._inbox.why_target_changed(_as_target(state))

    def why_proposal_changed(self) -> str:
        verdict = self.proposal
        if verdict is None or verdict.would is not Action.ROLLBACK or verdict.window is None:
            return ""
        if self._inbox.shown is None:
            return ""
        target = self._actions.proposed_target(verdict)
        if target is None:
            return ""
        return self._inbox.why_target_changed(target)

    def roll_back(self, state: RestorableState, *, reason: str) -> bool:
        window = self.window_since(state)
        return self._actions.roll_back(_as_target(state), window=window, reason=reason)

    def find_decision(self, seq: int | None) -> tuple[UndoPlan | str, Sequence[int]]:
        ranks = self._ctx.ranks
        found: tuple[UndoPlan | str, list[int]]
        found = ranks.broadcast(ranks.run_together(lambda: self._find_decision(seq)))
        return found

    def _find_decision(self, seq: int | None) -> tuple[UndoPlan | str, list[int]]:
        """Return the decision and its lines on rank 0, which alone knows their numbers."""
        ctx = self._ctx
        if ctx.ranks.rank or ctx.run is None:
            return "there is no journal", []
        if ctx.recorder.has_waiting:
            return "the journal cannot be written now, so its lines are not complete", []
        events = ctx.run.events()
        found = find_undo_plan(events, seq)
        if isinstance(found, str):
            return found, []
        return found, lines_to_undo(events, found)

    def undo(self, plan: UndoPlan, state: RestorableState, lines: Sequence[int]) -> None:
        self._actions.undo(plan, _as_target(state), lines)


def _as_target(state: RestorableState) -> Target:
    """Return the state as `find_state` has returned it."""
    assert isinstance(state, Target)
    return state
