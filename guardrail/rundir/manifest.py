"""The manifest of a checkpoint, and its checks. Reads plain bytes, without torch and pickle.

A checkpoint is a folder with one safetensors file per rank and `manifest.json`, written last:

    {"sha256": SHA-256 of the manifest's bytes, "manifest": {"format": 1, "step": ..., "tensors":
    {...}, ...}}

A tensor consists of pieces: boxes of its global shape, in any of the files. So a reader with
another number of ranks finds its own box. A folder without a valid manifest is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from guardrail.core.errors import CheckpointInvalid
from guardrail.core.files import read_file
from guardrail.core.records.record import Record
from guardrail.rundir.safetensors_header import ITEM_BYTES, Shape

FORMAT = 1
MANIFEST = "manifest.json"
MODEL, BUFFER, OPTIM = "model/", "buffer/", "optim/"  # prefixes of tensor names

_BEFORE, _BETWEEN, _AFTER = b'{"sha256":"', b'","manifest":', b"}\n"


class Box(Record, frozen=True, kw_only=True):
    """A part of a tensor: elements [offset, offset + size) in each dimension of `global_shape`."""

    global_shape: Shape
    offset: Shape
    size: Shape

    @classmethod
    def of_shape(cls, shape: Iterable[int]) -> Box:
        shape = tuple(shape)
        return cls(global_shape=shape, offset=(0,) * len(shape), size=shape)

    @property
    def is_complete(self) -> bool:
        return self.size == self.global_shape

    @property
    def elements(self) -> int:
        return math.prod(self.size)

    def overlap(self, other: Box) -> Box | None:
        """Return the box of the elements that both contain; None: there are none."""
        first = tuple(map(max, self.offset, other.offset))
        last = [
            min(a + m, b + n)
            for a, m, b, n in zip(self.offset, self.size, other.offset, other.size, strict=True)
        ]
        size = tuple(end - begin for begin, end in zip(first, last, strict=True))
        if any(extent <= 0 for extent in size):
            return None
        return Box(global_shape=self.global_shape, offset=first, size=size)

    def slices(self, within: Box) -> tuple[slice, ...]:
        """Return the slices of this box in a tensor that holds the elements of `within`."""
        starts = [own - base for own, base in zip(self.offset, within.offset, strict=True)]
        return tuple(
            slice(start, start + extent) for start, extent in zip(starts, self.size, strict=True)
        )


class Piece(Record, frozen=True, kw_only=True):
    """A box of a tensor and the file that holds it, under the name of the tensor."""

    file: str
    offset: Shape
    size: Shape


class TensorEntry(Record, frozen=True, kw_only=True):
    """A complete tensor. `dtype` as safetensors writes it, e.g. "F32"."""

    dtype: str
    shape: Shape
    pieces: tuple[Piece, ...]

    def boxes(self) -> list[Box]:
        return [Box(global_shape=self.shape, offset=p.offset, size=p.size) for p in self.pieces]


class FileEntry(Record, frozen=True, kw_only=True):
    """A file of the folder. Size and hash were read back from the disk."""

    name: str
    bytes: int
    sha256: str


class RankEntry(Record, frozen=True, kw_only=True):
    """The state of one rank.

    Attributes:
        digests: SHA-256 of each component of its local state.
        extra: its guard state; None: the same as on rank 0.
    """

    rank: int
    digests: dict[str, str]
    extra: dict[str, Any] | None = None


class Manifest(Record, frozen=True, kw_only=True):
    """manifest.json.

    Attributes:
        world: number of ranks that wrote it.
        strategy: how the state was distributed over them; see TrainingState.layout.
        identity: fingerprints of configuration and data, and versions. The guard compares them at a
            resume.
        scalars: learning rates, schedule and optimizer numbers; JSON as
            `guardrail.torch.state.json_codec` writes it.
        extra: state of the guard on rank 0 (cursor, detectors, ...); JSON in the same way.
        stateless: the optimizer never has tensors (SGD without momentum), so none are missing.
        warning: a problem that did not stop the save, such as replicas that differ.
        suspect: it holds steps of an unresolved incident. It is kept for inspection; a resume or
            rollback never chooses it.
    """

    format: int
    step: int
    timeline: int
    cursor: int
    world: int
    strategy: str
    time: float = 0.0
    identity: dict[str, Any] = msgspec.field(default_factory=dict)
    warning: str = ""
    stateless: bool = False
    files: tuple[FileEntry, ...] = ()
    ranks: tuple[RankEntry, ...] = ()
    scalars: dict[str, Any] = msgspec.field(default_factory=dict)
    extra: dict[str, Any] = msgspec.field(default_factory=dict)
    tensors: dict[str, TensorEntry] = msgspec.field(default_factory=dict)
    suspect: bool = False

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def sealed(manifest: Manifest) -> bytes:
    """Return the content of manifest.json. Its hash makes a changed bit detectable."""
    body = msgspec.json.encode(manifest)
    return _BEFORE + hashlib.sha256(body).hexdigest().encode() + _BETWEEN + body + _AFTER


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint, checked for damage and consistency.

    Raises:
        CheckpointInvalid: the manifest is missing, cut off, changed or of another format, or its
            pieces do not cover the tensors.
    """
    path = folder / MANIFEST
    try:
        refuse_link(folder, MANIFEST, path.lstat().st_mode)
        content = read_file(path)
    except FileNotFoundError as error:
        raise CheckpointInvalid(
            f"{folder.name}: {MANIFEST} is missing: the checkpoint was never finished",
            kind="missing",
        ) from error
    except OSError as error:
        raise CheckpointInvalid(
            f"{folder.name}: {MANIFEST} cannot be read ({error.strerror})", kind="unreadable"
        ) from error
    body = _unsealed(content, folder)
    try:
        found = msgspec.json.decode(body, type=dict[str, Any]).get("format")
        if found != FORMAT:
            raise CheckpointInvalid(
                f"{folder.name}: written in format {found}, this version reads format {FORMAT}",
                kind="other_format",
            )
        manifest = msgspec.json.decode(body, type=Manifest)
    except msgspec.DecodeError as error:
        raise CheckpointInvalid(
            f"{folder.name}: {MANIFEST} is not a manifest ({error})", kind="no_manifest"
        ) from error
    _check_consistent(manifest, folder)
    return manifest


