"""`guard.decide = "deferred"`: the host reads each step's numbers a step later, and nothing comes out
different.
"""

import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from guardrail.core.config import GuardConfig
from guardrail.core.errors import ConfigError, UsageError
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.commands import Command
from guardrail.core.records.status import Phase
from guardrail.core.sections import SnapshotSection
from guardrail.decide.sample_order import SampleOrder
from guardrail.rundir.run_directory import RunDirectory
from guardrail.torch.guard.guard import Guard
from guardrail.torch.guard.verdict_executor import APPLIED_UNJUDGED
from guardrail.torch.measure.reduction import StepReduction
from guardrail.torch.measure.update_gate import Gate, can_skip_on_device
from tests.support.ranks import run_ranks, wait_ranks
from tests.support.running import (
    SHAPES,
    assert_same,
    assert_whole,
    final,
    new_run,
    start_run,
    tiny,
    told,
    train,
    trained,
)
from tests.support.tiny import BATCH, VOCABULARY, Setup, Tiny
from trainer.config.config import Config
from trainer.train import Trainer

JUDGED = ("finding", "verdict", "diagnosis", "incident", "skipped", "rollback", "eval", "ended")


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def story(run: RunDirectory) -> list[tuple[str, int, int, str]]:
    """What was found and done, and when."""
    return [(e.kind, e.step, e.timeline, e.message) for e in run.events() if e.kind in JUDGED]


def both(folder: Path, **sections: Any) -> tuple[RunDirectory, RunDirectory]:
    """The same run with the gate that waits and with the one that does not."""
    guard = sections.pop("guard", {})
    runs = [
        trained(tiny(folder, guard={**guard, "gate": gate}, **sections))
        for gate in ("sync", "lagged")
    ]
    return runs[0], runs[1]


def assert_alike(waiting: RunDirectory, lagged: RunDirectory) -> None:
    assert_same(waiting, lagged)
    assert story(waiting) == story(lagged)
    assert_whole(lagged)


# What each kind of trouble looks like: a batch, a stretch that calls for a rollback, the hardware
# once, the state.
FAULTS: dict[str, list[dict[str, Any]]] = {
    "nan_loss": [{"kind": "nan_loss", "first": 200, "last": 201}],
    "spike_loss": [{"kind": "spike_loss", "first": 200, "last": 224, "value": 50.0}],
    "spike_loss of one micro-batch": [
        {"kind": "spike_loss", "first": 200, "last": 201, "value": 50.0, "micro": 0}
    ],
    "spike_grad": [{"kind": "spike_grad", "step": 26, "steps": 2, "value": 500.0, "times": 2}],
    "inf_grad": [{"kind": "inf_grad", "step": 27, "times": 1, "rank": 0}],
    "nan_grad": [{"kind": "nan_grad", "first": 208, "last": 212, "rank": 0}],
    "inf_grad_reduced": [{"kind": "inf_grad_reduced", "step": 28, "times": 1, "rank": 0}],
    "garbage_grad": [{"kind": "garbage_grad", "step": 27, "times": 1, "value": 300.0}],
    "ignore_labels": [{"kind": "ignore_labels", "first": 208, "last": 216}],
    "noise_tokens": [{"kind": "noise_tokens", "first": 200, "last": 232}],
    "repeat_tokens": [{"kind": "repeat_tokens", "first": 200, "last": 232}],
    "shuffle_labels": [{"kind": "shuffle_labels", "first": 200, "last": 232}],
    "scale_weights": [{"kind": "scale_weights", "step": 27, "times": 1, "value": 1000.0}],
    "scale_row": [{"kind": "scale_row", "step": 27, "times": 1, "value": 1000.0, "entry": 101}],
    "flip_weight": [{"kind": "flip_weight", "step": 27, "times": 1, "value": 30.0, "entry": 5}],
    "flip_moment": [{"kind": "flip_moment", "step": 27, "times": 1, "value": 30.0, "entry": 5}],
    "zero_moments": [{"kind": "zero_moments", "step": 27, "times": 1}],
    "scale_lr": [{"kind": "scale_lr", "step": 27, "steps": 3, "value": 100.0, "times": 3}],
}


