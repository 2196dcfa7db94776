"""Recorded runs through the live controller.

Old import path of its names; use `guardrail.backtest.backtest`. The function `backtest` is found
there alone: here its name is that of the module.
"""

from __future__ import annotations

from guardrail.core.old_names import forward

__getattr__ = forward(
    __name__,
    "guardrail.backtest.backtest",
    ["NOTE", "ACTS", "Alarm", "Case", "Result", "kind_of", "lines", "summary", "summary_lines"],
)
