"""What a checkpoint on disk says about itself, and whether that holds. Reads plain bytes: no torch,
nothing unpickled.

A checkpoint is a folder with one safetensors file a rank and `manifest.json`, written last:

    {"sha256": SHA-256 of the manifest's bytes, "manifest": {"format": 1, "step": ..., "tensors":
    {...}, ...}}

A tensor is cut into pieces, boxes of its global shape, wherever they lie; so a reader with any
number of ranks finds its own box. A folder without a valid manifest does not exist as a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import re
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from guardrail.core.errors import CheckpointInvalid
from guardrail.core.files import open_file, read_file
from guardrail.core.records import Record

FORMAT = 1
MANIFEST = "manifest.json"
MODEL, BUFFER, OPTIM = "model/", "buffer/", "optim/"  # what the name of a tensor begins with

# Bytes of one element, by the name that safetensors gives a type.
ITEM_BYTES = {
    **dict.fromkeys(
        ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1
    ),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}

_BEFORE, _BETWEEN, _AFTER = b'{"sha256":"', b'","manifest":', b"}\n"
_NAME = re.compile(r"step-(\d+)(?:-t(\d+))?(?:-(\d+))?")
_BEGINNING = re.compile(rb'"format":\d+,"step":(\d+),"timeline":(\d+),')
_CHUNK = 1 << 20
_HEADER_LIMIT = 100_000_000  # as in the safetensors library

Shape = tuple[int, ...]
Progress = Callable[[int, int], None]


class Box(Record, frozen=True, kw_only=True):
    """A part of a tensor: the elements [offset, offset + size) in every dimension of
    `global_shape`.
    """

    global_shape: Shape
    offset: Shape
    size: Shape

    @classmethod
    def whole(cls, shape: Iterable[int]) -> Box:
        shape = tuple(shape)
        return cls(global_shape=shape, offset=(0,) * len(shape), size=shape)

    @property
    def is_whole(self) -> bool:
        return self.size == self.global_shape

    @property
    def elements(self) -> int:
        return math.prod(self.size)

    def overlap(self, other: Box) -> Box | None:
        """The elements that both hold; None when there are none."""
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
        """Where this box lies in a tensor that holds the elements of `within`."""
        starts = [own - base for own, base in zip(self.offset, within.offset, strict=True)]
        return tuple(
            slice(start, start + extent) for start, extent in zip(starts, self.size, strict=True)
        )


class Piece(Record, frozen=True, kw_only=True):
    """A box of a tensor and the file that holds it, under the tensor's own name."""

    file: str
    offset: Shape
    size: Shape


class TensorEntry(Record, frozen=True, kw_only=True):
    """A tensor as a whole. `dtype` as safetensors writes it, e.g. "F32"."""

    dtype: str
    shape: Shape
    pieces: tuple[Piece, ...]

    def boxes(self) -> list[Box]:
        return [Box(global_shape=self.shape, offset=p.offset, size=p.size) for p in self.pieces]


class FileEntry(Record, frozen=True, kw_only=True):
    """A file of the folder, as it was read back from the disk."""

    name: str
    bytes: int
    sha256: str


class RankEntry(Record, frozen=True, kw_only=True):
    """What one rank held: SHA-256 of each component of its local state, and its `extra` where it is
    not rank 0's.
    """

    rank: int
    digests: dict[str, str]
    extra: dict[str, Any] | None = None


