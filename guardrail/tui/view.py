"""What one frame of the screen is drawn from: the run's snapshot, the time, and what the viewer chose. Immutable."""

from __future__ import annotations

from dataclasses import dataclass, field

from guardrail.records import EMBED_GRAD_NORM, GRAD_NORM, LOSS, Status
from guardrail.tui.health import Health, health_of
from guardrail.tui.series import Series
from guardrail.tui.story import Story

CHARTS = (LOSS, GRAD_NORM, EMBED_GRAD_NORM)
LABELS = {LOSS: "loss", GRAD_NORM: "gradient norm", EMBED_GRAD_NORM: "embedding gradient norm"}


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A run as its directory tells it.

    Attributes:
        name: NAME/DATE-NN.
        heard: when a new heartbeat was last seen, by the viewer's own clock: clocks of two machines differ.
        loaded: the metrics have been read to their end at least once.
        trouble: why the directory could not be read just now, or "".
        unsent: id of a command -> why it could not be handed in.
    """

    name: str
    status: Status | None = None
    heard: float = 0.0
    series: Series = field(default_factory=Series)
    story: Story = field(default_factory=Story)
    loaded: bool = True
    trouble: str = ""
    unsent: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class View:
    """A snapshot as this viewer looks at it.

    Attributes:
        now: wall time.
        big: the signal whose chart is enlarged.
        logarithmic: signals drawn on a log axis.
        message: (text, tone) of the line that answers keys.
    """

    snapshot: Snapshot
    now: float
    big: str = LOSS
    logarithmic: frozenset[str] = frozenset({GRAD_NORM, EMBED_GRAD_NORM})
    message: tuple[str, str] = ("", "plain")
    read_only: bool = False

    @property
    def status(self) -> Status | None:
        return self.snapshot.status

    @property
    def silence(self) -> float:
        return max(0.0, self.now - self.snapshot.heard)

    @property
    def health(self) -> Health:
        return health_of(self.status, recovering=self.snapshot.story.recovering, silence=self.silence)
