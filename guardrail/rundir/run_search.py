"""The runs in a folder of runs, and the one that a user names."""

from __future__ import annotations

import contextlib
import difflib
import os
from pathlib import Path

from guardrail.core.errors import RunDirectoryError
from guardrail.core.text import clean_text
from guardrail.rundir.run_directory import RunDirectory


def list_runs(root: str | os.PathLike[str]) -> list[RunDirectory]:
    """Return all runs under ROOT/NAME/, newest first.

    Folders that are not runs, or that cannot be read, are ignored.
    """
    found: list[tuple[float, str, RunDirectory]] = []
    for folder in _folders(Path(root)):
        for path in _folders(folder):
            with contextlib.suppress(RunDirectoryError, OSError):
                run = RunDirectory.open(path)
                found.append((_started(path), run.name, run))
    return [run for _, _, run in sorted(found, key=lambda item: item[:2], reverse=True)]


def find_run(spec: str | None, root: str | os.PathLike[str]) -> RunDirectory:
    """Return the run that a user names.

    Args:
        spec: a path, NAME (its newest run), NAME/DATE-NN, or the unique beginning of one; None: the
            newest run.

    Raises:
        RunDirectoryError: no run or several runs match; the message names similar ones.
    """
    if spec is not None and (os.sep in spec or spec in (".", "..")) and Path(spec).is_dir():
        return RunDirectory.open(spec)
    runs = list_runs(root)
    if spec and Path(spec).is_dir() and not any(run.name.startswith(spec) for run in runs):
        return RunDirectory.open(spec)
    if not runs:
        raise RunDirectoryError(
            f"no such run: {clean_text(spec or '', 200) or 'there is none'} in {root}",
            kind="no_runs",
        )
    if spec is None:
        return runs[0]
    spec = spec.rstrip("/")
    exact = [run for run in runs if spec in (run.name, run.path.parent.name, run.path.name)]
    if exact and (len(exact) == 1 or exact[0].path.parent.name == spec):
        return exact[0]
    matches = exact or [run for run in runs if run.name.startswith(spec)]
    if matches and "/" not in spec and len({run.path.parent for run in matches}) == 1 and not exact:
        return matches[0]
    if len(matches) == 1:
        return matches[0]
    if matches:
        names = ", ".join(run.name for run in matches[:5]) + (" ..." if len(matches) > 5 else "")
        raise RunDirectoryError(
            f"{clean_text(spec, 200)!r} is not one run; it could be {names}", kind="several_runs"
        )
    close = difflib.get_close_matches(
        spec, [run.name for run in runs] + [run.path.parent.name for run in runs], n=1
    )
    hint = f"\n  hint: did you mean {close[0]}?" if close else ""
    raise RunDirectoryError(
        f"no such run: {clean_text(spec, 200)} in {root}{hint}", kind="no_such_run"
    )


def _folders(path: Path) -> list[Path]:
    try:
        return [
            path / name
            for name in os.listdir(path)
            if not name.startswith(".") and (path / name).is_dir()
        ]
    except OSError:
        return []


def _started(path: Path) -> float:
    """config.toml is written when a run begins; ties are settled by the name."""
    try:
        return (path / "config.toml").stat().st_mtime
    except OSError:
        return 0.0
