"""The run directory: the only room that reads or writes one.

Old import path of its names; use `guardrail.RunDirectory` and `guardrail.rundir.run_directory`."""

from __future__ import annotations

from guardrail.core.old_names import forward

__getattr__ = forward(
    __name__,
    "guardrail.rundir.run_directory",
    ["SCREEN_SECONDS", "NAME", "is_run_name", "RunDirectory", "list_runs", "find_run"],
)
