"""Journal lines about the course of a run: start, end, pauses, commands, checkpoints, notes."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from guardrail.core.events.event import COMMAND, INCIDENT, Event, Int64, Positions
from guardrail.core.files import as_int
from guardrail.core.format import format_plural
from guardrail.core.records.findings import Finding


class Started(Event, frozen=True, kw_only=True):
    """Training began. `data` also holds fingerprints of the setup.

    Attributes:
        world: number of ranks.
        samples, order_seed, shuffled: of the sample order.
        versions: package -> version.
    """

    symbol: ClassVar[str] = "●"
    printed: ClassVar[bool] = True

    kind: str = "started"
    world: Int64 = 0
    samples: Int64 | None = None
    order_seed: int | None = None
    shuffled: bool | None = None
    batch_size: Int64 = 0
    host: str = ""
    device: str = ""
    versions: dict[str, Any] = msgspec.field(default_factory=dict)
    run_id: str = ""

    @property
    def sample_seed(self) -> int:
        """Return the seed of the sample order, also where an older version has named it `seed`."""
        if self.order_seed is not None:
            return self.order_seed
        return as_int(self.data.get("seed"))

    def sentence(self) -> str:
        return self.message or f"training begins on {format_plural(self.world, 'rank')}"


class Restarted(Event, frozen=True, kw_only=True):
    """Training continued after a restart, at this line's step.

    Attributes:
        checkpoint: that was loaded; "" where the run began again.
        new_timeline: of a journal that says so; else the line's own timeline.
    """

    symbol: ClassVar[str] = "●"
    printed: ClassVar[bool] = True
    topic: ClassVar[str] = INCIDENT
    optional: ClassVar[frozenset[str]] = frozenset(("reason", "new_timeline"))

    kind: str = "restarted"
    checkpoint: str = ""
    world: Int64 = 0
    device: str = ""
    run_id: str = ""
    reason: str = ""
    new_timeline: Int64 | None = None

    def sentence(self) -> str:
        if self.message:
            return self.message
        where = f"checkpoint {self.checkpoint}"
        if not self.checkpoint:
            where = "the beginning: no valid checkpoint was found"
        return f"continues at step {self.step} from {where}"


class Ended(Event, frozen=True, kw_only=True):
    """The run ended.

    Attributes:
        phase: "finished", "stopped", "halted" or "failed".
        saved: the last state is on disk.
        planned: phase that was planned.
        exit_code: of a start that trained nothing.
    """

    symbol: ClassVar[str] = "■"
    printed: ClassVar[bool] = True
    topic: ClassVar[str] = INCIDENT
    optional: ClassVar[frozenset[str]] = frozenset(("saved", "planned", "exit_code"))

    kind: str = "ended"
    phase: str = ""
    exit_code: Int64 | None = None
    reason: str = ""
    saved: bool | None = None
    planned: str = ""

    @property
    def tone(self) -> str:
        return {"finished": "good", "failed": "bad"}.get(self.phase, "warn")

    @property
    def notice(self) -> str:
        return self.phase

    def sentence(self) -> str:
        return self.message or f"{self.phase} at step {self.step}: {self.reason}"


class ResumeChecked(Event, frozen=True, kw_only=True):
    """The state after a resume against the saved one. `data`: part of the state -> outcome."""

    printed: ClassVar[bool] = True

    kind: str = "resume_check"

    @property
    def differences(self) -> dict[str, Any]:
        """Return the parts of the state that are not what was saved: part -> outcome."""
        return {part: outcome for part, outcome in self.data.items() if outcome != "ok"}

    def sentence(self) -> str:
        if self.message:
            return self.message
        if wrong := self.differences:
            return f"resumed state differs in {', '.join(wrong)}"
        return "resumed state is what was saved"


class Evaluated(Event, frozen=True, kw_only=True):
    """Held-out loss, nats a token."""

    kind: str = "eval"
    loss: float | None = None

    def sentence(self) -> str:
        if self.message or self.loss is None:
            return self.message
        return f"held-out loss {self.loss:.4f} after step {self.step}"


class Paused(Event, frozen=True, kw_only=True):
    """Training paused, by a command or with a question.

    Attributes:
        asks: it is a question. Older versions wrote `proposals` alone.
        proposals: the answers, each with what it does.
        deadline: wall time at which the guard answers itself; 0: never.
        default: what it then does.
        end: last position of the batch in question.
    """

    symbol: ClassVar[str] = "‖"
    printed: ClassVar[bool] = True
    topic: ClassVar[str] = INCIDENT
    optional: ClassVar[frozenset[str]] = frozenset(
        ("asks", "findings", "incident", "onset", "end", "deadline", "default")
    )

    kind: str = "paused"
    proposals: tuple[Any, ...] = ()
    asks: bool | None = None
    findings: tuple[Finding, ...] = ()
    incident: Int64 | None = None
    onset: Int64 | None = None
    end: Int64 | None = None
    deadline: float = 0.0
    default: str = ""

    @classmethod
    def by_user(cls, who: str) -> Paused:
        """Return the line of a pause by a command of `who`."""
        return cls(message=f"paused by {who or 'a command'}", asks=False)

    @property
    def is_question(self) -> bool:
        if self.asks is None:
            return bool(self.proposals)
        return self.asks

    @property
    def tone(self) -> str:
        return "warn"

    @property
    def notice(self) -> str:
        return self.kind if self.proposals else ""  # none for a pause by a user

    def may_omit(self, name: str) -> bool:
        """Return False for a question, which is written with all fields."""
        return not self.asks and name in self.optional


class Resumed(Event, frozen=True, kw_only=True):
    """Training continued after a pause.

    Attributes:
        question: journal line of the question that is over.
        who: answered it.
        answer: "go_on", "as_proposed" or "stop"; "" of a pause by a command.
    """

    printed: ClassVar[bool] = True
    topic: ClassVar[str] = INCIDENT
    optional: ClassVar[frozenset[str]] = frozenset(("question", "who", "answer", "incident"))

    kind: str = "resumed"
    question: Int64 | None = None
    who: str | None = None
    answer: str = ""
    incident: Int64 | None = None

    @classmethod
    def after_question(cls, outcome: str, *, question: int, who: str) -> Resumed:
        """Return the line after a question; `outcome` is one of the words of `answer`."""
        said = f"training continues: {outcome.replace('_', ' ')}"
        return cls(message=said, question=question, who=who)

    def may_omit(self, name: str) -> bool:
        if name == "incident" and self.answer:
            return False
        return name in self.optional

    def sentence(self) -> str:
        return self.message or "training continues"


class CommandAnswered(Event, frozen=True, kw_only=True):
    """A command was applied or refused.

    Attributes:
        id: of its file; "" where the guard gave it itself.
        command: its name.
        effect: "applied" or "refused"; `reason`: why it was refused.
        batch: of `accept`: positions of the next batch.
    """

    symbol: ClassVar[str] = "!"
    printed: ClassVar[bool] = True
    topic: ClassVar[str] = COMMAND
    optional: ClassVar[frozenset[str]] = frozenset(("question", "batch"))

    kind: str = "command"
    id: str = ""
    command: str = ""
    value: float | None = None
    who: str | None = ""
    question: Int64 | None = None
    effect: str = ""
    reason: str = ""
    batch: Positions | None = None

    @property
    def is_applied(self) -> bool:
        return self.effect == "applied"

    @property
    def tone(self) -> str:
        return "plain" if self.is_applied else "warn"

    def sentence(self) -> str:
        if self.message:
            return self.message
        said = f"{self.command or 'command'} {self.effect}"
        if self.reason:
            said += f": {self.reason}"
        return said

    def with_words(self, words: str) -> CommandAnswered:
        """Return the line with the sentence of a running guard, which says when it takes effect.

        Args:
            words: the command with its argument: "lr x0.5".
        """
        outcome = f"refused: {self.reason}"
        if self.is_applied:
            outcome = f"takes effect after step {self.step}"
        return msgspec.structs.replace(self, message=f"{words} {outcome}")


class CheckpointChanged(Event, frozen=True, kw_only=True):
    """A checkpoint became candidate, good, suspect, failed, invalid, foreign or pruned.

    Attributes:
        path: its name.
        cp_step: applied steps that it holds.
        seconds: from the call of `save` to the commit. Only the line of a save or a deletion has
            them, and the size in bytes.
    """

    symbol: ClassVar[str] = "C"
    optional: ClassVar[frozenset[str]] = frozenset(("cp_step", "bytes", "seconds", "reason"))

    kind: str = "checkpoint"
    path: str = ""
    state: str = ""
    cp_step: Int64 | None = None
    bytes: Int64 = 0
    seconds: float | None = None
    reason: str = ""

    @property
    def is_printed(self) -> bool:
        """Return whether the line is printed. A checkpoint that became good is routine."""
        return self.state in ("failed", "invalid", "suspect", "foreign")

    @property
    def name(self) -> str:
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def tone(self) -> str:
        return "bad" if self.state in ("failed", "invalid") else "plain"

    @classmethod
    def withdrawn(cls, path: str, *, cp_step: int, since: int) -> CheckpointChanged:
        """Return the line of a good one that is a candidate again; see `withdraw_good`."""
        why = f"the incident since step {since} is not over"
        said = f"checkpoint {path} is a candidate again: {why}"
        return cls(message=said, path=path, state="candidate", cp_step=cp_step)

    def may_omit(self, name: str) -> bool:
        return self.seconds is None and name in self.optional

    def sentence(self) -> str:
        """Return "checkpoint step-120: failed (No space left on device)"."""
        if self.message:
            return self.message
        if self.seconds is None and self.reason:
            return f"checkpoint {self.path} is not used: {self.reason}"
        if self.seconds is None and self.state == "good":
            return f"checkpoint {self.path} is good"
        if self.seconds is None and self.state == "suspect":
            return f"checkpoint {self.path} is suspect: it holds steps that were discarded"
        said = f"checkpoint {self.path or f'of step {self.cp_step}'}: {self.state}"
        if self.reason:
            said += f" ({self.reason})"
        return said


class Note(Event, frozen=True, kw_only=True):
    """Any other message. `data` holds the numbers of a note.

    Attributes:
        overflow: fp16: an update was skipped and the loss scale was halved.
    """

    printed: ClassVar[bool] = True
    optional: ClassVar[frozenset[str]] = frozenset(("overflow",))

    kind: str = "note"
    overflow: bool = False


TURNS = (Started, Restarted, Ended)  # lines that start or end a run
