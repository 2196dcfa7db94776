"""What one frame of the screen is drawn from: the run's snapshot, the time, and what the viewer
chose. Immutable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import msgspec

from guardrail.core.format import clean_and_shorten
from guardrail.core.records import EMBED_GRAD_NORM, EMBED_SHARE, GRAD_NORM, LOSS, Status
from guardrail.tui.model.background_facts import Background
from guardrail.tui.model.health import (
    GONE,
    HEARTBEAT_SECONDS,
    LOST_SECONDS,
    RECORDED,
    STARTING,
    Health,
    assess_health,
)
from guardrail.tui.model.pane_state import PaneState
from guardrail.tui.model.run_story import Story
from guardrail.tui.numerics.series import STEP, THROUGHPUT, Series

if TYPE_CHECKING:
    from guardrail.operate.preview import Preview

# What is shown without a choice: as many of them, from the first on, as the terminal has room for.
CHARTS = (LOSS, GRAD_NORM, EMBED_GRAD_NORM, EMBED_SHARE, "lr", THROUGHPUT)
_TEXTS = ("run", "progress", "disk", "commands_problem", "question", "host")
SLOW_SECONDS = 0.5  # what takes longer is said
LABELS = {
    GRAD_NORM: "gradient norm",
    EMBED_GRAD_NORM: "embedding gradient norm",
    EMBED_SHARE: "embedding share",
    "lr": "learning rate",
    THROUGHPUT: "tokens a second",
    "step_time": "step time, seconds",
    "step_time_max": "slowest rank's own work, seconds",
    "guard_time": "guard's time, seconds",
    "eval_loss": "evaluation loss",
}


def signal_label(signal: str) -> str:
    """A signal as a person names it. Names of further signals come from outside."""
    return LABELS.get(signal) or clean_and_shorten(signal.replace("_", " "), 40)


def clean_status(status: Status) -> Status:
    """The same status with every text in it cleaned, so that what is measured is what is shown.

    Before the first step of a start, and after the end, no process holds a state in memory: those
    that the status of the processes before still names are gone.
    """
    without_memory = status.phase in STARTING or status.phase.ended
    snapshots = [
        msgspec.structs.replace(
            s,
            tier=clean_and_shorten(s.tier, 20),
            state=clean_and_shorten(s.state, 20),
            path=clean_and_shorten(s.path),
        )
        for s in status.snapshots
        if not (without_memory and s.tier == "memory")
    ]
    texts = {name: clean_and_shorten(getattr(status, name)) for name in _TEXTS}
    return msgspec.structs.replace(status, snapshots=tuple(snapshots), **texts)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A run as its directory tells it. Whatever text is put in comes out cleaned.

    Attributes:
        name: NAME/DATE-NN.
        heard: when a new heartbeat was last seen, by the viewer's own clock: clocks of two machines
        differ.
        loaded: the metrics have been read to their end at least once.
        trouble: why the directory could not be read just now, or "".
        damage: files of the directory that are cut, missing or unreadable, each in a few words;
            what they still hold is shown.
        gone: the directory is not there any more; what was read of it is shown.
        unsent: id of a command -> why it could not be handed in.
        recorded: of a log that something else has written: what it is, and how far it is judged. ""
        for a run.
        previews: id of a preview that was asked for -> what the command would do.
        around: ranks, their output, the configuration, who else watches.
        columns: names of what the rows hold, from outside.
        looking_up: since when rows that are looked at closer are being read, by the viewer's clock;
        None: none are.
    """

    name: str
    status: Status | None = None
    heard: float = 0.0
    series: Series = field(default_factory=Series)
    story: Story = field(default_factory=Story)
    loaded: bool = True
    trouble: str = ""
    damage: tuple[str, ...] = ()
    gone: bool = False
    unsent: Mapping[str, str] = field(default_factory=dict)
    recorded: str = ""
    previews: Mapping[str, Preview] = field(default_factory=dict)
    around: Background = field(default_factory=Background)
    columns: tuple[str, ...] = ()
    looking_up: float | None = None

    def __post_init__(self) -> None:
        for name in ("name", "trouble", "recorded"):
            object.__setattr__(self, name, clean_and_shorten(getattr(self, name)))
        object.__setattr__(
            self, "damage", tuple(clean_and_shorten(text, 80) for text in self.damage)
        )
        object.__setattr__(
            self, "unsent", {id: clean_and_shorten(reason) for id, reason in self.unsent.items()}
        )
        if self.status is not None:
            object.__setattr__(self, "status", clean_status(self.status))


@dataclass(frozen=True)
class View:
    """A snapshot as this viewer looks at it.

    Attributes:
        now: wall time.
        charts: the signals that are looked at, the first ones first where not all have room.
        big: the signal whose chart is enlarged.
        logarithmic: signals drawn on a log axis.
        message: (text, tone) of the line that answers keys.
        axis: what the x-axis runs along, of `series.AXES`; `smooth`: 0 not at all, 1 lightly, 2
        strongly.
        span: how much of the axis the charts show, None: all of it; `end`: the last of it, None: it
        follows the newest.
        at: the step that the value cursor stands on, None: there is none and titles say the newest
        values.
        focus: the pane that keys go to; `full`: it has the whole screen.
        states: name of a pane -> what was chosen there.
    """

    snapshot: Snapshot
    now: float
    charts: tuple[str, ...] = CHARTS
    big: str = LOSS
    logarithmic: frozenset[str] = frozenset({GRAD_NORM, EMBED_GRAD_NORM})
    message: tuple[str, str] = ("", "plain")
    read_only: bool = False
    axis: str = STEP
    smooth: int = 0
    span: float | None = None
    end: float | None = None
    at: float | None = None
    focus: str = "curves"
    full: bool = False
    states: Mapping[str, PaneState] = field(default_factory=dict)

    def state(self, pane: str) -> PaneState:
        """What the viewer chose in a pane."""
        return replace(self.states.get(pane, PaneState()), focused=self.focus == pane)

    @property
    def status(self) -> Status | None:
        return self.snapshot.status

    @property
    def silence(self) -> float:
        return max(0.0, self.now - self.snapshot.heard)

    @property
    def responds(self) -> bool:
        """A heartbeat came within the last seconds, or the run has ended and none is due."""
        ended = self.status is not None and self.status.phase.ended
        return ended or (self.silence <= HEARTBEAT_SECONDS and not self.snapshot.gone)

    @property
    def lost(self) -> bool:
        """The run has not ended, and for so long no process of it has written that none can read a
        command.
        """
        return self.snapshot.gone or (not self.responds and self.silence > LOST_SECONDS)

    @property
    def waits(self) -> bool:
        """Rows that are looked at closer are long in coming."""
        since = self.snapshot.looking_up
        return since is not None and self.now - since >= SLOW_SECONDS

    @property
    def health(self) -> Health:
        if self.snapshot.recorded:
            return RECORDED
        if self.snapshot.gone:
            return GONE
        story = self.snapshot.story
        return assess_health(
            self.status,
            recovering=story.recovering,
            silence=self.silence,
            paused_by=story.paused_by,
        )
