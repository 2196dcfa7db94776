"""The command at hand: read on rank 0, agreed on by all ranks, refused or acknowledged.

A command is sent to the other ranks as two numbers of the packed vector, so no step waits for a
broadcast. Each command is answered in the journal, with the step of its effect, before it takes
effect.
"""

from __future__ import annotations

import msgspec

from guardrail.core.events.run_state import CommandAnswered
from guardrail.core.records.commands import Command, Shown
from guardrail.decide.control_commands.base import ControlCommand, HoldsFor
from guardrail.decide.control_commands.checkpoint import WriteCheckpoint
from guardrail.decide.control_commands.registry import command_from, numbers_of
from guardrail.decide.control_commands.run_facts import RunFacts
from guardrail.decide.questions import (
    Open,
    question_changed,
    setting_changed,
    target_changed,
    timeline_changed,
)
from guardrail.rundir.mailbox import CommandPoller
from guardrail.rundir.run_directory import RunDirectory
from guardrail.torch.checkpoint.rollback_target import Target
from guardrail.torch.guard.command_actions import CommandActions
from guardrail.torch.guard.context import RunContext
from guardrail.torch.guard.questions import OpenQuestion

NO_COMMAND = (0, 0.0)


class CommandInbox:
    """Reads commands and keeps the one at hand until it is done.

    Args:
        actions: of the run.
        question: that is open.

    Attributes:
        last_who: sender of the command that was taken last.
        last_taken: that command in words, with its sender and step.
        shown: what the sender of the command at hand was shown; on every rank.
    """

    def __init__(self, ctx: RunContext, actions: CommandActions, question: OpenQuestion) -> None:
        self._ctx = ctx
        self._actions = actions
        self._question = question
        self._poller: CommandPoller | None = None
        self._current: Command | None = None
        # its action has begun, and its file is still there
        self._acknowledged: Command | None = None
        self.shown: Shown | None = None
        self.last_who = ""
        self.last_taken = ""

    # -- reading -----------------------------------------------------------------------------------

    def open(self, run: RunDirectory) -> None:
        """Read commands from now on; on rank 0 only."""
        self._poller = CommandPoller(run, stamp=self._stamp)

    def close(self) -> None:
        """Stop reading commands. May be called again."""
        if self._poller is not None:
            self._poller.close()
            self._poller = None

    @property
    def problem(self) -> str:
        """Why commands are not read at the moment, for the status; "" while they are."""
        if self._poller is None:
            return ""
        return self._poller.problem

    def _stamp(self, command: Command) -> Command:
        """Add the number of the open question to a command that names none."""
        number = self._question.number
        if command.question is not None or (self._question.text and not number):
            return command
        return msgspec.structs.replace(command, question=number)

    def next(self, step: int) -> tuple[int, float]:
        """Return rank 0's next command as two numbers; `NO_COMMAND` when there is none."""
        self._current = None
        if self._poller is not None:
            self._current = self._poller.next(step)
        if self._current is not None:
            return numbers_of(command_from(self._current))
        if self._ctx.ranks.rank == 0 and self._actions.is_retry_due():
            # Each rank writes its part of a checkpoint, so all ranks retry a save together.
            return numbers_of(WriteCheckpoint())
        return NO_COMMAND

    def agree(self, command: tuple[int, float]) -> tuple[int, float, int]:
        """Return (command kind, value, ranks that were asked to stop) on every rank.

        A collective: the small all-reduce outside a step.
        """
        ranks = self._ctx.ranks
        failed = [0.0] * ranks.world
        failed[ranks.rank] = float(self._actions.failed_save())
        stop = float(self._actions.is_stop_requested())
        summed = ranks.sum([float(command[0]), command[1], stop, *failed])
        kind, value, stop, *failed = summed
        self._actions.note_failed_saves([int(serial) for serial in failed])
        return int(kind), value, int(stop)

    # -- whether a command still holds -------------------------------------------------------------

    def why_outdated(self, given: ControlCommand, run: RunFacts) -> str:
        """Return why the command at hand does not hold any more; "" if it does.

        A collective, but for a command that holds for anything: every rank gets the same answer.
        `shown` then holds what the sender was shown.
        """
        if given.holds_for is HoldsFor.ANYTHING:
            return ""
        ctx, command, question = self._ctx, self._current, self._question
        refusal, shown = "", None
        if command is not None:
            shown = command.shown
            if given.holds_for is not HoldsFor.SETTING and not question.is_unwritten:
                refusal = question_changed(command.question, Open(question.number, question.ended))
        refusal, self.shown = ctx.ranks.broadcast((refusal, shown))
        if refusal:
            return refusal
        if given.holds_for is HoldsFor.TIMELINE:
            progress = ctx.progress
            return timeline_changed(self.shown, timeline=progress.timeline, step=progress.step)
        setting = given.current_setting(run)
        if setting is None:
            return ""
        return setting_changed(self.shown, setting.value, setting.words)

    def why_target_changed(self, target: Target) -> str:
        """Return why `target` is not what the sender was shown; "" if it is."""
        lost = self._ctx.progress.step - target.step
        return target_changed(self.shown, to_step=target.step, tier=target.tier, steps_lost=lost)

    # -- acknowledging -----------------------------------------------------------------------------

    def acknowledge(
        self, given: ControlCommand, *, refusal: str = "", batch: tuple[int, int] | None = None
    ) -> bool:
        """Answer the command at hand in the journal, before its effect; see `RunActions`."""
        ctx, command = self._ctx, self._current
        if command is None and isinstance(given, WriteCheckpoint) and ctx.ranks.rank == 0:
            return True  # the guard itself retries a save
        step, words = ctx.progress.step, given.describe()
        effect = "applied"
        if refusal:
            effect = "refused"
        id, who = "", "guard"
        if command is not None:
            id, who = command.id, command.who
        if not refusal:
            self.last_who = who
            self.last_taken = f"{words} by {who or 'a command'} at step {step}"
        line = CommandAnswered(
            step=step,
            id=id,
            command=given.name,
            value=given.value,
            who=who,
            question=self._question.number,
            effect=effect,
            reason=refusal,
            batch=batch,
        )
        ctx.recorder.write(line.with_words(words))
        self._acknowledged, self._current = command, None
        if refusal or not given.own_line:
            self.put_away()
        return not refusal

    def put_away(self) -> None:
        """Remove the file of the acknowledged command, if it is still there."""
        command, self._acknowledged = self._acknowledged, None
        if command is not None and self._ctx.run is not None:
            self._ctx.run.command_done(command.id)
