"""Old import path; use `guardrail.SampleOrder` or `guardrail.decide.sample_order`."""

from __future__ import annotations

from guardrail.core.old_names import forward

__getattr__ = forward(
    __name__,
    "guardrail.decide.sample_order",
    ["mix64", "SampleOrder"],
    renamed={
        "LONG": "guardrail.decide.quarantine.LONG_RANGE",
        "Quarantine": "guardrail.decide.quarantine.Quarantine",
        "Batch": "guardrail.decide.sample_cursor.Batch",
        "Ledger": "guardrail.decide.sample_cursor.SampleCursor",
        "LedgerState": "guardrail.decide.sample_cursor.CursorState",
    },
)
