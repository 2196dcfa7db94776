"""Journal lines for tests, in the class of their kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from guardrail.core.events.event import Event
from guardrail.core.events.kinds import make_event


def make_line(*, data: Mapping[str, Any] | None = None, **fixed: Any) -> Event:
    """Return the event that is read from a line with these fields."""
    return make_event({**(data or {}), **fixed})
