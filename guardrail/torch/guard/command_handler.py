"""The front desk: commands and questions of people, carried out by all ranks at the same step.

Rank 0 reads the inbox; a command travels to the other ranks as two numbers of the packed vector, so
no step waits for a broadcast. Each command is answered in the journal before it takes effect, with
the step at which it does.
"""

from __future__ import annotations

import math
import time
from enum import Enum
from typing import TYPE_CHECKING, Any

import msgspec
import torch
import torch.distributed as dist

from guardrail.core.records import Action, Command, CommandKind, Phase, Shown, Span, Verdict
from guardrail.core.text import plural
from guardrail.decide.incidents import ACCEPTED
from guardrail.decide.questions import (
    BY_HAND,
    Open,
    how_to_answer,
    question_changed,
    setting_changed,
    target_changed,
    timeline_changed,
)
from guardrail.decide.sample_order import Batch
from guardrail.decide.undo import UndoPlan, find, lines_of
from guardrail.operate.preview import not_acceptable
from guardrail.rundir.command_files import DEEDS
from guardrail.rundir.mailbox import CommandPoller
from guardrail.rundir.run_directory import RunDirectory
from guardrail.torch.checkpoint.snapshot_manager import Target
from guardrail.torch.guard.questions import MODES, line_of_question, worded

if TYPE_CHECKING:
    from guardrail.torch.guard.guard import Guard

PARKED_SECONDS = 0.1  # between two meetings of parked ranks
DEFAULTS = ("proposed", "go_on", "stop")  # guard.ask_default, in the order of `Response`
KINDS = list(CommandKind)
# Kinds that hold for what was shown with them alone; the others do the same whatever has happened
# since.
BOUND = (*BY_HAND, CommandKind.ANSWER, CommandKind.LR, CommandKind.EMBED_ALPHA, CommandKind.POLICY)
_REMEMBERED = 64  # questions of which it is known who ended them


class ParkResult(Enum):
    """How a wait ended."""

    AS_PROPOSED = 0
    GO_ON = 1
    STOP = 2
    BY_HAND = 3  # rolled back or skipped by command: the batch under question is gone


