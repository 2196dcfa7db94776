"""The front desk: commands and questions of people, carried out by all ranks at the same step.

Rank 0 reads the inbox; a command travels to the other ranks as two numbers of the packed vector, so no step waits
for a broadcast. Each command is answered in the journal before it takes effect, with the step at which it does.
"""

from __future__ import annotations

import math
import time
from enum import Enum
from typing import TYPE_CHECKING, Any

import msgspec
import torch
import torch.distributed as dist

from guardrail.errors import GuardrailError
from guardrail.inbox import DEEDS
from guardrail.incidents import ACCEPTED
from guardrail.ledger import Batch
from guardrail.mailbox import Mailbox
from guardrail.preview import choices, not_acceptable
from guardrail.records import Action, Command, CommandKind, Mode, Phase, Span, Verdict
from guardrail.rundir import RunDirectory
from guardrail.scene import Scene
from guardrail.text import plural
from guardrail.undoing import Undoing, find, lines_of

if TYPE_CHECKING:
    from guardrail.torch.guard import Guard

PARKED_SECONDS = 0.1  # between two meetings of parked ranks
DEFAULTS = ("proposed", "go_on", "stop")  # guard.ask_default, in the order of `Answer`
KINDS = list(CommandKind)
MODES = list(Mode)


class Answer(Enum):
    """How a wait ended."""

    AS_PROPOSED = 0
    GO_ON = 1
    STOP = 2
    BY_HAND = 3  # rolled back or skipped by command: the batch under question is gone