@pytest.mark.parametrize(
    ("world", "strategy"), [(1, "ddp"), pytest.param(2, "ddp", marks=pytest.mark.ci_slow)]
)
def test_a_batch_a_stretch_the_hardware_and_the_state(
    tmp_path: Path, world: int, strategy: str
) -> None:
    faults = [
        *FAULTS["nan_loss"],
        {"kind": "inf_grad", "step": 17, "times": 1, "rank": world - 1},
        {"kind": "spike_loss", "step": 33, "times": 2, "value": 50.0},  # any batch, from this state
        {"kind": "spike_loss", "first": 352, "last": 376, "value": 50.0},
    ]
    sections = {
        "data": {"eval_fraction": 0.1},
        "train": {"steps": 50, "eval_every": 9, "eval_batches": 1},
    }
    waiting, lagged = both(tmp_path, world=world, strategy=strategy, faults=faults, **sections)
    assert_alike(waiting, lagged)
    kinds = [event.kind for event in lagged.events()]
    assert {"verdict", "diagnosis", "rollback", "skipped", "eval"} <= set(kinds)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize(("world", "strategy"), SHAPES)
def test_every_fault(tmp_path: Path, kind: str, world: int, strategy: str) -> None:
    waiting, lagged = both(
        tmp_path, world=world, strategy=strategy, faults=FAULTS[kind], train={"steps": 45}
    )
    if kind == "garbage_grad":  # other noise each time: only what came of it can be the same
        assert_same(waiting, lagged)
        assert [event[:3] for event in story(waiting)] == [event[:3] for event in story(lagged)]
    else:
        assert_alike(waiting, lagged)


def counted(config: Config) -> tuple[Trainer, int, int]:
    """A trainer that has run to its end in memory; steps that the host has waited for, and
    others.
    """
    trainer = Trainer(config)
    assert trainer.train() is Phase.FINISHED
    lagged = trainer.guard.deferred_gate
    assert lagged is not None
    return trainer, lagged.waited_steps, lagged.deferred_steps


def test_the_host_waits_for_the_steps_that_a_copy_follows_and_for_no_other(tmp_path: Path) -> None:
    trainer, waited, flown = counted(
        tiny(tmp_path, guard={"decide": "deferred"}, train={"steps": 40})
    )
    assert waited == 1 + 40 // 5 and flown == 40 - waited, "the first step, and one in five"
    assert trainer.guard.step == 40


