"""What can be known about a configuration and this machine before any process starts, without importing torch."""

from __future__ import annotations

import os
import re
import shutil
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


def check(settings: Settings, *, file: str) -> list[str]:
    """Refuse what cannot run here. Returns warnings. Raises ConfigError."""
    _check_devices(settings, file)
    return _check_disk(settings, file)


def _check_devices(settings: Settings, file: str) -> None:
    launch, devices = settings.launch, cuda_devices()
    if launch.device == "cuda" and not devices:
        raise ConfigError(
            "a CUDA device on this machine (/dev/nvidia0)",
            file=file,
            key="launch.device",
            value="cuda",
            hint='"cpu", or "auto" to take what is there',
        )
    if launch.device != "cpu" and devices and launch.processes > devices:
        raise ConfigError(
            f"at most the {devices} CUDA devices of this machine",
            file=file,
            key="launch.processes",
            value=launch.processes,
            hint='launch.device = "cpu" runs more processes than devices',
        )


def _check_disk(settings: Settings, file: str) -> list[str]:
    root = Path(settings.run.root)
    while not root.exists() and root != root.parent:
        root = root.parent
    if not os.access(root, os.W_OK):
        raise ConfigError("a folder that you may write", file=file, key="run.root", value=settings.run.root)
    free = shutil.disk_usage(root).free
    if free < LEAST_FREE_BYTES:
        raise ConfigError(
            f"a disk with at least {LEAST_FREE_BYTES >> 20} MiB free ({free >> 20} MiB are)",
            file=file,
            key="run.root",
            value=settings.run.root,
        )
    return []
