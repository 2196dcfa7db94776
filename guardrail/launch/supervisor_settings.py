"""The settings that the supervisor of one node uses, read from the run directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from guardrail.core import secret
from guardrail.core.config import read_run_tables
from guardrail.core.records.verdicts import Mode
from guardrail.core.sections import LaunchSection, NotifySection
from guardrail.rundir.run_directory import RunDirectory
from guardrail.trackers.base import Tracker
from guardrail.trackers.registry import enabled_trackers


@dataclass(frozen=True, kw_only=True)
class SupervisorSettings:
    """Sections of a run's configuration.

    Attributes:
        launch: with the rank of this node.
        mode: of the guard, until a rank writes the status.
        trackers: that the first node feeds; empty on the others.
        missing_secrets: keys of [notify] that are masked in the run directory and were not given
            again.
    """

    launch: LaunchSection
    notify: NotifySection
    mode: Mode
    trackers: tuple[type[Tracker], ...]
    missing_secrets: tuple[str, ...]

    @property
    def is_first_node(self) -> bool:
        return self.launch.node_rank == 0


def read_settings(
    run: RunDirectory, *, node_rank: int, secrets: Mapping[str, Any]
) -> SupervisorSettings:
    """Return the settings of a run.

    Args:
        node_rank: of this node. All nodes share one config.toml, so it cannot hold this number.
        secrets: of [notify], which the run directory does not hold.

    Raises:
        ConfigError: config.toml cannot be read.
    """
    tables = read_run_tables(run.path / "config.toml")
    launch = {**tables.get("launch", {}), "node_rank": node_rank}
    notify = tables.get("notify", {})
    trackers: tuple[type[Tracker], ...] = ()
    if node_rank == 0:
        trackers = tuple(enabled_trackers(tables))
    return SupervisorSettings(
        launch=msgspec.convert(launch, LaunchSection),
        notify=msgspec.convert(secret.restore_secrets(notify, secrets), NotifySection),
        mode=Mode(tables.get("guard", {}).get("mode", Mode.AUTO)),
        trackers=trackers,
        missing_secrets=tuple(secret.find_missing_secrets({**notify, **secrets})),
    )
