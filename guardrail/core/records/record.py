"""The base of the typed records that rooms pass to each other.

The controller gives records to the guard, the guard to the run directory, the run directory to the
screen. Records are immutable data without I/O, clock or torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """Base of the records: immutable and keyword-only. Ignores the fields of newer versions."""


def field_of(record: Any, name: str) -> Any:
    """Return a field of a record, or of a dict that was read from the journal."""
    return record.get(name) if isinstance(record, Mapping) else getattr(record, name, None)
