"""What a command may ask of a run: where it stands, and what its records say. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from guardrail.core.events.event import Event
from guardrail.core.records.spans import Span
from guardrail.core.records.status import SnapshotInfo, Unresolved
from guardrail.core.records.verdicts import Mode, Remedy
from guardrail.decide.control_commands.preview import Preview
from guardrail.decide.step_setting import StepSetting


class Rates(NamedTuple):
    """What one update is made with: the learning rate, and the factor on embedding gradients."""

    lr: float
    embedding: float


class Setting(NamedTuple):
    """A setting as it is now: its number, and the same in words."""

    value: float
    words: str


class RunFacts(Protocol):
    """The present state of a run. The guard and a reader of the run directory both have it."""

    @property
    def step(self) -> int:
        """Return the number of applied steps."""
        ...

    @property
    def mode(self) -> Mode:
        """Return the mode of the guard."""
        ...

    @property
    def is_paused(self) -> bool:
        """Return whether training is paused, by a command or for a question."""
        ...

    @property
    def is_asking(self) -> bool:
        """Return whether a question of the guard is open."""
        ...

    @property
    def question(self) -> int:
        """Return the open question's journal line; 0: none is open, or it is not known yet."""
        ...

    @property
    def unresolved(self) -> Unresolved | None:
        """Return the earliest incident that is not over."""
        ...

    def setting_of(self, factor: str) -> StepSetting:
        """Return what users have set: `factor` is the kind of a remedy, LR or EMBED_ALPHA."""
        ...


class RecordedFacts(RunFacts, Protocol):
    """The records of a run directory, which a preview also needs."""

    @property
    def timeline(self) -> int:
        """Return the number of the present timeline."""
        ...

    @property
    def cursor(self) -> int:
        """Return the position in the sample order after the last step."""
        ...

    @property
    def end(self) -> int:
        """Return the end of the batch in question; 0: none. A rollback by command skips it too."""
        ...

    @property
    def states(self) -> Sequence[SnapshotInfo]:
        """Return the snapshots and checkpoints that can be restored."""
        ...

    @property
    def events(self) -> Sequence[Event]:
        """Return the events of the journal."""
        ...

    @property
    def remedies(self) -> Sequence[tuple[Span | int | None, Remedy]]:
        """Return the remedies of the decisions that are not undone, each with its decision."""
        ...

    def next_rates(self) -> Rates:
        """Return what the next update is made with; NaN where that is not known."""
        ...

    def rates_after(self, step: int, remedies: Sequence[Remedy]) -> Rates:
        """Return what the update after `step` is made with, once `step` was restored."""
        ...

    def seconds_since(self, step: int) -> float:
        """Return the training time of the steps after `step`; NaN where a row is missing."""
        ...

    def steps_in(self, seconds: float) -> int:
        """Return how many steps the run makes in this time."""
        ...

    def next_window(self, batches: int) -> tuple[int, int] | None:
        """Return the positions of the next batches; None where the order is not known."""
        ...

    def nothing_left(self, window: tuple[int, int]) -> str:
        """Return why a user cannot skip these positions; "" where a user can."""
        ...

    def fresh(self, positions: Sequence[int]) -> int:
        """Return how many samples of these positions are not skipped yet."""
        ...


def make_preview(run: RecordedFacts, command: str, **fields: Any) -> Preview:
    """Return a preview of `command`, which may also be a choice of the guard's own question."""
    rates = run.next_rates()
    known = {
        "command": command,
        "step": run.step,
        "timeline": run.timeline,
        "question": run.question,
        "lr_before": rates.lr,
        "alpha_before": rates.embedding,
    }
    return Preview(**{**known, **fields})
