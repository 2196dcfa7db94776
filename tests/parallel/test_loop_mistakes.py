"""What a custom training loop may do wrong, and what it is told at the first step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from guardrail.core.config import GuardConfig
from guardrail.core.errors import DataError, UsageError
from guardrail.core.events.event import Event
from guardrail.core.events.run_state import ResumeChecked
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.status import Phase
from guardrail.core.sections import CheckpointSection, SnapshotSection
from guardrail.decide.sample_order import SampleOrder
from guardrail.rundir.run_directory import RunDirectory
from guardrail.torch.guard.guard import Guard, Step
from guardrail.torch.guard.written_settings import NEXT_RATE
from guardrail.torch.measure.reduction import StepReduction
from guardrail.torch.measure.update_gate import Gate
from tests.support.ranks import run_ranks
from tests.support.texts import numbers_in

BATCH, SAMPLES = 4, 80


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 1)

    def forward(self, rows: Tensor) -> Tensor:
        output: Tensor = self.second(self.first(rows).tanh())
        return output


class Loop:
    """A loop that is right as it stands; tests change one thing."""

    def __init__(
        self,
        run: RunDirectory | None = None,
        *,
        steps: int = 8,
        order: SampleOrder | None = None,
        schedule: Any = None,
        dtype: torch.dtype = torch.float32,
        **hyperparameters: Any,
    ) -> None:
        torch.manual_seed(1)
        self.model = Model().to(dtype)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), **{"lr": 0.01, **hyperparameters}
        )
        self.scheduler = schedule(self.optimizer) if schedule is not None else None
        self.rates: dict[int, float] = {}
        self.guard = Guard.from_config(
            GuardConfig(
                guard=GuardOptions(warmup=10, window=32, steps_until_good=2),
                snapshots=SnapshotSection(every=2, keep=3),
                checkpoint=CheckpointSection(every=5),
            ),
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            data=order or SampleOrder(samples=SAMPLES, seed=3),
            batch_size=BATCH,
            total_steps=steps,
            run=run,
        )

    def loss(self, step: Step, model: nn.Module | None = None) -> Tensor:
        rows = torch.tensor(step.batch.samples, dtype=torch.float32)[:, None].sin() * torch.arange(
            1.0, 5.0
        )
        output: Tensor = (model or self.model)(rows.to(self.model.first.weight.dtype)).float()
        return ((output - rows.sum(1, keepdim=True)) ** 2).mean()

    def train(self, upto: int = 0) -> Loop:
        """All steps, or as a process that dies after step `upto`."""
        for step in self.guard:
            loss = self.loss(step)
            loss.backward()
            self.rates[step.number] = float(self.optimizer.param_groups[0]["lr"])
            step.finish(loss)
            if step.number == upto:
                self.guard.snapshots.store.wait(60)  # type: ignore[union-attr]
                break
        return self


def note_events(run: RunDirectory) -> list[Event]:
    return [event for event in run.events() if event.kind == "note"]


def notes(run: RunDirectory) -> list[str]:
    return [event.message for event in note_events(run)]


# -- the optimizer is stepped by the guard alone


@pytest.mark.fault("E14")
@pytest.mark.parametrize("how", ["its optimizer", "another optimizer", "scheduler"])
def test_a_loop_that_steps_by_itself_is_refused(how: str) -> None:
    loop = Loop(schedule=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer))
    other = torch.optim.SGD(loop.model.parameters(), lr=0.1)
    weight = loop.model.first.weight.detach().clone()
    with pytest.raises(UsageError, match=r"called \w+\.step\(\)") as caught:
        for step in loop.guard:
            loss = loop.loss(step)
            loss.backward()
            match how:
                case "its optimizer":
                    loop.optimizer.step()
                case "another optimizer":
                    other.step()
            step.finish(loss)
            if how == "scheduler":
                loop.scheduler.step()
    if how != "scheduler":
        assert torch.equal(loop.model.first.weight, weight), (
            "refused before a parameter has changed"
        )
    assert "Remove" in str(caught.value)


def test_optimizers_of_other_parameters_and_of_other_times_are_free() -> None:
    loop, elsewhere = Loop(), nn.Linear(2, 2)
    other = torch.optim.SGD(elsewhere.parameters(), lr=0.1)
    loop.optimizer.step()
    for step in loop.guard:
        elsewhere(torch.ones(1, 2)).sum().backward()
        other.step()
        loss = loop.loss(step)
        loss.backward()
        step.finish(loss)
    assert loop.guard.phase is Phase.FINISHED
    loop.optimizer.step()


# -- what is watched is what is trained


@pytest.mark.fault("E2")
@pytest.mark.parametrize("what", ["a copy", "zero_grad"])
def test_a_loop_without_any_gradient_is_refused_at_its_first_step(what: str) -> None:
    loop = Loop()
    twin = copy.deepcopy(loop.model)
    with pytest.raises(UsageError) as caught:
        for step in loop.guard:
            loss = loop.loss(step, twin if what == "a copy" else None)
            loss.backward()
            if what == "zero_grad":
                loop.optimizer.zero_grad()
            step.finish(loss)
    assert caught.value.kind == "no_gradients" and numbers_in(str(caught.value)) == [1]
    assert loop.guard.step == 0


@pytest.mark.fault("E2")
def test_a_model_that_is_all_frozen_is_refused() -> None:
    frozen = Model().requires_grad_(False)
    with pytest.raises(UsageError, match="requires_grad"):
        StepReduction(frozen, rank=0, world=1)


@pytest.mark.fault("E2")
def test_gradients_that_are_all_zero_and_a_tensor_that_has_none_any_more_are_noted(
    tmp_path: Path,
) -> None:
    run = RunDirectory.create(tmp_path, "own", "")
    loop = Loop(run)
    for step in loop.guard:
        loss = loop.loss(step)
        loss.backward()
        if step.number == 1:
            loop.optimizer.zero_grad(set_to_none=False)
        if step.number in (3, 4):
            loop.model.first.weight.grad = None
        step.finish(loss)
    zero, lacking = note_events(run)
    assert numbers_in(zero.message) == [1] and "zero_grad" in zero.message
    assert lacking.data["parameters"] == ["first.weight"]
    assert numbers_in(lacking.message) == [1, 3], "one of them, in step 3"


@pytest.mark.fault("E2")
def test_gradients_on_one_rank_are_enough_and_none_on_all_is_refused_by_all(tmp_path: Path) -> None:
    outcomes = run_ranks(_some_gradients, 2, folder=tmp_path)
    assert all(one == ("finished", "refused") for one in outcomes)


def _some_gradients(rank: int) -> tuple[str, str]:
    found = []
    for graded in (1, 0):  # ranks that compute a gradient at all
        loop = Loop(steps=2)
        try:
            for step in loop.guard:
                loss = loop.loss(step)
                loss.backward()
                if rank >= graded:
                    loop.optimizer.zero_grad()
                step.finish(loss)
            found.append("finished")
        except UsageError:
            found.append("refused")
    return found[0], found[1]


# -- a resume with other settings


def cosine(steps: int) -> Any:
    return lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)


def decay(factor: float) -> Any:
    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor**step)


@pytest.mark.fault("E3")
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"schedule": cosine(100)}, {"schedule": cosine(12)}),
        ({"schedule": decay(0.9)}, {"schedule": decay(0.5)}),
        ({"schedule": cosine(100)}, {"schedule": cosine(100), "lr": 0.002}),
        ({}, {"lr": 0.002}),
    ],
)
def test_a_resume_goes_on_with_the_schedule_that_is_written_now(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    run = RunDirectory.create(tmp_path, "own", "")
    Loop(run, steps=12, **before).train(upto=6)
    resumed = Loop(run, steps=12, **after).train()
    fresh = Loop(steps=12, **after).train()
    assert min(resumed.rates) == 6
    assert resumed.rates == {step: fresh.rates[step] for step in resumed.rates}
    (note,) = note_events(run)
    assert NEXT_RATE in {entry["key"] for entry in note.data["settings"]}
    assert NEXT_RATE in note.message


@pytest.mark.fault("E3")
def test_other_hyperparameters_are_used_and_named(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "own", "")
    Loop(run, weight_decay=0.1, betas=(0.9, 0.95)).train(upto=6)
    loop = Loop(run, weight_decay=0.3, betas=(0.9, 0.99)).train()
    assert loop.optimizer.param_groups[0]["weight_decay"] == 0.3
    assert loop.optimizer.param_groups[0]["betas"] == (0.9, 0.99)
    (note,) = note_events(run)
    decay = {"key": "weight_decay", "saved": 0.1, "configured": 0.3, "used": 0.3}
    assert decay in note.data["settings"]
    assert {entry["key"] for entry in note.data["settings"]} == {"weight_decay", "betas"}
    assert "weight_decay: " in note.message and "betas: " in note.message


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=20)


@pytest.mark.parametrize("schedule", [one_cycle, cosine(20), decay(0.9), None])
def test_a_resume_with_the_same_settings_changes_nothing(tmp_path: Path, schedule: Any) -> None:
    """Also where a schedule moves settings that no user has changed, as one-cycle moves the
    momentum.
    """
    run = RunDirectory.create(tmp_path, "own", "")
    whole = Loop(steps=12, schedule=schedule).train()
    Loop(run, steps=12, schedule=schedule).train(upto=7)
    resumed = Loop(run, steps=12, schedule=schedule).train()
    assert resumed.rates == {step: whole.rates[step] for step in resumed.rates}
    assert all(
        torch.equal(a, b)
        for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True)
    )
    assert not notes(run)


@pytest.mark.fault("E15")
@pytest.mark.parametrize(
    ("order", "message"),
    [
        (SampleOrder(samples=SAMPLES, seed=4), "seed is 4 and was 3"),
        (SampleOrder(samples=SAMPLES + 1, seed=3), f"samples is {SAMPLES + 1} and was {SAMPLES}"),
        (SampleOrder(samples=SAMPLES, seed=3, shuffled=False), "shuffled is False and was True"),
    ],
)
def test_a_resume_with_another_sample_order_is_refused(
    tmp_path: Path, order: SampleOrder, message: str
) -> None:
    run = RunDirectory.create(tmp_path, "own", "")
    Loop(run).train(upto=6)
    lines = len(run.events())
    with pytest.raises(UsageError, match=message):
        Loop(run, order=order).train()
    assert len(run.events()) == lines


# -- the same parameters are trained


@pytest.mark.fault("E8")
def test_a_resume_names_parameters_that_are_newly_frozen_or_trained(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "own", "")
    first = Loop(run)
    first.model.first.bias.requires_grad_(False)
    first.train(upto=6)
    second = Loop(run)
    second.model.second.bias.requires_grad_(False)
    second.train()
    (check,) = [event for event in run.events() if event.kind == "resume_check"]
    frozen, thawed = check.data["trained"].split(", ")
    assert frozen.startswith("second.bias ") and thawed.startswith("first.bias ")
    assert isinstance(check, ResumeChecked) and list(check.differences) == ["trained"]
    assert check.message.endswith(" trained")


@pytest.mark.fault("E8")
def test_a_loss_that_is_cut_off_by_detach_is_named_at_the_first_step_after_a_resume(
    tmp_path: Path,
) -> None:
    run = RunDirectory.create(tmp_path, "own", "")
    Loop(run).train(upto=6)
    cut = Loop(run)
    cut.model.first.register_forward_hook(lambda module, inputs, output: output.detach())
    cut.train()
    (note,) = note_events(run)
    assert note.data["parameters"] == ["first.bias", "first.weight"]
    assert numbers_in(note.message) == [2, 6], "two of them, in step 6"


# -- updates that are lost in rounding


@pytest.mark.parametrize(
    ("rate", "is_lost"), [pytest.param(1e-5, True, marks=pytest.mark.fault("E13")), (1e-2, False)]
)
def test_16_bit_weights_that_no_update_changes_are_noted_once(
    tmp_path: Path, rate: float, is_lost: bool
) -> None:
    run = RunDirectory.create(tmp_path, "own", "")
    loop = Loop(run, steps=20, lr=rate, weight_decay=0.0, dtype=torch.bfloat16).train()
    assert loop.guard.phase is Phase.FINISHED
    found = [message for message in notes(run) if "bfloat16" in message]
    assert len(found) == int(is_lost)
    if is_lost:
        assert numbers_in(found[0])[1:3] == [4, 1e-05], "updates, and the learning rate"


# -- what the guard changes for a moment


@pytest.mark.fault("A8")
def test_an_optimizer_that_raises_leaves_the_learning_rate_as_it_was() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    gate = Gate([optimizer], parameters=list(model.parameters()), embedding=[], clip=1.0)
    optimizer.register_step_post_hook(lambda *_: 1 / 0)
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ZeroDivisionError):
        gate.apply(1.0, lr_factor=0.1)
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("given", "place", "named"),
    [
        (
            lambda loss: {"loss": loss.item()},
            "step.finish(loss): ",
            " float",
        ),
        (lambda loss: {"loss": None}, "step.finish(loss): ", " NoneType"),
        (
            lambda loss: {"loss": loss.repeat(3)},
            "step.finish(loss): ",
            " (3,)",
        ),
        (
            lambda loss: {"loss": loss + 0j},
            "step.finish(loss): ",
            " torch.complex64",
        ),
        (
            lambda loss: {"loss": loss, "tokens": "8"},
            "step.finish(tokens): ",
            " str",
        ),
        (
            lambda loss: {"loss": loss, "nominal_tokens": True},
            "step.finish(nominal_tokens): ",
            " number",
        ),
        (
            lambda loss: {"loss": loss, "signals": ["x"]},
            "step.finish(signals): ",
            " dict ",
        ),
        (
            lambda loss: {"loss": loss, "signals": {"x": "a"}},
            "step.finish(signals['x']): ",
            " str",
        ),
        (
            lambda loss: {"loss": loss, "signals": {"x": loss.repeat(2)}},
            "step.finish(signals['x']): ",
            " real ",
        ),
    ],
)
def test_what_finish_cannot_use_is_refused_in_one_sentence(
    given: Any, place: str, named: str
) -> None:
    loop = Loop()
    with pytest.raises(UsageError) as error:
        for step in loop.guard:
            loss = loop.loss(step)
            loss.backward()
            step.finish(**given(loss))
    assert str(error.value).startswith(place) and named in str(error.value)


@pytest.mark.parametrize("samples", [0, -1, 1.5, "8", None, True, float("nan")])
def test_a_sample_order_of_no_whole_number_of_samples_is_refused(samples: Any) -> None:
    with pytest.raises(DataError, match=r"SampleOrder\(samples\): .* > 0"):
        SampleOrder(samples=samples)


def test_a_halt_of_ones_own_loop_is_logged_with_its_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The loop just ends, and a script without a run directory would learn nothing of it."""
    loop = Loop(steps=30)
    for step in loop.guard:
        loss = loop.loss(step) * (float("nan") if step.number > 12 else 1.0)
        loss.backward()
        step.finish(loss)
    assert loop.guard.phase is Phase.HALTED
    (record,) = caplog.records
    assert record.levelname == "ERROR" and record.name.startswith("guardrail.")
    assert record.getMessage().startswith("guardrail: ") and " nan" in record.getMessage()
    assert numbers_in(record.getMessage())[0] == loop.guard.step
