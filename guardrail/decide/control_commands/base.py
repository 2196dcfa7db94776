"""What a command of a user is, and what it may ask of a run. Pure.

`ControlCommand` is the base class. Each command is a class in its own file, and one entry of
`registry.COMMANDS`. The command line, the screen, the command files, the journal and the guard know
a command only by this interface:

| who | uses |
|---|---|
| `guardrail ctl` | `name`, `aliases`, `argument`, `help`, `preview` |
| the screen | `key`, `label`, `dialog_lines`, `current_value`, `preview` |
| command files | `name`, `argument`, `own_line` |
| the guard | `holds_for`, `refuse`, `execute`, `describe` |
| a restart | `replayed` |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Protocol

from guardrail.core.events.event import Event
from guardrail.core.events.run_state import CommandAnswered
from guardrail.core.records.status import Status
from guardrail.core.records.verdicts import Mode
from guardrail.decide.control_commands.arguments import Argument, NoArgument
from guardrail.decide.control_commands.preview import Preview
from guardrail.decide.control_commands.run_facts import (
    RecordedFacts,
    RunFacts,
    Setting,
    make_preview,
)
from guardrail.decide.questions import ParkResult
from guardrail.decide.undo import UndoPlan


class HoldsFor(Enum):
    """What must not have changed since the command was given, for it to be carried out."""

    ANYTHING = "anything"  # it does the same whatever has happened since
    SETTING = "setting"  # the setting that it replaces
    QUESTION = "question"  # the question that was open
    TIMELINE = "timeline"  # the question and the timeline; it answers the question as well


@dataclass(frozen=True, kw_only=True)
class ScreenKey:
    """The key of a command on the screen.

    Attributes:
        key: as it is pressed and written.
        label: one or two words for the footer; "" keeps it out of there.
        help: what it does, as a sentence.
        rank: the footer drops the highest first where the terminal is narrow.
        title: of the dialog that asks for the argument.
        asks_first: a command without an argument shows its preview and waits for a Yes.
    """

    key: str
    label: str
    help: str
    rank: int = 5
    title: str = ""
    asks_first: bool = False


class RestorableState(Protocol):
    """A snapshot or checkpoint that the guard has found."""

    @property
    def step(self) -> int: ...

    @property
    def cursor(self) -> int: ...

    @property
    def tier(self) -> str: ...


class RunActions(Protocol):
    """What commands do to a run. Every rank calls the same methods in the same order."""

    @property
    def sender(self) -> str:
        """Who gave the command that was acknowledged last; "a command" where it does not say."""
        ...

    def acknowledge(
        self, command: ControlCommand, *, refusal: str = "", batch: tuple[int, int] | None = None
    ) -> bool:
        """Answer a command in the journal, before its effect.

        Args:
            refusal: why it is not taken; "" takes it.
            batch: positions of the next batch, of a command that needs them after a restart.

        Returns:
            Whether it is taken.
        """
        ...

    def pause(self) -> None:
        """Wait until a command ends the pause."""
        ...

    def end_pause(self, result: ParkResult) -> None:
        """End the wait of the ranks, if they wait."""
        ...

    def end_question(self) -> None:
        """End the wait because the batch under question is gone; a plain pause goes on."""
        ...

    def end_run(self, reason: str) -> None:
        """Save and end the run."""
        ...

    def set_mode(self, mode: Mode) -> None:
        """Change what the guard may do by itself."""
        ...

    def save_checkpoint(self) -> None:
        """Save the present state."""
        ...

    def next_batch(self) -> tuple[int, int]:
        """Return the positions of the next batch."""
        ...

    def accept(self, batch: tuple[int, int]) -> None:
        """Close open incidents; `batch` are the positions of the next batch."""
        ...

    def next_window(self, batches: int) -> tuple[int, int]:
        """Return the positions of the next batches, fewer at the end of the data; (0, 0): none."""
        ...

    def nothing_left(self, window: tuple[int, int]) -> str:
        """Return why a user cannot skip these positions; "" where a user can."""
        ...

    def skip(self, window: tuple[int, int], *, batches: int, reason: str) -> None:
        """Skip the samples of these positions."""
        ...

    def find_state(
        self, cursor: int | None = None, *, to_step: int | None = None, candidates: bool = False
    ) -> RestorableState | None:
        """Return the newest state before a position.

        Args:
            cursor: the position; None: the present one.
            to_step: only the state of this step.
            candidates: candidates count as good ones.
        """
        ...

    def window_since(self, state: RestorableState) -> tuple[int, int]:
        """Return the positions that were read since a state, with the batch under question."""
        ...

    def why_state_changed(self, state: RestorableState) -> str:
        """Return why a state is not the one that the sender was shown; "" if it is."""
        ...

    def why_proposal_changed(self) -> str:
        """Return why the guard's proposal is not what the sender was shown; "" if it is."""
        ...

    def roll_back(self, state: RestorableState, *, reason: str) -> bool:
        """Restore a state and skip `window_since(state)`; return whether it was done."""
        ...

    def find_decision(self, seq: int | None) -> tuple[UndoPlan | str, Sequence[int]]:
        """Return the decision of a journal line, and all lines that go with it.

        Args:
            seq: number of the line; None: the newest decision of the guard.

        Returns:
            In place of the decision, why there is none.
        """
        ...

    def undo(self, plan: UndoPlan, state: RestorableState, lines: Sequence[int]) -> None:
        """Restore a state and take back the decisions of these journal lines."""
        ...


