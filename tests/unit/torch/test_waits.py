"""In a quiet step the host waits for the device once; with a deferred gate it waits for nothing.

Each entry of `MORE` documents what an option adds to that.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from guardrail import Guard, GuardConfig, SampleOrder, Step
from guardrail.core.guard_options import GuardOptions
from guardrail.core.sections import SnapshotSection
from tests.support.running import tiny
from tests.support.tiny import BATCH, VOCABULARY, Tiny
from tests.support.waits import WaitCounter
from trainer.train import Trainer

STEPS = 40
FIRST_QUIET = 20  # the deferred gate has limits from then on
SNAPSHOT_EVERY = 100  # none in the counted steps
# The one read of a step. The deferred gate reads what has arrived on the host a step before.
READ = {
    "before_step": {"tolist in device_numbers.read_with": 1},
    "deferred": {"tolist in deferred_gate.read_result": 1},
}
# option of the trainer -> what it adds to a step
MORE = {
    "zclip": {},
    # The update counts of a fused AdamW are on the device, one a parameter.
    "stable": {
        "tolist in update_clipping._read_steps": 1,
        "tolist in update_clipping._measure": 1,
    },
    "qk_clip": {"tolist in qk_clip._clip": 1},
}


class Loop:
    """A loop of a user, with dropout and tied weights. Arguments are those of `Step.finish`."""

    def __init__(self, gate: str, *, lr: Any = 0.01, scaler: Any = None, **guard: Any) -> None:
        torch.manual_seed(0)
        self.model = Tiny()
        self.scaler = scaler
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, fused=True)
        detectors: Any = {"spike": {"min_history": 8}}
        self.guard = Guard.from_config(
            GuardConfig(
                guard=GuardOptions(decide=gate, detectors=detectors, **guard),
                snapshots=SnapshotSection(every=SNAPSHOT_EVERY),
            ),
            model=self.model,
            optimizer=optimizer,
            scaler=scaler,
            data=SampleOrder(samples=4000, seed=1),
            batch_size=BATCH,
            total_steps=STEPS,
        )

    def loss(self, step: Step) -> Tensor:
        generator = torch.Generator().manual_seed(step.number)
        tokens = torch.randint(0, VOCABULARY, (BATCH, 5), generator=generator)
        logits = self.model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        scaled = loss
        if self.scaler is not None:
            scaled = self.scaler.scale(loss)
        scaled.backward()
        return loss

    def count_waits(self, **finish: Any) -> list[Counter[str]]:
        """Return the waits of each quiet step."""
        counts = []
        for step in self.guard:
            loss = self.loss(step)
            with WaitCounter() as counter:
                step.finish(loss, **finish)
            if FIRST_QUIET < step.number < STEPS:
                counts.append(counter.calls)
        assert len(counts) == STEPS - FIRST_QUIET - 1
        return counts


@pytest.mark.parametrize("gate", ["before_step", "deferred"])
@pytest.mark.parametrize(
    "finish",
    [
        {},
        {"tokens": 32},
        {"tokens": torch.tensor(32)},
        {"tokens": 32.0, "nominal_tokens": 32.0},
        {"signals": {"odd": 1.5}},
        {"signals": {"odd": torch.tensor(1.5)}},
    ],
    ids=["defaults", "tokens", "tokens on the device", "sums", "signal", "signal on the device"],
)
def test_arguments_of_finish_add_no_wait(gate: str, finish: dict[str, Any]) -> None:
    loop = Loop(gate, extra_signals=("odd",), log_block_norms=True, log_update_norm=True)
    for calls in loop.count_waits(**finish):
        assert calls == READ[gate]


@pytest.mark.parametrize("gate", ["before_step", "deferred"])
def test_a_learning_rate_on_the_device_adds_no_wait(gate: str) -> None:
    for calls in Loop(gate, lr=torch.tensor(0.01)).count_waits():
        assert calls == READ[gate]


def test_a_loss_scale_adds_no_wait() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=5)
    loop = Loop("before_step", scaler=scaler)
    for calls in loop.count_waits():
        assert calls == READ["before_step"]
    assert scaler.get_scale() == 64.0 * 2 ** (STEPS // 5)


@pytest.mark.parametrize("option", ["zclip", "stable", "qk_clip"])
def test_waits_of_the_trainer(tmp_path: Any, option: str) -> None:
    values = {"zclip": 2.5, "stable": True, "qk_clip": 100.0}
    config = tiny(
        tmp_path,
        train={"steps": STEPS},
        optim={option: values[option]},
        snapshots={"every": SNAPSHOT_EVERY},
    )
    trainer = Trainer(config)
    with contextlib.closing(trainer.loader):  # its thread must not outlive the test
        for step in trainer.guard:
            with WaitCounter() as counter:
                trainer.train_step(step)
            if FIRST_QUIET < step.number < STEPS:
                assert counter.calls == Counter(READ["before_step"]) + Counter(MORE[option])


def test_the_counter_sees_each_kind_of_wait() -> None:
    from guardrail.torch.measure import gradient_norms

    numbers = torch.arange(4.0)
    calls = {
        "float(x[0])": "_local_scalar_dense",
        "x.tolist()": "tolist",
        "x.cpu()": "cpu",
        "x.numpy()": "numpy",
        "x.nonzero()": "nonzero",
        "x[x > 1]": "index by a mask",
        "torch.as_tensor(1.0, device='cpu')": "as_tensor",
        "torch.tensor([1.0], device='cpu')": "tensor",
    }
    for call, expected in calls.items():
        code = compile(f"def made(x, torch):\n    return {call}", gradient_norms.__file__, "exec")
        scope: dict[str, Any] = {}
        exec(code, scope)
        with WaitCounter() as counter:
            scope["made"](numbers, torch)
        assert counter.calls[f"{expected} in gradient_norms.made"] == 1
        with WaitCounter() as counter:
            numbers.clone()
        assert not counter.calls
