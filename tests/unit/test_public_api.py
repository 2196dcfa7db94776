"""The public names, their signatures, and the old import paths and arguments, which stay."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import guardrail
from guardrail import Guard, GuardConfig, LoopHooks, RankLayout, RunDirectory, SampleOrder, Step
from guardrail.core.errors import ConfigError, UsageError
from guardrail.core.records.status import Phase
from guardrail.decide.sample_cursor import Batch
from guardrail.torch.guard.context import RankInfo
from guardrail.torch.guard.data_share import DataShare
from trainer.config.layout import Layout, ParallelSection

PUBLIC = [
    "Action",
    "Finding",
    "Guard",
    "GuardConfig",
    "GuardrailError",
    "LoopHooks",
    "RankLayout",
    "RunDirectory",
    "SampleOrder",
    "Step",
    "Verdict",
    "load_config",
]

SIGNATURES = {
    "Guard": "(model: 'nn.Module', optimizer: 'Optimizer | Sequence[Optimizer]', *, "
    "data: 'SampleOrder', batch_size: 'int | Callable[[int], int]', "
    "config: 'GuardConfig | Mapping[str, Any] | str | os.PathLike[str] | None' = None, "
    "scheduler: 'Any' = None, scaler: 'Any' = None, run: 'RunDirectory | None' = None, "
    "total_steps: 'int' = 0, limit: 'int | None' = None, "
    "clip: 'float | Callable[[float], float]' = 1.0, hooks: 'LoopHooks | None' = None, "
    "ranks: 'RankLayout | None' = None, signals: 'StopSignals | None' = None, "
    "heartbeat: 'Heartbeat | None' = None) -> 'None'",
    "Guard.from_config": "(config: 'GuardConfig | Mapping[str, Any] | str | os.PathLike[str] | None' "
    "= None, **arguments: 'Any') -> 'Guard'",
    "Guard.end": "(self, phase: 'Phase', reason: 'str', *, onset: 'int | None' = None) -> 'None'",
    "Guard.log_eval": "(self, loss: 'float') -> 'None'",
    "Guard.peek": "(self, batch: 'Batch') -> 'Batch | None'",
    "Guard.poll_stop": "(self) -> 'bool'",
    "Guard.report_phase": "(self, phase: 'Phase') -> 'None'",
    "Guard.share_of": "(self, batch: 'Batch') -> 'tuple[int, ...]'",
    "Guard.status": "(self) -> 'Status'",
    "LoopHooks": "(*, replay: 'Replay | None' = None, label_order_gain: 'LabelOrderLosses | None' = None, "
    "rerun_forward: 'Callable[[], None] | None' = None, "
    "describe_samples: 'DescribeSamples | None' = None, sample_texts: 'Texts | None' = None, "
    "describe_tokens: 'DescribeTokens | None' = None, "
    "fixed_batch_loss: 'Callable[[], float] | None' = None, "
    "scheduled_lr: 'Callable[[int], float] | None' = None, "
    "fingerprints: 'dict[str, Any] | None' = None) -> None",
    "RankLayout": "(*, device: 'torch.device | None' = None, counts_loss: 'bool' = True, "
    "shard_ranks: 'range | None' = None) -> None",
    "SampleOrder": "(samples: 'int', *, seed: 'int' = 0, shuffled: 'bool' = True) -> 'None'",
    "Step.finish": "(self, loss: 'Tensor', *, tokens: 'Tensor | float' = 1.0, "
    "nominal_tokens: 'float | None' = None, incomplete: 'bool' = False, "
    "signals: 'Mapping[str, Tensor | float] | None' = None, wait: 'bool' = False) -> 'Verdict | None'",
    "load_config": "(path: 'str | os.PathLike[str]', *, overrides: 'Sequence[str]' = ()) "
    "-> 'GuardConfig'",
}

# Old module -> names of it that were in use; old names of classes first.
OLD = {
    "guardrail.config": "Settings GuardSection RungSection SnapshotSection CheckpointSection "
    "LaunchSection NotifySection load checked dump",
    "guardrail.ledger": "Ledger SampleOrder Batch Quarantine LedgerState",
    "guardrail.records": "Kind Curve Outcome Action Verdict Finding Mode Phase Command CommandKind",
    "guardrail.errors": "GuardrailError ConfigError UsageError DataError Halted ExitCode",
    "guardrail.manifest": "Manifest Box read_manifest verify fingerprint checkpoint_dirs",
    "guardrail.rundir": "RunDirectory find_run list_runs is_run_name",
    "guardrail.report": "Answered Report build as_dict text save",
    "guardrail.backtest": "Alarm Case Result lines summary",
    "guardrail.torch.guard": "Guard Step",
    "guardrail.torch.shards": "read_parts",
}


# -- names -----------------------------------------------------------------------------------------


def test_the_public_names_are_these() -> None:
    assert sorted(guardrail.__all__) == PUBLIC and set(PUBLIC) <= set(dir(guardrail))
    for name in PUBLIC:
        assert getattr(guardrail, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Settings'"):
        _ = guardrail.Settings  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_signatures_are_these(name: str) -> None:
    found: Any = guardrail
    for part in name.split("."):
        found = getattr(found, part)
    assert str(inspect.signature(found)) == SIGNATURES[name]


def run_code(code: str) -> None:
    """Run Python code in a fresh interpreter; it must not fail."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_import_loads_nothing_heavy() -> None:
    code = (
        "import sys, guardrail\n"
        "heavy = {'torch', 'numpy', 'msgspec', 'click', 'textual'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "from guardrail import GuardConfig\n"
        "assert 'torch' not in sys.modules\n"
        "import guardrail.rundir, guardrail.report, guardrail.backtest, guardrail.records\n"
        "assert not {'torch', 'numpy'} & sys.modules.keys()\n"
    )
    run_code(code)


