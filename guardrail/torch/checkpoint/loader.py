"""Find and load a checkpoint. Every hash is checked before a live tensor changes.

Each rank checks a share of the files. All methods are collectives: every rank calls them, and all
get the same answer or raise the same error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from guardrail.core.errors import CheckpointInvalid
from guardrail.core.records.record import Record
from guardrail.rundir.checkpoint_folders import checkpoint_dirs
from guardrail.rundir.manifest import OPTIM, Box, Manifest, read_manifest
from guardrail.rundir.verification import Progress, verify
from guardrail.torch.checkpoint.safetensors_file import DTYPES, read_parts
from guardrail.torch.checkpoint.save_job import reason_of
from guardrail.torch.state import json_codec
from guardrail.torch.state.collectives import gather_objects
from guardrail.torch.state.slow_work import T, run_together
from guardrail.torch.state.training_state import TrainingState, refuse_problems

Allowed = Callable[[Manifest], bool | str]


class Selection(Record, frozen=True, kw_only=True):
    """The checkpoint that was found, and why each newer one was refused.

    Attributes:
        path: None if none was found.
        refused: (path, reason) of newer ones, damaged or not allowed.
        invalid: names of the damaged ones among them.
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
            live state after the load against the saved one. Components that cannot be compared
            (other sharding) are missing.
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

    def find_newest_valid(
        self, allowed: Allowed = lambda manifest: True, progress: Progress | None = None
    ) -> Selection:
        """Return the newest checkpoint that is valid and allowed.

        Args:
            allowed: True, or False or a reason to refuse this one; rank 0's answer counts.
            progress: called with (bytes hashed, bytes to hash) of this rank's share of one
                checkpoint.
        """
        names = self.gather(self.run_slow_work(self._list_names))[0]
        refused: list[tuple[Path, str]] = []
        invalid: set[str] = set()
        for name in names:
            path = self.folder / name
            manifest, broken, refusal = self._examine(path, allowed, progress)
            if manifest is not None and not broken and not refusal:
                self._verified = path
                return Selection(
                    path=path, manifest=manifest, refused=tuple(refused), invalid=frozenset(invalid)
                )
            refused.append((path, broken or refusal))
            if broken:
                invalid.add(name)
        return Selection(refused=tuple(refused), invalid=frozenset(invalid))

    def _list_names(self) -> list[str]:
        """Return the names of the checkpoints, on rank 0."""
        if self.rank != 0:
            return []
        return [path.name for path in checkpoint_dirs(self.folder)]

    def _examine(
        self, path: Path, allowed: Allowed, progress: Progress | None
    ) -> tuple[Manifest | None, str, str]:
        """Return (manifest, what is damaged, why it is not allowed).

        Only an allowed checkpoint is hashed.
        """
        manifest, broken = self.run_slow_work(lambda: _try_read(path))
        refusal = ""
        if manifest is not None:
            answer = allowed(manifest)
            if answer is not True:
                refusal = answer or "not to be used"
        by_rank = self.gather((broken, refusal))
        broken, refusal = _first_problem(why for why, _ in by_rank), by_rank[0][1]
        if broken or refusal or manifest is None:
            return manifest, broken, refusal
        share = [file.name for file in manifest.files][self.rank :: self.world]
        broken = self.run_slow_work(lambda: _find_damage(path, share, progress))
        return manifest, _first_problem(self.gather(broken)), ""

    def load(self, path: Path, *, weights_only: bool = False) -> Loaded:
        """Load a checkpoint into the live state; any number of ranks may have saved it.

        Args:
            path: the folder; not hashed again right after `find_newest_valid` has chosen it.
            weights_only: do not load optimizer and schedule. A checkpoint without moments can be
                used in this way only.

        Raises:
            CheckpointInvalid: it is damaged or does not fit, on any rank. The live state is
                unchanged then.
        """
        manifest, parts, boxes = self._read(path, weights_only=weights_only)
        if weights_only:
            self.state.load_weights(parts)
        else:
            self.state.load(parts, manifest.scalars, boxes)
        extra = manifest.extra
        if manifest.world == self.world:
            own = manifest.ranks[self.rank].extra
            extra = manifest.extra if own is None else own
        return Loaded(
            path=path,
            manifest=manifest,
            extra=json_codec.decode(extra),
            checks=self._compare(manifest, weights_only=weights_only),
        )

    def _read(
        self, path: Path, *, weights_only: bool
    ) -> tuple[Manifest, dict[str, Tensor], dict[str, Box]]:
        """Return this rank's parts in host memory; an error of any rank is raised on every rank."""
        verified, self._verified = self._verified, None
        if path != verified:
            _, broken, _ = self._examine(path, lambda manifest: True, None)
            if broken:
                raise CheckpointInvalid(broken)
        outcome, problem = self.run_slow_work(
            lambda: self._try_read_parts(path, weights_only=weights_only)
        )
        problem = _first_problem(self.gather(problem))
        if outcome is None or problem:
            raise CheckpointInvalid(problem)
        return outcome

    def _try_read_parts(
        self, path: Path, *, weights_only: bool
    ) -> tuple[tuple[Manifest, dict[str, Tensor], dict[str, Box]] | None, str]:
        """Return (what this rank loads, ""), or (None, why it cannot)."""
        try:
            manifest = read_manifest(path)
            boxes = self._boxes_to_load(manifest, weights_only=weights_only)
            return (manifest, read_parts(path, manifest, boxes), boxes), ""
        except (CheckpointInvalid, OSError, RuntimeError, MemoryError) as error:
            reason = reason_of(error)
            if path.name not in reason:
                reason = f"{path.name}: {reason}"
            return None, reason

    def run_slow_work(self, work: Callable[[], T]) -> T:
        """Return `work()` of this rank once all ranks are done.

        No rank waits in a collective for a slow disk.
        """
        return run_together(work, self.gather, world=self.world)

    def _boxes_to_load(self, manifest: Manifest, *, weights_only: bool) -> dict[str, Box]:
        """Return name -> this rank's part of each tensor to load, once all of it fits."""
        unknown = [name for name, tensor in manifest.tensors.items() if tensor.dtype not in DTYPES]
        refuse_problems(
            f"{name} is of type {manifest.tensors[name].dtype}, unknown to torch"
            for name in unknown
        )
        found = {
            name: (DTYPES[tensor.dtype], tensor.shape) for name, tensor in manifest.tensors.items()
        }
        if self.state.holders is not None:
            strangers = [name for name in found if not self._is_of_any_stage(name)]
            refuse_problems(f"{name} is not in this model" for name in strangers)
            found = {name: kind for name, kind in found.items() if self.state.owns(name)}
        refuse_problems(self.state.differences(found, weights_only=weights_only))
        if not weights_only:
            self._refuse_cold(manifest)
            self.state.check_scalars(manifest.scalars)
        names = [name for name in found if not (weights_only and name.startswith(OPTIM))]
        return {name: self.state.box(name, manifest.tensors[name].shape) for name in names}

    def _is_of_any_stage(self, name: str) -> bool:
        """Return whether any stage of the pipeline has a place for a tensor."""
        inner = name.split("/", 1)[1]
        if name.startswith(OPTIM):
            inner = inner.rpartition("/")[0]
        return inner in self.state.all_names

    def _refuse_cold(self, manifest: Manifest) -> None:
        """Raise if there is no optimizer state to load: training would seem to continue, and the
        loss would spike some steps later.
        """
        if manifest.step == 0 or any(name.startswith(OPTIM) for name in manifest.tensors):
            return
        if not manifest.stateless or self.state.stateless() is False:
            raise CheckpointInvalid(
                f"the checkpoint has no optimizer state (saved after step {manifest.step}): the "
                "moments would restart at zero. Load it with weights_only=True, or choose another "
                "checkpoint."
            )

    def _compare(self, manifest: Manifest, *, weights_only: bool) -> dict[str, str]:
        """Return the result per component of comparing live digests with the saved ones.

        Only components that a rank held in the same parts when they were saved are compared.
        """
        saved = self._comparable_digests(manifest)
        if weights_only:
            saved = {name: saved[name] for name in saved if name in ("weights", "buffers")}
        live = self.state.digests()
        is_equal = {name: live.get(name) == digest for name, digest in saved.items()}
        by_rank = self.gather(is_equal)
        checks: dict[str, str] = {}
        for name in is_equal:
            wrong = [str(rank) for rank, theirs in enumerate(by_rank) if not theirs.get(name, True)]
            checks[name] = f"differs on rank {', '.join(wrong)}" if wrong else "ok"
        if weights_only:
            checks |= {"moments": "cold", "schedule": "cold"}
        return checks

    def _comparable_digests(self, manifest: Manifest) -> dict[str, str]:
        if manifest.strategy == self.strategy == "ddp":
            return manifest.ranks[0].digests
        if manifest.strategy == self.strategy and manifest.world == self.world:
            return manifest.ranks[self.rank].digests
        return {"schedule": manifest.ranks[0].digests["schedule"]}

    def gather(self, value: Any) -> Sequence[Any]:
        """Return every rank's value, by rank."""
        return gather_objects(value, self.world)


def _first_problem(problems: Iterable[str]) -> str:
    """Return the first problem that is not empty; "" if there is none."""
    return next(filter(None, problems), "")


def _try_read(path: Path) -> tuple[Manifest | None, str]:
    """Return (the manifest, ""), or (None, what is damaged)."""
    try:
        return read_manifest(path), ""
    except CheckpointInvalid as error:
        return None, str(error)


def _find_damage(path: Path, files: Sequence[str], progress: Progress | None) -> str:
    """Return what is damaged in these files of a checkpoint; "" if they are valid."""
    try:
        verify(path, files, progress)
    except CheckpointInvalid as error:
        return str(error)
    return ""
