"""Journal events as lines of the log: a mark, a tone and a sentence. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from guardrail.core.events.event import Event
from guardrail.core.format import clean_and_shorten

# The same letters mark the event on the axis of a chart.
SKIP, ROLLBACK, COMMAND, CHECKPOINT, INCIDENT = "S", "R", "!", "C", "#"


@dataclass(frozen=True)
class LogLine:
    """One line of the log. `mark` says the kind in one character, `tone` how it is meant."""

    time: float
    step: int
    mark: str
    tone: str  # "plain", "good", "warn", "bad"
    text: str


_MARKS = {
    "verdict": "▲",
    "finding": "▲",
    "skipped": SKIP,
    "rollback": ROLLBACK,
    "undo": ROLLBACK,
    "command": COMMAND,
    "checkpoint": CHECKPOINT,
    "incident": "#",
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


def make_log_line(event: Event) -> LogLine:
    """One event for a person: its message, or what its data says where an old version wrote no
    message.
    """
    tone = _TONES.get(event.kind, "plain")
    data = event.data
    if event.kind == "command" and data.get("effect") != "applied":
        tone = "warn"
    elif event.kind == "checkpoint" and data.get("state") in ("failed", "invalid"):
        tone = "bad"
    elif event.kind == "disk":
        tone = "good" if data.get("state") == "ok" else "bad"
    elif event.kind == "incident" and data.get("state") in (
        "recovered",
        "recovered with higher loss",
        "accepted",
    ):
        tone = "good"
    elif event.kind == "ended":
        tone = (
            "good"
            if data.get("phase") == "finished"
            else "bad"
            if data.get("phase") == "failed"
            else "warn"
        )
    text = clean_and_shorten(event.message, 400) or _fallback(event)
    who = event.data.get("who")
    if event.kind == "command" and isinstance(who, str) and who:
        text = f"{text} (by {clean_and_shorten(who, 60)})"
    mark = "●" if tone == "good" and event.kind == "disk" else _MARKS.get(event.kind, "·")
    return LogLine(event.time, event.step, mark, tone, text)


def _fallback(event: Event) -> str:
    kind = clean_and_shorten(event.kind, 40)
    plain = [
        f"{clean_and_shorten(k, 40)} {clean_and_shorten(str(v), 80)}"
        for k, v in event.data.items()
        if isinstance(v, str | int | float)
    ]
    return f"{kind} {', '.join(plain)}".strip()[:400]
