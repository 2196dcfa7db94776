"""The commands that `guardrail` without arguments prints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

CONFIGURATION = "config.toml"


def suggest_commands(root: str) -> Iterator[tuple[str, str]]:
    """Yield commands that fit this folder and what each does, the most useful first.

    Args:
        root: folder of all runs.
    """
    from guardrail.rundir.run_search import list_runs

    runs = list_runs(root)
    if runs:
        newest = runs[0]
        status = newest.read_status()
        ended = status is not None and status.phase.ended
        if ended:
            yield f"guardrail report {newest.name}", "print what happened in the newest run"
        else:
            yield f"guardrail attach {newest.name}", "watch the newest run"
        yield "guardrail runs", f"list the runs ({len(runs)})"
    if Path(CONFIGURATION).is_file():
        yield f"guardrail launch {CONFIGURATION}", "start a training run"
        yield f"guardrail doctor {CONFIGURATION}", "check this machine and the configuration"
    else:
        yield "guardrail init", f"write a commented {CONFIGURATION}"
    yield "guardrail backtest FILE", "print what the guard would have done in a recorded run"
    yield "guardrail --help", "list all commands"