class ReplayTarget:
    """What the command lines of a journal change, for one reader.

    A reader overrides what concerns it; the rest does nothing.
    """

    def set_factor(self, factor: str, from_step: int, value: float) -> None:
        """Apply a factor that a user has set. `factor`: kind of a remedy, LR or EMBED_ALPHA."""

    def set_mode(self, mode: Mode) -> None:
        """Apply a mode that a user has set."""

    def accept_incidents(self, step: int, batch: tuple[int, int]) -> None:
        """Apply that a user has accepted the run as it was after `step`; `batch` came next."""


class ControlCommand:
    """A command that a user gives to a run. A subclass is a kind, an object is one command.

    Attributes:
        name: as users, command files and the journal write it.
        aliases: names in older versions.
        argument: what it takes.
        help: what it does, as a sentence.
        key: on the screen; None: it has none.
        holds_for: what must not have changed since the user gave it.
        own_line: the journal line that its action writes; None: the answer is the only line.
        factor: kind of the remedy whose factor it sets; "": it sets none.
        waits_for_preview: the screen sends it only once its preview is shown.
        value: the argument of this command.
        question: journal line of the question that it names; None: it names none.
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    argument: ClassVar[Argument] = NoArgument()
    help: ClassVar[str]
    key: ClassVar[ScreenKey | None] = None
    holds_for: ClassVar[HoldsFor] = HoldsFor.ANYTHING
    own_line: ClassVar[type[Event] | None] = None
    factor: ClassVar[str] = ""
    waits_for_preview: ClassVar[bool] = True

    def __init__(self, value: float = 0.0, *, question: int | None = None) -> None:
        self.value = value
        self.question = question

    # -- words

    def describe(self) -> str:
        """Return the command as the journal names it: "lr x0.5", "skip 20 batches"."""
        return self.name

    def label(self) -> str:
        """Return the command as the screen names it."""
        return self.describe()

    def write(self) -> str:
        """Return the command as a user types it: "lr 0.5", "mode ask"."""
        return f"{self.name} {self.argument.write(self.value)}".rstrip()

    @classmethod
    def dialog_lines(cls, status: Status | None) -> list[str]:
        """Return what the screen shows before the preview is known."""
        return []

    @classmethod
    def current_value(cls, status: Status | None) -> float | None:
        """Return the value that holds now; None for a command that replaces no setting."""
        return None

    # -- now

    def refuse(self, run: RunFacts) -> str:
        """Return why the run cannot take the command now; "" if it can."""
        return ""

    def current_setting(self, run: RunFacts) -> Setting | None:
        """Return the setting that the command replaces; None: it replaces none."""
        return None

    def preview(self, run: RecordedFacts) -> Preview:
        """Return what the command would do now. It changes nothing."""
        if refusal := self.refuse(run):
            return self.preview_refusal(run, refusal)
        return self.preview_effect(run)

    def preview_effect(self, run: RecordedFacts) -> Preview:
        """Return what the command would do, where the run takes it."""
        return self.make_preview(run)

    def preview_refusal(self, run: RecordedFacts, refusal: str) -> Preview:
        """Return the preview of a command that the run would refuse."""
        return self.make_preview(run, possible=False, refusal=refusal)

    def make_preview(self, run: RecordedFacts, **fields: Any) -> Preview:
        """Return a preview with what every one holds, and these fields."""
        return make_preview(run, self.name, **{"value": float(self.value), **fields})

    def execute(self, actions: RunActions) -> bool:
        """Carry the command out, or refuse it; return whether it was taken.

        Every rank calls it. `refuse` has returned "".
        """
        return actions.acknowledge(self)

    # -- after a restart

    def replayed(self, target: ReplayTarget, event: CommandAnswered) -> None:
        """Apply what the journal line of the command means after a restart.

        Args:
            event: its journal line. The command took effect after the step of that line.
        """
