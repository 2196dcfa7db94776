"""Checks of this machine, and of a configuration on it, as a report of one line per check."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from guardrail.core.config import GuardConfig, ask_trainer
from guardrail.core.errors import ConfigError, ExitCode
from guardrail.core.format import format_plural
from guardrail.core.records.record import Record
from guardrail.launch import launcher, preflight
from guardrail.launch.machine_checks import (
    Check,
    check_processor,
    check_software,
    check_system,
    check_torch,
)
from guardrail.launch.torch_probe import ask_torch
from guardrail.rundir import processes

CONFIGURATION = "configuration"
PRACTICE = "practice"
SECRETS = "secrets"
OUTLINE = "outline"
ELSEWHERE = "not here"
MARKS = {"ok": "●", "note": "▲ note:", "problem": "✗ problem:"}


class Report(Record, frozen=True, kw_only=True):
    """What the doctor found.

    Attributes:
        machine: what this machine has and lacks.
        configuration: whether a file can run here; None if none was given.
    """

    machine: tuple[Check, ...]
    configuration: tuple[Check, ...] | None = None


def check_machine(
    path: str | None = None, overrides: tuple[str, ...] = (), *, dry_run: bool = False
) -> Report:
    """Check this machine, and a configuration where `path` is given. Changes nothing.

    Args:
        dry_run: the configuration is for other machines: what this one lacks is a note.
    """
    torch = ask_torch()
    machine = (*check_software(), *check_processor(), *check_torch(torch), *check_system())
    if path is None:
        return Report(machine=machine)
    try:
        settings = launcher.load_settings(path, overrides)
    except ConfigError as error:
        return Report(machine=machine, configuration=(_problem(str(error)),))
    check = _check_for_other_machines if dry_run else _check_configuration
    return Report(machine=machine, configuration=tuple(check(settings, path, overrides, torch)))


def format_lines(report: Report) -> Iterator[str]:
    """Yield the report as text: name, symbol, word and sentence of each check."""
    checks = [*report.machine, *(report.configuration or ())]
    width = max(len(check.name) for check in checks)
    for check in report.machine:
        yield f"{check.name:<{width}}  {MARKS[check.level]} {check.text}"
    if report.configuration is not None:
        yield ""
        for check in report.configuration:
            yield f"{check.name:<{width}}  {MARKS[check.level]} {check.text}"


def find_exit_code(report: Report) -> int:
    """Return 2 if the configuration cannot run here, else 0."""
    if any(check.level == "problem" for check in report.configuration or ()):
        return ExitCode.USAGE
    return ExitCode.FINISHED


def _problem(text: str) -> Check:
    return Check(name=CONFIGURATION, level="problem", text=text)


def _check_configuration(
    settings: GuardConfig, path: str, overrides: tuple[str, ...], torch: dict[str, Any]
) -> Iterator[Check]:
    """Yield what keeps the configuration from running here, then what makes it slow."""
    problems = preflight.find_problems(settings, file=path, overrides=overrides)
    found = [_problem(str(error)) for error in problems]
    name_problem = preflight.find_name_problem(settings, file=path, overrides=overrides)
    if name_problem is not None:
        found.append(_problem(str(name_problem)))
    if "error" in torch:
        found.append(_problem("torch cannot be imported"))
    else:
        found += _check_devices(settings, torch)
    for remark in ask_trainer(settings, "remarks"):
        found.append(Check(name=PRACTICE, level="note", text=remark))
    for remark in launcher.secret_remarks(settings):
        found.append(Check(name=SECRETS, level="note", text=remark))
    yield from found
    if not any(check.level == "problem" for check in found):
        count = format_plural(settings.launch.processes, "process")
        yield Check(name=CONFIGURATION, level="ok", text=f"{path} can run here, {count}")


def _check_for_other_machines(
    settings: GuardConfig, path: str, overrides: tuple[str, ...], torch: dict[str, Any]
) -> Iterator[Check]:
    """Yield what the configuration needs of its machines, and what was not checked."""
    for line in ask_trainer(settings, "outline"):
        yield Check(name=OUTLINE, level="ok", text=line)
    problems = preflight.find_problems(settings, file=path, overrides=overrides)
    lacking = [str(error) for error in problems]
    if "error" not in torch:
        lacking += [check.text for check in _check_devices(settings, torch)]
    for text in lacking:
        yield Check(name=ELSEWHERE, level="note", text=text)
    for remark in ask_trainer(settings, "remarks"):
        yield Check(name=PRACTICE, level="note", text=remark)
    nodes = settings.launch.nodes
    if nodes > 1:
        text = f"not checked: the network between {nodes} nodes, and the rendezvous"
        yield Check(name=ELSEWHERE, level="note", text=text)
    name_problem = preflight.find_name_problem(settings, file=path, overrides=overrides)
    if name_problem is not None:
        yield _problem(str(name_problem))
        return
    ranks = format_plural(settings.launch.processes * nodes, "rank")
    text = f"{path} has no error, for {ranks}; nothing was started"
    yield Check(name=CONFIGURATION, level="ok", text=text)


def _check_devices(settings: GuardConfig, torch: dict[str, Any]) -> Iterator[Check]:
    """Yield settings that need a device, a backend, a precision or cores that are not here."""
    launch, devices = settings.launch, torch["devices"]
    wants_cuda = launch.device == "cuda" or (launch.device == "auto" and devices)
    if launch.device == "cuda" and not devices and preflight.count_cuda_devices() != 0:
        yield _problem(
            'launch.device = "cuda": torch finds no device. Check the driver, and whether this '
            "torch is a build for the CPU."
        )
    backend = "nccl" if wants_cuda else "gloo"
    if launch.processes * launch.nodes > 1 and not torch[backend] and (devices or not wants_cuda):
        yield _problem(
            f"launch.processes = {launch.processes}: {backend} is not in this build of torch"
        )
    precision = getattr(getattr(settings, "train", None), "precision", "")
    if devices and wants_cuda and precision == "bf16" and not torch["bf16"]:
        yield _problem('train.precision = "bf16": this device does not support it. Use "fp32".')
    cores = processes.cores()
    if not wants_cuda and launch.processes > cores:
        text = f"launch.processes = {launch.processes}: {cores} cores; the processes share them"
        yield Check(name=CONFIGURATION, level="note", text=text)
