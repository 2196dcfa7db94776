"""What this machine has and lacks: packages, processor, torch, disk, terminal."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil

from guardrail.core.format import format_gib
from guardrail.core.packages import EXTRA_OF, install_hint
from guardrail.core.records.record import Record
from guardrail.core.text import clean_text
from guardrail.launch import preflight, rank_stacks
from guardrail.rundir import processes

Level = Literal["ok", "note", "problem"]

LEAST_SHM_BYTES = 64 << 20  # NCCL wants a few of these; a container has this much in total
LEAST_WATCHES = 128  # inotify watches of a user; the screen takes about five
PACKAGES = (
    "torch",
    "accelerate",
    "safetensors",
    "tokenizers",
    "textual",
    "tensorboard",
    "numpy",
    "msgspec",
)
_CAP_SYS_PTRACE = 1 << 19


class Check(Record, frozen=True, kw_only=True):
    """One line of the doctor's report."""

    name: str
    level: Level
    text: str


def check_software() -> Iterator[Check]:
    """Yield the versions of Python and of the packages, and whether py-spy works."""
    yield Check(name="python", level="ok", text=f"{platform.python_version()} ({sys.executable})")
    for name in PACKAGES:
        try:
            yield Check(name=name, level="ok", text=metadata.version(name))
        except metadata.PackageNotFoundError:
            yield _missing_package(name)
    yield _check_py_spy()


def _missing_package(name: str) -> Check:
    text = "not installed"
    if name in EXTRA_OF:
        text = f"not installed: {install_hint(name)}"
    if name == "tensorboard":
        return Check(name=name, level="note", text=text)
    return Check(name=name, level="problem", text=text)


def _check_py_spy() -> Check:
    if rank_stacks.find_py_spy() is None:
        text = "not installed: the stacks of a hung rank come from faulthandler only"
        return Check(name="py-spy", level="note", text=text)
    if not _may_trace():
        text = "installed, but kernel.yama.ptrace_scope forbids it to read other processes"
        return Check(name="py-spy", level="note", text=text)
    return Check(name="py-spy", level="ok", text="installed")


def _may_trace() -> bool:
    """Return whether a process may read another one of this user.

    It may where Yama restricts nothing, or with CAP_SYS_PTRACE.
    """
    try:
        if int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text()) == 0:
            return True
        status = Path("/proc/self/status").read_text()
    except (OSError, ValueError):
        return True
    capabilities = re.search(r"^CapEff:\s*(\w+)", status, re.MULTILINE)
    return capabilities is not None and bool(int(capabilities[1], 16) & _CAP_SYS_PTRACE)


def check_processor() -> Iterator[Check]:
    """Yield the number of cores and the memory."""
    memory = psutil.virtual_memory()
    yield Check(name="cores", level="ok", text=str(processes.cores()))
    text = f"{format_gib(memory.available)} free of {format_gib(memory.total)}"
    yield Check(name="memory", level="ok", text=text)


def check_torch(torch: dict[str, Any]) -> Iterator[Check]:
    """Yield the devices and the communication backends that torch finds.

    Args:
        torch: the answer of `ask_torch`.
    """
    if "error" in torch:
        yield Check(name="torch import", level="problem", text=torch["error"])
        return
    devices = torch["devices"]
    yield _check_cuda(torch)
    if devices and importlib.util.find_spec("pynvml") is None:
        text = "not shown: nvidia-ml-py is not installed; pip install 'guardrail[gpu]'"
        yield Check(name="GPU use", level="note", text=text)
    for backend in ("gloo", "nccl"):
        level: Level = "ok"
        text = "available"
        if not torch[backend]:
            is_needed = backend == "gloo" or bool(devices)
            level = "problem" if is_needed else "note"
            text = "not in this build of torch"
        yield Check(name=backend, level=level, text=text)


def _check_cuda(torch: dict[str, Any]) -> Check:
    devices = torch["devices"]
    if devices:
        names = [f"{clean_text(one['name'])} {format_gib(one['bytes'])}" for one in devices]
        return Check(name="cuda", level="ok", text=f"{len(devices)}: {', '.join(names)}")
    files = preflight.count_cuda_devices()
    if files == 0:
        return Check(name="cuda", level="note", text="no device; training runs on the CPU")
    built = "built for the CPU only"
    if torch["cuda_built"]:
        built = f"built for CUDA {torch['cuda_built']}"
    if files is None:  # WSL2 has its device file without a GPU as well
        text = f"torch ({built}) finds no device; training runs on the CPU"
        return Check(name="cuda", level="note", text=text)
    text = f"{files} device files, but torch ({built}) finds no device"
    return Check(name="cuda", level="problem", text=text)


def check_system() -> Iterator[Check]:
    """Yield disk, shared memory, inotify and terminal."""
    free = shutil.disk_usage(".").free
    level: Level = "problem" if free < preflight.LEAST_FREE_BYTES else "ok"
    yield Check(name="disk", level=level, text=f"{format_gib(free)} free here")
    if Path("/dev/shm").is_dir():
        yield _check_shared_memory()
    yield _check_inotify()
    yield _check_terminal()


def _check_shared_memory() -> Check:
    free = shutil.disk_usage("/dev/shm").free
    text = f"{format_gib(free)} free"
    if free < LEAST_SHM_BYTES:
        text += ": too little for NCCL (docker: --shm-size)"
        return Check(name="/dev/shm", level="note", text=text)
    return Check(name="/dev/shm", level="ok", text=text)


def _check_inotify() -> Check:
    folder = Path("/proc/sys/fs/inotify")
    try:
        watches = int((folder / "max_user_watches").read_text())
        instances = int((folder / "max_user_instances").read_text())
    except (OSError, ValueError):
        return Check(name="inotify", level="note", text="not on this system: the screen polls")
    text = f"{watches:,} watches, {instances:,} instances per user"
    if watches < LEAST_WATCHES:
        return Check(name="inotify", level="note", text=f"{text}: the screen may poll")
    return Check(name="inotify", level="ok", text=text)


def _check_terminal() -> Check:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return Check(name="terminal", level="note", text="none: launch and attach print lines")
    size = shutil.get_terminal_size()
    name = os.environ.get("TERM", "")
    shown_name = clean_text(name, 40) or "unknown"
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    text = f"{shown_name}, {size.columns} x {size.lines}, colours {_find_colours(name)}"
    if encoding != "utf8":
        text += f"; {encoding or 'no'} encoding cannot show the curves"
        return Check(name="terminal", level="note", text=text)
    if name in ("", "dumb"):
        return Check(name="terminal", level="problem", text=f"{text}: no screen; use --headless")
    return Check(name="terminal", level="ok", text=text)


def _find_colours(name: str) -> str:
    if os.environ.get("NO_COLOR"):
        return "none (NO_COLOR)"
    if os.environ.get("COLORTERM", "").lower() in ("truecolor", "24bit"):
        return "24 bit"
    return "256" if "256color" in name else "16"
