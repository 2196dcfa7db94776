"""What holds for every optimizer of the registry, and how a new one is added."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from guardrail.core.errors import ConfigError
from tests.support.places import ROOT
from tests.support.running import tiny
from trainer.config.config import ModelSection, OptimSection
from trainer.model import Decoder
from trainer.optim.base import OptimizerSpec
from trainer.optim.registry import OPTIMIZERS, build_optimizers, find_optimizer

each_optimizer = pytest.mark.parametrize("spec", OPTIMIZERS, ids=lambda spec: spec.name)


def small_model() -> Decoder:
    section = ModelSection(layers=1, width=8, heads=2)
    return Decoder(section, vocabulary=11, sequence_length=4, seed=3)


def settings_of(spec: OptimizerSpec) -> OptimSection:
    return OptimSection(name=spec.name, lr=1e-2)


def train(model: Decoder, optimizers: list[torch.optim.Optimizer], *, steps: int) -> None:
    for step in range(steps):
        torch.manual_seed(step)
        model(torch.randint(11, (2, 4))).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_names_are_unique_and_found() -> None:
    names = [spec.name for spec in OPTIMIZERS]
    assert len(set(names)) == len(names)
    assert [find_optimizer(name) for name in names] == list(OPTIMIZERS)
    with pytest.raises(KeyError):
        find_optimizer("no such optimizer")


@each_optimizer
def test_it_has_a_help_text_and_belongs_to_the_configuration(
    spec: OptimizerSpec, tmp_path: Path
) -> None:
    assert spec.help and not spec.help.endswith(".")
    config = tiny(tmp_path, optim={"name": spec.name})
    assert config.optim.spec is spec


@each_optimizer
def test_each_parameter_is_in_one_group(spec: OptimizerSpec) -> None:
    model = small_model()
    optimizers = build_optimizers(model, settings_of(spec))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    trained = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(trained) == sorted(id(parameter) for parameter in model.parameters())
    assert all(group["lr"] == pytest.approx(1e-2) for group in groups)


@each_optimizer
def test_it_keeps_no_more_numbers_than_it_declares(spec: OptimizerSpec) -> None:
    model = small_model()
    optimizers = build_optimizers(model, settings_of(spec))
    train(model, optimizers, steps=1)
    kept = 0
    for optimizer in optimizers:
        for state in optimizer.state.values():
            tensors = [value for name, value in state.items() if name != "step"]
            kept += sum(t.numel() for t in tensors if isinstance(t, torch.Tensor) and t.ndim)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    # Adafactor's sums over rows and columns are not counted: little in a model of real size.
    small = sum(sum(parameter.shape) for parameter in model.parameters())
    assert kept <= spec.moments * parameters + small


@each_optimizer
def test_a_restored_state_continues_with_the_same_bits(spec: OptimizerSpec) -> None:
    model, again = small_model(), small_model()
    optimizers = build_optimizers(model, settings_of(spec))
    train(model, optimizers, steps=2)
    again.load_state_dict(model.state_dict())
    others = build_optimizers(again, settings_of(spec))
    for optimizer, other in zip(optimizers, others, strict=True):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizers, steps=1)
    train(again, others, steps=1)
    for one, other_one in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other_one)


@each_optimizer
def test_what_it_does_not_work_with_is_refused(spec: OptimizerSpec, tmp_path: Path) -> None:
    cases = [
        (spec.works_sharded, {"train": {"strategy": "fsdp"}}, "optim.name"),
        (spec.works_deferred, {"guard": {"decide": "deferred"}}, "optim.name"),
        (spec.works_stable, {"optim": {"stable": True}}, "optim.stable"),
        (
            spec.works_with_model_parallel,
            {"launch": {"processes": 2}, "parallel": {"tp": 2}},
            "optim.name",
        ),
    ]
    for works, sections, key in cases:
        sections = {**sections, "optim": {"name": spec.name, **sections.get("optim", {})}}
        if works:
            tiny(tmp_path, **sections)
            continue
        with pytest.raises(ConfigError) as caught:
            tiny(tmp_path, **sections)
        assert key in str(caught.value)


def test_an_example_of_one_file_is_picked_up_by_one_line(tmp_path: Path) -> None:
    """A new process, since the configuration reads the registry when it is imported."""
    program = f"""
        from trainer.optim import registry
        from tests.support.examples.lion import Lion
        registry.OPTIMIZERS += (Lion(),)

        import json, pathlib, sys
        assert "torch" not in sys.modules
        from trainer.config.config import Config
        from tests.support.running import tiny
        from trainer.train import Trainer

        config = tiny(
            pathlib.Path({str(tmp_path)!r}),
            optim={{"name": "lion", "lr": 1e-3}},
            train={{"steps": 8}},
        )
        trainer = Trainer(config)
        phase = trainer.train()
        print(json.dumps([phase.value, type(trainer.optimizers[0]).__name__]))
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["finished", "TorchLion"]


def test_the_registry_imports_no_torch() -> None:
    program = "import sys, trainer.config.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)
