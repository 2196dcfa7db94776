"""Finding and loading a checkpoint: every hash is checked before a live tensor is touched, by the
ranks in shares.

All methods are collectives: every rank calls them, and all get the same answer or raise the same
error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from guardrail.core.errors import CheckpointInvalid
from guardrail.core.records import Record
from guardrail.rundir.manifest import (
    OPTIM,
    Box,
    Manifest,
    Progress,
    checkpoint_dirs,
    read_manifest,
    verify,
)
from guardrail.torch.checkpoint.commit import reason_of
from guardrail.torch.checkpoint.safetensors_file import DTYPES, read_parts
from guardrail.torch.state import json_codec as plain
from guardrail.torch.state.slow_work import T, run_together
from guardrail.torch.state.training_state import TrainingState, refuse

Allowed = Callable[[Manifest], bool | str]


class Selection(Record, frozen=True, kw_only=True):
    """The checkpoint that was found, and why each newer one was refused. `path` is None when there
    is none.

    `invalid` names those of the refused that do not hold; the others hold and were not allowed.
    """

    path: Path | None = None
    manifest: Manifest | None = None
    refused: tuple[tuple[Path, str], ...] = ()
    invalid: frozenset[str] = frozenset()


class Loaded(Record, frozen=True, kw_only=True):
    """What a load has put into the live state.

    Attributes:
        extra: the guard's own state: this rank's, if as many ranks saved it, else rank 0's.
        checks: "ok", "differs on rank N" or "cold" for weights, moments, schedule, buffers: the
            live state after the load against what was saved. What cannot be compared (other
            sharding) is left out.
    """

    path: Path
    manifest: Manifest
    extra: dict[str, Any]
    checks: dict[str, str]


class CheckpointLoader:
    """Reads the checkpoints of one folder into one training state.

    Args:
        folder: `checkpoints/` of a run directory, or any folder with checkpoints in it.
        state: what is loaded into.
        rank, world: of the default process group.
    """

    def __init__(
        self, folder: Path, state: TrainingState, *, rank: int = 0, world: int = 1
    ) -> None:
        self.folder, self.state, self.rank, self.world = folder, state, rank, world
        self.strategy = state.layout
        self._verified: Path | None = None

    def newest_valid(
        self, allowed: Allowed = lambda manifest: True, progress: Progress | None = None
    ) -> Selection:
        """The newest checkpoint that holds and is allowed.

        Args:
            allowed: rank 0's answer counts: True, or False or a reason for passing this one over.
            progress: called with (bytes hashed, bytes to hash) of this rank's share of one
            checkpoint.
        """
        listed = self.slow_work(
            lambda: [path.name for path in checkpoint_dirs(self.folder)] if self.rank == 0 else []
        )
        names = self.gathered(listed)[0]
        refused: list[tuple[Path, str]] = []
        invalid: set[str] = set()
        for name in names:
            path = self.folder / name
            manifest, broken, verdict = self._examined(path, allowed, progress)
            if manifest is not None and not broken and not verdict:
                self._verified = path
                return Selection(
                    path=path, manifest=manifest, refused=tuple(refused), invalid=frozenset(invalid)
                )
            refused.append((path, broken or verdict))
            if broken:
                invalid.add(name)
        return Selection(refused=tuple(refused), invalid=frozenset(invalid))

    def _examined(
        self, path: Path, allowed: Allowed, progress: Progress | None
    ) -> tuple[Manifest | None, str, str]:
        """(manifest, what is broken, why it is not allowed); hashes are computed of an allowed one
        only.
        """
        manifest, broken = self.slow_work(lambda: _read(path))
        answer = allowed(manifest) if manifest is not None else True
        verdict = "" if answer is True else answer or "not to be used"
        answers = self.gathered((broken, verdict))
        broken, verdict = next((why for why, _ in answers if why), ""), answers[0][1]
        if broken or verdict or manifest is None:
            return manifest, broken, verdict
        share = [file.name for file in manifest.files][self.rank :: self.world]
        broken = self.slow_work(lambda: _verify(path, share, progress))
        return manifest, next(filter(None, self.gathered(broken)), ""), ""

    def load(self, path: Path, *, weights_only: bool = False) -> Loaded:
        """Load a checkpoint into the live state; saved by any number of ranks, ddp or fsdp.

        Args:
            path: the folder; not hashed again right after `newest_valid` has chosen it.
            weights_only: leave optimizer and schedule as they are: the only way to use a checkpoint
            without moments.

        Raises:
            CheckpointInvalid: it does not hold or does not fit, on any rank. Nothing live has been
            touched then.
        """
        manifest, parts, boxes = self._read(path, weights_only=weights_only)
        if weights_only:
            self.state.load_weights(parts)
        else:
            self.state.load(parts, manifest.scalars, boxes)
        own = manifest.ranks[self.rank].extra if manifest.world == self.world else None
        return Loaded(
            path=path,
            manifest=manifest,
            extra=plain.decode(manifest.extra if own is None else own),
            checks=self._compared(manifest, weights_only=weights_only),
        )

    def _read(
        self, path: Path, *, weights_only: bool
    ) -> tuple[Manifest, dict[str, Tensor], dict[str, Box]]:
        """The parts of this rank in host memory; raises on every rank what went wrong on any."""
        verified, self._verified = self._verified, None
        if path != verified:
            _, broken, _ = self._examined(path, lambda manifest: True, None)
            if broken:
                raise CheckpointInvalid(broken)
        outcome, problem = self.slow_work(
            lambda: self._attempt_read(path, weights_only=weights_only)
        )
        problem = next(filter(None, self.gathered(problem)), "")
        if outcome is None or problem:
            raise CheckpointInvalid(problem)
        return outcome

    def _attempt_read(
        self, path: Path, *, weights_only: bool
    ) -> tuple[tuple[Manifest, dict[str, Tensor], dict[str, Box]] | None, str]:
        """(What this rank is to load, ""), or (None, why it cannot)."""
        try:
            manifest = read_manifest(path)
            boxes = self._wanted(manifest, weights_only=weights_only)
            return (manifest, read_parts(path, manifest, boxes), boxes), ""
        except (CheckpointInvalid, OSError, RuntimeError, MemoryError) as error:
            reason = reason_of(error)
            return None, reason if path.name in reason else f"{path.name}: {reason}"

    def slow_work(self, work: Callable[[], T]) -> T:
        """`work()` of this rank, once all ranks have done theirs: none waits in a collective for a
        slow disk.
        """
        return run_together(work, self.gathered, world=self.world)

    def _wanted(self, manifest: Manifest, *, weights_only: bool) -> dict[str, Box]:
        """Name -> this rank's part of each tensor to be loaded, once everything is known to fit."""
        unknown = [name for name, tensor in manifest.tensors.items() if tensor.dtype not in DTYPES]
        refuse(
            f"{name} is of type {manifest.tensors[name].dtype}, unknown to torch"
            for name in unknown
        )
        found = {
            name: (DTYPES[tensor.dtype], tensor.shape) for name, tensor in manifest.tensors.items()
        }
        if self.state.holders is not None:
            refuse(f"{name} is not in this model" for name in found if not self._is_elsewhere(name))
            found = {name: kind for name, kind in found.items() if self.state.owns(name)}
        refuse(self.state.differences(found, weights_only=weights_only))
        if not weights_only:
            self._refuse_cold(manifest)
            self.state.check_scalars(manifest.scalars)
        names = [name for name in found if not (weights_only and name.startswith(OPTIM))]
        return {name: self.state.box(name, manifest.tensors[name].shape) for name in names}

    def _is_elsewhere(self, name: str) -> bool:
        """Whether another stage of the pipeline has a place for it."""
        inner = name.split("/", 1)[1]
        return (
            inner.rpartition("/")[0] if name.startswith(OPTIM) else inner
        ) in self.state.all_names

    def _refuse_cold(self, manifest: Manifest) -> None:
        """Training on with cold moments looks like a success and is a loss spike some steps
        later.
        """
        if manifest.step == 0 or any(name.startswith(OPTIM) for name in manifest.tensors):
            return
        if not manifest.stateless or self.state.stateless() is False:
            raise CheckpointInvalid(
                f"it was saved after step {manifest.step} and holds no optimizer state: resuming would restart "
                "the moments at zero; load it with weights_only=True if that is meant"
            )

    def _compared(self, manifest: Manifest, *, weights_only: bool) -> dict[str, str]:
        """The live state's digests against the saved ones, wherever a rank holds now what a rank
        held then.
        """
        now = self.state.digests()
        saved = {"schedule": manifest.ranks[0].digests["schedule"]}
        if manifest.strategy == self.strategy == "ddp":
            saved = manifest.ranks[0].digests
        elif manifest.strategy == self.strategy and manifest.world == self.world:
            saved = manifest.ranks[self.rank].digests
        if weights_only:
            saved = {
                name: digest for name, digest in saved.items() if name in ("weights", "buffers")
            }
        mine = {name: now.get(name) == digest for name, digest in saved.items()}
        everyone = self.gathered(mine)
        checks = {}
        for name in mine:
            wrong = [
                str(rank) for rank, theirs in enumerate(everyone) if not theirs.get(name, True)
            ]
            checks[name] = f"differs on rank {', '.join(wrong)}" if wrong else "ok"
        return checks | ({"moments": "cold", "schedule": "cold"} if weights_only else {})

    def gathered(self, value: Any) -> Sequence[Any]:
        """Every rank's value, by rank."""
        if self.world == 1:
            return [value]
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, value)
        return everyone


def _read(path: Path) -> tuple[Manifest | None, str]:
    """(The manifest, ""), or (None, what is broken)."""
    try:
        return read_manifest(path), ""
    except CheckpointInvalid as error:
        return None, str(error)


def _verify(path: Path, files: Sequence[str], progress: Progress | None) -> str:
    """What is broken in these files of a checkpoint; "" when they hold."""
    try:
        verify(path, files, progress)
    except CheckpointInvalid as error:
        return str(error)
    return ""
