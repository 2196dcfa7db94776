"""Is it healthy? One glyph, one word and one tone for every state a run can be in. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from guardrail.records import Phase, Status
from guardrail.tui.format import clock

HEARTBEAT_SECONDS = 10.0  # a heartbeat comes once a second; this long without one is a loss
PHASES = {
    Phase.STARTING: "starting",
    Phase.SETUP: "setting up",
    Phase.STEP: "training",
    Phase.EVAL: "evaluating",
    Phase.SAVE: "saving",
    Phase.ROLLBACK: "rolling back",
    Phase.PAUSED: "paused",
    Phase.FINISHED: "finished",
    Phase.STOPPED: "stopped",
    Phase.HALTED: "halted by the guard",
    Phase.FAILED: "failed",
}
WORDS = ("HEALTHY", "RECOVERING", "ASKING", "PAUSED", "HALTED", "STOPPED", "FINISHED", "FAILED", "STARTING", "DEGRADED")


@dataclass(frozen=True)
class Health:
    glyph: str
    word: str
    tone: str  # "good", "warn", "bad", "calm"

    def __str__(self) -> str:
        return f"{self.glyph} {self.word}"


RECORDED = Health("□", "RECORDED", "calm")
_ENDED = {
    Phase.FINISHED: Health("✓", "FINISHED", "good"),
    Phase.STOPPED: Health("■", "STOPPED", "calm"),
    Phase.HALTED: Health("✗", "HALTED", "bad"),
    Phase.FAILED: Health("✗", "FAILED", "bad"),
}


def health_of(status: Status | None, *, recovering: bool, silence: float) -> Health:
    """The state of a run.

    Args:
        recovering: the newest incident is still open.
        silence: seconds since a new heartbeat was last seen.
    """
    if status is None:
        return Health("○", "NO STATUS YET", "calm")
    if status.phase in _ENDED:
        return _ENDED[status.phase]
    if silence > HEARTBEAT_SECONDS:
        return Health("?", f"NO HEARTBEAT since {clock(status.heartbeat)}", "bad")
    if status.question:
        return Health("◆", "ASKING", "warn")
    if status.phase is Phase.PAUSED:
        return Health("‖", "PAUSED", "warn")
    if status.phase is Phase.ROLLBACK or recovering:
        return Health("▲", "RECOVERING", "warn")
    if status.phase in (Phase.STARTING, Phase.SETUP):
        return Health("○", "STARTING", "calm")
    if status.durability != "ok":  # it learns, and a crash would cost more than it should
        return Health("▲", "DEGRADED", "warn")
    return Health("●", "HEALTHY", "good")
