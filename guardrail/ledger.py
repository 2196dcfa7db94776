"""Old import path; use `guardrail.SampleOrder` or `guardrail.decide.sample_order`."""

from __future__ import annotations

from guardrail.core.old_names import forward

__getattr__ = forward(
    __name__,
    "guardrail.decide.sample_order",
    ["LONG", "mix64", "SampleOrder", "Batch", "Quarantine", "LedgerState"],
    renamed={"Ledger": "SampleCursor"},
)
