"""What can be known about a configuration and this machine before any process starts, without
importing torch.
"""

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

LEAST_FREE_BYTES = 32 * 1024 * 1024  # journal, logs, status, and the first refused checkpoint
_NVIDIA = re.compile(r"nvidia\d+")


# Devices of which torch alone can tell the number: AMD GPUs (ROCm), GPUs of Windows (WSL2), Jetson
# modules.
_UNCOUNTED = ("kfd", "dxg", "nvhost-gpu", "nvgpu")
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


def count_cuda_devices() -> int | None:
    """GPUs that torch may find here as CUDA devices, by the device files and CUDA_VISIBLE_DEVICES.

    None where there may be some, and only torch can count them; 0 where there can be none.
    """
    try:
        files = os.listdir("/dev")
    except OSError:
        return None
    hidden = [os.environ[name] for name in _VISIBLE if name in os.environ]
    named = [
        [one.strip() for one in names.split(",") if one.strip() and one.strip() != "-1"]
        for names in hidden
    ]
    if not all(named):
        return 0
    present = sum(1 for name in files if _NVIDIA.fullmatch(name))
    if any(one.startswith("MIG-") for names in named for one in names):
        return None if present else 0  # parts of a device
    if not present and any(name in files for name in _UNCOUNTED):
        return None
    return min([present, *map(len, named)])


def check_launch(
    settings: GuardConfig,
    *,
    file: str,
    overrides: Sequence[str] = (),
    given: Mapping[str, str] | None = None,
) -> None:
    """Refuse a configuration, right in itself, that cannot run on this machine. Raises ConfigError.

    Args:
        file, overrides: where it came from, for the message.
        given: key -> where else its value came from, such as "--root".
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
    """Everything that keeps it from running here; arguments as of `check`."""
    for look in (_memory, _devices, _disk, _packages, _secrets):
        for error in look(settings):
            source = (given or {}).get(error.key) or find_source(
                error.key, file=file, overrides=overrides
            )
            yield error.at(source)


def _memory(settings: GuardConfig) -> Iterator[ConfigError]:
    try:
        settings.check_machine()
    except ConfigError as error:
        yield error


def _packages(settings: GuardConfig) -> Iterator[ConfigError]:
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


def _secrets(settings: GuardConfig) -> Iterator[ConfigError]:
    """Secrets that are referred to: the first node, which notifies, must be able to read them."""
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


def _devices(settings: GuardConfig) -> Iterator[ConfigError]:
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


def _disk(settings: GuardConfig) -> Iterator[ConfigError]:
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