@pytest.mark.parametrize("module", OLD)
def test_old_import_paths_work_without_a_warning(module: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        old = importlib.import_module(module)
        assert old.__doc__ and "Old import path" in old.__doc__
        for name in OLD[module].split():
            assert getattr(old, name) is not None
        if hasattr(old, "__getattr__"):
            for name in inspect.getclosurevars(old.__getattr__).nonlocals["places"]:
                assert getattr(old, name) is not None
    assert not hasattr(old, "no_such_name")


def test_old_names_are_the_same_objects() -> None:
    from guardrail.config import GuardSection, Settings
    from guardrail.core.guard_options import GuardOptions
    from guardrail.rundir import RunDirectory as OldRunDirectory
    from guardrail.torch.guard import Guard as OldGuard

    assert Settings is GuardConfig and GuardSection is GuardOptions
    assert OldRunDirectory is RunDirectory and OldGuard is Guard


def test_the_function_build_is_found_before_and_after_its_module_is_loaded() -> None:
    code = (
        "from guardrail.report import build as before\n"
        "import guardrail.report.build\n"
        "from guardrail.report import build as after\n"
        "from guardrail.report.build import build_report\n"
        "assert before is after is build_report\n"
    )
    run_code(code)


# -- arguments -------------------------------------------------------------------------------------


def parts() -> dict[str, Any]:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {"model": model, "optimizer": optimizer, "batch_size": 4, "total_steps": 3}


def describe(ids: Any) -> tuple[list[dict[str, Any]], int]:
    return [], 0


def test_a_configuration_is_an_object_a_dictionary_a_file_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "guard.toml"
    path.write_text('[guard]\nmode = "advise"\n[snapshots]\nkeep = 2\n')
    assert guardrail.load_config(path, overrides=["snapshots.every=20"]).snapshots.every == 20
    for config in (path, str(path), {"guard": {"mode": "advise"}}):
        for guard in (
            Guard(**parts(), data=SampleOrder(64), config=config),
            Guard.from_config(config, **parts(), data=SampleOrder(64)),
        ):
            assert guard.mode.value == "advise"
    assert Guard(**parts(), data=SampleOrder(64)).config == GuardConfig()
    assert Guard.from_config(**parts(), data=SampleOrder(64)).config == GuardConfig()


def test_old_arguments_work_without_a_warning() -> None:
    old = {"describe": describe, "identity": {"data": "aa"}, "counting": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guards = [
            Guard(GuardConfig(), **parts(), order=SampleOrder(samples=64), **old),  # type: ignore[arg-type, call-arg, misc]
            Guard({"guard": {}}, **parts(), order=SampleOrder(samples=64), **old),  # type: ignore[arg-type, call-arg, misc]
            Guard(settings=GuardConfig(), **parts(), order=SampleOrder(samples=64), **old),  # type: ignore[arg-type, call-arg, misc]
            Guard.from_config(GuardConfig(), **parts(), data=SampleOrder(samples=64), **old),
            Guard.from_config(settings=GuardConfig(), **parts(), order=SampleOrder(64), **old),
        ]
    for guard in guards:
        assert guard.quarantine.describe_samples is describe and guard.total_steps == 3


@pytest.mark.parametrize(
    ("given", "key", "named"),
    [
        ({"optimiser": 1}, "optimiser", " optimizer?"),
        (
            {"describe_sample": describe},
            "describe_sample",
            " hooks=LoopHooks(describe_samples=...)?",
        ),
        ({"counts_loss": True}, "counts_loss", " ranks=RankLayout(counts_loss=...)?"),
        ({"zzzzzz": 1}, "zzzzzz", " model, optimizer, data, batch_size, "),
        ({"order": SampleOrder(64)}, "order", " data "),
        (
            {"hooks": LoopHooks(describe_samples=describe), "describe": describe},
            "describe",
            " hooks.describe_samples ",
        ),
        ({"hooks": {"replay": describe}}, "hooks", " guardrail.LoopHooks, "),
        ({"hooks": LoopHooks(replay=3)}, "hooks.replay", ""),  # type: ignore[arg-type]
        ({"ranks": 3, "device": "cpu"}, "ranks", " guardrail.RankLayout, "),
        ({"config": 3}, "settings", "GuardConfig(...), "),
    ],
)
def test_a_wrong_argument_is_refused_with_the_right_one(given: Any, key: str, named: str) -> None:
    for make in (Guard, Guard.from_config):
        with pytest.raises(ConfigError) as caught:
            make(**parts(), data=SampleOrder(64), **given)  # type: ignore[operator]
        assert caught.value.key == key and named in str(caught.value)


def test_a_missing_argument_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        Guard(**parts())  # type: ignore[call-arg]
    assert caught.value.key == "data" and caught.value.expected.startswith("data=...")


# -- this rank's samples ---------------------------------------------------------------------------


def batch_of(count: int) -> Batch:
    ids = tuple(range(100, 100 + count))
    return Batch(first=0, last=count, positions=tuple(range(count)), samples=ids)


def shares(count: int, layouts: list[RankLayout]) -> list[tuple[int, ...]]:
    """The share of each rank, with the answers that a gather would give."""

    class Gathered(RankInfo):
        def gather(self, value: Any) -> list[Any]:
            return [layout.counts_loss for layout in layouts]

    found = []
    for rank, layout in enumerate(layouts):
        share = DataShare(Gathered(rank=rank, world=len(layouts)), layout)
        share.open()
        found.append(share.of(batch_of(count)))
    return found


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(8, [2, 2, 2, 2]), (10, [3, 3, 2, 2]), (3, [1, 1, 1, 0]), (7, [2, 2, 2, 1])],
)
def test_the_shares_are_the_batch_in_its_order(count: int, sizes: list[int]) -> None:
    found = shares(count, [RankLayout()] * 4)
    assert [len(share) for share in found] == sizes
    assert sum(found, ()) == batch_of(count).samples


