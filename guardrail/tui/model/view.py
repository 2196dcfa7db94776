"""What one frame of the screen is drawn from: the snapshot of a run, the time, and the choices of
the viewer. Immutable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import msgspec

from guardrail.core.format import clean_and_shorten
from guardrail.core.records.signals import EMBED_GRAD_NORM, EMBED_SHARE, GRAD_NORM, LOSS
from guardrail.core.records.status import SnapshotInfo, Status
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

# The charts that are shown by default: from the first on as many as the terminal has room for.
CHARTS = (LOSS, GRAD_NORM, EMBED_GRAD_NORM, EMBED_SHARE, "lr", THROUGHPUT)
_TEXTS = ("run", "progress", "disk", "commands_problem", "question", "host")
SLOW_SECONDS = 0.5  # reading that takes longer is shown
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
    """Return the name of a signal as it is shown; unknown names come from outside."""
    return LABELS.get(signal) or clean_and_shorten(signal.replace("_", " "), 40)


def clean_status(status: Status) -> Status:
    """Return the same status with cleaned texts: their width is measured before they are drawn.

    Before the first step of a start, and after the end, no process holds a state in memory. States
    in memory that the status names then were those of earlier processes.
    """
    without_memory = status.phase in STARTING or status.phase.ended
    snapshots: list[SnapshotInfo] = []
    for info in status.snapshots:
        if without_memory and info.tier == "memory":
            continue
        tier, state = clean_and_shorten(info.tier, 20), clean_and_shorten(info.state, 20)
        path = clean_and_shorten(info.path)
        snapshots.append(msgspec.structs.replace(info, tier=tier, state=state, path=path))
    texts = {name: clean_and_shorten(getattr(status, name)) for name in _TEXTS}
    return msgspec.structs.replace(status, snapshots=tuple(snapshots), **texts)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A run as its directory shows it. All texts are cleaned.

    Attributes:
        name: NAME/DATE-NN.
        heard: when a new heartbeat was last seen, by the viewer's clock: clocks of two machines
            differ.
        loaded: the metrics have been read to their end at least once.
        problem: why the directory could not be read just now, or "".
        damage: files of the directory that are cut, missing or unreadable, each in a few words;
            what they still hold is shown.
        gone: the directory no longer exists; what was read of it is shown.
        unsent: id of a command -> why it could not be sent.
        recorded: of a log of another program: what it is, and how much of it is judged. "" for a
            run.
        previews: id of a preview that was asked for -> what the command would do.
        around: ranks, their output, the configuration, other screens.
        columns: names of the columns of the rows, from outside.
        looking_up: since when single rows are being read, by the viewer's clock; None: none are.
    """

    name: str
    status: Status | None = None
    heard: float = 0.0
    series: Series = field(default_factory=Series)
    story: Story = field(default_factory=Story)
    loaded: bool = True
    problem: str = ""
    damage: tuple[str, ...] = ()
    gone: bool = False
    unsent: Mapping[str, str] = field(default_factory=dict)
    recorded: str = ""
    previews: Mapping[str, Preview] = field(default_factory=dict)
    around: Background = field(default_factory=Background)
    columns: tuple[str, ...] = ()
    looking_up: float | None = None

    def __post_init__(self) -> None:
        for name in ("name", "problem", "recorded"):
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
    """A snapshot with the choices of this viewer.

    Attributes:
        now: wall time.
        charts: signals with a chart; where not all have room, the first ones.
        big: the signal whose chart is enlarged.
        logarithmic: signals drawn on a log axis.
        message: (text, tone) of the message line.
        axis: of the charts, one of `series.AXES`.
        smooth: 0 not at all, 1 lightly, 2 strongly.
        span: length of the range in view, None: the complete run.
        end: its end, None: it follows the newest step.
        at: the step of the cursor, None: there is none, and titles show the newest values.
        focus: the pane that keys go to; `full`: it fills the screen.
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
        """Return what the viewer chose in a pane."""
        return replace(self.states.get(pane, PaneState()), focused=self.focus == pane)

    @property
    def status(self) -> Status | None:
        return self.snapshot.status

    @property
    def silence(self) -> float:
        """Seconds since a new heartbeat was last seen."""
        return max(0.0, self.now - self.snapshot.heard)

    @property
    def responds(self) -> bool:
        """A heartbeat came within the last 10 s, or the run has ended and sends none."""
        ended = self.status is not None and self.status.phase.ended
        return ended or (self.silence <= HEARTBEAT_SECONDS and not self.snapshot.gone)

    @property
    def lost(self) -> bool:
        """No process of the run has written for 60 s, so that none can read a command."""
        return self.snapshot.gone or (not self.responds and self.silence > LOST_SECONDS)

    @property
    def waits(self) -> bool:
        """Reading single rows takes long."""
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
