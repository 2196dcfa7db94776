"""Journal events as lines of the log: a symbol, a tone and a sentence. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from guardrail.core.events.decisions import IncidentChanged, RolledBack, Skipped
from guardrail.core.events.event import Event
from guardrail.core.events.run_state import CheckpointChanged, CommandAnswered
from guardrail.core.format import clean_and_shorten

# The same letters mark the event on a chart.
SKIP, ROLLBACK, COMMAND = Skipped.symbol, RolledBack.symbol, CommandAnswered.symbol
CHECKPOINT, INCIDENT = CheckpointChanged.symbol, IncidentChanged.symbol


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


def make_log_line(event: Event) -> LogLine:
    """Return the line of one event; an event without a message shows its data."""
    text = clean_and_shorten(event.message, 400) or _describe_data(event)
    if isinstance(event, CommandAnswered) and event.who:
        text = f"{text} (by {clean_and_shorten(event.who, 60)})"
    return LogLine(event.time, event.step, event.mark, event.tone, text)


def _describe_data(event: Event) -> str:
    """Return the kind of an event with its plain fields."""
    fields: list[str] = []
    for name, value in event.data.items():
        if isinstance(value, str | int | float):
            fields.append(f"{clean_and_shorten(name, 40)} {clean_and_shorten(str(value), 80)}")
    return f"{clean_and_shorten(event.kind, 40)} {', '.join(fields)}".strip()[:400]
