"""Wait for commands and answers of users, and carry them out at the same step on all ranks."""

from __future__ import annotations

import time

import msgspec

from guardrail.core.events.run_state import Paused, Resumed
from guardrail.core.records.status import Phase
from guardrail.core.records.verdicts import Action, Verdict
from guardrail.decide.control_commands.answer import Answer
from guardrail.decide.control_commands.base import ControlCommand
from guardrail.decide.control_commands.registry import command_of, numbers_of
from guardrail.decide.questions import ParkResult
from guardrail.decide.sample_cursor import Batch
from guardrail.rundir.run_directory import RunDirectory
from guardrail.torch.guard.command_actions import CommandActions
from guardrail.torch.guard.command_inbox import NO_COMMAND, CommandInbox
from guardrail.torch.guard.context import RunContext
from guardrail.torch.guard.questions import OpenQuestion, question_line
from guardrail.torch.guard.user_commands import UserCommands

PARKED_SECONDS = 0.1  # between two all-reduces of paused ranks
DEFAULTS = ("proposal", "continue", "stop")  # guard.answer_default, in the order of `ParkResult`


class CommandHandler:
    """Waits for users, and carries their commands out.

    Args:
        actions: what commands do to the run.

    Attributes:
        question: what the guard asks while training is paused.
        is_done_already: the command that came with the step under question was carried out.
    """

    def __init__(self, ctx: RunContext, actions: CommandActions) -> None:
        self._ctx = ctx
        self._actions = actions
        self.question = OpenQuestion(ctx)
        self._inbox = CommandInbox(ctx, actions, self.question)
        self._commands = UserCommands(
            ctx, actions, inbox=self._inbox, question=self.question, pause=lambda: self.park()
        )
        self.is_done_already = False

    def open(self, run: RunDirectory) -> None:
        """Read commands from now on; on rank 0 only."""
        self._inbox.open(run)

    def close(self) -> None:
        """Stop reading commands. May be called again."""
        self._inbox.close()

    @property
    def problem(self) -> str:
        """Why commands are not read at the moment, for the status; "" while they are."""
        return self._inbox.problem

    def next(self, step: int) -> tuple[int, float]:
        """Return rank 0's next command as two numbers: (1 + index of its kind, its value)."""
        return self._inbox.next(step)

    def agree_to_stop(self) -> bool:
        """Return on every rank whether any was asked to stop. A collective."""
        return self._inbox.agree(NO_COMMAND)[2] > 0

    def carry_out(self, kind: int, value: float) -> bool:
        """Carry out a command that came with a step; return whether it was taken.

        Args:
            kind: 1 + index of its kind.
        """
        return self._commands.carry_out(command_of(kind, value))

    # -- waiting -----------------------------------------------------------------------------------

    def park(
        self,
        question: str = "",
        *,
        verdict: Verdict | None = None,
        batch: Batch | None = None,
        command: tuple[int, float] = NO_COMMAND,
    ) -> ParkResult:
        """Wait until a user answers, for hours if need be.

        The ranks meet in a small all-reduce again and again, so no collective times out.

        Args:
            question: what the guard asks; "" for a pause by command.
            verdict: with the findings and the proposal.
            batch: under question; a rollback by command skips it as well.
            command: that came with the step under question, known to every rank. It is carried out,
                or refused, first. It does not wait until the question is answered.
        """
        self.is_done_already = bool(command[0])
        self.question.end = 0
        if batch is not None:
            self.question.end = batch.last
        began = time.monotonic()
        self._commands.proposal, self._commands.facts.is_paused = verdict, True
        self._open_question(question, verdict, batch)
        answer: ParkResult | None = None
        while answer is None:
            self._actions.set_phase(Phase.PAUSED)
            if command[0]:
                kind, value = command
                answer = self._while_parked(command_of(kind, value))
                command = NO_COMMAND
            else:
                answer = self._meet(question, verdict, began)
        self._commands.proposal, self._commands.facts.is_paused = None, False
        self._close_question(answer, verdict)
        return answer

    def _open_question(self, text: str, verdict: Verdict | None, batch: Batch | None) -> None:
        """Write the `paused` line with the evidence."""
        ctx = self._ctx
        seconds = ctx.config.guard.answer_timeout
        deadline, default = 0.0, ""
        if text and seconds > 0:
            deadline, default = time.time() + seconds, self._default(verdict)
        line = ctx.ranks.run_together(
            lambda: question_line(
                ctx,
                text,
                verdict,
                batch,
                status=self._actions.status,
                deadline=deadline,
                default=default,
            )
        )
        self.question.open(text, deadline=deadline, default=default)
        if not text:
            line = Paused.by_user(self._inbox.last_who)
        ctx.recorder.write(line)

    def _meet(self, question: str, verdict: Verdict | None, began: float) -> ParkResult | None:
        """Meet the other ranks once, and carry out what came meanwhile."""
        command = self._inbox.next(self._ctx.progress.step + 1)
        waited = time.monotonic() - began
        if not command[0] and question and self._decides_alone(verdict, waited):
            default = DEFAULTS.index(self._default(verdict))
            command = numbers_of(Answer(float(default)))
        kind, value, stop = self._inbox.agree(command)
        if stop:
            self._actions.end(Phase.STOPPED, "asked to stop by a signal while paused")
            return ParkResult.STOP
        if kind:
            return self._while_parked(command_of(kind, value))
        self._actions.poll()
        time.sleep(PARKED_SECONDS)
        return None

    def _close_question(self, answer: ParkResult, verdict: Verdict | None) -> None:
        """Write the `resumed` line. A later answer to this question is refused with how it ended."""
        is_asked, number = bool(self.question.text), self.question.number
        self.question.close(self._inbox.last_taken)
        if self._ctx.progress.phase is not None:
            return
        outcome = answer.name.lower()
        line = Resumed()
        if is_asked:
            line = Resumed.after_question(outcome, question=number, who=self._inbox.last_who)
        # To continue beyond the share of skipped data applies no update.
        if verdict is not None and verdict.beyond is None:
            line = msgspec.structs.replace(line, answer=outcome, incident=verdict.incident)
        self._ctx.recorder.write(line)

    def _decides_alone(self, verdict: Verdict | None, waited: float) -> bool:
        """Return, on rank 0, whether the guard answers its question itself now.

        A run whose budget is used up halts at once where no screen is open. It waits all the same
        where the default is not to halt, since a user may come until then, and where the
        escalation step is to pause and ask.

        Args:
            waited: seconds since the guard asked.
        """
        ctx = self._ctx
        if ctx.ranks.rank:
            return False
        if ctx.run is None:  # without a run directory no answer can come
            return True
        seconds = ctx.config.guard.answer_timeout
        is_spent = (
            verdict is not None and verdict.would is Action.HALT and verdict.escalation != "pause"
        )
        if is_spent and self._default(verdict) == "proposal" and not ctx.run.screens():
            return True
        return seconds > 0 and waited > seconds

    def _default(self, verdict: Verdict | None) -> str:
        """Return what is done without an answer.

        By itself the guard skips no more than its share of the data.
        """
        if verdict is not None and verdict.beyond is not None:
            return "proposal"
        return self._ctx.config.guard.answer_default

    def _while_parked(self, command: ControlCommand) -> ParkResult | None:
        """Carry a command out; return how it ends the wait; None: it does not."""
        self._commands.result = None
        self._commands.carry_out(command)
        return self._commands.result
