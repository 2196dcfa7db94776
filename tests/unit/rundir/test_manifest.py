from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from guardrail.core.errors import CheckpointInvalid, ExitCode
from guardrail.rundir.checkpoint_folders import checkpoint_dirs, checkpoint_name
from guardrail.rundir.manifest import (
    FORMAT,
    MANIFEST,
    Box,
    FileEntry,
    Manifest,
    Piece,
    TensorEntry,
    covers,
    read_manifest,
    sealed,
)
from guardrail.rundir.safetensors_header import read_header
from guardrail.rundir.verification import fingerprint, verify
from guardrail.torch.checkpoint.safetensors_file import dtype_name, write_file

Cut = tuple[str, tuple[int, ...], tuple[int, ...]]  # file, offset, size

TENSORS = {
    "model/matrix": torch.arange(42, dtype=torch.float32).reshape(6, 7),
    "model/half": torch.arange(5, dtype=torch.bfloat16),
    "model/scalar": torch.tensor(3.5, dtype=torch.float64),
    "optim/matrix/exp_avg": torch.ones(6, 7),
    "buffer/mask": torch.tensor([True, False]),
}
FILES = ("rank-00000.safetensors", "rank-00001.safetensors")


def cut(name: str, *sizes: tuple[int, ...], dim: int = 0) -> list[Cut]:
    """Pieces of these sizes along `dim`, on the two files in turn."""
    pieces, at = [], 0
    for index, size in enumerate(sizes):
        offset = [0] * len(size)
        offset[dim] = at
        at += size[dim]
        pieces.append((FILES[index % 2], tuple(offset), size))
    return pieces


def build(
    folder: Path, cuts: dict[str, list[Cut]] | None = None, *, step: int = 100, timeline: int = 0
) -> Path:
    """A checkpoint of TENSORS; `cuts` says how a tensor is cut, default: not at all, in turn on the two
    files.
    """
    path = folder / checkpoint_name(step, timeline)
    path.mkdir(parents=True)
    content: dict[str, dict[str, torch.Tensor]] = {file: {} for file in FILES}
    entries = {}
    for index, (name, tensor) in enumerate(TENSORS.items()):
        complete = [(FILES[index % 2], (0,) * tensor.ndim, tuple(tensor.shape))]
        pieces = (cuts or {}).get(name, complete)
        for file, offset, size in pieces:
            content[file][name] = tensor[
                tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))
            ].contiguous()
        entries[name] = TensorEntry(
            dtype=dtype_name(tensor.dtype),
            shape=tuple(tensor.shape),
            pieces=tuple(
                Piece(file=file, offset=offset, size=size) for file, offset, size in pieces
            ),
        )
    files = tuple(write_file(path / file, tensors) for file, tensors in content.items())
    manifest = Manifest(
        format=FORMAT,
        step=step,
        timeline=timeline,
        cursor=800,
        world=2,
        strategy="fsdp",
        files=files,
        tensors=entries,
    )
    (path / MANIFEST).write_bytes(sealed(manifest))
    return path


def rewrite(path: Path, **changes: object) -> None:
    """Put another, correctly sealed manifest there."""
    import msgspec

    (path / MANIFEST).write_bytes(sealed(msgspec.structs.replace(read_manifest(path), **changes)))


def refusal(path: Path) -> CheckpointInvalid:
    with pytest.raises(CheckpointInvalid) as caught:
        verify(path)
    assert caught.value.exit_code is ExitCode.CHECK_FAILED
    assert "\n" not in str(caught.value)
    return caught.value