def test_an_update_that_the_ceilings_let_through_by_mistake_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second lock: were the ceilings wrong, the controller would still have the last word."""
    spike = [{"kind": "spike_loss", "first": 208, "last": 209, "value": 50.0}]
    config = tiny(tmp_path, guard={"decide": "deferred"}, faults=spike, train={"steps": 40})
    monkeypatch.setattr(
        "guardrail.decide.controller.Controller.safe_limits",
        lambda self, like: dict.fromkeys(like.signals, math.inf),
    )
    run = trained(config)
    (back,) = [event for event in run.events() if event.kind == "rollback"]
    assert back.data["span"]["reason"].startswith(f"{APPLIED_UNJUDGED}: loss")
    assert back.data["window"] == [208, 216]
    assert_same(run, trained(told(config, run)))


@pytest.mark.fault("A11")
def test_what_it_takes_back_is_no_more_than_the_guard_may_leave_out_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spike = [{"kind": "spike_loss", "first": 208, "last": 209, "value": 50.0}]
    guard = {"gate": "lagged", "max_skipped_share": 0.001}
    config = tiny(tmp_path, guard=guard, faults=spike, train={"steps": 40})
    monkeypatch.setattr(
        "guardrail.decide.controller.Controller.safe_limits",
        lambda self, like: dict.fromkeys(like.signals, math.inf),
    )
    run = new_run(config)
    codes = wait_ranks(start_run(run, 1))
    assert codes == [0] and not [event for event in run.events() if event.kind == "rollback"]
    (ended,) = [event for event in run.events() if event.kind == "ended"]
    assert ended.data["phase"] == "halted" and APPLIED_UNJUDGED in ended.message
    assert "guard.max_skipped_share = 0.001" in ended.message


def test_commands_take_effect_at_the_step_they_came_with(tmp_path: Path) -> None:
    runs = []
    for gate in ("sync", "lagged"):
        run = new_run(tiny(tmp_path, guard={"gate": gate}, train={"steps": 24}))
        for name, kind, value, at_step in (
            ("slower", "lr", 0.5, 6),
            ("skip", "skip", 2, 11),
            ("back", "rollback", 10, 13),
            ("shrink", "shrink-embedding", 0.5, 17),
        ):
            run.send(Command(id=name, kind=kind, value=value, at_step=at_step, who="tester"))
        assert train(run, 1) == "finished"
        runs.append(run)
    assert_alike(*runs)
    answered = [[(e.step, e.message) for e in run.events() if e.kind == "command"] for run in runs]
    assert answered[0] == answered[1] and len(answered[0]) == 4


@pytest.mark.slow
@pytest.mark.parametrize(("world", "strategy"), SHAPES)
def test_killed_and_resumed(tmp_path: Path, world: int, strategy: str) -> None:
    faults = [{"kind": "spike_loss", "first": 200, "last": 224, "value": 50.0}]
    config = tiny(
        tmp_path, world=world, strategy=strategy, guard={"decide": "deferred"}, faults=faults
    )
    whole, run = trained(config), new_run(config)
    pids = start_run(run, world)
    while len(run.metrics(["step"]) if run.metrics_path.exists() else ()) < 34:
        assert os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, (
            "it has ended already"
        )
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_ranks(pids)
    assert train(run, world) == "finished"
    assert_same(run, whole)
    assert final(run) == final(whole)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("optim", "name", "muon"),
        ("optim", "implementation", "foreach"),
        ("optim", "zclip", 2.5),
        ("optim", "qk_clip", 100.0),
        ("optim", "stable", True),
        ("train", "precision", "fp16"),
    ],
)
def test_what_needs_the_numbers_at_once_is_refused(
    tmp_path: Path, section: str, key: str, value: Any
) -> None:
    with pytest.raises(ConfigError, match=r"guard\.decide") as caught:
        tiny(tmp_path, guard={"decide": "deferred"}, **{section: {key: value}})
    assert caught.value.key == f"{section}.{key}"


# -- a loop of one's own: running buffers, dice that nobody seeds


class Loop:
    """Batch norm, dropout from the global dice, a signal of its own, losses that spoil at some
    positions.
    """

    def __init__(
        self, gate: str, *, bad: dict[int, float] | None = None, optimizer: str = "adamw-fused"
    ) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1)
        )
        made = torch.optim.AdamW(self.model.parameters(), lr=0.05, fused=optimizer == "adamw-fused")
        more: Any = {"gate": gate, "layers": True, "update_norm": True, "signals": ("odd",)}
        # In 60 steps two bad batches are already 3 % of the data.
        guard = GuardOptions(
            window=32, warmup=12, steps_until_good=4, max_skipped_share=1.0, **more
        )
        self.guard = Guard.from_config(
            GuardConfig(guard=guard, snapshots=SnapshotSection(every=5, keep=4)),
            model=self.model,
            optimizer=made,
            scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(made, T_max=80),
            data=SampleOrder(samples=4000, seed=1),
            batch_size=BATCH,
            total_steps=60,
        )
        self.bad, self.tries = bad or {}, 0

    def run(self) -> dict[str, torch.Tensor]:
        torch.manual_seed(4)
        for step in self.guard:
            self.tries += 1
            rows = torch.tensor(step.batch.samples, dtype=torch.float32)[
                :, None
            ].sin() * torch.arange(1.0, 5.0)
            loss = ((self.model(rows) - rows.sum(1, keepdim=True)) ** 2).mean() + 0.5
            for position, factor in self.bad.items():
                if position in step.batch.positions:
                    loss = loss * factor
            loss.backward()
            # A number below 0, and none at each fourth step: neither is anybody's business.
            step.finish(loss, signals={"odd": -loss.detach()} if step.number % 4 else {})
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


@pytest.mark.parametrize(
    "bad", [{}, {170: math.nan}, {170: 1e4}, {170: 1e4, 178: 1e4, 186: 1e4, 194: math.nan}]
)
def test_buffers_and_dice_of_dropped_tries_leave_no_trace(bad: dict[int, float]) -> None:
    waiting, lagged = Loop("sync", bad=bad), Loop("lagged", bad=bad)
    theirs, ours = waiting.run(), lagged.run()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert list(waiting.guard.cursor.quarantine.lines()) == list(
        lagged.guard.cursor.quarantine.lines()
    )
    assert lagged.tries > waiting.tries, (
        "so small a model has notes too, and each costs two more tries"
    )
    assert lagged.guard.deferred_gate is not None and lagged.guard.deferred_gate.deferred_steps > 30


def test_a_loop_whose_optimizer_cannot_leave_out_is_refused() -> None:
    with pytest.raises(UsageError, match="found_inf"):
        Loop("lagged", optimizer="loop")


# -- the same arithmetic


@pytest.mark.parametrize("kind", ["plain", "fsdp"])
def test_an_update_is_left_out_or_applied_by_a_number_on_the_device(
    tmp_path: Path, kind: str
) -> None:
    for outcome in run_ranks(
        _gated, 1 if kind == "plain" else 2, kind, folder=tmp_path, init=kind != "plain"
    ):
        assert outcome == (True, True)


def _gated(rank: int, kind: str) -> tuple[bool, bool]:
    """(Whether parameters and moments are untouched where left out, and the same bits as without
    the flag).
    """
    setups = [Setup(kind, "adamw-fused") for _ in range(2)]
    for setup in setups:
        setup.steps(1, 4)
    before = {name: tensor.clone() for name, tensor in state_of(setups[0]).items()}
    for setup, unless in zip(setups, (torch.tensor(1.0), None), strict=True):
        torch.manual_seed(0)
        setup.model(torch.ones(2, 3, dtype=torch.long)).sum().backward()
        parameters = list(setup.model.parameters())
        gate = Gate(setup.optimizers, parameters=parameters, embedding=[], clip=1.0)
        assert can_skip_on_device(setup.optimizers[0])
        if unless is not None:
            gate.apply(torch.tensor(math.nan), unless=unless)
            now = state_of(setup)
            untouched = all(
                torch.equal(before[name], now[name]) for name in before if "seen" not in name
            )
            torch.manual_seed(0)
            setup.model(torch.ones(2, 3, dtype=torch.long)).sum().backward()
            gate.apply(torch.tensor(0.37, dtype=torch.float64), unless=torch.tensor(0.0))
        else:
            gate.apply(0.37)
    ours, theirs = (state_of(setup) for setup in setups)
    return untouched, all(
        torch.equal(ours[name], theirs[name]) for name in theirs if "seen" not in name
    )


def state_of(setup: Setup) -> dict[str, torch.Tensor]:
    from guardrail.torch.state.training_state import TrainingState

    return TrainingState(setup.model, setup.optimizers, setup.schedulers).tensors()


def test_the_device_computes_what_the_host_computes() -> None:
    torch.manual_seed(0)
    model = Tiny()
    probes = StepReduction(model, rank=0, world=1, layers=True, named=("a", "b"), updates=True)
    gate = Gate([], parameters=probes.parameters, embedding=probes.embedding, clip=0.01)
    for seed in range(50):
        torch.manual_seed(seed)
        model(torch.randint(0, VOCABULARY, (2, 4))).sum().backward()
        named = {"a": torch.rand(())} if seed % 2 else {"a": -1.5, "b": torch.rand(())}
        vector = probes.start(
            10 * torch.rand(()),
            3 + seed,
            step_time=0.1,
            named=named,
            update_square=torch.rand(()) if seed else None,
        )
        reduced = probes.unpack(vector.tolist(), 17.0, None)
        values, known, sound, scale = probes.unpack_on_device(vector, 17.0)
        told_ = {
            n: v
            for n, v, k in zip(probes.signal_names, values.tolist(), known.tolist(), strict=True)
            if k
        }
        assert told_ == reduced.signals()
        assert sound.item() is True and scale.item() == reduced.scale
        for clip in (1.0, 0.3, 1e9):
            assert gate.factor_on_device(values[1], scale, clip=clip).item() == gate.factor(
                reduced, clip=clip
            )


@pytest.mark.parametrize(
    "numbers",
    [
        {"loss": math.nan},
        {"loss": math.inf},
        {"tokens": 0},
        {"incomplete": True},
        {"gradient": math.nan},
    ],
)
def test_what_is_not_sound_is_told_on_the_device(numbers: dict[str, Any]) -> None:
    model = Tiny()
    probes = StepReduction(model, rank=0, world=1)
    model(torch.zeros(1, 2, dtype=torch.long)).sum().backward()
    if gradient := numbers.get("gradient"):
        next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = gradient  # type: ignore[union-attr]
    loss, tokens = torch.tensor(numbers.get("loss", 2.0)), numbers.get("tokens", 1)
    vector = probes.start(loss, tokens, step_time=0.0, incomplete=numbers.get("incomplete", False))
    assert not probes.unpack_on_device(vector, None)[2]