def _unsealed(content: bytes, folder: Path) -> bytes:
    start = len(_BEFORE) + 64
    body = content[start + len(_BETWEEN) : -len(_AFTER)]
    intact = (
        content.startswith(_BEFORE)
        and content[start : start + len(_BETWEEN)] == _BETWEEN
        and content.endswith(_AFTER)
        and content[len(_BEFORE) : start] == hashlib.sha256(body).hexdigest().encode()
    )
    if not intact:
        try:
            old = isinstance(json.loads(content), dict) and not content.startswith(_BEFORE[:5])
        except ValueError:
            old = False
        if old:
            raise CheckpointInvalid(
                f"{folder.name}: {MANIFEST} is of an unknown format", kind="other_format"
            )
        raise CheckpointInvalid(
            f"{folder.name}: {MANIFEST} is not what was written: cut off or changed", kind="changed"
        )
    return body


def _check_consistent(manifest: Manifest, folder: Path) -> None:
    """Raise CheckpointInvalid unless all pieces are in listed files and cover their tensors."""
    names = {file.name for file in manifest.files}
    if any(Path(name).name != name or name in (".", "..") for name in names):
        raise CheckpointInvalid(
            f"{folder.name}: the manifest names a file outside of its folder", kind="outside"
        )
    for name, tensor in manifest.tensors.items():
        if tensor.dtype not in ITEM_BYTES:
            raise CheckpointInvalid(
                f"{folder.name}: {name} has the unknown type {tensor.dtype!r}", kind="unknown_dtype"
            )
        if not all(piece.file in names for piece in tensor.pieces):
            raise CheckpointInvalid(
                f"{folder.name}: {name} lies in a file that the manifest does not list",
                kind="unlisted_file",
            )
        if not covers(tensor.shape, tensor.boxes()):
            raise CheckpointInvalid(
                f"{folder.name}: the pieces of {name} do not make up its shape {tensor.shape}",
                kind="incomplete_tensor",
            )


def _first_axis_that_differs(boxes: list[Box], dimensions: int) -> int:
    """Return the first dimension in which the offsets of the boxes differ; 0: there is none."""
    for axis in range(dimensions):
        offsets = {box.offset[axis] for box in boxes}
        if len(offsets) > 1:
            return axis
    return 0


def covers(shape: Shape, boxes: list[Box]) -> bool:
    """Return whether the boxes are inside `shape`, are disjoint, and cover all of it.

    A shape without elements needs no box.
    """
    total = 0
    for box in boxes:
        if not len(box.offset) == len(box.size) == len(shape):
            return False
        if any(
            o < 0 or s < 0 or o + s > full
            for o, s, full in zip(box.offset, box.size, shape, strict=True)
        ):
            return False
        total += box.elements
    # Disjoint boxes with the volume of the shape cover it. They are sorted along the first
    # dimension in which they differ. Only boxes that start before the present one ends can
    # overlap it.
    if total != math.prod(shape):
        return False
    axis = _first_axis_that_differs(boxes, len(shape))
    ordered = sorted((b for b in boxes if b.elements), key=lambda box: box.offset)
    for index, box in enumerate(ordered):
        for other in ordered[index + 1 :]:
            if shape and other.offset[axis] >= box.offset[axis] + box.size[axis]:
                break
            if box.overlap(other) is not None:
                return False
    return True


def refuse_link(folder: Path, name: str, mode: int) -> None:
    """Raise CheckpointInvalid unless the file is a regular file, such as for a link.

    The target of a link may change or disappear, and a copy of the folder does not contain it.
    """
    if not stat.S_ISREG(mode):
        what, kind = "no regular file", "no_file"
        if stat.S_ISLNK(mode):
            what, kind = "a link to another file", "link"
        raise CheckpointInvalid(
            f"{folder.name}/{name} is {what}: a checkpoint holds its files itself", kind=kind
        )
