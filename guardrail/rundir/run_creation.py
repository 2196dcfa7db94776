"""Makes the folder of a new run."""

from __future__ import annotations

import datetime
import errno
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

from guardrail.core import secret
from guardrail.core.errors import RunDirectoryError, UsageError
from guardrail.core.files import FOLDER_MODE, LONGEST_NAME, TEMPORARY, replace_file, sync_folder
from guardrail.core.section import Section
from guardrail.core.text import clean_text
from guardrail.core.toml_file import dump_toml

_FOLDERS = ("checkpoints", "commands", "logs", "ranks", "screens", "tensorboard")
_NAME = re.compile(r"[^\W_][\w.+=@-]{0,99}")
NAME = "1 to 100 letters, digits, and . _ + = @ - inside"


def is_run_name(name: str) -> bool:
    """Return whether a folder of runs can have this name. A letter may take four bytes."""
    return bool(_NAME.fullmatch(name)) and len(name.encode()) <= LONGEST_NAME


def _check_types(root: Any, name: Any) -> None:
    """Check the types of the folder of all runs and the name of a run. Raises UsageError."""
    if not isinstance(root, (str, os.PathLike)):
        raise UsageError(
            f"RunDirectory.create(root): expected the path of a folder, got {type(root).__name__}",
            kind="wrong_type",
        )
    if not isinstance(name, str):
        raise UsageError(
            f"RunDirectory.create(name): expected a name for the run, got {type(name).__name__}",
            kind="wrong_type",
        )


def _format_config(config: Any) -> str:
    """Return a configuration, given as TOML text or as settings, as TOML text. Raises UsageError."""
    if isinstance(config, Section):
        return dump_toml(config)
    if isinstance(config, str):
        return config
    raise UsageError(
        "RunDirectory.create(config_toml): expected TOML text or a GuardConfig, got "
        f"{type(config).__name__}",
        kind="wrong_type",
    )


def create_numbered(root: str | os.PathLike[str], name: str, config: str | Section) -> Path:
    """Make ROOT/NAME/YYYY-MM-DD-NN with its configuration, complete before a reader can see it.

    Several processes may do this at once: each gets its own number.

    Args:
        config: TOML text, or settings that are written as TOML.

    Raises:
        UsageError: an argument has a wrong type.
        RunDirectoryError: the name is not valid, or the folder cannot be made.
    """
    _check_types(root, name)
    config_toml = _format_config(config)
    if not is_run_name(name):
        raise RunDirectoryError(
            f"{clean_text(name, 80)!r} is no name for a run: {NAME}", kind="wrong_name"
        )
    parent = Path(root) / name
    try:
        parent.mkdir(parents=True, exist_ok=True, mode=FOLDER_MODE)
        hidden = parent / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"
        hidden.mkdir(mode=FOLDER_MODE)
        try:
            for folder in _FOLDERS:
                (hidden / folder).mkdir(mode=FOLDER_MODE)
            replace_file(hidden / "config.toml", secret.mask_text(config_toml).encode("utf-8"))
            path = _claim(hidden, parent)
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise
        sync_folder(parent)
    except OSError as error:
        raise RunDirectoryError(
            f"cannot make a run directory in {parent}: {error.strerror}"
        ) from error
    return path.absolute()


def create_at(path: Path, config_toml: str) -> None:
    """Make a run directory at exactly this path, which is empty or missing.

    Raises RunDirectoryError.
    """
    try:
        path.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        if any(path.iterdir()):
            is_run = (path / "config.toml").exists()
            hint = "guardrail launch --resume goes on with a run" if is_run else "not empty"
            raise RunDirectoryError(f"{path}: exists already\n  hint: {hint}")
        for folder in _FOLDERS:
            (path / folder).mkdir(mode=FOLDER_MODE)
        replace_file(path / "config.toml", secret.mask_text(config_toml).encode("utf-8"))
    except FileExistsError as error:
        raise RunDirectoryError(
            f"{path}: another launch is making a run there, or it is no folder"
        ) from error
    except OSError as error:
        raise RunDirectoryError(
            f"cannot make a run directory at {path}: {error.strerror}"
        ) from error


def _claim(hidden: Path, parent: Path) -> Path:
    """Rename a complete directory to the next free number; return the new path.

    A rename onto a directory that is not empty fails. So each process gets another number.
    """
    day = datetime.date.today().isoformat()
    taken = [
        int(name.rsplit("-", 1)[1])
        for name in os.listdir(parent)
        if re.fullmatch(rf"{day}-\d+", name)
    ]
    number = max(taken, default=0)
    while True:
        number += 1
        path = parent / f"{day}-{number:02d}"
        try:
            os.rename(hidden, path)
            return path
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise


def check_is_run(path: Path) -> None:
    """Raise RunDirectoryError if the folder is missing, is not a run, or may not be read."""
    files = [path / name for name in ("config.toml", "status.json", "journal.jsonl")]
    try:
        known = any(file.exists() for file in files)
        if known:
            os.listdir(path)
    except PermissionError as error:
        raise RunDirectoryError(f"{path}: you may not read it", kind="no_permission") from error
    if known:
        return
    if path.is_dir():
        raise RunDirectoryError(f"{path}: not a run directory", kind="not_a_run")
    raise RunDirectoryError(f"{path}: no such run", kind="no_such_run")