def test_an_intact_checkpoint_verifies_and_reports_progress(tmp_path: Path) -> None:
    path = build(tmp_path)
    seen: list[tuple[int, int]] = []
    manifest = verify(path, progress=lambda done, total: seen.append((done, total)))
    assert manifest.step == 100 and manifest.cursor == 800
    total = sum((path / file).stat().st_size for file in FILES)
    assert seen[-1] == (total, total) == (manifest.bytes, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_files_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    path = build(tmp_path)
    held = load_file(path / FILES[0]) | load_file(path / FILES[1])
    assert all(
        torch.equal(held[name], tensor) and held[name].dtype == tensor.dtype
        for name, tensor in TENSORS.items()
    )
    entries, data = read_header(path / FILES[0])
    assert (
        data % 8 == 0
        and entries["model/matrix"].shape == (6, 7)
        and entries["model/matrix"].dtype == "F32"
    )


@pytest.mark.parametrize("file", [*FILES, MANIFEST])
def test_one_flipped_bit_anywhere_is_found(file: str, tmp_path: Path) -> None:
    path = build(tmp_path)
    content = (path / file).read_bytes()
    places = [*random.Random(7).sample(range(len(content) * 8), 60), 0, len(content) * 8 - 1]
    for place in places:
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << (place % 8)
        (path / file).write_bytes(damaged)
        assert file in str(refusal(path)), place
    (path / file).write_bytes(content)
    verify(path)


@pytest.mark.parametrize("file", [*FILES, MANIFEST])
def test_a_file_cut_off_anywhere_is_found(file: str, tmp_path: Path) -> None:
    path = build(tmp_path)
    content = (path / file).read_bytes()
    for length in {0, 1, 8, 100, len(content) // 2, len(content) - 1}:
        (path / file).write_bytes(content[:length])
        error = refusal(path)
        assert file in str(error), length
        assert error.kind == ("changed" if file == MANIFEST else "cut_off"), length
    (path / file).write_bytes(content + b"\0")
    assert refusal(path).kind == ("changed" if file == MANIFEST else "too_long")


@pytest.mark.parametrize("file", [*FILES, MANIFEST])
def test_a_missing_file_is_found(file: str, tmp_path: Path) -> None:
    path = build(tmp_path)
    (path / file).unlink()
    error = refusal(path)
    assert (file in str(error), error.kind) == (True, "missing")


@pytest.mark.fault("R14")
@pytest.mark.parametrize("file", [*FILES, MANIFEST])
def test_a_file_that_is_a_link_out_of_the_checkpoint_is_refused(file: str, tmp_path: Path) -> None:
    """The content is the same, and it may change or go with no trace in the folder; a copy of the
    folder lacks it.
    """
    folder = build(tmp_path)
    (folder / file).rename(tmp_path / "elsewhere")
    (folder / file).symlink_to(tmp_path / "elsewhere")
    for check in (verify, fingerprint):
        with pytest.raises(CheckpointInvalid, match=file) as caught:
            check(folder)
        assert caught.value.kind == "link"


@pytest.mark.fault("R14")
def test_a_file_that_is_none_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    folder = build(tmp_path)
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).mkdir()
    with pytest.raises(CheckpointInvalid, match=MANIFEST) as caught:
        verify(folder)
    assert caught.value.kind == "no_file"


def test_a_zero_filled_tail_is_found(tmp_path: Path) -> None:
    """What a power failure after an unsynced rename leaves; safetensors loads it without a word."""
    path = build(tmp_path)
    content = (path / FILES[0]).read_bytes()
    (path / FILES[0]).write_bytes(content[:-16] + bytes(16))
    load_file(path / FILES[0])
    error = refusal(path)
    assert (FILES[0] in str(error), error.kind) == (True, "changed")


def test_only_the_named_files_are_hashed_but_all_are_measured(tmp_path: Path) -> None:
    path = build(tmp_path)
    content = bytearray((path / FILES[1]).read_bytes())
    content[-1] ^= 1
    (path / FILES[1]).write_bytes(content)
    verify(path, files=[FILES[0]])
    verify(path, files=())
    with pytest.raises(CheckpointInvalid, match=FILES[1]):
        verify(path, files=[FILES[1]])
    (path / FILES[1]).write_bytes(content[:-1])
    with pytest.raises(CheckpointInvalid, match=FILES[1]) as caught:
        verify(path, files=())
    assert caught.value.kind == "cut_off"


def test_another_format_is_refused_by_its_number(tmp_path: Path) -> None:
    path = build(tmp_path)
    rewrite(path, format=99)
    error = refusal(path)
    assert error.kind == "other_format"
    assert re.findall(r"format (\d+)", str(error)) == ["99", str(FORMAT)]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b'{"format": 0, "step": 100}', "other_format"),
        (b"", "changed"),
        (b"\xff\xfe\x00", "changed"),
        (b"[]", "changed"),
    ],
)
def test_what_is_no_manifest_is_refused(content: bytes, kind: str, tmp_path: Path) -> None:
    path = build(tmp_path)
    (path / MANIFEST).write_bytes(content)
    assert refusal(path).kind == kind


def test_a_sealed_manifest_with_a_field_of_the_wrong_type_is_refused(tmp_path: Path) -> None:
    path = build(tmp_path)
    body = b'{"format":1,"step":"many"}'
    digest = hashlib.sha256(body).hexdigest().encode()
    (path / MANIFEST).write_bytes(b'{"sha256":"' + digest + b'","manifest":' + body + b"}\n")
    assert refusal(path).kind == "no_manifest"


