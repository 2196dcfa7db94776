"""The same run on every mesh of ranks: one curve, one verdict, exact rollbacks, checkpoints that
fit all of them.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from torch.distributed.tensor import DTensor

from guardrail.core.config import load_trainer_config
from guardrail.core.errors import ConfigError
from guardrail.core.records.commands import Command
from guardrail.core.records.signals import UPDATE_NORM
from guardrail.core.toml_file import dump_toml
from guardrail.launch.launcher import prepare_resume
from guardrail.report.quarantine import quarantine_lines
from guardrail.rundir.checkpoint_folders import checkpoint_dirs
from guardrail.rundir.manifest import OPTIM, Box, read_manifest
from guardrail.rundir.run_directory import RunDirectory
from guardrail.rundir.verification import fingerprint, verify
from guardrail.torch.checkpoint.disk_checkpoints import CheckpointStore
from guardrail.torch.checkpoint.memory_snapshots import SnapshotRing
from guardrail.torch.checkpoint.safetensors_file import read_parts
from tests.support.places import ROOT
from tests.support.ranks import run_ranks
from tests.support.running import BLIND, assert_same, of_kind, table, tiny, told, trained
from tests.support.running import new_run as new
from tests.support.running import train as train_to_end
from tests.support.texts import numbers_in
from trainer.config.config import Config
from trainer.config.layout import Layout, ParallelSection
from trainer.config.sizes import parameter_count
from trainer.objectives.loss import IGNORED
from trainer.parallel.tensor_parallel import loss_sum
from trainer.train import Trainer


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    """A rank is a fork, and must not find the Accelerate state of an earlier test in this
    process.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


SIGNALS = ("loss", "grad_norm", "embed_grad_norm", "embed_share")

# name -> (ranks, [parallel] section); those of QUICK run every time, those of CI in .ci/run, the
# others are slow.
MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "zero2": (2, {"dp_shard": 2, "reshard_after_forward": False}),
    "hybrid": (4, {"dp_replicate": 2, "dp_shard": 2}),
    "sequence": (2, {"tp": 2, "sequence_parallel": True}),
    "pp": (2, {"pp": 2}),
    "tp": (2, {"tp": 2}),
    "zero3": (2, {"dp_shard": 2}),
    "offload": (2, {"dp_shard": 2, "cpu_offload": True}),
    "hybrid-offload": (
        4,
        {"dp_replicate": 2, "dp_shard": 2, "cpu_offload": True, "reshard_after_forward": False},
    ),
    "replicas": (2, {"dp_replicate": 2}),
    "tp-shards": (4, {"dp_shard": 2, "tp": 2}),
    "tp-replicas": (4, {"dp_replicate": 2, "tp": 2, "sequence_parallel": True}),
    "gpipe": (2, {"pp": 2, "schedule": "gpipe"}),
    "chunks": (2, {"pp": 2, "chunks": 2}),
    "gpipe-chunks": (2, {"pp": 2, "chunks": 2, "schedule": "gpipe"}),
    "pp-tp": (4, {"pp": 2, "tp": 2}),
    "pp-sequence": (4, {"pp": 2, "tp": 2, "sequence_parallel": True}),
    "pp-replicas": (4, {"pp": 2, "dp_replicate": 2, "schedule": "gpipe"}),
    "chunks-shards": (4, {"pp": 2, "chunks": 2, "dp_shard": 2}),
    "chunks-tp": (4, {"pp": 2, "chunks": 2, "tp": 2, "sequence_parallel": True}),
    "pp-shards-tp": (8, {"pp": 2, "dp_shard": 2, "tp": 2}),
    "pp-replicas-tp": (8, {"pp": 2, "dp_replicate": 2, "tp": 2, "sequence_parallel": True}),
    "tp-hybrid": (8, {"dp_replicate": 2, "dp_shard": 2, "tp": 2}),
}
ALONE = ("tp", "sequence")
QUICK = ("pp",)
# .ci/run runs these after the tests.
CI = ("zero2", "hybrid", "sequence", "pp-sequence")


def marks_of(name: str) -> tuple[pytest.MarkDecorator, ...]:
    if name in QUICK:
        return ()
    return (pytest.mark.ci_slow if name in CI else pytest.mark.slow,)


