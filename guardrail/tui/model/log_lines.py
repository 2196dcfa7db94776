"""Journal events as lines of the log: a symbol, a tone and a sentence. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from guardrail.core.events.event import Event
from guardrail.core.format import clean_and_shorten

# The same letters mark the event on a chart.
SKIP, ROLLBACK, COMMAND, CHECKPOINT, INCIDENT = "S", "R", "!", "C", "#"


@dataclass(frozen=True)
class LogLine:
    """One line of the log.

    Attributes:
        mark: one character for the kind of the event.
        tone: "plain", "good", "warn" or "bad".
    """

    time: float
    step: int
    mark: str
    tone: str
    text: str


_MARKS = {
    "verdict": "▲",
    "finding": "▲",
    "skipped": SKIP,
    "rollback": ROLLBACK,
    "undo": ROLLBACK,
    "command": COMMAND,
    "checkpoint": CHECKPOINT,
    "incident": INCIDENT,
    "disk": "▲",
    "paused": "‖",
    "rank_hung": "✗",
    "rank_failed": "✗",
    "ended": "■",
    "started": "●",
    "restarted": "●",
}
_TONES = {
    "verdict": "warn",
    "skipped": "warn",
    "rollback": "warn",
    "undo": "warn",
    "paused": "warn",
    "rank_hung": "bad",
    "rank_failed": "bad",
}
_GOOD_ENDS = ("recovered", "recovered with higher loss", "accepted")  # states of an incident
_PHASE_TONES = {"finished": "good", "failed": "bad"}  # of the end of a run; others warn


def make_log_line(event: Event) -> LogLine:
    """Return the line of one event; an event without a message shows its data."""
    tone = _tone_of(event)
    text = clean_and_shorten(event.message, 400) or _describe_data(event)
    who = event.data.get("who")
    if event.kind == "command" and isinstance(who, str) and who:
        text = f"{text} (by {clean_and_shorten(who, 60)})"
    mark = _MARKS.get(event.kind, "·")
    if event.kind == "disk" and tone == "good":
        mark = "●"
    return LogLine(event.time, event.step, mark, tone, text)


def _tone_of(event: Event) -> str:
    state = event.data.get("state")
    match event.kind:
        case "command" if event.data.get("effect") != "applied":
            return "warn"
        case "checkpoint" if state in ("failed", "invalid"):
            return "bad"
        case "disk":
            return "good" if state == "ok" else "bad"
        case "incident" if state in _GOOD_ENDS:
            return "good"
        case "ended":
            return _PHASE_TONES.get(str(event.data.get("phase")), "warn")
    return _TONES.get(event.kind, "plain")


def _describe_data(event: Event) -> str:
    """Return the kind of an event with its plain fields."""
    fields: list[str] = []
    for name, value in event.data.items():
        if isinstance(value, str | int | float):
            fields.append(f"{clean_and_shorten(name, 40)} {clean_and_shorten(str(value), 80)}")
    return f"{clean_and_shorten(event.kind, 40)} {', '.join(fields)}".strip()[:400]
