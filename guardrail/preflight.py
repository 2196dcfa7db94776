"""What can be known about a configuration and this machine before any process starts, without importing torch."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from guardrail.config import Settings
from guardrail.errors import ConfigError

LEAST_FREE_BYTES = 32 * 1024 * 1024  # journal, logs, status, and the first refused checkpoint
_NVIDIA = re.compile(r"nvidia\d+")


def cuda_devices() -> int:
    """NVIDIA devices that this process may use, by their device files and CUDA_VISIBLE_DEVICES."""
    try:
        present = sum(1 for name in os.listdir("/dev") if _NVIDIA.fullmatch(name))
    except OSError:
        present = 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    named = [name for name in visible.split(",") if name.strip() and name.strip() != "-1"]
    return min(present, len(named))


def check(settings: Settings, *, file: str, overrides: Sequence[str] = ()) -> list[str]:
    """Refuse what cannot run here. Returns warnings.

    Args:
        settings: a configuration that is right in itself.
        file, overrides: where it came from, for the message.

    Raises:
        ConfigError
    """
    overridden = {text.partition("=")[0].strip() for text in overrides}

    def origin(key: str) -> str:
        return "--set" if key in overridden else file

    try:
        settings.check_machine()
    except ConfigError as error:
        raise ConfigError(
            error.expected, file=origin(error.key), key=error.key, value=error.value, hint=error.hint
        ) from error
    _check_devices(settings, origin)
    return _check_disk(settings, origin)


def _check_devices(settings: Settings, origin: Callable[[str], str]) -> None:
    launch, devices = settings.launch, cuda_devices()
    if launch.device == "cuda" and not devices:
        raise ConfigError(
            "a CUDA device on this machine (/dev/nvidia0)",
            file=origin("launch.device"),
            key="launch.device",
            value="cuda",
            hint='"cpu", or "auto" to take what is there',
        )
    if launch.device != "cpu" and devices and launch.processes > devices:
        raise ConfigError(
            f"at most the {devices} CUDA devices of this machine",
            file=origin("launch.processes"),
            key="launch.processes",
            value=launch.processes,
            hint='launch.device = "cpu" runs more processes than devices',
        )


def _check_disk(settings: Settings, origin: Callable[[str], str]) -> list[str]:
    root = Path(settings.run.root)
    while not root.exists() and root != root.parent:
        root = root.parent
    if not root.is_dir() or not os.access(root, os.W_OK | os.X_OK):
        raise ConfigError(
            "a folder that you may write", file=origin("run.root"), key="run.root", value=settings.run.root
        )
    free = shutil.disk_usage(root).free
    if free < LEAST_FREE_BYTES:
        raise ConfigError(
            f"a disk with at least {LEAST_FREE_BYTES >> 20} MiB free ({free >> 20} MiB are)",
            file=origin("run.root"),
            key="run.root",
            value=settings.run.root,
        )
    return []
