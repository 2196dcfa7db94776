"""Checks of a configuration on this machine before any process starts, without importing torch."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from guardrail.core.config import GuardConfig
from guardrail.core.errors import ConfigError
from guardrail.core.files import why_unreachable
from guardrail.core.overrides import find_source
from guardrail.core.packages import install_hint, is_installed
from guardrail.core.secret import SecretRef
from guardrail.core.sections import check_webhook
from guardrail.rundir.run_creation import NAME, is_run_name

LEAST_FREE_BYTES = 32 * 1024 * 1024  # journal, logs, status, and the first refused checkpoint
_NVIDIA = re.compile(r"nvidia\d+")


# Devices that only torch can count: AMD GPUs (ROCm), GPUs of Windows (WSL2), Jetson modules.
_UNCOUNTED = ("kfd", "dxg", "nvhost-gpu", "nvgpu")
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


def count_cuda_devices() -> int | None:
    """Return the number of CUDA devices that torch may find, by device files and environment.

    Returns:
        0 where there can be none; None where there may be some that only torch can count.
    """
    try:
        files = os.listdir("/dev")
    except OSError:
        return None
    named = [_split_devices(os.environ[name]) for name in _VISIBLE if name in os.environ]
    if not all(named):
        return 0
    present = sum(1 for name in files if _NVIDIA.fullmatch(name))
    if any(_names_part(names) for names in named):
        return None if present else 0
    if not present and any(name in files for name in _UNCOUNTED):
        return None
    return min([present, *map(len, named)])


def _split_devices(names: str) -> list[str]:
    """Return the devices that a variable such as CUDA_VISIBLE_DEVICES makes visible.

    CUDA ignores the first name that is not valid, and all names after it.
    """
    devices = []
    for name in names.split(","):
        device = name.strip()
        if not device or device.startswith("-"):
            break
        devices.append(device)
    return devices


def _names_part(devices: list[str]) -> bool:
    """Return whether one of the names is a part of a device (MIG)."""
    return any(one.startswith("MIG-") for one in devices)


def check_launch(
    settings: GuardConfig,
    *,
    file: str,
    overrides: Sequence[str] = (),
    given: Mapping[str, str] | None = None,
) -> None:
    """Refuse a valid configuration that cannot run on this machine.

    Args:
        file, overrides: its source, for the message.
        given: key -> another source of its value, such as "--root".

    Raises:
        ConfigError: the first problem.
    """
    for problem in find_problems(settings, file=file, overrides=overrides, given=given):
        raise problem


def find_problems(
    settings: GuardConfig,
    *,
    file: str,
    overrides: Sequence[str] = (),
    given: Mapping[str, str] | None = None,
) -> Iterator[ConfigError]:
    """Yield every problem that keeps it from running here. Arguments as for `check_launch`."""
    for find in (_check_memory, _check_devices, _check_disk, _check_packages, _check_secrets):
        for error in find(settings):
            source = find_source(error.key, file=file, overrides=overrides)
            if given and given.get(error.key):
                source = given[error.key]
            yield error.at(source)


def find_name_problem(
    settings: GuardConfig, *, file: str, overrides: Sequence[str] = ()
) -> ConfigError | None:
    """Return why no folder of runs can have this run's name; None if it can.

    With --run-dir the name is no folder, so this is not one of `find_problems`.
    """
    name = settings.run.name
    if is_run_name(name):
        return None
    source = find_source("run.name", file=file, overrides=overrides)
    return ConfigError(NAME, file=source, key="run.name", value=name)


def _check_memory(settings: GuardConfig) -> Iterator[ConfigError]:
    try:
        settings.check_machine()
    except ConfigError as error:
        yield error


def _check_packages(settings: GuardConfig) -> Iterator[ConfigError]:
    if settings.notify.apprise and not is_installed("apprise"):
        yield ConfigError(
            "an installed apprise",
            key="notify.apprise",
            hint=f"{install_hint('apprise')}, or use notify.webhook or notify.command",
        )
    if not is_installed("torch"):
        yield ConfigError(
            "an installed torch",
            key="launch.trainer",
            value=settings.launch.trainer,
            hint=install_hint("torch"),
        )


def _check_secrets(settings: GuardConfig) -> Iterator[ConfigError]:
    """Check the referred secrets. Only the first node notifies, so only it must read them."""
    notify = settings.notify
    if settings.launch.node_rank:
        return
    named = [("notify.command", notify.command), ("notify.webhook", notify.webhook)]
    named += [(f"notify.apprise[{index}]", address) for index, address in enumerate(notify.apprise)]
    for key, value in named:
        if isinstance(value, SecretRef):
            try:
                text = value.read(key)
                if key == "notify.webhook":
                    check_webhook(text)
            except ConfigError as error:
                yield error


def _check_devices(settings: GuardConfig) -> Iterator[ConfigError]:
    launch, devices = settings.launch, count_cuda_devices()
    if launch.device == "cuda" and devices == 0:
        yield ConfigError(
            "a CUDA device on this machine (/dev/nvidia0; /dev/kfd for ROCm, /dev/dxg for WSL2)",
            key="launch.device",
            value="cuda",
            hint='"cpu", or "auto" to take what is there',
        )
    if launch.device != "cpu" and devices and launch.processes > devices:
        yield ConfigError(
            f"at most the {devices} CUDA devices of this machine",
            key="launch.processes",
            value=launch.processes,
            hint='launch.device = "cpu" runs more processes than devices',
        )


def _check_disk(settings: GuardConfig) -> Iterator[ConfigError]:
    key, value = "run.root", settings.run.root
    root = Path(value)
    if why := why_unreachable(root):
        yield ConfigError("a folder that you may write", key=key, value=value, hint=why)
        return
    while not root.exists() and root != root.parent:
        root = root.parent
    if not root.is_dir() or not os.access(root, os.W_OK | os.X_OK):
        yield ConfigError("a folder that you may write", key=key, value=value)
        return
    free = shutil.disk_usage(root).free
    if free < LEAST_FREE_BYTES:
        least = LEAST_FREE_BYTES >> 20
        yield ConfigError(
            f"a disk with at least {least} MiB free ({free >> 20} MiB are)", key=key, value=value
        )
