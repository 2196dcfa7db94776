"""The state of a run in one symbol, one short text and one tone. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from guardrail.core.format import clean_and_shorten, format_age, format_countdown
from guardrail.core.records.status import Phase, Status
from guardrail.core.records.verdicts import Mode

# a heartbeat comes once a second; after this long without one the run does not respond
HEARTBEAT_SECONDS = 10.0
# after this long without a heartbeat there is no process that could read a command
LOST_SECONDS = 60.0
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
STARTING = (Phase.STARTING, Phase.SETUP)


@dataclass(frozen=True)
class Health:
    """The state of a run.

    Attributes:
        word: in capital letters, with its number or user where it has one.
        tone: "good", "warn", "bad" or "calm".
    """

    glyph: str
    word: str
    tone: str

    def __str__(self) -> str:
        return f"{self.glyph} {self.word}"


RECORDED = Health("□", "RECORDED", "calm")
GONE = Health("✗", "DIRECTORY GONE", "bad")
_ENDED = {
    Phase.FINISHED: Health("✓", "FINISHED", "good"),
    Phase.STOPPED: Health("■", "STOPPED", "calm"),
    Phase.HALTED: Health("✗", "HALTED", "bad"),
    Phase.FAILED: Health("✗", "FAILED", "bad"),
}


def assess_health(
    status: Status | None,
    *,
    recovering: bool,
    silence: float,
    paused_by: str = "",
) -> Health:
    """Return the state of a run.

    Args:
        recovering: the newest incident is still open.
        silence: seconds since a new heartbeat was last seen.
        paused_by: user who paused the run, where the journal names one.
    """
    if status is None:
        return Health("○", "NO STATUS YET", "calm")
    if status.phase in _ENDED:
        return _assess_ended(status)
    if silence > HEARTBEAT_SECONDS:
        return Health("?", f"NOT RESPONDING for {format_age(silence)}", "bad")
    if status.question:
        return Health("◆", _question_word(status, silence), "warn")
    if status.phase is Phase.PAUSED:
        by = f" by {clean_and_shorten(paused_by, 16)}" if paused_by else ""
        return Health("‖", f"PAUSED{by}", "warn")
    if status.phase in STARTING:
        return Health("○", "STARTING", "calm")
    return _assess_training(status, recovering=recovering)


def seconds_left(status: Status, silence: float) -> float:
    """Return the seconds until the guard answers its question itself.

    The clock of the run's host may differ from the viewer's. So only the time since the last
    heartbeat is measured by the viewer's clock.
    """
    return max(0.0, status.deadline - status.heartbeat - silence)


def format_disk_state(status: Status) -> str:
    """Return "disk failing: checkpoint: No space left on device"."""
    return f"disk {status.disk}"


def _question_word(status: Status, silence: float) -> str:
    if not status.deadline:
        return "NEEDS ANSWER"
    return f"NEEDS ANSWER {format_countdown(seconds_left(status, silence))}"


def _assess_ended(status: Status) -> Health:
    """A run whose newest incident is not over has not ended well, even if it has finished."""
    ended = _ENDED[status.phase]
    if status.unresolved is None or ended.tone != "good":
        return ended
    return Health("▲", f"{ended.word}, {status.unresolved.headline() or 'not recovered'}", "warn")


def _assess_training(status: Status, *, recovering: bool) -> Health:
    """An incident that is not over comes before a failing disk, and both before HEALTHY."""
    if status.phase is Phase.ROLLBACK:
        return Health("▲", "ROLLING BACK", "warn")
    if status.unresolved is not None:
        headline = clean_and_shorten(status.unresolved.headline(), 40)
        return Health("▲", headline or "RECOVERING", "warn")
    if recovering and status.mode is Mode.ADVISE:  # an older version writes no `unresolved`
        return Health("▲", "UNSTABLE, no action (advise)", "warn")
    if recovering:
        return Health("▲", "RECOVERING", "warn")
    if status.disk != "ok":  # training goes on, but a crash would lose more steps
        return Health("▲", "DISK FAILING", "warn")
    return Health("●", "HEALTHY", "good")
