"""fp16: the loss scale moves by the one verdict and travels with snapshots and checkpoints;
overflows are no spikes.
"""

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.commands import Command
from guardrail.core.records.findings import FindingKind
from guardrail.core.records.signals import LOSS_SCALE
from guardrail.core.records.verdicts import Action, Mode
from guardrail.core.toml_file import dump_toml
from guardrail.decide.controller import Controller
from guardrail.detectors.loss_scale import AT_START
from guardrail.report.quarantine import quarantine_lines
from guardrail.rundir.checkpoint_folders import checkpoint_dirs
from guardrail.rundir.manifest import read_manifest
from guardrail.rundir.run_directory import RunDirectory
from guardrail.rundir.verification import fingerprint
from guardrail.torch.diagnose.nonfinite_module import find_nonfinite_module
from guardrail.torch.measure.gradient_norms import compute_norms
from guardrail.torch.measure.loss_scaler import LossScale
from tests.support.feed import BATCH, obs
from tests.support.ranks import run_ranks
from tests.support.running import tiny
from trainer.config.config import Config
from trainer.train import Trainer, train

OVERFLOW = list(Action).index(Action.FP16_OVERFLOW)
_train_step = Trainer.train_step


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    """A rank is a fork, and must not find the Accelerate state of an earlier test in this
    process.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


# -- the rule


@pytest.mark.parametrize("first", [65536.0, 2.0**127])
def test_the_scale_moves_as_torch_moves_it(first: float) -> None:
    ours = torch.amp.GradScaler("cpu", init_scale=first, growth_interval=3)
    theirs = torch.amp.GradScaler("cpu", init_scale=first, growth_interval=3)
    scale = LossScale(ours)
    parameter = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    dice = np.random.default_rng(0)
    for overflow in [False, False, False, True, *(dice.random(60) < 0.2).tolist()]:
        theirs.scale(parameter).backward()
        parameter.grad = torch.tensor(math.inf if overflow else 0.0)
        theirs.step(optimizer)
        theirs.update()
        assert scale.update(overflow=overflow) == scale.value
        assert ours.state_dict() == theirs.state_dict()


def test_the_norm_of_finite_halves_is_finite() -> None:
    large = torch.full((100,), 6e4, dtype=torch.float16)
    assert compute_norms([large, large.float()])[0].item() == pytest.approx(6e5)


# -- the verdict


def overflow(step: int, index: int, scale: float = 1024.0) -> Any:
    """An overflow of batch number `index`."""
    seen = obs(step, 2.0, math.inf, first=index * BATCH, nonfinite_grad=(1,), overflow=True)
    return msgspec.structs.replace(seen, signals={**seen.signals, LOSS_SCALE: scale})


def settled(controller: Controller) -> int:
    """A healthy run whose loss scale has long been found; the step that comes next."""
    for step in range(1, 101):
        seen = obs(step, 2.0 + 0.01 * (step % 7), 0.5 + 0.01 * (step % 5))
        seen = msgspec.structs.replace(seen, signals={**seen.signals, LOSS_SCALE: 1024.0})
        assert controller.observe(seen).action is Action.APPLY
    return 101


@pytest.mark.parametrize("mode", list(Mode))
def test_single_overflows_are_left_out_without_a_finding(mode: Mode) -> None:
    controller = Controller(GuardOptions(rollback_after_overflows=4), mode=mode)
    step = settled(controller)
    for _ in range(5):
        for index in range(3):
            verdict = controller.observe(overflow(step, step + index))
            assert (verdict.action, verdict.findings, verdict.incident) == (
                Action.FP16_OVERFLOW,
                (),
                None,
            )
            assert not verdict.accepted
        assert controller.observe(obs(step, 2.0, 0.5)).action is Action.APPLY
        step += 1


def test_overflows_in_a_row_are_a_collapse_that_rolls_back_then_halts() -> None:
    controller = Controller(GuardOptions(rollback_after_overflows=4, max_rollbacks=1))
    step = settled(controller)
    verdicts = [controller.observe(overflow(step, step - 1 + k)) for k in range(4)]
    assert [v.action for v in verdicts] == [Action.FP16_OVERFLOW] * 3 + [Action.ROLLBACK]
    (finding,) = verdicts[-1].findings
    assert (finding.kind, finding.ranks, finding.onset) == (FindingKind.SCALE_COLLAPSE, (1,), step)
    # window_before and the four
    assert verdicts[-1].window == ((step - 2) * BATCH, (step + 3) * BATCH)
    assert finding.score == 4 and finding.sentence() in verdicts[-1].reason
    assert verdicts[-1].incident_state == "open"
    assert controller.observe(overflow(step, step)).action is Action.FP16_OVERFLOW  # counted anew


def test_a_collapse_in_the_first_step_reaches_back_to_its_first_batch() -> None:
    """Before there is a usual scale, as many are forgiven as bring 65536 to 1: a sound run may need
    them (case 4).
    """
    controller = Controller(GuardOptions(rollback_after_overflows=3))
    verdicts = [controller.observe(overflow(1, k)) for k in range(AT_START)]
    assert [v.action for v in verdicts] == [Action.FP16_OVERFLOW] * (AT_START - 1) + [
        Action.ROLLBACK
    ]
    assert verdicts[-1].window == (0, AT_START * BATCH)


def test_a_rejected_batch_between_overflows_leaves_no_trace_in_their_count() -> None:
    controller = Controller(GuardOptions(rollback_after_overflows=3))
    step = settled(controller)
    controller.observe(overflow(step, step))
    state = json.loads(json.dumps(controller.state_dict()))
    controller.observe(obs(step, math.nan, 0.5, first=step * BATCH))
    assert controller.state_dict() == state
    controller.observe(overflow(step, step + 2))
    other = Controller(GuardOptions(rollback_after_overflows=3))
    other.load_state_dict(controller.state_dict())
    assert other.observe(overflow(step, step + 3)).action is Action.ROLLBACK


@pytest.mark.parametrize("mode", [Mode.ADVISE, Mode.ASK, Mode.OFF])
def test_no_mode_applies_an_overflow(mode: Mode) -> None:
    controller = Controller(GuardOptions(rollback_after_overflows=2), mode=mode)
    step = settled(controller)
    verdicts = [controller.observe(overflow(step, step + k)) for k in range(4)]
    assert all(v.action in (Action.FP16_OVERFLOW, Action.PAUSE) for v in verdicts)
    would = None if mode is Mode.OFF else Action.ROLLBACK
    assert [v.would for v in verdicts] == [None, would, None, would]


# -- runs


def configure(folder: Path, world: int, strategy: str, **sections: Any) -> Config:
    corpus = folder / "corpus.txt"
    if not corpus.exists():
        corpus.write_text(Path(json.__file__).read_text(encoding="utf-8") * 2, encoding="utf-8")
    training = {"steps": 30, "precision": "fp16", "loss_scale_steps": 7} | sections.pop("train", {})
    return tiny(
        folder,
        world=world,
        strategy=strategy,
        data={"sources": [str(corpus)]},
        train=training,
        checkpoint={"every": 10},
        **sections,
    )


def trained(config: Config, folder: Path, run: RunDirectory | None = None) -> RunDirectory:
    run = run or RunDirectory.create(config.run.root, config.run.name, dump_toml(config))
    run_ranks(_rank, config.world, config, run, folder=folder, init=False)
    return run


def _rank(rank: int, config: Config, run: RunDirectory) -> str:
    return train(config, run=run).value


def rows(run: RunDirectory, *names: str, verdict: int = 0) -> np.ndarray:
    view = run.metrics()
    here = view.current() & (view.column("verdict") == verdict)
    return np.stack([view.column(name)[here] for name in names], axis=1)


def events(run: RunDirectory, kind: str) -> list[dict[str, Any]]:
    return [event.data for event in run.events() if event.kind == kind]


SHAPES = [(1, "ddp"), (2, "ddp"), pytest.param(2, "fsdp", marks=pytest.mark.ci_slow)]
COMMON = ("step", "first", "loss", "grad_norm", "lr", "loss_scale")


@pytest.mark.parametrize(("world", "strategy"), SHAPES)
def test_case_4_the_scale_comes_back_and_overflows_move_no_schedule(
    world: int, strategy: str, tmp_path: Path
) -> None:
    # Gradients overflow above 4096: four overflows to begin with, and one whenever the scale has
    # grown.
    above = {"kind": "overflow", "first": 0, "last": 10**6, "value": 4096.0}
    config = configure(tmp_path, world, strategy, faults=[above])
    whole = trained(config, tmp_path)
    stopped = RunDirectory.create(config.run.root, config.run.name, dump_toml(config))
    stopped.send(Command(id="stop", kind="stop", at_step=17))
    assert [e["phase"] for e in events(trained(config, tmp_path, stopped), "ended")] == ["stopped"]
    resumed = trained(config, tmp_path, stopped)
    (check,) = events(resumed, "resume_check")
    assert {"weights", "moments", "schedule", "loss"} <= check.keys()
    assert all(check[part] == "ok" for part in ("weights", "moments", "schedule", "data", "loss"))

    ours, theirs = rows(whole, *COMMON), rows(resumed, *COMMON)
    assert np.array_equal(ours, theirs)
    assert ours[:, 0].tolist() == list(range(1, 31))
    assert (ours[:, 5] <= 4096).all() and np.isfinite(ours).all()
    assert (ours[:, 3] < 20).all(), "norms are those of the unscaled gradients"
    scales = rows(whole, "loss_scale", verdict=OVERFLOW)[:, 0]
    assert scales[:4].tolist() == [65536, 32768, 16384, 8192] and len(scales) > 6
    assert not events(whole, "skipped") and not events(whole, "verdict")
    assert sum("overflow" in e for e in events(whole, "note")) == len(scales)
    a, b = (checkpoint_dirs(run.checkpoints)[0] for run in (whole, resumed))
    assert fingerprint(a) == fingerprint(b)
    assert read_manifest(a).scalars["scalers"][0]["scale"] == ours[-1, 5]


@pytest.mark.parametrize(("world", "strategy"), SHAPES)
def test_case_12_a_collapse_rolls_back_exactly(world: int, strategy: str, tmp_path: Path) -> None:
    # The gradients of a stretch overflow at every scale, however low. The batch before it overflows
    # because the scale has just grown, so it is the first of the five in a row.
    faults = [
        {"kind": "overflow", "first": 0, "last": 10**6, "value": 4096.0},
        {"kind": "overflow", "first": 160, "last": 200, "value": 0.0, "rank": world - 1},
    ]
    guard = {"overflows": 5, "window": 32, "warmup": 12, "confirm": 4}
    config = configure(tmp_path, world, strategy, faults=faults, guard=guard)
    a = trained(config, tmp_path)
    (verdict,), (rollback,) = events(a, "verdict"), events(a, "rollback")
    assert [f["kind"] for f in verdict["findings"]] == ["scale_collapse"]
    assert verdict["findings"][0]["ranks"] == [world - 1]
    assert verdict["parameters"], "the parameters with the broken gradients are named"
    assert rollback["window"] == [144, 192] and rollback["tier"] == "memory"

    quarantine = tmp_path / "quarantine.txt"
    quarantine.write_text("\n".join(quarantine_lines(a)), encoding="utf-8")
    replace = msgspec.structs.replace
    told = replace(
        config,
        guard=replace(config.guard, mode=Mode.OFF),
        data=replace(config.data, quarantine=str(quarantine)),
    )
    b = trained(told, tmp_path)
    assert np.array_equal(rows(a, *COMMON), rows(b, *COMMON))
    assert fingerprint(checkpoint_dirs(a.checkpoints)[0]) == fingerprint(
        checkpoint_dirs(b.checkpoints)[0]
    )


def test_gradients_that_never_come_back_halt_the_run(tmp_path: Path) -> None:
    faults = [{"kind": "overflow", "first": 80, "last": 10**6, "value": 0.0}]
    guard = {"overflows": 3, "rollbacks": 1, "confirm": 4}
    run = trained(configure(tmp_path, 1, "ddp", faults=faults, guard=guard), tmp_path)
    assert [e["phase"] for e in events(run, "ended")] == ["halted"]
    assert len(events(run, "rollback")) == 1


def test_fp16_follows_fp32(tmp_path: Path) -> None:
    losses = [
        rows(trained(configure(tmp_path, 1, "ddp", train=train), tmp_path), "loss", "grad_norm")
        for train in ({"precision": "fp32"}, {"precision": "fp16", "loss_scale_steps": 2000})
    ]
    assert len(losses[0]) == len(losses[1]) == 30
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)
    assert not np.array_equal(losses[1], losses[0])


# -- case 9: which module


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(3)
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x


def test_the_innermost_module_with_the_first_nonfinite_output_is_named() -> None:
    net = Net()
    with torch.no_grad():
        net.blocks[1][0].weight[2, 1] = math.inf
    ids = torch.arange(8)
    assert find_nonfinite_module(net, lambda: net(ids)) == "blocks.1.0"
    assert find_nonfinite_module(nn.Sequential(Net()), lambda: None) == ""
    with torch.no_grad():
        net.blocks[1][0].weight[2, 1] = 0.0
    assert find_nonfinite_module(net, lambda: net(ids)) == ""
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize(("world", "strategy"), [SHAPES[0], SHAPES[2]])
def test_case_9_an_attention_that_leaves_the_range_of_fp16_is_named(
    world: int, strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(tmp_path, world, strategy)
    monkeypatch.setattr("trainer.train.Trainer.train_step", _with_a_large_weight)
    run = trained(config, tmp_path)
    first = next(e for e in run.events() if e.kind == "verdict")
    # the weight does it with any batch
    assert first.data["at_step"] == 12 and first.data["action"] == "rollback"
    assert [e["count"] for e in events(run, "rollback")] == [0]
    assert first.data["modules"] == {str(rank): "blocks.1.attention.q" for rank in range(world)}
    assert "first non-finite output: blocks.1.attention.q" in first.message
    assert [e["phase"] for e in events(run, "ended")] == ["finished"]


def _with_a_large_weight(self: Any, step: Any) -> None:
    """From step 12 on, once: the projection of the second block is 1e5 times too large, until the
    guard goes back.
    """
    if step.number == 12 and self.guard.timeline == 0 and not hasattr(self, "spoiled"):
        self.spoiled = True
        with torch.no_grad():
            self.guard.state.tensors()["model/blocks.1.attention.q.weight"].mul_(1e7)
    _train_step(self, step)
