"""Recorded runs through the live controller.

Old import path of its names; use `guardrail.backtest.backtest`, `.result` and
`.result_text`. The function `backtest` has no old path, because its name is that of a module.
"""

from __future__ import annotations

from guardrail.core.old_names import forward

__getattr__ = forward(
    __name__,
    "guardrail.backtest.result",
    ["NOTE", "ACTS", "Alarm"],
    renamed={
        "Case": "BacktestIncident",
        "Result": "BacktestResult",
        "kind_of": "guardrail.backtest.backtest.name_finding_kind",
        "lines": "guardrail.backtest.result_text.format_result",
        "summary": "guardrail.backtest.result_text.sum_results",
        "summary_lines": "guardrail.backtest.result_text.format_summary",
    },
)
