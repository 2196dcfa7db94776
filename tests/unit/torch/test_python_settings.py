"""Settings and arguments that are given in Python are converted and checked like a configuration
file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from guardrail.core.config import GuardConfig
from guardrail.core.errors import ConfigError
from guardrail.core.guard_options import EscalationStep, GuardOptions
from guardrail.core.records.status import Phase
from guardrail.core.records.verdicts import Action, Mode, Remedy
from guardrail.core.sections import CheckpointSection, LaunchSection, NotifySection, SnapshotSection
from guardrail.decide.sample_order import SampleOrder
from guardrail.torch.guard.guard import Guard
from trainer.config.config import Config
from trainer.config.sections import DataSection, TrainSection
from trainer.train import Trainer

OMITTED = object()


def make_guard(settings: Any = None, **parts: Any) -> Guard:
    """A guard of a tiny loop; an argument that is OMITTED is not given at all."""
    model = nn.Linear(2, 1)
    given = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "data": SampleOrder(samples=64),
        "batch_size": 4,
        "total_steps": 30,
        **parts,
    }
    given = {name: value for name, value in given.items() if value is not OMITTED}
    return Guard.from_config(GuardConfig() if settings is None else settings, **given)


def train(guard: Guard, *, bad: range = range(0)) -> list[Action]:
    """Constant losses, infinite at the bad steps; returns what was decided."""
    actions = []
    for step in guard:
        loss = sum((parameter**2).sum() for parameter in guard.reduction.parameters)
        loss = loss * (float("inf") if step.number in bad else 1.0)
        loss.backward()
        step.finish(loss)
        assert step.verdict is not None
        actions.append(step.verdict.action)
        if len(actions) == 60:
            break
    return actions


@pytest.mark.fault("E1")
@pytest.mark.parametrize("word", ["advise", "off"])
def test_a_mode_given_as_text_is_that_mode(word: str) -> None:
    guard = make_guard(GuardConfig(guard=GuardOptions(mode=word)))  # type: ignore[arg-type]
    assert guard.mode is Mode(word) and guard.config.guard.mode is Mode(word)
    assert set(train(guard, bad=range(12, 13))) == {Action.APPLY}
    assert guard.phase is Phase.FINISHED and guard.timeline == 0


@pytest.mark.fault("E1")
@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"guard": GuardOptions(window=-3)},
            "guard.detectors.spike.history = -3: expected a whole number >= 16",
        ),
        (
            {"guard": GuardOptions(warmup=200)},
            "guard.detectors.spike.min_history = 200: expected at most guard.detectors.spike.history (128)",
        ),
        (
            {"guard": GuardOptions(mode="advice")},
            "guard.mode = 'advice': expected auto, ask, advise or off",
        ),
        (
            {"guard": GuardOptions(loss_score=float("nan"))},
            "guard.detectors.spike.loss_threshold = nan: expected a finite number",
        ),
        (
            {"guard": GuardOptions(loss_score="8")},
            "guard.detectors.spike.loss_threshold = '8': expected a number, got a string",
        ),
        (
            {"guard": GuardOptions(allowlist=((9, 3),))},
            "guard.allowlist[0] = [9, 3]: ",
        ),
        (
            {"guard": GuardOptions(extra_signals=("loss",))},
            "guard.extra_signals = 'loss': ",
        ),
        (
            {"guard": GuardOptions(steps_until_good=100)},
            "guard.steps_until_good = 100: expected at most snapshots.every",
        ),
        (
            {"guard": GuardOptions(escalation=(EscalationStep(action="jump"),))},
            "guard.escalation[0].action = 'jump': expected skip, rollback,",
        ),
        (
            {"guard": GuardOptions(escalation=(EscalationStep(action="lower_lr", factor=3.0),))},
            "guard.escalation[0].factor = 3.0: expected a number <= 1",
        ),
        (
            {
                "guard": GuardOptions(
                    escalation=(EscalationStep(action="halt"), EscalationStep(action="rollback"))
                )
            },
            "guard.escalation[0].action = 'halt': ",
        ),
        (
            {"guard": GuardOptions(escalation=("skip",))},
            "guard.escalation[0] = 'skip': expected a table, got a string",
        ),
        (
            {"guard": GuardOptions(remedies=(Remedy(kind="lr", value=2.0, from_step=1),))},
            "guard.remedies[0].value = 2.0: expected a factor above 0",
        ),
        (
            {"guard": GuardOptions(remedies=(Remedy(kind="rate", value=0.5, from_step=1),))},
            "guard.remedies[0].kind = 'rate': expected one of lr, embed_alpha",
        ),
        ({"guard": None}, "guard: expected a table, got nothing"),
        (
            {"guard": SnapshotSection()},
            "guard.every = 10: expected a known key\n  hint: did you mean snapshots.every?",
        ),
        (
            {"snapshots": SnapshotSection(every=0)},
            "snapshots.every = 0: expected a whole number >= 1",
        ),
        ({"snapshots": SnapshotSection(keep=1)}, "snapshots.keep = 1: expected 0, or 2 and more"),
        (
            {"checkpoint": CheckpointSection(every=0)},
            "checkpoint.every = 0: expected a whole number >= 1",
        ),
        (
            {"checkpoint": CheckpointSection(every=2.5)},
            "checkpoint.every = 2.5: expected a whole number, got one with",
        ),
        (
            {"checkpoint": CheckpointSection(keep=1)},
            "checkpoint.keep = 1: expected a whole number >= 2",
        ),
        (
            {"launch": LaunchSection(processes=-1)},
            "launch.processes = -1: expected a whole number >= 1",
        ),
        (
            {"notify": NotifySection(on=("lunch",))},
            "notify.on[0] = 'lunch': expected incident, recovered,",
        ),
    ],
)
def test_every_section_is_checked(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_guard(GuardConfig(**sections))
    assert str(caught.value).startswith(message)


@pytest.mark.fault("E1")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (GuardOptions(), "settings = GuardOptions("),
        (3, "expected a table of sections"),
        (
            {"guard": {"mod": "ask"}},
            "guard.mod = 'ask': expected a known key\n  hint: did you mean guard.mode?",
        ),
        ({1: {}}, "1: expected a known key"),
    ],
)
def test_what_is_no_settings_is_refused(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_guard(settings)
    assert message in str(caught.value)


@pytest.mark.fault("E1")
def test_what_means_the_same_is_converted() -> None:
    guard = make_guard({"guard": {"mode": "advise", "ladder": [{"do": "skip"}, {"do": "halt"}]}})
    assert guard.config.guard.mode is Mode.ADVISE and guard.config.guard.ladder[
        1
    ] == EscalationStep(action="halt")
    section = GuardOptions(
        window=np.int64(64), loss_score=np.float32(7.5), cause_test=np.bool_(False)
    )
    converted = make_guard(GuardConfig(guard=section)).config.guard
    assert (converted.window, converted.loss_score, converted.cause_test) == (64, 7.5, False)
    guard.set_mode("ask")  # type: ignore[arg-type]
    assert guard.mode is Mode.ASK is guard.controller.mode
    with pytest.raises(ConfigError, match=r"guard\.mode = 'later': expected one of auto, ask"):
        guard.set_mode("later")  # type: ignore[arg-type]


class Frozen(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 1)
        self.requires_grad_(False)


@pytest.mark.fault("E1")
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"model": "gpt"}, "model = 'gpt': expected a torch.nn.Module"),
        ({"model": nn.Linear}, "this is a class: call it first"),
        (
            {"model": Frozen()},
            "model = 'Frozen': expected a model with a parameter that requires a gradient",
        ),
        ({"optimizer": None}, "optimizer: expected a torch.optim optimizer"),
        ({"optimizer": []}, "optimizer = []: expected at least one optimizer"),
        ({"optimizer": ["adam"]}, "optimizer[0] = 'adam': expected a torch.optim optimizer"),
        ({"optimizer": torch.optim.SGD}, "expected a torch.optim optimizer, or a list of them"),
        (
            {"scheduler": 0.1},
            "scheduler = 0.1: expected an object with step(), state_dict(), load_state_dict()",
        ),
        (
            {"scaler": True},
            "scaler = True: expected an object with scale(), get_scale(), is_enabled()",
        ),
        (
            {"data": [1, 2]},
            "data = [1, 2]: expected the sample order, a guardrail.SampleOrder",
        ),
        ({"data": SampleOrder}, "hint: SampleOrder(len(dataset), seed=0)"),
        ({"batch_size": 0}, "batch_size = 0: expected a whole number >= 1"),
        ({"batch_size": 4.0}, "batch_size = 4.0: expected a whole number >= 1"),
        ({"batch_size": "4"}, "batch_size = '4': expected a whole number >= 1"),
        ({"batch_size": True}, "batch_size = True: expected a whole number >= 1"),
        ({"batch_size": OMITTED}, "batch_size: expected batch_size=...\n  hint: Guard needs it"),
        ({"total_steps": -1}, "total_steps = -1: expected a whole number >= 0"),
        ({"total_steps": 1e4}, "total_steps = 10000.0: expected a whole number >= 0"),
        ({"limit": 0}, "limit = 0: expected a whole number >= 1"),
        ({"clip": float("nan")}, "clip = nan: expected a number >= 0"),
        ({"clip": -1.0}, "clip = -1.0: expected a number >= 0"),
        ({"run": "runs/a"}, "hint: RunDirectory.open('runs/a')"),
        ({"device": "gpu"}, "device = 'gpu': expected a torch.device"),
        (
            {"holders": range(0, 2)},
            "shard_ranks = range(0, 2): expected a range of ranks within 0 to 1",
        ),
        ({"counting": 1}, "counts_loss = 1: expected True or False"),
        ({"replay": 3}, "replay = 3: expected a function, or None"),
        ({"identity": "abc"}, "fingerprints = 'abc': expected a dictionary"),
        (
            {"optimiser": 1},
            "optimiser: expected an argument of Guard\n  hint: did you mean optimizer?",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_every_argument_of_the_guard_is_checked(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_guard(**parts)
    assert message in str(caught.value)


@pytest.mark.fault("E1")
def test_a_batch_size_that_a_function_gives_is_checked_too() -> None:
    guard = make_guard(batch_size=lambda step: 4 if step < 3 else 0)
    with pytest.raises(ConfigError, match=r"batch_size\(3\) = 0: expected a whole number >= 1"):
        train(guard)
    assert len(train(make_guard(batch_size=np.int64(4), total_steps=np.int32(3)))) == 3


@pytest.mark.fault("E1")
@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"train": TrainSection(steps=3, batch_size=0)},
            "train.batch_size = 0: expected a whole number >= 1",
        ),
        (
            {"train": TrainSection(steps=3, precision="fp8")},
            "train.precision = 'fp8': expected fp32, bf16 or fp16",
        ),
        ({"train": TrainSection()}, "train.steps = 0: expected either train.steps or train.epochs"),
        (
            {"data": DataSection(sources=("nope.txt",))},
            "data.sources[0] = 'nope.txt': expected an existing file",
        ),
        (
            {"guard": GuardOptions(mode="careful")},
            "guard.mode = 'careful': expected auto, ask, advise or off",
        ),
        (
            {"launch": LaunchSection(processes=3)},
            "train.batch_size = 16: expected a multiple of the 3 data-parallel",
        ),
    ],
)
def test_the_configuration_of_the_trainer_is_checked(
    sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Trainer(Config(**{"train": TrainSection(steps=300), **sections}))
    assert str(caught.value).startswith(message)


@pytest.mark.fault("E1")
def test_a_section_for_a_backtest_is_checked(tmp_path: Path) -> None:
    from guardrail.backtest.backtest import run_backtest
    from guardrail.backtest.importers.sources import find_sources

    (tmp_path / "log.csv").write_text("step,loss\n" + "".join(f"{n},2.0\n" for n in range(1, 50)))
    (log,) = next(iter(find_sources([str(tmp_path / "log.csv")]))).read({})
    with pytest.raises(ConfigError, match=r"spike\.history = 2: expected a whole number >= 16"):
        run_backtest(log, GuardOptions(window=2))
