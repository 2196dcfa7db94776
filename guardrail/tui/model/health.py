"""Is it healthy? One glyph, one short text and one tone for every state that a run can be in.
Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from guardrail.core.format import clean_and_shorten, format_age, format_countdown
from guardrail.core.records import Mode, Phase, Status

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
    """`word`: the state, with its number or name where it has one; `tone`: "good", "warn", "bad" or
    "calm".
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
    """The state of a run.

    Args:
        recovering: the newest incident is still open.
        silence: seconds since a new heartbeat was last seen.
        paused_by: who has paused the run, where the journal says it.
    """
    if status is None:
        return Health("○", "NO STATUS YET", "calm")
    if status.phase in _ENDED:
        return _at_the_end(status)
    if silence > HEARTBEAT_SECONDS:
        return Health("?", f"NOT RESPONDING for {format_age(silence)}", "bad")
    if status.question:
        left = f" {format_countdown(seconds_left(status, silence))}" if status.deadline else ""
        return Health("◆", f"NEEDS ANSWER{left}", "warn")
    if status.phase is Phase.PAUSED:
        return Health(
            "‖", f"PAUSED by {clean_and_shorten(paused_by, 16)}" if paused_by else "PAUSED", "warn"
        )
    if status.phase in STARTING:
        return Health("○", "STARTING", "calm")
    return _while_training(status, recovering=recovering)


def seconds_left(status: Status, silence: float) -> float:
    """Seconds until the guard answers its question itself. The clock of the run's host may differ
    from the viewer's: only the viewer's time since the last heartbeat counts."""
    return max(0.0, status.deadline - status.heartbeat - silence)


def format_disk_state(status: Status) -> str:
    """ "disk failing: checkpoint: No space left on device"."""
    return f"disk {status.disk}"


def _at_the_end(status: Status) -> Health:
    """A run that has finished with damage in its weights has not ended well."""
    ended = _ENDED[status.phase]
    if status.unresolved is None or ended.tone != "good":
        return ended
    return Health("▲", f"{ended.word}, {status.unresolved.headline() or 'not recovered'}", "warn")


def _while_training(status: Status, *, recovering: bool) -> Health:
    """With an incident that is not over nothing is green."""
    if status.phase is Phase.ROLLBACK:
        return Health("▲", "ROLLING BACK", "warn")
    if status.unresolved is not None:
        return Health(
            "▲", clean_and_shorten(status.unresolved.headline(), 40) or "RECOVERING", "warn"
        )
    if recovering and status.mode is Mode.ADVISE:  # a run of an older version says no more
        return Health("▲", "UNSTABLE, no action (advise)", "warn")
    if recovering:
        return Health("▲", "RECOVERING", "warn")
    if status.disk != "ok":  # it trains, and a crash would cost more than it should
        return Health("▲", "DISK FAILING", "warn")
    return Health("●", "HEALTHY", "good")