SWEEP = [pytest.param(name, marks=marks_of(name)) for name in MESHES if name != "one"]


def layers_of(*names: str) -> int:
    """Such that stages, or chunks of stages, have one block and two blocks."""
    return 5 if any("chunks" in MESHES[name][1] for name in names) else 3


def config_of(folder: Path, name: str, **sections: Any) -> Config:
    """A run on the mesh of this name. A tensor-parallel group alone has one micro-batch a step."""
    world, parallel = MESHES[name]
    train = {"micro_batch_size": 8 if name in ALONE else 2, **sections.pop("train", {})}
    model = {"tied": False, "layers": layers_of(name), **sections.pop("model", {})}
    return tiny(folder, world=world, model=model, train=train, parallel=parallel, **sections)


def exact_config(folder: Path, name: str, **sections: Any) -> Config:
    """The same where a run is compared with its like: without a pipeline to fill, one layer and two
    micro-batches.
    """
    world, parallel = MESHES[name]
    if "pp" not in parallel and name not in ALONE:
        rows = (
            8
            // Layout.from_section(
                ParallelSection(**parallel), world=world, strategy="ddp"
            ).data_ranks
        )
        sections["train"] = {"micro_batch_size": max(1, rows // 2), **sections.pop("train", {})}
    if "pp" not in parallel:
        sections["model"] = {"layers": 1, **sections.pop("model", {})}
    return config_of(folder, name, **sections)


STEPS = 50
CURVE: dict[str, Any] = {
    "model": {"dropout": 0.0},
    "train": {"steps": STEPS},
    "guard": {"layers": True, "update_norm": True},
}


Known = Callable[[int], RunDirectory]


def of_one_rank(factory: pytest.TempPathFactory, options: dict[str, Any]) -> Known:
    """Number of layers -> the run of one rank with these options, trained when it is first asked
    for.
    """

    @functools.cache
    def known(layers: int) -> RunDirectory:
        model = {**options["model"], "layers": layers}
        return trained(config_of(factory.mktemp("one"), "one", **{**options, "model": model}))

    return known


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Known:
    """The run that each mesh must reproduce."""
    return of_one_rank(tmp_path_factory, CURVE)


@pytest.mark.parametrize("name", SWEEP)
def test_a_mesh_reproduces_the_curve_of_one_rank(
    name: str, one_rank: Known, tmp_path: Path
) -> None:
    one, many = one_rank(layers_of(name)), trained(config_of(tmp_path, name, **CURVE))
    ours, theirs = table(many, SIGNALS), table(one, SIGNALS)
    assert len(ours) == len(theirs) == STEPS
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    # Rounding differs from the first step on and grows with each update.
    np.testing.assert_allclose(ours[:, 0], theirs[:, 0], rtol=1e-4)
    np.testing.assert_allclose(ours[:, 1:], theirs[:, 1:], rtol=5e-3)
    assert np.array_equal(
        table(many, ("tokens", "lr", "first")), table(one, ("tokens", "lr", "first"))
    )
    columns = one.metrics().columns
    further = [*(name for name in columns if name.startswith("grad_norm/")), UPDATE_NORM]
    assert len(further) > 4 and many.metrics().columns == columns
    layers = table(one, further[:-1])
    np.testing.assert_allclose(
        (layers**2).sum(axis=1) ** 0.5, table(one, ("grad_norm",))[:, 0], rtol=1e-6
    )
    np.testing.assert_allclose(table(many, further)[0, :-1], layers[0], rtol=1e-5)
    np.testing.assert_allclose(table(many, further)[1:], table(one, further)[1:], rtol=2e-2)


RECIPES: dict[str, dict[str, Any]] = {
    "bloom": {
        "positions": "alibi",
        "norm": "layer",
        "bias": True,
        "activation": "gelu",
        "embedding_norm": True,
    },
    "grouped": {
        "kv_heads": 2,
        "heads": 4,
        "tied": False,
        "activation": "geglu",
        "norm_place": "sandwich",
    },
    "palm": {"parallel": True, "positions": "learned", "norm": "layer"},
    "post": {"norm_place": "post", "positions": "sinusoidal", "bias": True, "norm": "layer"},
}


@pytest.mark.parametrize(
    "recipe", ["bloom", *(pytest.param(r, marks=pytest.mark.slow) for r in list(RECIPES)[1:])]
)
@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param("tp-shards", marks=pytest.mark.ci_slow),
        pytest.param("pp-sequence", marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_block_can_be_split(recipe: str, mesh: str, tmp_path: Path) -> None:
    model = {"heads": 4, "dropout": 0.0, **RECIPES[recipe]}
    options: dict[str, Any] = {
        "model": model,
        "train": {"steps": 6, "activation_checkpointing": recipe == "grouped"},
    }
    one = trained(config_of(tmp_path, "one", **options))
    split = trained(config_of(tmp_path, mesh, **options))
    np.testing.assert_allclose(table(split, SIGNALS)[0], table(one, SIGNALS)[0], rtol=1e-5)
    np.testing.assert_allclose(table(split, SIGNALS), table(one, SIGNALS), rtol=1e-3)
    assert not any("Warning" in file.read_text() for file in (split.path / "logs").iterdir())


@pytest.mark.parametrize("name", SWEEP)
def test_what_one_rank_saw_is_seen_by_all_and_named(name: str, tmp_path: Path) -> None:
    last = MESHES[name][0] - 1
    faults = [
        {"kind": kind, "step": step, "rank": last, "times": 1}
        for kind, step in (("nan_loss", 4), ("inf_grad", 7))
    ]
    run = trained(exact_config(tmp_path, name, faults=faults, train={"steps": 8}))
    verdicts = of_kind(run, "verdict")
    # It does not come again with the same batch and the same dice, so the hardware is blamed, by
    # rank, and no data.
    assert [(verdict.data["action"], verdict.data["at_step"]) for verdict in verdicts] == [
        ("retry", 4),
        ("retry", 7),
    ]
    for verdict, signal in zip(verdicts, ("loss", "grad_norm"), strict=True):
        assert {f["signal"]: f["ranks"] for f in verdict.data["findings"]}[signal] == [last]
    assert math.isfinite(table(run, ("loss",))[-1, 0])


@pytest.mark.parametrize("name", SWEEP)
def test_rolled_back_stopped_and_resumed_it_is_the_run_that_was_told_before(
    name: str, tmp_path: Path
) -> None:
    """Both at once, since each costs a second run: a rollback that skips, and a checkpoint that is
    loaded again.
    """
    fault = {"kind": "spike_loss", "first": 104, "last": 128, "value": 50.0}
    config = exact_config(tmp_path, name, faults=[fault], guard=BLIND, train={"steps": 20})
    run = new(config)
    run.send(Command(id="stop", kind="stop", at_step=17))
    assert train_to_end(run, config.world) == "stopped"
    (rollback,) = of_kind(run, "rollback")
    assert rollback.data["tier"] == "memory"
    assert train_to_end(run, config.world) == "finished"
    (check,) = of_kind(run, "resume_check")
    assert {
        name: check.data[name] for name in ("weights", "moments", "schedule", "data", "loss")
    } == dict.fromkeys(("weights", "moments", "schedule", "data", "loss"), "ok")
    assert_same(run, trained(told(config, run)))


# Offloaded parameters are updated on the host, which the lagged gate is there not to wait for.
LAGGED = [
    pytest.param(name, marks=pytest.mark.ci_slow if name == "sequence" else pytest.mark.slow)
    for name, (_, parallel) in MESHES.items()
    if name != "one" and not parallel.get("cpu_offload")
]


@pytest.mark.parametrize("name", LAGGED)
def test_the_lagged_gate_changes_nothing_on_any_mesh(name: str, tmp_path: Path) -> None:
    """Trouble of a rank alone, a bad batch, a state that no batch goes well with: tried again, left
    out, gone back.
    """
    faults = [
        {"kind": "inf_grad", "step": 7, "rank": MESHES[name][0] - 1, "times": 1},
        {"kind": "nan_loss", "first": 72, "last": 74},
        {"kind": "spike_loss", "step": 17, "times": 2, "value": 50.0},
    ]
    runs = [
        trained(
            exact_config(tmp_path, name, faults=faults, guard={"gate": gate}, train={"steps": 24})
        )
        for gate in ("sync", "lagged")
    ]
    assert_same(*runs)
    stories = [
        [(e.kind, e.step, e.message) for e in run.events() if e.kind in ACTED] for run in runs
    ]
    assert stories[0] == stories[1]
    assert {kind for kind, *_ in stories[1]} == set(ACTED)
    assert "retry" in {event.data["action"] for event in of_kind(runs[1], "verdict")}


ACTED = ("verdict", "diagnosis", "skipped", "rollback", "ended")


# -- from one mesh to another

PAIRS = [
    ("hybrid", "one"),
    ("one", "sequence"),
    ("pp", "one"),
    ("replicas", "zero3"),
    ("zero3", "one"),
    ("tp", "replicas"),
    ("one", "hybrid"),
    ("tp-shards", "zero2"),
    ("hybrid", "tp-replicas"),
    ("tp", "tp-hybrid"),
    ("zero3", "hybrid-offload"),
    ("offload", "replicas"),
    ("hybrid", "zero2"),
    ("one", "pp-shards-tp"),
    ("pp-replicas-tp", "pp-shards-tp"),
    ("pp-tp", "zero3"),
    ("tp-shards", "pp"),
    ("chunks", "one"),
    ("pp", "chunks-shards"),
]
# The first two in .ci/run, the next two every time.
RESHARD = [
    *(pytest.param(*pair, marks=pytest.mark.ci_slow) for pair in PAIRS[:2]),
    *PAIRS[2:4],
    *(pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS[4:]),
]
# A batch is left out before the stop, and its quarantine must come along; fp16, and its scale has
# moved.
BEFORE: dict[str, Any] = {
    "model": {"dropout": 0.0},
    "train": {"steps": 18, "precision": "fp16", "loss_scale": 256.0, "loss_scale_steps": 4},
    "faults": [{"kind": "nan_loss", "first": 40, "last": 48}],
}


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return of_one_rank(tmp_path_factory, BEFORE)


@pytest.mark.parametrize(("before", "after"), RESHARD)
def test_a_checkpoint_of_one_mesh_loads_on_another(
    before: str, after: str, never_stopped: Known, tmp_path: Path
) -> None:
    layers = layers_of(before, after)
    options = {**BEFORE, "model": {**BEFORE["model"], "layers": layers}}
    first, second = config_of(tmp_path, before, **options), config_of(tmp_path, after, **options)
    run = new(first)
    run.send(Command(id="stop", kind="stop", at_step=11))
    assert train_to_end(run, first.world) == "stopped"
    saved = checkpoint_dirs(run.checkpoints)[0]
    assert read_manifest(saved).scalars["scalers"][0]["scale"] != 256.0
    copies = run_ranks(_loaded, second.world, second, run, folder=tmp_path / "loaded", init=False)
    assert_equal(saved, copies[0])

    overrides = [
        f"launch.processes={second.world}",
        f"train.micro_batch_size={second.train.micro_batch_size}",
    ]
    fresh = msgspec.to_builtins(ParallelSection())
    overrides += [f"parallel.{k}={json.dumps(v)}" for k, v in (fresh | MESHES[after][1]).items()]
    assert prepare_resume(str(run.path), tuple(overrides), root="") is not None
    assert run.config_text() == dump_toml(second)
    assert train_to_end(run, second.world) == "finished"
    (check,) = of_kind(run, "resume_check")
    assert all(
        outcome == "ok" for part, outcome in check.data.items() if isinstance(outcome, str)
    ), check.data
    whole = never_stopped(layers)
    assert quarantine_lines(run) == quarantine_lines(whole) != []
    np.testing.assert_array_equal(table(run, EXACT), table(whole, EXACT))
    np.testing.assert_allclose(table(run, SIGNALS), table(whole, SIGNALS), rtol=2e-2)


EXACT = ("step", "first", "last", "lr", "tokens", "loss_scale")


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("one", "zero3"), ("hybrid", "replicas")])
def test_two_optimizers_load_on_another_mesh(before: str, after: str, tmp_path: Path) -> None:
    """Muon has the matrices of the blocks, with a momentum and no second moment, and AdamW the
    rest.
    """
    options: dict[str, Any] = {"optim": {"name": "muon"}, "train": {"steps": 6}}
    run = trained(config_of(tmp_path, before, **options))
    second = config_of(tmp_path, after, **options)
    copies = run_ranks(_loaded, second.world, second, run, folder=tmp_path / "loaded", init=False)
    assert_equal(checkpoint_dirs(run.checkpoints)[0], copies[0])


def _loaded(rank: int, config: Config, run: RunDirectory) -> Path:
    """Load the newest checkpoint of `run` and save it again: the copy."""
    copy = (
        RunDirectory.create(run.path.parent.parent / "copies", "copy", dump_toml(config))
        if rank == 0
        else None
    )
    trainer = Trainer(config)
    box: list[Any] = [copy]
    if config.world > 1:
        dist.broadcast_object_list(box, src=0)
    state = trainer.guard.state
    old = CheckpointStore(run.checkpoints, state, rank=rank, world=config.world)
    loaded = old.load(checkpoint_dirs(run.checkpoints)[0])
    old.close()
    store = CheckpointStore(box[0].checkpoints, state, rank=rank, world=config.world)
    ring = SnapshotRing(state, 2)
    manifest = loaded.manifest
    store.save(ring.take(manifest.step, manifest.cursor, manifest.timeline, {}))
    assert store.wait(30.0)
    store.close()
    if config.world > 1:
        dist.barrier()
    (folder,) = checkpoint_dirs(box[0].checkpoints)
    verify(folder)
    return folder


def assert_equal(a: Path, b: Path) -> None:
    """Two checkpoints hold the same training state, bit by bit, however it is cut into pieces."""
    ours, theirs = read_manifest(a), read_manifest(b)
    assert ours.scalars == theirs.scalars
    assert ours.tensors.keys() == theirs.tensors.keys()
    whole = {name: Box.of_shape(entry.shape) for name, entry in ours.tensors.items()}
    for name, tensor in read_parts(a, ours, whole).items():
        assert torch.equal(tensor, read_parts(b, theirs, {name: whole[name]})[name]), name
    assert any(name.startswith(OPTIM) for name in whole)
    assert fingerprint(a) == fingerprint(b)


# -- what a mesh is made of


def test_offloaded_state_lies_on_the_host_and_zero2_keeps_what_it_gathered(tmp_path: Path) -> None:
    for name in ("zero2", "zero3"):
        config = config_of(tmp_path, name)
        assert (
            run_ranks(_gathered_after_forward, 2, config, folder=tmp_path / name, init=False)
            == [name == "zero2"] * 2
        )


def _gathered_after_forward(rank: int, config: Config) -> bool:
    """Whether the parameters of the first block are still whole after the forward pass."""
    trainer = Trainer(config)
    trainer.model(torch.zeros((1, 8), dtype=torch.int64))
    weight = next(trainer.model.blocks[0].parameters())
    return not isinstance(weight, DTensor)


def test_replicas_of_shards_write_each_piece_once(tmp_path: Path) -> None:
    run = trained(config_of(tmp_path, "hybrid", train={"steps": 8}))
    newest = checkpoint_dirs(run.checkpoints)[0]
    manifest = read_manifest(newest)
    for name, entry in manifest.tensors.items():
        assert sum(math.prod(piece.size) for piece in entry.pieces) == math.prod(entry.shape), name
    sizes = [file.bytes for file in manifest.files]
    assert len(sizes) == 4 and max(sizes) < 1.5 * min(sizes), "the replicas share the work"


@pytest.mark.parametrize(
    ("section", "world", "strategy", "expected"),
    [
        ({}, 4, "ddp", (4, 1, False)),
        ({"tp": 2}, 8, "ddp", (4, 1, True)),
        ({"pp": 4, "tp": 2}, 16, "ddp", (2, 1, True)),
        ({"pp": 2, "tp": 2, "chunks": 3, "sequence_parallel": True}, 8, "ddp", (2, 1, True)),
        ({"pp": 12, "tp": 4, "dp_replicate": 8}, 384, "ddp", (8, 1, True)),
        ({"tp": 4}, 8, "fsdp", (1, 2, True)),
        ({"pp": 2, "tp": 2, "sequence_parallel": True}, 8, "ddp", (2, 1, True)),
        ({"dp_shard": 2, "tp": 2}, 8, "ddp", (2, 2, True)),
        ({}, 4, "fsdp", (1, 4, True)),
        ({}, 1, "fsdp", (1, 1, True)),
        ({"dp_shard": 2}, 8, "ddp", (4, 2, True)),
        ({"dp_replicate": 2}, 8, "fsdp", (2, 4, True)),
        ({"dp_replicate": 2, "dp_shard": 3}, 6, "ddp", (2, 3, True)),
        ({"dp_replicate": 4}, 4, "ddp", (4, 1, False)),
    ],
)
def test_layouts(
    section: dict[str, Any], world: int, strategy: str, expected: tuple[int, int, bool]
) -> None:
    layout = Layout.from_section(ParallelSection(**section), world=world, strategy=strategy)
    assert (layout.dp_replicate, layout.dp_shard, layout.sharded) == expected
    assert layout.world == world
    ranks = [layout.data_rank(rank) for rank in range(world)]
    assert ranks == sorted(list(range(layout.data_ranks)) * layout.tp) * layout.pp
    stages = [layout.stage_of(rank) for rank in range(world)]
    assert stages == sorted(list(range(layout.pp)) * (world // layout.pp))
    assert all(
        stages[other] == stages[rank]
        for rank in range(world)
        for other in layout.shard_ranks(rank) or ()
    )
    assert {rank for rank in range(world) if layout.counts_loss(rank)} <= set(
        layout.shard_ranks(world - 1) or range(world)
    )
    assert sum(layout.counts_loss(rank) for rank in range(world)) == layout.data_ranks
    assert (
        all(layout.rng_part(rank) == layout.stage_of(rank) for rank in range(world))
        or layout.sequence
    )
    if layout.sequence:
        places = itertools.product(range(world), range(layout.chunks))
        thrown = {(layout.data_rank(rank), layout.rng_part(rank, chunk)) for rank, chunk in places}
        assert len(thrown) == world * layout.chunks
    dealt = layout.blocks_of_stages(13)
    assert sorted(itertools.chain(*dealt)) == list(range(13))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= layout.chunks


@pytest.mark.parametrize(
    ("section", "key", "expected"),
    [
        ({"dp_shard": 3}, "parallel", " 4"),
        ({"dp_replicate": 2, "dp_shard": 4}, "parallel", " 4"),
        ({"dp_replicate": 2, "dp_shard": 1}, "parallel", " 4"),
        ({"tp": 3}, "parallel", " 4"),
        ({"cpu_offload": True}, "parallel.cpu_offload", "false, "),
        ({"reshard_after_forward": False}, "parallel.reshard_after_forward", "true, "),
        (
            {"sequence_parallel": True},
            "parallel.sequence_parallel",
            " parallel.tp ",
        ),
        ({"chunks": 2}, "parallel.chunks", " parallel.pp "),
    ],
)
def test_layouts_that_are_refused(
    section: dict[str, Any], key: str, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        tiny(tmp_path, world=4, parallel=section)
    assert error.value.key == key and expected in error.value.expected


@pytest.mark.parametrize(
    ("name", "sections", "key"),
    [
        ("pp", {"model": {"layers": 1}}, "parallel.pp"),
        ("pp", {"model": {"tied": True}}, "model.tied"),
        ("pp", {"model": {"positions": "t5"}}, "model.positions"),
        ("pp", {"train": {"micro_batch_size": 8}}, "train.micro_batch_size"),
        ("pp", {"train": {"ramp_from": 4, "ramp_tokens": 1000}}, "train.batch_ramp.start"),
        ("chunks", {"model": {"layers": 3}}, "parallel.chunks"),
        # 5 micro-batches on 2 stages: 2 rounds would be of 2.5.
        ("chunks", {"train": {"micro_batch_size": 2, "batch_size": 10}}, "train.micro_batch_size"),
        ("sequence", {"model": {"heads": 1}}, "model.heads"),
        ("sequence", {"model": {"heads": 4, "kv_heads": 1}}, "model.kv_heads"),
        ("sequence", {"model": {"hidden": 33}}, "model.hidden"),
        ("sequence", {"model": {"positions": "t5"}}, "model.positions"),
        ("sequence", {"model": {"qk_norm": True}}, "model.qk_norm"),
        ("sequence", {"optim": {"name": "muon"}}, "optim.name"),
        ("sequence", {"train": {"z_loss": 1e-4}}, "train.z_loss"),
        ("sequence", {"data": {"sequence_length": 33}}, "data.sequence_length"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(
    name: str, sections: dict[str, Any], key: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        config_of(tmp_path, name, **sections)
    assert error.value.key == key


def test_micro_batches_in_whole_rounds_go_with_chunks(tmp_path: Path) -> None:
    assert (
        config_of(tmp_path, "chunks", train={"micro_batch_size": 2, "batch_size": 12}).micro_batches
        == 6
    )


@pytest.mark.parametrize(("name", "dealt"), [("pp", ("0", "12")), ("chunks", ("02", "134"))])
def test_a_stage_has_its_blocks_and_no_others(
    name: str, dealt: tuple[str, str], tmp_path: Path
) -> None:
    names = run_ranks(_names, 2, config_of(tmp_path, name), folder=tmp_path, init=False)
    assert {name.split(".")[1] for name in names[0] if name.startswith("blocks")} == set(dealt[0])
    assert {name.split(".")[1] for name in names[1] if name.startswith("blocks")} == set(dealt[1])
    assert "embedding.weight" in names[0] and not {"norm.weight", "head.weight"} & set(names[0])
    assert "embedding.weight" not in names[1] and {"norm.weight", "head.weight"} <= set(names[1])


def _names(rank: int, config: Config) -> list[str]:
    return [name for name, _ in Trainer(config).model.named_parameters()]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_loss_of_split_logits_is_the_loss_of_whole_ones(world: int, tmp_path: Path) -> None:
    # 3 ranks have 3, 3 and 1 of 7 ids.
    logits = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0)) * 30
    labels = torch.randint(0, 7, (4, 5), generator=torch.Generator().manual_seed(1))
    labels[1, 2:] = IGNORED
    logits[1, 3] = math.nan  # of an ignored token: teaches nothing, not even NaN
    whole = logits.clone().requires_grad_()
    kept = labels != IGNORED
    expected = torch.nn.functional.cross_entropy(whole[kept], labels[kept], reduction="sum")
    (3.0 * expected).backward()
    parts = run_ranks(_split_loss, world, logits, labels, folder=tmp_path)
    for total, count, _ in parts:
        torch.testing.assert_close(total, expected.detach(), rtol=1e-6, atol=0)
        assert count == 17
    # A gradient is 3 (p - y): where p is near to y, what is left has the rounding of numbers up to
    # 3.
    torch.testing.assert_close(
        torch.cat([gradient for *_, gradient in parts], -1), whole.grad, rtol=1e-5, atol=1e-6
    )


def _split_loss(
    rank: int, logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, int, torch.Tensor]:
    size = -(-7 // dist.get_world_size())
    part = logits[..., rank * size : (rank + 1) * size].clone().requires_grad_()
    total, count = loss_sum(part, labels, first=rank * size, group=dist.group.WORLD)
    (3.0 * total).backward()
    assert part.grad is not None
    return total.detach(), int(count), part.grad


def test_a_batch_is_shared_by_the_data_ranks(tmp_path: Path) -> None:
    config = config_of(tmp_path, "hybrid", train={"batch_size": 24})
    assert (config.micro_batch_size, config.micro_batches) == (2, 3)
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, "hybrid", train={"batch_size": 22})
    assert (caught.value.key, caught.value.value) == ("train.batch_size", 22)
    assert numbers_in(caught.value.expected)[0] == 4, "the ranks that share it"
    assert msgspec.to_builtins(config)["parallel"]["dp_shard"] == 2


def test_the_published_layout_of_bloom_adds_up() -> None:
    config = load_trainer_config(ROOT / "configs" / "bloom-3d.toml")
    assert isinstance(config, Config)
    assert config.world == 384 and (
        config.layout.dp_replicate,
        config.layout.tp,
        config.layout.pp,
    ) == (8, 4, 12)
    assert config.micro_batches == 128
    assert config.train.batch_size * config.data.sequence_length == 4 * 1024 * 1024
    # 176 G parameters in the paper, with a vocabulary of 250,880; a second matrix of that size
    # comes on top.
    count = parameter_count(config.model, 250_880)
    assert count - 250_880 * config.model.width == pytest.approx(176.25e9, rel=1e-3)