def test_a_newer_manifest_with_fields_unknown_here_is_read(tmp_path: Path) -> None:
    path = build(tmp_path)
    tree = json.loads((path / MANIFEST).read_bytes())["manifest"] | {"invented_later": {"a": 1}}
    body = json.dumps(tree, separators=(",", ":")).encode()
    digest = hashlib.sha256(body).hexdigest().encode()
    (path / MANIFEST).write_bytes(b'{"sha256":"' + digest + b'","manifest":' + body + b"}\n")
    assert verify(path).step == 100


def test_a_manifest_that_lies_is_refused(tmp_path: Path) -> None:
    path = build(tmp_path)
    honest = read_manifest(path)
    first, second = honest.files
    matrix = honest.tensors["model/matrix"]

    def lie(**changes: object) -> CheckpointInvalid:
        rewrite(path, **changes)
        error = refusal(path)
        (path / MANIFEST).write_bytes(sealed(honest))
        return error

    def with_matrix(**changes: object) -> dict[str, TensorEntry]:
        import msgspec

        return {**honest.tensors, "model/matrix": msgspec.structs.replace(matrix, **changes)}

    longer = FileEntry(name=first.name, bytes=first.bytes + 1, sha256=first.sha256)
    shorter = lie(files=(longer, second))
    assert shorter.kind == "cut_off"
    assert {str(first.bytes), str(first.bytes + 1)} <= set(re.findall(r"\d+", str(shorter)))
    outside = FileEntry(name="../escape", bytes=1, sha256="")
    assert lie(files=(first, second, outside)).kind == "outside"
    unknown = lie(tensors=with_matrix(dtype="F3"))
    assert (unknown.kind, "F3" in str(unknown)) == ("unknown_dtype", True)
    stray = Piece(file="rank-00009.safetensors", offset=(0, 0), size=(6, 7))
    moved = Piece(file=FILES[1], offset=(0, 0), size=(6, 7))
    for kind, changes in (
        ("missing_piece", {"dtype": "I32"}),
        ("incomplete_tensor", {"shape": (7, 7)}),
        ("incomplete_tensor", {"pieces": ()}),
        ("unlisted_file", {"pieces": (stray,)}),
        ("missing_piece", {"pieces": (moved,)}),
    ):
        error = lie(tensors=with_matrix(**changes))
        assert (error.kind, "model/matrix" in str(error)) == (kind, True), changes
    verify(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        (2**63).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"no",
        (2).to_bytes(8, "little") + b"[]",
        (22).to_bytes(8, "little") + b'{"a":{"dtype":"F32"}} ',
        (58).to_bytes(8, "little")
        + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}    '
        + bytes(4),
    ],
)
def test_a_broken_header_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointInvalid, match=r"x\.safetensors"):
        read_header(path)


# -- fingerprint -----------------------------------------------------------------------------------


