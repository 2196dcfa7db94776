"""Checks of sections that a type cannot express: values that do not fit each other.

Every function raises ConfigError for the first problem that it finds.
"""

from __future__ import annotations

from collections.abc import Sequence

from guardrail.core.errors import ConfigError
from guardrail.core.guard_options import EFFECTS, EscalationStep, GuardOptions
from guardrail.core.late_imports import find_remedy
from guardrail.core.records.signals import METRIC_COLUMNS, UPDATE_NORM
from guardrail.core.records.verdicts import Mode, Remedy
from guardrail.core.sections import LaunchSection, SnapshotSection


def check_detectors(guard: GuardOptions) -> None:
    """Refuse settings of detectors that do not fit each other."""
    for table in guard.detectors.__struct_fields__:
        getattr(guard.detectors, table).check(f"guard.detectors.{table}")


def check_snapshots(snapshots: SnapshotSection, guard: GuardOptions) -> None:
    """Refuse a ring that leaves no time to call a snapshot good."""
    if snapshots.keep == 1:
        raise ConfigError(
            "0, or 2 and more",
            key="snapshots.keep",
            value=1,
            hint="with 0, a rollback restores a checkpoint",
        )
    reach = snapshots.every * (snapshots.keep - 1)
    if guard.mode is not Mode.OFF and snapshots.keep and guard.steps_until_good > reach:
        raise ConfigError(
            f"at most snapshots.every * (snapshots.keep - 1) = {reach}",
            key="guard.steps_until_good",
            value=guard.steps_until_good,
            hint="each snapshot is dropped before it counts as good; raise snapshots.keep",
        )


def check_extra_signals(names: Sequence[str]) -> None:
    """Refuse empty names, names of guardrail's own signals, and names that occur twice."""
    for name in names:
        is_taken = name in METRIC_COLUMNS or name == UPDATE_NORM
        if is_taken or not name.strip() or names.count(name) > 1:
            raise ConfigError(
                "names that guardrail does not use itself, each once",
                key="guard.extra_signals",
                value=name,
            )


def check_escalation(steps: Sequence[EscalationStep]) -> None:
    """Refuse remedies that can never be used."""
    for index, step in enumerate(steps[:-1]):
        if find_remedy(step.action).ends_run:
            raise ConfigError(
                f"{step.action} as the last remedy",
                key=f"guard.escalation[{index}].action",
                value=step.action,
                hint="a remedy after it is never used",
            )
    if any(not find_remedy(step.action).restores_state for step in steps[1:]):
        raise ConfigError("skip as the first remedy, or no skip", key="guard.escalation")


def check_allowlist(ranges: Sequence[tuple[int, int]]) -> None:
    """Refuse empty ranges."""
    for index, (first, last) in enumerate(ranges):
        if first >= last:
            raise ConfigError(
                "a range [first, last) with first < last",
                key=f"guard.allowlist[{index}]",
                value=[first, last],
                hint="the range is empty",
            )


def check_remedies(remedies: Sequence[Remedy]) -> None:
    """Refuse remedies of the configuration with an unknown kind or an impossible number."""
    for index, remedy in enumerate(remedies):
        key = f"guard.remedies[{index}]"
        if remedy.kind not in EFFECTS:
            raise ConfigError(f"one of {', '.join(EFFECTS)}", key=f"{key}.kind", value=remedy.kind)
        if remedy.kind != "moments" and not 0 < remedy.value <= 1:
            raise ConfigError(
                "a factor above 0 and at most 1", key=f"{key}.value", value=remedy.value
            )
        for name, least in (("from_step", 1), ("hold_steps", 0), ("ramp_steps", 0)):
            value = getattr(remedy, name)
            if value < least:
                raise ConfigError(f"at least {least}", key=f"{key}.{name}", value=value)


def check_node_rank(launch: LaunchSection) -> None:
    """Refuse a node rank that the number of nodes does not have."""
    if launch.node_rank >= launch.nodes:
        raise ConfigError(
            f"less than launch.nodes ({launch.nodes})",
            key="launch.node_rank",
            value=launch.node_rank,
            hint="nodes count from 0",
        )


def check_rendezvous(launch: LaunchSection) -> None:
    """Refuse several nodes without a place to meet."""
    if launch.nodes > 1 and not launch.rendezvous_endpoint:
        raise ConfigError(
            "HOST:PORT of the first node",
            key="launch.rendezvous_endpoint",
            value="",
            hint="needed because launch.nodes is greater than 1",
        )
