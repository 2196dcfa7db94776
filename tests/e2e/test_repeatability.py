"""A pass that does not give the same bits twice is measured, and is not called broken hardware."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from guardrail.core.events.decisions import Diagnosed
from guardrail.core.events.run_state import Note
from guardrail.core.records.verdicts import Cause
from guardrail.decide.hardware_fault import NONDETERMINISTIC
from guardrail.rundir.run_directory import RunDirectory
from guardrail.torch.diagnose import batch_replay
from guardrail.torch.guard import step_diagnosis
from guardrail.torch.measure.reduction import StepReduction
from tests.support.running import new_run, tiny
from trainer.train import Trainer

SPIKE = {"kind": "spike_loss", "first": 160, "last": 168, "value": 30.0}


@pytest.fixture
def unsteady_reduction(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Change one element of the reduced gradient a little at each second reduction.

    So does an all-reduce that adds in another order.
    """
    start, calls = StepReduction.start, [0]

    def unsteady(self: StepReduction, *given: Any, **named: Any) -> Any:
        calls[0] += 1
        gradient = self.parameters[0].grad
        if calls[0] % 2 and gradient is not None:
            flat = gradient.flatten()
            flat[int(flat.abs().argmax())] *= 1.0001
            gradient.copy_(flat.view_as(gradient))
        return start(self, *given, **named)

    monkeypatch.setattr(StepReduction, "start", unsteady)
    yield


def train(folder: Path) -> RunDirectory:
    config = tiny(folder, train={"steps": 40, "deterministic": True}, faults=[SPIKE])
    run = new_run(config)
    Trainer(config, run=run).train()
    return run


def causes(run: RunDirectory) -> list[str]:
    return [event.cause for event in run.events() if isinstance(event, Diagnosed)]


def measured(run: RunDirectory) -> list[dict[str, Any]]:
    notes = [event for event in run.events() if isinstance(event, Note)]
    return [note.data["repeatable"] for note in notes if "repeatable" in note.data]


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (batch_replay, step_diagnosis):
        monkeypatch.setattr(module, "needs_measurement", lambda device: True)


def test_another_order_of_addition_is_not_broken_hardware(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unsteady_reduction: None
) -> None:
    as_on_a_gpu(monkeypatch)
    run = train(tmp_path)
    assert measured(run) == [{"kernels": True, "reduction": False}]
    assert causes(run) == [Cause.DATA.value]


def test_without_the_measurement_it_would_be(tmp_path: Path, unsteady_reduction: None) -> None:
    # The other test is about a difference that counts.
    run = train(tmp_path)
    assert measured(run) == []
    assert set(causes(run)) == {Cause.HARDWARE.value}


def test_the_measurement_changes_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train(tmp_path / "plain")
    as_on_a_gpu(monkeypatch)
    run = train(tmp_path / "measured")
    assert measured(run) == [{"kernels": True, "reduction": True}]
    assert causes(run) == causes(plain) == [Cause.DATA.value]
    columns = ("step", "loss", "grad_norm", "embed_grad_norm")
    for name in columns:
        assert run.metrics().column(name).tolist() == plain.metrics().column(name).tolist()


def test_a_flag_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert batch_replay.assumed_tolerance(torch.device("cuda")) == NONDETERMINISTIC
    assert batch_replay.assumed_tolerance(torch.device("cpu")) == 0.0


def test_a_checksum_depends_on_every_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        weight = torch.nn.Parameter(torch.zeros(3, 5, dtype=dtype))
        weight.grad = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
        before = batch_replay.checksum_gradients([weight])
        assert before == batch_replay.checksum_gradients([weight]) != 0
        for place in range(weight.numel()):
            changed = weight.grad.clone()
            value = changed.view(-1)[place]
            changed.view(-1)[place] = torch.nextafter(value, torch.full_like(value, torch.inf))
            other = torch.nn.Parameter(torch.zeros_like(weight))
            other.grad = changed
            assert batch_replay.checksum_gradients([other]) != before
        swapped = torch.nn.Parameter(torch.zeros_like(weight))
        swapped.grad = weight.grad.flip(0)
        assert batch_replay.checksum_gradients([swapped]) != before
    assert batch_replay.checksum_gradients([torch.nn.Parameter(torch.zeros(2))]) == 0