@pytest.mark.parametrize(
    ("world", "section"),
    [
        (4, ParallelSection()),
        (4, ParallelSection(tp=2)),
        (4, ParallelSection(pp=2)),
        (8, ParallelSection(pp=2, tp=2)),
        (8, ParallelSection(dp_replicate=2, dp_shard=2, tp=2)),
    ],
)
def test_ranks_that_compute_the_same_read_the_same_as_in_the_trainer(
    world: int, section: ParallelSection
) -> None:
    """As trainer.data.loader deals out a batch with one micro-batch a rank."""
    layout = Layout.from_section(section, world=world, strategy="ddp")
    rows = 16 // layout.data_ranks
    found = shares(
        16,
        [
            RankLayout(counts_loss=layout.counts_loss(rank), shard_ranks=layout.shard_ranks(rank))
            for rank in range(world)
        ],
    )
    for rank, share in enumerate(found):
        first = layout.data_rank(rank) * rows
        assert share == batch_of(16).samples[first : first + rows]


def test_a_layout_that_says_no_share_is_an_error_only_where_it_is_asked() -> None:
    with pytest.raises(UsageError, match=r"RankLayout\.shard_ranks = None: 2 "):
        shares(8, [RankLayout(), RankLayout(), RankLayout(counts_loss=False)])


def test_one_rank_has_all_samples() -> None:
    guard = Guard(**parts(), data=SampleOrder(64, seed=1))
    for step in guard:
        assert isinstance(step, Step) and step.samples == step.batch.samples
        assert guard.share_of(batch_of(5)) == batch_of(5).samples
        sum((p**2).sum() for p in guard.reduction.parameters).backward()  # type: ignore[union-attr]
        step.finish(torch.tensor(2.0))
    assert guard.phase is Phase.FINISHED


def test_a_file_that_is_no_custom_loops_is_checked_completely(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[guard]\nmode = "advise"\n[launch]\ntrainer = "trainer"\n')
    with pytest.raises(ConfigError, match=r"train\.steps"):
        guardrail.load_config(path)
    path.write_text('[guard]\nmod = "advise"\n')
    with pytest.raises(ConfigError) as caught:
        Guard(**parts(), data=SampleOrder(64), config=path)
    assert (caught.value.key, caught.value.value) == ("guard.mod", "advise")
    assert "guard.mode" in caught.value.hint