class Manifest(Record, frozen=True, kw_only=True):
    """manifest.json.

    Attributes:
        world, strategy: number of ranks that wrote it, and how the state lay on them; see
        TrainingState.layout.
        identity: fingerprints of configuration and data, versions: what the guard wants to know
        again at a resume.
        scalars: learning rates, schedule and optimizer numbers; JSON as
        `guardrail.torch.state.json_codec` writes it.
        extra: the guard's own state (cursor, detectors, ...), from rank 0; JSON in the same way.
        stateless: the optimizer keeps no tensors by nature (SGD without momentum): their absence is
        no loss.
        warning: what was odd although the save succeeded, such as replicas that had drifted apart.
        suspect: it holds steps of an unresolved incident: kept for a look at it, never chosen by a
        resume or rollback.
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
    """The content of manifest.json, with the hash that makes a flipped bit in it show."""
    body = msgspec.json.encode(manifest)
    return _BEFORE + hashlib.sha256(body).hexdigest().encode() + _BETWEEN + body + _AFTER


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, proven intact and consistent in itself.

    Raises:
        CheckpointInvalid: missing, cut off, changed, of another format, or its pieces do not make
        up the tensors.
    """
    path = folder / MANIFEST
    try:
        _refuse_link(folder, MANIFEST, path.lstat().st_mode)
        content = read_file(path)
    except FileNotFoundError as error:
        raise CheckpointInvalid(
            f"{folder.name}: {MANIFEST} is missing: the checkpoint was never finished"
        ) from error
    except OSError as error:
        raise CheckpointInvalid(
            f"{folder.name}: {MANIFEST} cannot be read ({error.strerror})"
        ) from error
    body = _unsealed(content, folder)
    try:
        found = msgspec.json.decode(body, type=dict[str, Any]).get("format")
        if found != FORMAT:
            raise CheckpointInvalid(
                f"{folder.name}: written in format {found}, this version reads format {FORMAT}"
            )
        manifest = msgspec.json.decode(body, type=Manifest)
    except msgspec.DecodeError as error:
        raise CheckpointInvalid(f"{folder.name}: {MANIFEST} is not a manifest ({error})") from error
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
        why = "is of an unknown format" if old else "is not what was written: cut off or changed"
        raise CheckpointInvalid(f"{folder.name}: {MANIFEST} {why}")
    return body


def _check_consistent(manifest: Manifest, folder: Path) -> None:
    """A manifest that is intact may still be wrong: pieces must lie in known files and make up the
    whole.
    """
    names = {file.name for file in manifest.files}
    if any(Path(name).name != name or name in (".", "..") for name in names):
        raise CheckpointInvalid(f"{folder.name}: the manifest names a file outside of its folder")
    for name, tensor in manifest.tensors.items():
        if tensor.dtype not in ITEM_BYTES:
            raise CheckpointInvalid(f"{folder.name}: {name} has the unknown type {tensor.dtype!r}")
        if not all(piece.file in names for piece in tensor.pieces):
            raise CheckpointInvalid(
                f"{folder.name}: {name} lies in a file that the manifest does not list"
            )
        if not covers(tensor.shape, tensor.boxes()):
            raise CheckpointInvalid(
                f"{folder.name}: the pieces of {name} do not make up its shape {tensor.shape}"
            )


