"""The sections of a configuration beside [guard]: run, launch, snapshots, checkpoint, tensorboard, notify."""

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
    """[run]: what the run is called and where it lives."""

    # Name of the run; the run directory is ROOT/NAME/DATE-NN.
    name: str = "run"
    # Folder of all runs, relative to the working directory.
    root: str = "runs"


class LaunchSection(Section, frozen=True, kw_only=True):
    """[launch]: the processes. Passed to torch elastic, which starts them."""

    RENAMED: ClassVar = {
        f"{wait}_seconds": f"{wait}_timeout"
        for wait in ("node", "setup", "step", "eval", "save", "stop", "collective")
    }

    # Processes on this node; each is one rank with one device.
    processes: Positive = 1
    # "auto" takes CUDA where it is, else the CPU.
    device: typing.Literal["auto", "cpu", "cuda"] = "auto"
    # Package that trains: TRAINER.config holds the schema, `python -m TRAINER` is one rank.
    trainer: str = "trainer"
    # Nodes that take part, and their rendezvous, as torchrun names them.
    nodes: Positive = 1
    node_rank: Natural = 0
    rendezvous_backend: typing.Literal["static", "c10d"] = "c10d"
    rendezvous_endpoint: str = ""
    rendezvous_id: str = ""
    # Seconds to wait for the other nodes, at the start and when one was lost: it may come back
    # until then.
    node_timeout: PositiveFloat = 600.0
    # Times the ranks are started again after a failure before the run ends with exit code 4.
    max_restarts: Natural = 3
    # Seconds without progress after which a rank counts as hung, per phase. One whose process is
    # stopped (SIGSTOP), while the others wait, counts after 30 seconds.
    setup_timeout: PositiveFloat = 1800.0
    step_timeout: PositiveFloat = 600.0
    eval_timeout: PositiveFloat = 1800.0
    save_timeout: PositiveFloat = 1800.0
    # Seconds that a stop may take to save before the ranks are killed.
    stop_timeout: PositiveFloat = 300.0
    # Seconds after which a collective that waits for another rank gives up.
    collective_timeout: PositiveFloat = 600.0
    # Intra-op threads of a CPU rank; 0: OMP_NUM_THREADS where that is set, else cores / processes.
    threads: Natural = 0


class SnapshotSection(Section, frozen=True, kw_only=True):
    """[snapshots]: the ring in host memory."""

    # Steps between two snapshots.
    every: Positive = 10
    # Snapshots kept by each rank, each as large as its parameters and optimizer state; at least 2,
    # since the last good one must outlive the next. 0: no ring, for a machine without that memory.
    # A rollback then goes to a checkpoint. The cause test has no older state, so it does not show
    # whether the data is bad from every state (a row of rejections calls for a rollback). Only a
    # save holds a copy, until it is written. With a disk so slow that a checkpoint is still being written when
    # its snapshot leaves the ring, up to two copies more are held.
    keep: Natural = 4


class CheckpointSection(Section, frozen=True, kw_only=True):
    """[checkpoint]: the tier on disk."""

    # Steps between two checkpoints.
    every: Positive = 200
    # Good checkpoints kept, beside one older than the longest detection delay. One is not enough:
    # the last good one must outlive the writing of the next.
    keep: Annotated[int, Meta(ge=2)] = 3
    # Seconds between two tries of a save that failed.
    retry_seconds: PositiveFloat = 30.0


class TensorboardSection(Section, frozen=True, kw_only=True):
    """[tensorboard]: the same story as event files."""

    # Written by the supervisor from the run directory; the step does not wait for it.
    enabled: bool = True


class NotifySection(Section, frozen=True, kw_only=True):
    """[notify]: messages about the run, sent by the supervisor. Each way that is set is used; a
    failure never harms the run.

    `command`, `webhook` and `apprise` are secrets: { env = "NAME" } or { file = "PATH" } says where
    one stands. One that is written out is masked in the run's copy of the configuration, and a
    resume needs it again.
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

    # A shell command, or a list of words: gets the event as JSON on its standard input, and
    # GUARDRAIL_EVENT, _TEXT, _MESSAGE, _NAME, _DIRECTORY, _HOST, _STEP and _SEQ in its environment.
    # The words of a list can be seen in the process list of the machine while it runs.
    command: str | tuple[str, ...] | SecretRef = ""
    # http:// or https:// address that the same JSON is posted to; its field "text" is what chat
    # services show.
    webhook: str | SecretRef = ""
    # Addresses as apprise writes them, such as "slack://..." (`pip install 'guardrail[notify]'`).
    apprise: tuple[str | SecretRef, ...] = ()
    # Events that are sent: incidents and how they end, the guard's questions, a failing disk, failed
    # ranks, the end.
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
    # Seconds that one way may take.
    seconds: PositiveFloat = 10.0

    def __repr__(self) -> str:
        return (
            f"NotifySection({secret.mask_secrets({'notify': msgspec.to_builtins(self)})['notify']})"
        )

    def check(self) -> None:
        """Refuse references that name nothing and addresses that are none. Raises ConfigError."""
        for name in ("command", "webhook"):
            if isinstance(value := getattr(self, name), SecretRef):
                value.check(f"notify.{name}")
        for index, address in enumerate(self.apprise):
            if isinstance(address, SecretRef):
                address.check(f"notify.apprise[{index}]")
        if isinstance(self.webhook, str) and self.webhook and not secret.is_masked(self.webhook):
            check_webhook(self.webhook)

    def resolved(self, *, base: Path) -> NotifySection:
        """With absolute paths of the files that hold secrets."""

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
    """Refuse what is no address, without repeating it. Raises ConfigError."""
    if not re.fullmatch(r"https?://[^/\s]\S*", address) or not address.isascii():
        raise ConfigError(
            "an http:// or https:// address without spaces", key="notify.webhook", value=address
        )
