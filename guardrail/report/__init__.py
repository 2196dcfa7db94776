"""What happened in a run, in every format.

Old import path of its names; use `guardrail.report.build`, `.model`, `.output` and `.quarantine`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from guardrail.core.old_names import forward

__getattr__ = forward(
    __name__,
    "guardrail.report.output",
    [],
    renamed={
        "as_dict": "report_as_dict",
        "text": "summary_text",
        "written": "render_report",
        "save": "save_report",
        "Answered": "guardrail.report.model.CommandRecord",
        "CheckpointLine": "guardrail.report.model.CheckpointLine",
        "Restart": "guardrail.report.model.Restart",
        "Report": "guardrail.report.model.Report",
        "build": "guardrail.report.build.build_report",
        "quarantine_lines": "guardrail.report.quarantine.quarantine_lines",
    },
)


class _Package(ModuleType):
    """Keeps the old function `build`, also once the module of that name is loaded."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "build":
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
