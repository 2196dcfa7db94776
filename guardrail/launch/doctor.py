"""What this machine can do, and what of a configuration will not work on it. torch is asked in
another process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil

from guardrail.core.config import GuardConfig, ask_trainer
from guardrail.core.errors import ConfigError, ExitCode
from guardrail.core.format import format_gib, format_plural
from guardrail.core.packages import EXTRA_OF, install_hint
from guardrail.core.records import Record
from guardrail.core.text import clean_text
from guardrail.launch import launcher, preflight, rank_stacks
from guardrail.rundir import processes

Level = Literal["ok", "note", "problem"]

PATIENCE_SECONDS = 2.0  # of a person, before being told what takes so long
TORCH_SECONDS = 180.0  # the first import after a boot reads a gigabyte
LEAST_SHM_BYTES = 64 << 20  # what NCCL wants a few of; containers come with this much in all
LEAST_WATCHES = 128  # inotify watches of a user; the screen takes about five

CONFIGURATION = "configuration"
PRACTICE = "practice"
SECRETS = "secrets"
OUTLINE = "outline"
ELSEWHERE = "not here"
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

# Runs in the process that imports torch; prints one JSON object.
_ASK_TORCH = """
import json, torch, torch.distributed as dist
cuda = torch.cuda.is_available()
devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if cuda else []
print(json.dumps({
    "cuda_built": torch.version.cuda or torch.version.hip or "",
    "devices": [{"name": d.name, "bytes": d.total_memory} for d in devices],
    "bf16": bool(cuda and torch.cuda.is_bf16_supported()),
    "gloo": dist.is_available() and dist.is_gloo_available(),
    "nccl": dist.is_available() and dist.is_nccl_available(),
}))
"""


class Check(Record, frozen=True, kw_only=True):
    """One line of the answer."""

    name: str
    level: Level
    text: str


class Report(Record, frozen=True, kw_only=True):
    """`machine`: what there is. `configuration`: what of a file cannot run here, None if none was
    given.
    """

    machine: tuple[Check, ...]
    configuration: tuple[Check, ...] | None = None


def check_machine(
    path: str | None = None, overrides: tuple[str, ...] = (), *, dry_run: bool = False
) -> Report:
    """Look at everything. Nothing is changed on the machine.

    Args:
        dry_run: the configuration is meant for other machines: what this one lacks for it does not
        count.
    """
    torch = _ask_torch()
    machine = (*_software(), *_processor(), *_torch(torch), *_system())
    if path is None:
        return Report(machine=machine)
    try:
        settings = launcher.load_settings(path, overrides)
    except ConfigError as error:
        return Report(
            machine=machine,
            configuration=(Check(name=CONFIGURATION, level="problem", text=str(error)),),
        )
    look = _dry_run if dry_run else _configuration
    return Report(machine=machine, configuration=tuple(look(settings, path, overrides, torch)))


def format_lines(report: Report) -> Iterator[str]:
    """The report for a person: a glyph and a word beside each other."""
    marks = {"ok": "●", "note": "▲ note:", "problem": "✗ problem:"}
    width = max(len(check.name) for check in (*report.machine, *(report.configuration or ())))
    for check in report.machine:
        yield f"{check.name:<{width}}  {marks[check.level]} {check.text}"
    if report.configuration is not None:
        yield ""
        for check in report.configuration:
            yield f"{check.name:<{width}}  {marks[check.level]} {check.text}"


def find_exit_code(report: Report) -> int:
    """2 if the configuration cannot run here."""
    broken = any(check.level == "problem" for check in report.configuration or ())
    return ExitCode.USAGE if broken else ExitCode.FINISHED


# -- the machine


def _software() -> Iterator[Check]:
    yield Check(name="python", level="ok", text=f"{platform.python_version()} ({sys.executable})")
    for name in PACKAGES:
        try:
            yield Check(name=name, level="ok", text=metadata.version(name))
        except metadata.PackageNotFoundError:
            yield _missing_package(name)
    if rank_stacks.find_py_spy() is None:
        text = "not installed: the stacks of a hung rank come from faulthandler alone"
        yield Check(name="py-spy", level="note", text=text)
    elif not _may_trace():
        text = "installed, but kernel.yama.ptrace_scope keeps it from other processes"
        yield Check(name="py-spy", level="note", text=text)
    else:
        yield Check(name="py-spy", level="ok", text="installed")


def _missing_package(name: str) -> Check:
    text = "not installed"
    if name in EXTRA_OF:
        text = f"not installed: {install_hint(name)}"
    if name == "tensorboard":
        return Check(name=name, level="note", text=text)
    return Check(name=name, level="problem", text=text)


def _may_trace() -> bool:
    """Another process of this user may be looked into: nothing restricts it, or CAP_SYS_PTRACE
    lifts that.
    """
    try:
        if int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text()) == 0:
            return True
        capabilities = re.search(
            r"^CapEff:\s*(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE
        )
    except (OSError, ValueError):
        return True
    return capabilities is not None and bool(int(capabilities[1], 16) & 1 << 19)


def _processor() -> Iterator[Check]:
    memory = psutil.virtual_memory()
    yield Check(name="cores", level="ok", text=str(processes.cores()))
    yield Check(
        name="memory",
        level="ok",
        text=f"{format_gib(memory.available)} free of {format_gib(memory.total)}",
    )


def _torch(torch: dict[str, Any]) -> Iterator[Check]:
    if "error" in torch:
        yield Check(name="torch import", level="problem", text=torch["error"])
        return
    files = preflight.count_cuda_devices()
    devices = torch["devices"]
    if devices:
        names = ", ".join(
            f"{clean_text(device['name'])} {format_gib(device['bytes'])}" for device in devices
        )
        yield Check(name="cuda", level="ok", text=f"{len(devices)}: {names}")
        if importlib.util.find_spec("pynvml") is None:
            text = "not shown: nvidia-ml-py is not installed; pip install 'guardrail[gpu]'"
            yield Check(name="GPU use", level="note", text=text)
    elif files != 0:
        built = (
            f"built for CUDA {torch['cuda_built']}"
            if torch["cuda_built"]
            else "built for the CPU only"
        )
        if files is None:  # WSL2 has its device file without a GPU as well
            yield Check(
                name="cuda",
                level="note",
                text=f"torch ({built}) sees no device; training runs on the CPU",
            )
        else:
            yield Check(
                name="cuda",
                level="problem",
                text=f"{files} device files, but torch ({built}) sees no device",
            )
    else:
        yield Check(name="cuda", level="note", text="no device; training runs on the CPU")
    for backend in ("gloo", "nccl"):
        needed = backend == "gloo" or bool(devices)
        level: Level = "ok" if torch[backend] else "problem" if needed else "note"
        yield Check(
            name=backend,
            level=level,
            text="available" if torch[backend] else "not in this build of torch",
        )


def _system() -> Iterator[Check]:
    free = shutil.disk_usage(".").free
    few = free < preflight.LEAST_FREE_BYTES
    yield Check(name="disk", level="problem" if few else "ok", text=f"{format_gib(free)} free here")
    if Path("/dev/shm").is_dir():
        shared = shutil.disk_usage("/dev/shm").free
        small = shared < LEAST_SHM_BYTES
        text = f"{format_gib(shared)} free" + (
            ": too little for NCCL (docker: --shm-size)" if small else ""
        )
        yield Check(name="/dev/shm", level="note" if small else "ok", text=text)
    yield from _inotify()
    yield from _terminal()


def _inotify() -> Iterator[Check]:
    folder = Path("/proc/sys/fs/inotify")
    try:
        watches, instances = (
            int((folder / name).read_text()) for name in ("max_user_watches", "max_user_instances")
        )
    except (OSError, ValueError):
        yield Check(name="inotify", level="note", text="not on this system: the screen polls")
        return
    few = watches < LEAST_WATCHES
    text = f"{watches:,} watches, {instances:,} instances a user" + (
        ": the screen may poll" if few else ""
    )
    yield Check(name="inotify", level="note" if few else "ok", text=text)


def _terminal() -> Iterator[Check]:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield Check(name="terminal", level="note", text="none: launch and attach print lines")
        return
    size = shutil.get_terminal_size()
    name = os.environ.get("TERM", "")
    colours = "none (NO_COLOR)" if os.environ.get("NO_COLOR") else _colours(name)
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    text = f"{clean_text(name, 40) or 'unknown'}, {size.columns} x {size.lines}, colours {colours}"
    if encoding != "utf8":
        yield Check(
            name="terminal",
            level="note",
            text=f"{text}; {encoding or 'no'} encoding cannot draw the curves",
        )
    elif name in ("", "dumb"):
        yield Check(name="terminal", level="problem", text=f"{text}: no screen; use --headless")
    else:
        yield Check(name="terminal", level="ok", text=text)


def _colours(name: str) -> str:
    if os.environ.get("COLORTERM", "").lower() in ("truecolor", "24bit"):
        return "24 bit"
    return "256" if "256color" in name else "16"


def _ask_torch() -> dict[str, Any]:
    """What torch says, from a process of its own, with a word to the one who waits."""
    process = subprocess.Popen(
        [sys.executable, "-c", _ASK_TORCH],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    done = threading.Event()
    talker = threading.Thread(target=_talk, args=(done,), daemon=True)
    talker.start()
    try:
        output, errors = process.communicate(timeout=TORCH_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"error": f"not imported within {TORCH_SECONDS:.0f} s"}
    finally:
        done.set()
        talker.join()
    try:
        answer: dict[str, Any] = json.loads(output.splitlines()[-1])
        return answer
    except (ValueError, IndexError):
        last = errors.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        return {"error": clean_text(last[0], 300)}


def _talk(done: threading.Event) -> None:
    began = time.monotonic()
    while not done.wait(PATIENCE_SECONDS):
        print(f"importing torch, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


# -- a configuration on this machine


def _configuration(
    settings: GuardConfig, path: str, overrides: tuple[str, ...], torch: dict[str, Any]
) -> Iterator[Check]:
    """Everything that stops it, and then what makes it slow."""
    problems = preflight.find_problems(settings, file=path, overrides=overrides)
    found = [Check(name=CONFIGURATION, level="problem", text=str(error)) for error in problems]
    if "error" in torch:
        found.append(Check(name=CONFIGURATION, level="problem", text="torch cannot be imported"))
    else:
        found += _devices(settings, torch)
    found += [
        Check(name=PRACTICE, level="note", text=remark)
        for remark in ask_trainer(settings, "remarks")
    ]
    found += [
        Check(name=SECRETS, level="note", text=remark)
        for remark in launcher.secret_remarks(settings)
    ]
    yield from found
    if not any(check.level == "problem" for check in found):
        yield Check(
            name=CONFIGURATION,
            level="ok",
            text=f"{path} can run here, {format_plural(settings.launch.processes, 'process')}",
        )


def _dry_run(
    settings: GuardConfig, path: str, overrides: tuple[str, ...], torch: dict[str, Any]
) -> Iterator[Check]:
    """What is wrong wherever it runs; what it asks of its machines; what has not been looked at."""
    yield from (
        Check(name=OUTLINE, level="ok", text=line) for line in ask_trainer(settings, "outline")
    )
    here = [
        str(error) for error in preflight.find_problems(settings, file=path, overrides=overrides)
    ]
    if "error" not in torch:
        here += [check.text for check in _devices(settings, torch)]
    yield from (Check(name=ELSEWHERE, level="note", text=text) for text in here)
    yield from (
        Check(name=PRACTICE, level="note", text=remark)
        for remark in ask_trainer(settings, "remarks")
    )
    if settings.launch.nodes > 1:
        text = (
            f"the network between {settings.launch.nodes} nodes, and who answers at the rendezvous"
        )
        yield Check(name=ELSEWHERE, level="note", text=f"not looked at: {text}")
    ranks = settings.launch.processes * settings.launch.nodes
    yield Check(
        name=CONFIGURATION,
        level="ok",
        text=f"{path} is right in itself, for {format_plural(ranks, 'rank')}; nothing was started",
    )


def _devices(settings: GuardConfig, torch: dict[str, Any]) -> Iterator[Check]:
    launch, devices = settings.launch, torch["devices"]
    wants_cuda = launch.device == "cuda" or (launch.device == "auto" and devices)
    if launch.device == "cuda" and not devices and preflight.count_cuda_devices() != 0:
        text = 'launch.device = "cuda": torch sees no device (driver? a build for the CPU?)'
        yield Check(name=CONFIGURATION, level="problem", text=text)
    backend = "nccl" if wants_cuda else "gloo"
    if launch.processes * launch.nodes > 1 and not torch[backend] and (devices or not wants_cuda):
        text = f"launch.processes = {launch.processes}: {backend} is not in this build of torch"
        yield Check(name=CONFIGURATION, level="problem", text=text)
    precision = getattr(getattr(settings, "train", None), "precision", "")
    if devices and wants_cuda and precision == "bf16" and not torch["bf16"]:
        yield Check(
            name=CONFIGURATION,
            level="problem",
            text='train.precision = "bf16": not supported by this device',
        )
    if not wants_cuda and launch.processes > processes.cores():
        text = f"launch.processes = {launch.processes}: {processes.cores()} cores; they will share"
        yield Check(name=CONFIGURATION, level="note", text=text)
