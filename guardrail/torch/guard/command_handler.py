"""Commands and answers of users: all ranks wait for them, and carry them out, at the same step."""

from __future__ import annotations

import time
from typing import Any

from guardrail.core.records import Action, Phase, Verdict
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

PARKED_SECONDS = 0.1  # between two meetings of parked ranks
DEFAULTS = ("proposal", "continue", "stop")  # guard.answer_default, in the order of `ParkResult`


class CommandHandler:
    """Waits for users, and carries their commands out.

    Args:
        actions: what commands do to the run.

    Attributes:
        question: what the guard asks while it is parked.
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
        """Read no more commands; harmless when called again."""
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
        """Wait for a user, for hours if need be.

        The ranks keep meeting, so that no collective times out.

        Args:
            question: what the guard asks; "" for a pause by command.
            verdict: what it has seen and proposes.
            batch: under question; a rollback by command skips it as well.
            command: that came with the step under question, known to every rank. It is the first
                one that is carried out, or refused, and does not wait until the question is over.
        """
        self.is_done_already = bool(command[0])
        self.question.end = batch.last if batch is not None else 0
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
        data = ctx.ranks.run_together(
            lambda: question_line(
                ctx,
                verdict,
                batch,
                status=self._actions.status,
                deadline=deadline,
                default=default,
            )
        )
        self.question.open(text, deadline=deadline, default=default)
        message = text or f"paused by {self._inbox.last_who or 'a command'}"
        ctx.recorder.event("paused", message, **data)

    def _meet(self, question: str, verdict: Verdict | None, began: float) -> ParkResult | None:
        """Let the ranks meet once, and carry out what came meanwhile."""
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
        """Write the `resumed` line; whoever answers the same question later learns how it ended."""
        is_asked, number = bool(self.question.text), self.question.number
        self.question.close(self._inbox.last_taken)
        if self._ctx.progress.phase is not None:
            return
        how = ""
        data: dict[str, Any] = {}
        if is_asked:
            how = f": {answer.name.lower().replace('_', ' ')}"
            data = {"question": number, "who": self._inbox.last_who}
        # to go on beyond the share to skip applies no update
        if verdict is not None and verdict.beyond is None:
            data |= {"answer": answer.name.lower(), "incident": verdict.incident}
        self._ctx.recorder.event("resumed", f"training goes on{how}", **data)

    def _decides_alone(self, verdict: Verdict | None, waited: float) -> bool:
        """Return, on rank 0, whether the guard answers its question itself now.

        A run that is out of budget does not wait for a screen that is not there. Where the default
        is another than to halt, it waits for that all the same: a user may come until then. So it
        does on a rung that says to park and ask.

        Args:
            waited: seconds since it asked.
        """
        ctx = self._ctx
        if ctx.ranks.rank:
            return False
        if ctx.run is None:  # nothing can bring an answer
            return True
        seconds = ctx.config.guard.answer_timeout
        is_spent = (
            verdict is not None and verdict.would is Action.HALT and verdict.escalation != "pause"
        )
        if is_spent and self._default(verdict) == "proposal" and not ctx.run.screens():
            return True
        return seconds > 0 and waited > seconds

    def _default(self, verdict: Verdict | None) -> str:
        """Return what a question comes to without an answer.

        By itself the guard skips no more than its share of the data.
        """
        is_beyond = verdict is not None and verdict.beyond is not None
        return "proposal" if is_beyond else self._ctx.config.guard.answer_default

    def _while_parked(self, command: ControlCommand) -> ParkResult | None:
        """Return how a command ends the wait; None: it does not, and took effect in place."""
        self._commands.result = None
        self._commands.carry_out(command)
        return self._commands.result
