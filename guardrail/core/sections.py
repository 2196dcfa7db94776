"""The sections of a configuration other than [guard]."""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta

from guardrail.core import secret
from guardrail.core.errors import ConfigError
from guardrail.core.secret import SecretRef
from guardrail.core.section import Natural, Positive, PositiveFloat, Section


class RunSection(Section, frozen=True, kw_only=True):
    """[run]: the name of the run and its folder."""

    # Name of the run. The run directory is ROOT/NAME/DATE-NN.
    name: str = "run"
    # Folder of all runs, relative to the working directory.
    root: str = "runs"


class LaunchSection(Section, frozen=True, kw_only=True):
    """[launch]: the processes, which torch elastic starts."""

    RENAMED: ClassVar = {
        f"{wait}_seconds": f"{wait}_timeout"
        for wait in ("node", "setup", "step", "eval", "save", "stop", "collective")
    }

    # Processes on this node. Each is one rank with one device.
    processes: Positive = 1
    # "auto": CUDA where there is a device, else the CPU.
    device: typing.Literal["auto", "cpu", "cuda"] = "auto"
    # Package that trains. TRAINER.config holds its schema; `python -m TRAINER` runs one rank.
    trainer: str = "trainer"
    # Number of nodes, and their rendezvous. The names are those of torchrun.
    nodes: Positive = 1
    node_rank: Natural = 0
    rendezvous_backend: typing.Literal["static", "c10d"] = "c10d"
    rendezvous_endpoint: str = ""
    rendezvous_id: str = ""
    # Seconds to wait for the other nodes: at the start, and after one was lost.
    node_timeout: PositiveFloat = 600.0
    # How often the ranks are started again after a failure. Then the run ends with exit code 4.
    max_restarts: Natural = 3
    # Seconds without progress after which a rank counts as hung, per phase. A rank whose process is
    # stopped (SIGSTOP) while the others wait counts as hung after 30 seconds.
    setup_timeout: PositiveFloat = 1800.0
    step_timeout: PositiveFloat = 600.0
    eval_timeout: PositiveFloat = 1800.0
    save_timeout: PositiveFloat = 1800.0
    # Seconds that the ranks have to save and stop. Then they are killed.
    stop_timeout: PositiveFloat = 300.0
    # Seconds after which a collective that waits for another rank fails.
    collective_timeout: PositiveFloat = 600.0
    # Intra-op threads of a CPU rank. 0: OMP_NUM_THREADS if it is set, else cores / processes.
    threads: Natural = 0


class SnapshotSection(Section, frozen=True, kw_only=True):
    """[snapshots]: copies of the training state in host memory."""

    # Steps between two snapshots.
    every: Positive = 10
    # Snapshots that each rank keeps, each as large as its parameters and optimizer state. At least
    # 2, because the last good one must outlive the next. If the disk is slow, up to two more copies
    # are held while checkpoints are written from them. 0: no snapshots, for a machine without that
    # memory. A rollback then restores a checkpoint. The cause test then has no older state, so it
    # cannot show whether the data is bad from every state, and consecutive rejections lead to a
    # rollback. A save then holds one copy until it is written.
    keep: Natural = 4


class CheckpointSection(Section, frozen=True, kw_only=True):
    """[checkpoint]: copies of the training state on disk."""

    # Steps between two checkpoints.
    every: Positive = 200
    # Good checkpoints that are kept, and one more that is older than the longest detection delay.
    # At least 2, because the last good one must outlive the writing of the next.
    keep: Annotated[int, Meta(ge=2)] = 3
    # Seconds before a failed save is tried again.
    retry_seconds: PositiveFloat = 30.0


class TensorboardSection(Section, frozen=True, kw_only=True):
    """[tensorboard]: the metrics and events as TensorBoard files."""

    # Write the files. The supervisor writes them from the run directory; no step waits for it.
    enabled: bool = True


class NotifySection(Section, frozen=True, kw_only=True):
    """[notify]: messages about the run. The supervisor sends each by every way that is set. A
    failure to send does not affect the run.

    `command`, `webhook` and `apprise` are secrets. Give { env = "NAME" } or { file = "PATH" }. A
    secret that is written out is masked in the run's copy of the configuration, and a resume needs
    it again.
    """

    RENAMED_VALUES: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "on": {
            "offset": "recovered with higher loss",
            "recurred": "repeated",
            "degraded": "disk_failing",
            "restored": "disk_ok",
            "hung": "rank_hung",
            "ranks_failed": "rank_failed",
        }
    }

    # A shell command, or a list of words. It reads the event as JSON from its standard input, and
    # GUARDRAIL_EVENT, _TEXT, _MESSAGE, _NAME, _DIRECTORY, _HOST, _STEP and _SEQ from its
    # environment. While it runs, every user of the machine can see the words of a list.
    command: str | tuple[str, ...] | SecretRef = ""
    # http:// or https:// address to which the same JSON is posted. Chat services show its field
    # "text".
    webhook: str | SecretRef = ""
    # Addresses as apprise writes them, such as "slack://..." (`pip install 'guardrail[notify]'`).
    apprise: tuple[str | SecretRef, ...] = ()
    # Events that are sent: incidents and how they end, the guard's questions, a failing disk,
    # failed ranks, the end of the run.
    on: tuple[
        typing.Literal[
            "incident",
            "recovered",
            "recovered with higher loss",
            "accepted",
            "repeated",
            "rollback",
            "undo",
            "paused",
            "disk_failing",
            "disk_ok",
            "rank_hung",
            "rank_failed",
            "finished",
            "stopped",
            "halted",
            "failed",
        ],
        ...,
    ] = (
        "incident",
        "paused",
        "disk_failing",
        "rank_hung",
        "rank_failed",
        "finished",
        "halted",
        "failed",
    )
    # Seconds that one way may take to send.
    seconds: PositiveFloat = 10.0

    def __repr__(self) -> str:
        return (
            f"NotifySection({secret.mask_secrets({'notify': msgspec.to_builtins(self)})['notify']})"
        )

    def check(self) -> None:
        """Refuse empty references and invalid addresses. Raises ConfigError."""
        for name in ("command", "webhook"):
            if isinstance(value := getattr(self, name), SecretRef):
                value.check(f"notify.{name}")
        for index, address in enumerate(self.apprise):
            if isinstance(address, SecretRef):
                address.check(f"notify.apprise[{index}]")
        if isinstance(self.webhook, str) and self.webhook and not secret.is_masked(self.webhook):
            check_webhook(self.webhook)

    def resolved(self, *, base: Path) -> NotifySection:
        """Return a copy with absolute paths of the files that hold secrets."""

        def absolute(value: Any) -> Any:
            if not isinstance(value, SecretRef) or not value.file:
                return value
            return SecretRef(file=str(base / os.path.expanduser(value.file)))

        return msgspec.structs.replace(
            self,
            command=absolute(self.command),
            webhook=absolute(self.webhook),
            apprise=tuple(map(absolute, self.apprise)),
        )


def check_webhook(address: str) -> None:
    """Refuse an invalid address, without repeating it. Raises ConfigError."""
    if not re.fullmatch(r"https?://[^/\s]\S*", address) or not address.isascii():
        raise ConfigError(
            "an http:// or https:// address without spaces", key="notify.webhook", value=address
        )