class Desk:
    """Commands of one guard; `question` is what it asks while parked."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._mailbox: Mailbox | None = None
        self._current: Command | None = None
        self._answered: Command | None = None  # its deed is under way, and its file is still there
        self._end = 0  # end of the batch that is under question, else 0
        self.question = ""
        self.deadline, self.default = 0.0, ""  # when and how it answers itself, for the status

    def open(self, run: RunDirectory) -> None:
        """Read commands; on rank 0 only."""
        self._mailbox = Mailbox(run)

    @property
    def problem(self) -> str:
        """Why commands are not read at the moment, for the status; "" while they are."""
        return self._mailbox.problem if self._mailbox is not None else ""

    def close(self) -> None:
        if self._mailbox is not None:
            self._mailbox.close()
            self._mailbox = None

    def next(self, step: int) -> tuple[int, float]:
        """Rank 0's next command as two numbers, 1 + index of its kind and its value; (0, 0.0) when there is none."""
        self._current = self._mailbox.next(step) if self._mailbox is not None else None
        if self._current is not None:
            return 1 + KINDS.index(self._current.kind), self._current.value
        if self._guard.rank == 0 and self._guard.tiers.retry_due:
            # Each rank writes its share of a checkpoint, so a save is tried again by all of them together.
            return 1 + KINDS.index(CommandKind.CHECKPOINT), 0.0
        return 0, 0.0

    def agree(self, command: tuple[int, float]) -> tuple[int, float, int]:
        """The small all-reduce outside a step: (command kind, value, ranks that were asked to stop)."""
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

    # -- waiting for a person ------------------------------------------------------------------------------------

    def park(self, question: str = "", *, verdict: Verdict | None = None, batch: Batch | None = None) -> Answer:
        """Wait for a person while the ranks keep meeting, so that no collective times out, for hours if need be.

        Args:
            question: what the guard asks; "" for a pause by hand.
            verdict: what it has seen and proposes.
            batch: under question; a rollback by hand leaves it out as well.
        """
        guard = self._guard
        held, self._current = self._current, None  # came with the step under question and waits until that is over
        self.question, self._end = question, batch.last if batch is not None else 0
        began = time.monotonic()
        seconds, default = guard.settings.guard.ask_seconds, self._default(verdict)
        if question:
            self.deadline, self.default = (time.time() + seconds, default) if seconds > 0 else (0.0, "")
        options = guard.slow_work(lambda: self._options(verdict, batch))
        guard.say("paused", question or "paused by a person", **options)
        answer: Answer | None = None
        while answer is None:
            guard.at(Phase.PAUSED)
            command = self.next(guard.step + 1)
            if not command[0] and question and self._decides_alone(verdict, time.monotonic() - began):
                command = 1 + KINDS.index(CommandKind.ANSWER), float(DEFAULTS.index(default))
            kind, value, stop = self.agree(command)
            if stop:
                guard.end(Phase.STOPPED, "asked to stop by a signal while paused")
                answer = Answer.STOP
            elif kind:
                answer = self._while_parked(KINDS[kind - 1], value)
            else:
                guard.tiers.poll()
                time.sleep(PARKED_SECONDS)
        self.question, self._end = "", 0
        self.deadline, self.default = 0.0, ""
        self._current = held
        if guard.phase is None:
            taken = f": {answer.name.lower().replace('_', ' ')}" if question else ""
            # To go on beyond the share that may be skipped does not apply the update.
            lets_pass = verdict is not None and verdict.beyond is None
            data = {"answer": answer.name.lower(), "incident": verdict.incident} if verdict and lets_pass else {}
            guard.say("resumed", f"training goes on{taken}", **data)
        return answer

    def _decides_alone(self, verdict: Verdict | None, waited: float) -> bool:
        """On rank 0: nobody will answer. A run that is out of budget does not wait for a screen that is not there.

        Where the default is another than to halt, it waits for that all the same: somebody may come until then. So it
        does on a rung that says to park and ask, which is there for who comes later.
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
        """What a question comes to without an answer. By itself the guard skips no more than its share of the data."""
        beyond = verdict is not None and verdict.beyond is not None
        return "proposed" if beyond else self._guard.settings.guard.ask_default

    def _options(self, verdict: Verdict | None, batch: Batch | None) -> dict[str, Any]:
        """What the `paused` line holds: the evidence, and each choice with what it would do and cost."""
        if verdict is None or verdict.would is None or batch is None:
            return {"proposals": []}
        names = [verdict.would.value, "go on", "stop"]
        data: dict[str, Any] = {
            "findings": list(verdict.findings),
            "incident": verdict.incident,
            "onset": verdict.onset,
            "end": batch.last,
            "deadline": self.deadline,
            "default": self.default,
        }
        guard = self._guard
        if guard.rank or guard.run is None:  # what the others remember of the journal holds no proposals
            return {"proposals": [{"choice": choice, "action": name} for choice, name in enumerate(names)], **data}
        try:
            previews = choices(
                Scene.of(guard.run, status=guard.account.status()),
                verdict,
                first=batch.first,
                last=batch.last,
                settled=guard.controller.is_settled,
            )
        except (OSError, GuardrailError):
            previews = []  # a disk that does not answer: the question is asked without the numbers
        told = {preview.command: msgspec.to_builtins(preview) | {"text": preview.sentence()} for preview in previews}
        proposals = [{"choice": at, "action": name, **told.get(name, {})} for at, name in enumerate(names)]
        return {"proposals": proposals, **data}

    def _while_parked(self, kind: CommandKind, value: float) -> Answer | None:
        """What ends the wait comes back; the rest takes effect in place."""
        asked = bool(self.question)
        if kind is CommandKind.RESUME or (kind is CommandKind.ANSWER and asked):
            self._answer(kind, value)
            answer = Answer(int(value)) if kind is CommandKind.ANSWER else Answer.AS_PROPOSED
            if answer is Answer.STOP:
                self._guard.end(Phase.STOPPED, "stopped by a person while the guard asked")
            return answer
        if kind is CommandKind.PAUSE:
            self._answer(kind, value, refusal="training is paused already")
            return None
        done = self.execute(kind, value)
        if done and kind is CommandKind.STOP:
            return Answer.STOP
        # Each answers the guard's question; after a pause by hand, training stays paused.
        answers = kind in (CommandKind.ROLLBACK, CommandKind.SKIP, CommandKind.UNDO)
        return Answer.BY_HAND if done and asked and answers else None

    # -- commands ------------------------------------------------------------------------------------------------

    def execute(self, kind: CommandKind, value: float) -> bool:
        """Carry a command out, or refuse it with a reason; returns whether it was taken. Every rank decides alike.

        The file of one with a deed of its own goes once that is on the record: a death before leaves it to be done.
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
                self._answer(kind, value)  # the journal line itself is where the setting is read from; see Past
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
        guard.say(
            "command",
            f"{_worded(kind, value)} {outcome}",
            id=command.id if command else "",
            command=kind.value,
            value=value,
            who=command.who if command else "guard",
            effect="refused" if refusal else "applied",
            reason=refusal,
            **data,
        )
        self._answered, self._current = command, None
        if refusal or kind not in DEEDS:
            self._put_away()
        return not refusal

    def _accept(self, value: float) -> bool:
        """Take the run as it is for sound: what is not over is over, and later states may become good."""
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
            data = {"number": one.number, "state": ACCEPTED, "onset": one.onset, "at_step": guard.step}
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
        if self._answer(CommandKind.SKIP, batches, refusal=ledger.nothing_left(first, last)) and ahead:
            reason = f"{plural(batches, 'batch')} skipped by command"
            guard.quarantine.leave_out(
                Span(first=first, last=last, cause="user", step=guard.step + 1, reason=reason, batches=batches)
            )

    def _roll_back(self, value: float) -> bool:
        """To the named step, or the newest good state before the present; leaves out the data in between."""
        guard = self._guard
        to_step = None if math.isnan(value) else int(value)
        end = max(guard.ledger.cursor, self._end)
        target = guard.tiers.target(guard.ledger.cursor - 1, to_step=to_step)
        if target is None:
            where = f"step {to_step}" if to_step is not None else "an earlier step"
            refusal = f"there is no snapshot or valid checkpoint of {where}"
            return self._answer(CommandKind.ROLLBACK, value, refusal=refusal)
        if not self._answer(CommandKind.ROLLBACK, value, refusal=guard.ledger.nothing_left(target.cursor, end)):
            return False
        return guard.timelines.roll_back(
            window=(target.cursor, end),
            onset=target.step + 1,
            reason=f"rollback to step {target.step} by command",
            cause="user",
            target=target,
        )

    def _undo(self, value: float) -> bool:
        """Take back the decision of one journal line, or the newest one of the guard; see guardrail.undoing."""
        guard = self._guard
        seq = None if math.isnan(value) else int(value)
        found, lines = guard.shared(guard.slow_work(lambda: self._meant(seq)))
        if isinstance(found, str):
            return self._answer(CommandKind.UNDO, value, refusal=found)
        assert found.first is not None
        target = guard.tiers.target(found.first, candidates=True)
        if target is None:
            refusal = f"no state from before line {found.of} is left"
            return self._answer(CommandKind.UNDO, value, refusal=refusal)
        self._answer(CommandKind.UNDO, value)
        guard.timelines.undo(found, target, lines)
        return True

    def _meant(self, seq: int | None) -> tuple[Undoing | str, list[int]]:
        """On rank 0, which alone knows the numbers of the lines: the decision, and all lines that go with it."""
        guard = self._guard
        if guard.rank or guard.run is None:
            return "there is no journal", []
        if guard.recorder.behind:
            return "the journal cannot be written now, so its lines are not complete", []
        events = guard.run.events()
        found = find(events, seq)
        return found, [] if isinstance(found, str) else lines_of(events, found)


def _worded(kind: CommandKind, value: float) -> str:
    """ "lr x0.5", "skip 20 batches": a command as a person would say it."""
    match kind:
        case CommandKind.LR | CommandKind.EMBED_ALPHA:
            return f"{kind.value} x{value:g}"
        case CommandKind.SKIP:
            return f"skip {plural(int(value), 'batch')}"
        case CommandKind.POLICY:
            return f"policy {MODES[int(value)].value}"
        case CommandKind.ROLLBACK:
            return "rollback" if math.isnan(value) else f"rollback to step {value:g}"
        case CommandKind.UNDO:
            return "undo" if math.isnan(value) else f"undo line {value:g}"
        case CommandKind.ANSWER:
            return f"answer {value:g}"
    return kind.value
