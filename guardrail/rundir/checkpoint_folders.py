"""The checkpoint folders of a run: their names, and which is the newest."""

from __future__ import annotations

import math
import re
from pathlib import Path

from guardrail.core.files import open_file
from guardrail.rundir.manifest import MANIFEST

_NAME = re.compile(r"step-(\d+)(?:-t(\d+))?(?:-(\d+))?")
_BEGINNING = re.compile(rb'"format":\d+,"step":(\d+),"timeline":(\d+),')


def checkpoint_name(step: int, timeline: int = 0, copy: int = 0) -> str:
    """Return the name of a checkpoint folder: `step-00001200`.

    The timeline is added if an older timeline has used that name. A number is added if the name
    with the timeline is used too.
    """
    name = f"step-{step:08d}"
    if timeline or copy:
        name += f"-t{timeline}"
    return f"{name}-{copy + 1}" if copy else name


def checkpoint_dirs(folder: Path) -> list[Path]:
    """Return the committed checkpoints of a run, newest first: by timeline, then by step.

    Temporary folders are ignored. A checkpoint whose manifest cannot be read comes first, since its
    age is unknown. So the search for the newest valid checkpoint meets it, and can report why it
    was refused.
    """
    found = []
    if folder.is_dir():
        for path in folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and path.is_dir():
                found.append((_age(path, int(match[1])), path.name, path))
    return [path for *_, path in sorted(found, reverse=True)]


def _age(path: Path, step: int) -> tuple[float, int]:
    """Return (timeline, step), from the first bytes of the manifest."""
    try:
        with open_file(path / MANIFEST) as stream:
            match = _BEGINNING.search(stream.read(512))
    except OSError:
        match = None
    return (int(match[2]), int(match[1])) if match else (math.inf, step)