class CommandHandler:
    """Commands of one guard; `question` is what it asks while parked."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._mailbox: CommandPoller | None = None
        self._current: Command | None = None
        self._answered: Command | None = None  # its deed is under way, and its file is still there
        self._end = 0  # end of the batch that is under question, else 0
        self._shown: Shown | None = None  # of the command at hand, on every rank
        self._over: dict[int, str] = {}  # number of a question -> how it ended
        # who sent the command that was taken last, and what it was
        self._last_who = self._last_taken = ""
        # the command that came with the step under question has been carried out already
        self.obeyed = False
        self.question = ""
        self.deadline, self.default = 0.0, ""  # when and how it answers itself, for the status

    def open(self, run: RunDirectory) -> None:
        """Read commands; on rank 0 only."""
        self._mailbox = CommandPoller(run, stamp=self._stamp)

    @property
    def number(self) -> int:
        """Journal line of the question that is open; 0: none is, or its line is not on disk yet."""
        return self._guard.recorder.written.get("paused", 0) if self.question else 0

    def _stamp(self, command: Command) -> Command:
        """Of a sender that does not say so: a command is for the question that is open when it
        arrives.
        """
        number = self.number
        if command.question is not None or (self.question and not number):
            return command
        return msgspec.structs.replace(command, question=number)

    @property
    def problem(self) -> str:
        """Why commands are not read at the moment, for the status; "" while they are."""
        return self._mailbox.problem if self._mailbox is not None else ""

    def close(self) -> None:
        if self._mailbox is not None:
            self._mailbox.close()
            self._mailbox = None

    def next(self, step: int) -> tuple[int, float]:
        """Rank 0's next command as two numbers, 1 + index of its kind and its value; (0, 0.0) when
        there is none.
        """
        self._current = self._mailbox.next(step) if self._mailbox is not None else None
        if self._current is not None:
            return 1 + KINDS.index(self._current.kind), self._current.value
        if self._guard.rank == 0 and self._guard.tiers.retry_due:
            # Each rank writes its share of a checkpoint, so a save is tried again by all of them
            # together.
            return 1 + KINDS.index(CommandKind.CHECKPOINT), 0.0
        return 0, 0.0

    def agree(self, command: tuple[int, float]) -> tuple[int, float, int]:
        """The small all-reduce outside a step: (command kind, value, ranks that were asked to
        stop).
        """
        guard = self._guard
        failed = [0.0] * guard.world
        failed[guard.rank] = float(guard.tiers.failed_save)
        numbers = [float(command[0]), command[1], float(guard.stopping), *failed]
        vector = torch.tensor(numbers, dtype=guard.probes.dtype).to(guard.probes.device)
        if guard.world > 1:
            dist.all_reduce(vector)
        kind, value, stop, *failed = vector.tolist()
        guard.tiers.note_failures([int(serial) for serial in failed])
        return int(kind), value, int(stop)

    # -- waiting for a person ----------------------------------------------------------------------

    def park(
        self,
        question: str = "",
        *,
        verdict: Verdict | None = None,
        batch: Batch | None = None,
        command: tuple[int, float] = (0, 0.0),
    ) -> ParkResult:
        """Wait for a person while the ranks keep meeting, so that no collective times out, for
        hours if need be.

        Args:
            question: what the guard asks; "" for a pause by hand.
            verdict: what it has seen and proposes.
            batch: under question; a rollback by hand leaves it out as well.
            command: that came with the step under question, known to every rank. It is the first
                one that is carried out, or refused, and does not wait until the question is over.
        """
        guard = self._guard
        self.obeyed = bool(command[0])
        self._end = batch.last if batch is not None else 0
        began = time.monotonic()
        seconds, default = guard.settings.guard.ask_seconds, self._default(verdict)
        deadline, default_now = (
            (time.time() + seconds, default) if question and seconds > 0 else (0.0, "")
        )
        data = guard.slow_work(
            lambda: line_of_question(guard, verdict, batch, deadline=deadline, default=default_now)
        )
        guard.recorder.written.pop("paused", None)
        self.question, self.deadline, self.default = question, deadline, default_now
        guard.say("paused", question or f"paused by {self._last_who or 'a command'}", **data)
        answer: ParkResult | None = None
        while answer is None:
            guard.at(Phase.PAUSED)
            if command[0]:
                answer, command = (
                    self._while_parked(KINDS[command[0] - 1], command[1], verdict),
                    (0, 0.0),
                )
                continue
            command = self.next(guard.step + 1)
            if (
                not command[0]
                and question
                and self._decides_alone(verdict, time.monotonic() - began)
            ):
                command = 1 + KINDS.index(CommandKind.ANSWER), float(DEFAULTS.index(default))
            (kind, value, stop), command = self.agree(command), (0, 0.0)
            if stop:
                guard.end(Phase.STOPPED, "asked to stop by a signal while paused")
                answer = ParkResult.STOP
            elif kind:
                answer = self._while_parked(KINDS[kind - 1], value, verdict)
            else:
                guard.tiers.poll()
                guard.recorder.retry()
                time.sleep(PARKED_SECONDS)
        self._over_now(answer, verdict)
        return answer

    def _over_now(self, answer: ParkResult, verdict: Verdict | None) -> None:
        """The wait has ended; whoever answers the same question later learns how."""
        guard, asked, number = self._guard, bool(self.question), self.number
        if number:
            self._over[number] = self._last_taken
            self._over = dict(list(self._over.items())[-_REMEMBERED:])
        self.question, self._end = "", 0
        self.deadline, self.default = 0.0, ""
        if guard.phase is not None:
            return
        how = f": {answer.name.lower().replace('_', ' ')}" if asked else ""
        data: dict[str, Any] = {"question": number, "who": self._last_who} if asked else {}
        # to go on beyond the share to skip applies no update
        if verdict is not None and verdict.beyond is None:
            data |= {"answer": answer.name.lower(), "incident": verdict.incident}
        guard.say("resumed", f"training goes on{how}", **data)

    def _decides_alone(self, verdict: Verdict | None, waited: float) -> bool:
        """On rank 0: nobody will answer. A run that is out of budget does not wait for a screen
        that is not there.

        Where the default is another than to halt, it waits for that all the same: somebody may come
        until then. So it does on a rung that says to park and ask, which is there for who comes
        later.
        """
        guard = self._guard
        if guard.rank:
            return False
        settings = guard.settings.guard
        if guard.run is None:  # nothing can bring an answer
            return True
        spent = verdict is not None and verdict.would is Action.HALT and verdict.rung != "pause"
        unseen = spent and self._default(verdict) == "proposed" and not guard.run.screens()
        return unseen or (settings.ask_seconds > 0 and waited > settings.ask_seconds)

    def _default(self, verdict: Verdict | None) -> str:
        """What a question comes to without an answer. By itself the guard skips no more than its
        share of the data.
        """
        beyond = verdict is not None and verdict.beyond is not None
        return "proposed" if beyond else self._guard.settings.guard.ask_default

    def _while_parked(
        self, kind: CommandKind, value: float, verdict: Verdict | None
    ) -> ParkResult | None:
        """What ends the wait comes back; the rest takes effect in place."""
        asked = bool(self.question)
        if kind is CommandKind.RESUME:
            refusal = self._guard.shared(how_to_answer(self.number)) if asked else ""
            return ParkResult.AS_PROPOSED if self._answer(kind, value, refusal=refusal) else None
        if kind is CommandKind.ANSWER and asked:
            return self._answered_with(ParkResult(int(value)), verdict)
        if kind is CommandKind.PAUSE:
            self._answer(kind, value, refusal="training is paused already")
            return None
        done = self.execute(kind, value)
        if done and kind is CommandKind.STOP:
            return ParkResult.STOP
        # After a pause by hand, training stays paused.
        return ParkResult.BY_HAND if done and asked and kind in BY_HAND else None

    def _answered_with(self, answer: ParkResult, verdict: Verdict | None) -> ParkResult | None:
        """An answer to the open question, if it is one to this question and to what was
        proposed.
        """
        refusal = self._take_up(CommandKind.ANSWER)
        back = (
            answer is ParkResult.AS_PROPOSED
            and verdict is not None
            and verdict.would is Action.ROLLBACK
        )
        if (
            not refusal
            and back
            and verdict is not None
            and verdict.window is not None
            and self._shown is not None
        ):
            before, settled = verdict.before_step, self._guard.controller.is_settled
            target = self._guard.tiers.target(
                verdict.window[0], before_step=before, settled=settled
            )
            refusal = self._target_changed(target) if target is not None else ""
        if not self._answer(CommandKind.ANSWER, float(answer.value), refusal=refusal):
            return None
        if answer is ParkResult.STOP:
            self._guard.end(
                Phase.STOPPED, f"stopped by {self._last_who or 'a command'} while the guard asked"
            )
        return answer

    # -- what a command was shown for --------------------------------------------------------------

    def _take_up(self, kind: CommandKind) -> str:
        """Why the command at hand does not hold for what is now; "" if it does. A collective: every
        rank decides alike.

        What it was shown to do is kept for the checks of its target.
        """
        guard, command = self._guard, self._current
        unknown = bool(self.question) and not self.number
        refusal = ""
        if command is not None and kind in (*BY_HAND, CommandKind.ANSWER) and not unknown:
            refusal = question_changed(command.question, Open(self.number, self._over))
        refusal, self._shown = guard.shared(
            (refusal, command.shown if command is not None else None)
        )
        if not refusal and kind in BY_HAND:
            refusal = timeline_changed(self._shown, timeline=guard.timeline, step=guard.step)
        return refusal or self._setting_changed(kind)

    def _setting_changed(self, kind: CommandKind) -> str:
        guard = self._guard
        if kind is CommandKind.POLICY:
            return setting_changed(self._shown, float(MODES.index(guard.mode)), guard.mode.value)
        if kind not in (CommandKind.LR, CommandKind.EMBED_ALPHA):
            return ""
        now = (guard.past.lr if kind is CommandKind.LR else guard.past.alpha).at(guard.step + 1)
        return setting_changed(self._shown, now, f"x{now:g}")

    def _target_changed(self, target: Target) -> str:
        lost = self._guard.step - target.step
        return target_changed(self._shown, to_step=target.step, tier=target.tier, steps_lost=lost)

    # -- commands ----------------------------------------------------------------------------------

    def execute(self, kind: CommandKind, value: float) -> bool:
        """Carry a command out, or refuse it with a reason; returns whether it was taken. Every rank
        decides alike.

        The file of one with a deed of its own goes once that is on the record: a death before
        leaves it to be done.
        """
        taken = self._execute(kind, value)
        self._put_away()
        return taken

    def _put_away(self) -> None:
        answered, self._answered = self._answered, None
        if answered is not None and self._guard.run is not None:
            self._guard.run.command_done(answered.id)

    def _execute(self, kind: CommandKind, value: float) -> bool:
        guard = self._guard
        if kind in BOUND and (refusal := self._take_up(kind)):
            return self._answer(kind, value, refusal=refusal)
        match kind:
            case CommandKind.PAUSE:
                self._answer(kind, value)
                self.park()
            case CommandKind.RESUME:
                return self._answer(kind, value, refusal="training is not paused")
            case CommandKind.ANSWER:
                return self._answer(kind, value, refusal="no question is open")
            case CommandKind.STOP:
                self._answer(kind, value)
                guard.end(Phase.STOPPED, "stopped by command")
            case CommandKind.LR | CommandKind.EMBED_ALPHA:
                # the journal line itself is where the setting is read from; see Past
                self._answer(kind, value)
            case CommandKind.POLICY:
                self._answer(kind, value)
                guard.set_mode(MODES[int(value)])
            case CommandKind.CHECKPOINT:
                self._answer(kind, value)
                guard.tiers.save_now(guard.timelines.facts)
            case CommandKind.ACCEPT:
                return self._accept(value)
            case CommandKind.SKIP:
                self._skip(int(value))
            case CommandKind.ROLLBACK:
                return self._roll_back(value)
            case CommandKind.UNDO:
                return self._undo(value)
        return True

    def _answer(self, kind: CommandKind, value: float, *, refusal: str = "", **data: Any) -> bool:
        """Acknowledge a command in the journal, before its effect. Returns whether it is taken.

        Args:
            data: more for its line, of a command whose line itself is what it does.
        """
        guard, command = self._guard, self._current
        if command is None and kind is CommandKind.CHECKPOINT and guard.rank == 0:
            return True  # a retry of the guard's own
        outcome = f"refused: {refusal}" if refusal else f"takes effect after step {guard.step}"
        who = command.who if command else "guard"
        if not refusal:
            self._last_who = who
            self._last_taken = f"{worded(kind, value)} by {who or 'a command'} at step {guard.step}"
        guard.say(
            "command",
            f"{worded(kind, value)} {outcome}",
            id=command.id if command else "",
            command=kind.value,
            value=value,
            who=who,
            question=self.number,
            effect="refused" if refusal else "applied",
            reason=refusal,
            **data,
        )
        self._answered, self._current = command, None
        if refusal or kind not in DEEDS:
            self._put_away()
        return not refusal

    def _accept(self, value: float) -> bool:
        """Take the run as it is for sound: what is not over is over, and later states may become
        good.
        """
        guard = self._guard
        controller = guard.controller
        unresolved = controller.unresolved()
        unresolved = None if unresolved is None else guard.past.unresolved(unresolved)
        refusal = not_acceptable(unresolved, asking=bool(self.question))
        cursor = guard.ledger.cursor
        batch = (cursor, cursor + guard.ledger.batch_size)
        if not self._answer(CommandKind.ACCEPT, value, refusal=refusal, batch=list(batch)):
            return False
        accepted = controller.accept(guard.step, batch)
        for one in [one for one in controller.incidents.ended if one.number in accepted]:
            message = f"incident {one.number}: accepted as it is after step {guard.step}"
            data = {
                "number": one.number,
                "state": ACCEPTED,
                "onset": one.onset,
                "at_step": guard.step,
            }
            guard.say("incident", message, **data)
        guard.tiers.withdraw(controller.incidents.since)
        return True

    def _skip(self, batches: int) -> None:
        """Leave the next `batches` batches out."""
        guard, ledger = self._guard, self._guard.ledger
        position = ledger.state()
        ahead: list[Batch] = []
        while len(ahead) < batches and (batch := ledger.next_batch()) is not None:
            ahead.append(batch)
            ledger.passed(batch, applied=False)
        ledger.restore(position)
        # Not from the cursor on: behind a restart, what was rejected before lies between.
        first, last = (ahead[0].first, ahead[-1].last) if ahead else (0, 0)
        if (
            self._answer(CommandKind.SKIP, batches, refusal=ledger.nothing_left(first, last))
            and ahead
        ):
            reason = f"{plural(batches, 'batch')} skipped by command"
            guard.quarantine.leave_out(
                Span(
                    first=first,
                    last=last,
                    cause="user",
                    step=guard.step + 1,
                    reason=reason,
                    batches=batches,
                )
            )

    def _roll_back(self, value: float) -> bool:
        """To the named step, or the newest good state before the present; leaves out the data in
        between.
        """
        guard = self._guard
        to_step = None if math.isnan(value) else int(value)
        end = max(guard.ledger.cursor, self._end)
        target = guard.tiers.target(guard.ledger.cursor - 1, to_step=to_step)
        if target is None:
            where = f"step {to_step}" if to_step is not None else "an earlier step"
            refusal = f"there is no snapshot or valid checkpoint of {where}"
            return self._answer(CommandKind.ROLLBACK, value, refusal=refusal)
        refusal = self._target_changed(target) or guard.ledger.nothing_left(target.cursor, end)
        if not self._answer(CommandKind.ROLLBACK, value, refusal=refusal):
            return False
        return guard.timelines.roll_back(
            window=(target.cursor, end),
            onset=target.step + 1,
            reason=f"rollback to step {target.step} by command",
            cause="user",
            target=target,
        )

    def _undo(self, value: float) -> bool:
        """Take back the decision of one journal line, or the newest one of the guard; see
        guardrail.decide.undo.
        """
        guard = self._guard
        seq = None if math.isnan(value) else int(value)
        found, lines = guard.shared(guard.slow_work(lambda: self._meant(seq)))
        if isinstance(found, str):
            return self._answer(CommandKind.UNDO, value, refusal=found)
        assert found.first is not None
        target = guard.tiers.target(found.first, candidates=True)
        if target is None:
            refusal = f"no snapshot or checkpoint from before journal line {found.of} is left"
            return self._answer(CommandKind.UNDO, value, refusal=refusal)
        if not self._answer(CommandKind.UNDO, value, refusal=self._target_changed(target)):
            return False
        guard.timelines.undo(found, target, lines)
        return True

    def _meant(self, seq: int | None) -> tuple[UndoPlan | str, list[int]]:
        """On rank 0, which alone knows the numbers of the lines: the decision, and all lines that
        go with it.
        """
        guard = self._guard
        if guard.rank or guard.run is None:
            return "there is no journal", []
        if guard.recorder.behind:
            return "the journal cannot be written now, so its lines are not complete", []
        events = guard.run.events()
        found = find(events, seq)
        return found, [] if isinstance(found, str) else lines_of(events, found)