def reference() -> str:
    digest = hashlib.sha256()
    for name, dtype in (("model/half", "BF16"), ("model/matrix", "F32"), ("model/scalar", "F64")):
        tensor = TENSORS[name]
        digest.update(f"{name} {dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


CUTS: dict[str, dict[str, list[Cut]]] = {
    "whole": {},
    "rows": {"model/matrix": cut("", (4, 7), (2, 7)), "model/half": cut("", (3,), (2,))},
    "columns": {"model/matrix": cut("", (6, 4), (6, 3), dim=1)},
    "an empty shard": {"model/half": cut("", (5,), (0,))},
}


@pytest.mark.parametrize("cuts", CUTS)
def test_the_fingerprint_does_not_depend_on_how_tensors_are_cut(cuts: str, tmp_path: Path) -> None:
    path = build(tmp_path, CUTS[cuts])
    verify(path)
    assert fingerprint(path) == reference()


def test_the_fingerprint_is_of_parameters_alone_and_of_every_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, same in (
        ("optim/matrix/exp_avg", True),
        ("buffer/mask", True),
        ("model/half", False),
    ):
        changed = TENSORS[name].clone()
        changed.view(torch.uint8).view(-1)[0] ^= 1
        monkeypatch.setitem(TENSORS, name, changed)
        path = build(tmp_path / name)
        monkeypatch.undo()
        assert (fingerprint(path) == reference()) is same


# -- boxes -----------------------------------------------------------------------------------------

SHAPES = st.lists(st.integers(1, 4), min_size=0, max_size=3).map(tuple)


@st.composite
def shapes_and_boxes(draw: st.DrawFn, *, inside: bool = False) -> tuple[tuple[int, ...], list[Box]]:
    shape = draw(SHAPES)
    boxes = []
    for _ in range(draw(st.integers(0, 4))):
        offset = tuple(draw(st.integers(0, full)) for full in shape)
        size = tuple(
            draw(st.integers(0, full - start if inside else full))
            for full, start in zip(shape, offset, strict=True)
        )
        boxes.append(Box(global_shape=shape, offset=offset, size=size))
    return shape, boxes


def counted(shape: tuple[int, ...], boxes: list[Box]) -> torch.Tensor:
    counts = torch.zeros(shape, dtype=torch.int64)
    for box in boxes:
        counts[box.slices(Box.of_shape(shape))] += 1
    return counts


@given(shapes_and_boxes())
def test_covers_is_what_counting_elements_says(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = case
    inside = all(
        o + s <= full
        for box in boxes
        for o, s, full in zip(box.offset, box.size, shape, strict=True)
    )
    assert covers(shape, boxes) == (inside and bool((counted(shape, boxes) == 1).all()))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.data())
def test_any_partition_covers(shape: list[int], data: st.DataObject) -> None:
    boxes = [Box.of_shape(shape)]
    for _ in range(data.draw(st.integers(0, 5))):  # cut a box in two, again and again
        box = boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
        axis = data.draw(st.integers(0, len(shape) - 1))
        at = data.draw(st.integers(0, box.size[axis]))
        left, right = list(box.size), list(box.size)
        left[axis], right[axis] = at, box.size[axis] - at
        moved = list(box.offset)
        moved[axis] += at
        boxes.append(Box(global_shape=box.global_shape, offset=box.offset, size=tuple(left)))
        boxes.append(Box(global_shape=box.global_shape, offset=tuple(moved), size=tuple(right)))
    assert covers(tuple(shape), boxes)
    full = [box for box in boxes if box.elements]
    if full and len(shape):
        assert not covers(tuple(shape), [box for box in boxes if box is not full[0]])
        assert not covers(tuple(shape), [*boxes, full[0]])


@given(shapes_and_boxes(inside=True))
def test_overlap_is_the_common_elements(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = case
    for one, two in itertools.pairwise(boxes):
        common = one.overlap(two)
        expected = int((counted(shape, [one, two]) == 2).sum())
        assert (common.elements if common else 0) == expected


# -- names and age ---------------------------------------------------------------------------------


def test_names() -> None:
    assert checkpoint_name(1200) == "step-00001200"
    assert checkpoint_name(1200, 2) == "step-00001200-t2"
    assert checkpoint_name(1200, 2, 1) == "step-00001200-t2-2"


def test_checkpoints_are_listed_newest_first_by_timeline_then_step(tmp_path: Path) -> None:
    for step, timeline in ((0, 0), (200, 0), (400, 0), (300, 1), (200, 1)):
        build(tmp_path, step=step, timeline=timeline)
    (tmp_path / ".tmp-1234-000001-step-00000900").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "step-00000500").write_text("a file")
    names = [
        "step-00000300-t1",
        "step-00000200-t1",
        "step-00000400",
        "step-00000200",
        "step-00000000",
    ]
    assert [path.name for path in checkpoint_dirs(tmp_path)] == names
    assert checkpoint_dirs(tmp_path / "nowhere") == []


def test_a_plain_name_written_on_a_later_timeline_is_newer(tmp_path: Path) -> None:
    """The suffix is only there where the plain name was taken: age is in the manifest."""
    build(tmp_path, step=100, timeline=1)
    late = build(tmp_path / "other", step=50, timeline=3)
    shutil.move(late, tmp_path / "step-00000050")
    assert [path.name for path in checkpoint_dirs(tmp_path)] == [
        "step-00000050",
        "step-00000100-t1",
    ]


def test_one_that_cannot_be_read_is_met_first(tmp_path: Path) -> None:
    build(tmp_path, step=100, timeline=1)
    (build(tmp_path, step=50) / MANIFEST).write_bytes(b"")
    assert [path.name for path in checkpoint_dirs(tmp_path)] == [
        "step-00000050",
        "step-00000100-t1",
    ]


def test_checking_needs_no_torch() -> None:
    code = "import sys, guardrail.rundir.manifest; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
