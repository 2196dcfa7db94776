"""Which steps a replay makes, from which checkpoint, and whether this machine can make them."""

from __future__ import annotations

import contextlib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from guardrail.core.errors import CheckpointInvalid, UsageError
from guardrail.core.events.decisions import ENDS, IncidentChanged
from guardrail.core.events.event import Event
from guardrail.core.events.run_state import Restarted, Started
from guardrail.core.text import clean_text
from guardrail.decide.run_history import RunHistory
from guardrail.launch.preflight import count_cuda_devices
from guardrail.report.incident import Incident
from guardrail.report.incident_builder import IncidentBuilder
from guardrail.rundir.checkpoint_folders import checkpoint_dirs
from guardrail.rundir.manifest import Manifest, read_manifest
from guardrail.rundir.run_directory import RunDirectory


class ReplayPlan(NamedTuple):
    """Steps (from_step, to_step] from the checkpoint `base`; None: from the beginning."""

    base: Path | None
    from_step: int
    to_step: int
    incident: int | None = None


def plan_replay(run: RunDirectory, incident: int | None = None) -> ReplayPlan:
    """Return the steps of the present timeline, or those around one incident.

    Raises:
        UsageError: there is nothing to replay, or this machine cannot replay it.
    """
    events = run.events()
    view = run.metrics(["step", "verdict"])
    steps = view.array[view.current() & (view.column("verdict") == 0), 0]
    if not len(steps):
        raise UsageError(
            f"{run.name} has made no step yet: there is nothing to replay", kind="no_steps"
        )
    last = int(steps.max())
    base, from_step, to_step = None, 0, last
    if incident is not None:
        about = _find_incident(run, events, incident)
        base, from_step = _checkpoint_before(run, events, about)
        to_step = min(last, max(_last_step_of(events, incident, last), from_step + 1))
    if to_step <= from_step:
        raise UsageError(f"{run.name}: no step after step {from_step:,} is left to replay")
    plan = ReplayPlan(base, from_step, to_step, incident)
    _refuse_other_machine(run, events, plan)
    return plan


def manifest_of(folder: Path) -> Manifest | None:
    """Return the manifest of a checkpoint; None for one that is not valid."""
    try:
        return read_manifest(folder)
    except CheckpointInvalid:
        return None


def starts_in(events: Sequence[Event], plan: ReplayPlan) -> list[Started | Restarted]:
    """Return the `started` and `restarted` lines whose ranks made steps of the plan."""
    starts: list[Started | Restarted] = []
    for event in events:
        if isinstance(event, (Started, Restarted)):
            starts = [one for one in starts if one.step < event.step] + [event]
    first = max((at for at, one in enumerate(starts) if one.step <= plan.from_step), default=0)
    return [one for one in starts[first:] if one.step < plan.to_step]


def machine_remarks(run: RunDirectory) -> tuple[str, ...]:
    """Return what differs here from the start of the run, and may be why numbers differ."""
    import socket
    from importlib.metadata import PackageNotFoundError, version

    first = next((event for event in run.events() if isinstance(event, Started)), None)
    if first is None:
        return ()
    remarks = []
    if first.host and first.host != socket.gethostname():
        remarks.append(f"the run began on {clean_text(first.host, 80)}, another machine")
    for name in ("torch", "guardrail"):
        with contextlib.suppress(PackageNotFoundError):
            then, now = first.versions.get(name), version(name)
            if then and _without_build(str(then)) != _without_build(now):
                remarks.append(f"{name} was {clean_text(str(then), 40)} and is {now}")
    return tuple(remarks)


def _without_build(version: str) -> str:
    """Return "2.8.0" for "2.8.0+cu126"."""
    return version.split("+")[0]


def _find_incident(run: RunDirectory, events: Sequence[Event], number: int) -> Incident:
    incidents = {one.number: one for one in IncidentBuilder().add_events(events)}
    if number not in incidents:
        known = ", ".join(str(one) for one in sorted(incidents) if one) or "none"
        raise UsageError(f"{run.name} has no incident {number}\n  hint: it has {known}")
    return incidents[number]


def _checkpoint_before(
    run: RunDirectory, events: Sequence[Event], incident: Incident
) -> tuple[Path, int]:
    """Return the newest checkpoint of the present timeline from before an incident, and its step.

    Raises:
        UsageError: it is pruned.
    """
    history = RunHistory.from_events(events)
    first = min((span.first for span in incident.spans), default=None)
    left: list[int] = []
    for folder in checkpoint_dirs(run.checkpoints):
        manifest = manifest_of(folder)
        if manifest is None or folder.name in history.suspects:
            continue
        if not history.lives(timeline=manifest.timeline, step=manifest.step):
            continue
        left.append(manifest.step)
        is_before_data = first is None or manifest.cursor <= first
        if manifest.step < incident.onset and is_before_data:
            return folder, manifest.step
    hint = "none is left"
    if left:
        hint = f"the oldest one left is of step {min(left):,}"
    raise UsageError(
        f"{run.name}: the checkpoint from before incident {incident.number} "
        f"(step {incident.onset:,}) is pruned\n"
        f"  hint: {hint}; `guardrail replay` without --incident begins at step 0 and needs none"
    )


def _last_step_of(events: Sequence[Event], number: int, last: int) -> int:
    """Return the step that ended an incident; `last` while it is open."""
    ended = last
    for event in events:
        if isinstance(event, IncidentChanged) and event.number == number and event.state in ENDS:
            ended = event.step + 1  # the line is written before that step counts
    return ended


def _refuse_other_machine(run: RunDirectory, events: Sequence[Event], plan: ReplayPlan) -> None:
    """Raise UsageError where the steps were made on other ranks or devices than there are here."""
    launch = tomllib.loads(run.config_text()).get("launch", {})
    if launch.get("nodes", 1) != 1:
        raise UsageError(f"{run.name} was trained on {launch['nodes']} nodes; a replay runs on one")
    here = int(launch.get("processes", 1))
    for event in starts_in(events, plan):
        world = event.world or here
        if world != here:
            raise UsageError(
                f"{run.name} ran on {world} ranks from step {event.step:,} on, and its "
                f"configuration has {here}: sums over another number of ranks round differently, "
                "so the numbers cannot be the same"
            )
        if event.device == "cuda" and count_cuda_devices() == 0:
            raise UsageError(f"{run.name} was trained on CUDA devices; this machine has none")
