"""The run directory: the only room that reads or writes one.

Old import path of its names; use `guardrail.RunDirectory` and `guardrail.rundir.run_directory`."""

from __future__ import annotations

from guardrail.core.old_names import forward

__getattr__ = forward(
    __name__,
    "guardrail.rundir.run_directory",
    ["RunDirectory"],
    renamed={
        "SCREEN_SECONDS": "guardrail.rundir.screen_files.SCREEN_SECONDS",
        "NAME": "guardrail.rundir.run_creation.NAME",
        "is_run_name": "guardrail.rundir.run_creation.is_run_name",
        "list_runs": "guardrail.rundir.run_search.list_runs",
        "find_run": "guardrail.rundir.run_search.find_run",
    },
)