def covers(shape: Shape, boxes: list[Box]) -> bool:
    """Whether the boxes lie inside `shape`, are disjoint, and leave nothing out. No piece is needed
    for no elements.
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
    # Disjoint boxes of the right volume fill the shape. Sorted along the first dimension in which
    # they differ, only those that begin before the present one ends can meet it.
    if total != math.prod(shape):
        return False
    axis = next((d for d in range(len(shape)) if len({box.offset[d] for box in boxes}) > 1), 0)
    ordered = sorted((b for b in boxes if b.elements), key=lambda box: box.offset)
    for index, box in enumerate(ordered):
        for other in ordered[index + 1 :]:
            if shape and other.offset[axis] >= box.offset[axis] + box.size[axis]:
                break
            if box.overlap(other) is not None:
                return False
    return True


def verify(
    folder: Path, files: Iterable[str] | None = None, progress: Progress | None = None
) -> Manifest:
    """Check a checkpoint without changing anything.

    Args:
        folder: the checkpoint.
        files: names of the files whose SHA-256 is computed; None: all. Sizes and headers are
            checked for all of them in any case.
        progress: called with (bytes hashed, bytes to hash).

    Raises:
        CheckpointInvalid: names the file and says in one sentence what is wrong with it.
    """
    manifest = read_manifest(folder)
    for file in manifest.files:
        _check_size(folder, file)
    chosen = set(files) if files is not None else {file.name for file in manifest.files}
    total = sum(file.bytes for file in manifest.files if file.name in chosen)
    done = 0
    for file in manifest.files:
        if file.name in chosen:
            digest, done = _hashed(folder, file, done, total, progress)
            if digest != file.sha256:
                raise CheckpointInvalid(
                    f"{folder.name}/{file.name}: its content is not what was written "
                    f"(SHA-256 {digest[:12]}..., the manifest says {file.sha256[:12]}...)"
                )
    _check_headers(folder, manifest)
    return manifest


def _check_size(folder: Path, file: FileEntry) -> None:
    try:
        found = (folder / file.name).lstat()
    except FileNotFoundError as error:
        raise CheckpointInvalid(f"{folder.name}/{file.name} is missing") from error
    except OSError as error:
        raise CheckpointInvalid(
            f"{folder.name}/{file.name} cannot be read ({error.strerror})"
        ) from error
    _refuse_link(folder, file.name, found.st_mode)
    size = found.st_size
    if size != file.bytes:
        how = "cut off" if size < file.bytes else "too long"
        raise CheckpointInvalid(
            f"{folder.name}/{file.name} is {how}: {size} bytes, the manifest says {file.bytes}"
        )


def _refuse_link(folder: Path, name: str, mode: int) -> None:
    """What a link points to is no part of the checkpoint: it may change or go, and a copy of the
    folder lacks it.
    """
    if not stat.S_ISREG(mode):
        what = "a link to another file" if stat.S_ISLNK(mode) else "no regular file"
        raise CheckpointInvalid(
            f"{folder.name}/{name} is {what}: a checkpoint holds its files itself"
        )


def _hashed(
    folder: Path, file: FileEntry, done: int, total: int, progress: Progress | None
) -> tuple[str, int]:
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    try:
        with open(folder / file.name, "rb", buffering=0) as stream:
            while count := stream.readinto(view):
                digest.update(view[:count])
                done += count
                if progress is not None:
                    progress(done, total)
    except OSError as error:
        raise CheckpointInvalid(
            f"{folder.name}/{file.name} cannot be read ({error.strerror})"
        ) from error
    return digest.hexdigest(), done


class HeaderEntry(msgspec.Struct, frozen=True):
    """One tensor in a safetensors header: bytes [begin, end) from `data` on, the beginning of the
    file's data.
    """

    dtype: str
    shape: Shape
    data_offsets: tuple[int, int]


def read_header(path: Path) -> tuple[dict[str, HeaderEntry], int]:
    """The header of a safetensors file: (tensors by name, where the data begin in the file, in
    bytes).

    Raises:
        CheckpointInvalid: not a safetensors file, or one whose tensors do not fit in it.
    """
    try:
        with (
            open_file(path) as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            length = int.from_bytes(content[:8], "little")
            if len(content) < 8 or not 2 <= length <= min(_HEADER_LIMIT, len(content) - 8):
                raise CheckpointInvalid(f"{path.parent.name}/{path.name} is not a safetensors file")
            header = msgspec.json.decode(content[8 : 8 + length], type=dict[str, Any])
            room = len(content) - 8 - length
    # mmap refuses an empty file with ValueError, msgspec derives from it
    except (OSError, ValueError) as error:
        raise CheckpointInvalid(
            f"{path.parent.name}/{path.name} is not a safetensors file ({error})"
        ) from error
    header.pop("__metadata__", None)
    try:
        entries = msgspec.convert(header, dict[str, HeaderEntry])
    except msgspec.ValidationError as error:
        raise CheckpointInvalid(
            f"{path.parent.name}/{path.name} has a broken header ({error})"
        ) from error
    for name, entry in entries.items():
        begin, end = entry.data_offsets
        if not 0 <= begin <= end <= room or end - begin != ITEM_BYTES.get(
            entry.dtype, 0
        ) * math.prod(entry.shape):
            raise CheckpointInvalid(
                f"{path.parent.name}/{path.name}: {name} does not fit in the file"
            )
    return entries, 8 + length


def _check_headers(folder: Path, manifest: Manifest) -> None:
    headers = {file.name: read_header(folder / file.name)[0] for file in manifest.files}
    for name, tensor in manifest.tensors.items():
        for piece in tensor.pieces:
            held = headers[piece.file].get(name)
            if held is None or (held.dtype, held.shape) != (tensor.dtype, piece.size):
                raise CheckpointInvalid(
                    f"{folder.name}/{piece.file} does not hold the piece of {name} it should"
                )


def fingerprint(folder: Path) -> str:
    """One SHA-256 over all parameters, the same however many ranks wrote them and however they were
    sharded.

    Over the tensors "model/...", by name: a line `name dtype shape`, then the whole tensor's bytes
    in row-major order. Buffers and moments stay out. Holds one tensor in memory at a time, and only
    where pieces interleave. Hashes of the files are not checked here; see `verify`.
    """
    manifest = read_manifest(folder)
    for file in manifest.files:
        _check_size(folder, file)
    digest = hashlib.sha256()
    headers = {file.name: read_header(folder / file.name) for file in manifest.files}
    for name in sorted(manifest.tensors):
        if name.startswith(MODEL):
            tensor = manifest.tensors[name]
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            for part in _row_major(folder, name, tensor, headers):
                digest.update(part)
    return digest.hexdigest()


def _row_major(
    folder: Path,
    name: str,
    tensor: TensorEntry,
    headers: dict[str, tuple[dict[str, HeaderEntry], int]],
) -> Iterable[Any]:
    """The bytes of a tensor in order, in parts. Elements are opaque: the item's bytes are one more
    dimension.
    """
    import numpy as np

    item = ITEM_BYTES[tensor.dtype]

    def content(piece: Piece) -> Any:
        entries, start = headers[piece.file]
        if name not in entries:
            raise CheckpointInvalid(f"{folder.name}/{piece.file} does not hold {name}")
        begin, end = entries[name].data_offsets
        if end - begin != item * math.prod(piece.size):
            raise CheckpointInvalid(
                f"{folder.name}/{piece.file}: {name} has another size than the manifest says"
            )
        shape = (*piece.size, item)
        if begin == end:
            return np.empty(shape, dtype=np.uint8)
        return np.memmap(
            folder / piece.file, dtype=np.uint8, mode="r", offset=start + begin, shape=shape
        )

    pieces = sorted(tensor.pieces, key=lambda piece: piece.offset)
    if all(piece.size[1:] == tensor.shape[1:] for piece in pieces):  # whole rows follow one another
        yield from map(content, pieces)
        return
    whole = np.empty((*tensor.shape, item), dtype=np.uint8)
    for piece in pieces:
        box = Box(global_shape=tensor.shape, offset=piece.offset, size=piece.size)
        whole[box.slices(Box.whole(tensor.shape))] = content(piece)
    yield whole


def checkpoint_name(step: int, timeline: int = 0, copy: int = 0) -> str:
    """`step-00001200`; with its timeline where an older timeline has taken that name; numbered if
    that is taken too.
    """
    name = f"step-{step:08d}"
    if timeline or copy:
        name += f"-t{timeline}"
    return f"{name}-{copy + 1}" if copy else name


def checkpoint_dirs(folder: Path) -> list[Path]:
    """The committed checkpoints of a run, newest first: by timeline, then by step. Temporary
    folders are passed over.

    One whose manifest cannot be read comes first of all: its age is unknown, so whoever looks for
    the newest valid one must meet it and be able to say why it was refused.
    """
    found = []
    if folder.is_dir():
        for path in folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and path.is_dir():
                found.append((_age(path, int(match[1])), path.name, path))
    return [path for *_, path in sorted(found, reverse=True)]


def _age(path: Path, step: int) -> tuple[float, int]:
    """(timeline, step), from the first bytes of the manifest."""
    try:
        with open_file(path / MANIFEST) as stream:
            match = _BEGINNING.search(stream.read(512))
    except OSError:
        match = None
    return (int(match[2]), int(match[1])) if match else (math.inf, step)
