"""Settings and arguments that are given in Python are converted and checked like a configuration
file.
"""

from __future__ import annotations

from collections.abc import Callable
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
from tests.support.golden import assert_golden
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


WRONG_SECTIONS: list[tuple[dict[str, Any], str]] = [
    (
        {"guard": GuardOptions(window=-3)},
        "guard.detectors.spike.history = -3: ",
    ),
    (
        {"guard": GuardOptions(warmup=200)},
        "guard.detectors.spike.min_history = 200: ",
    ),
    (
        {"guard": GuardOptions(mode="advice")},
        "guard.mode = 'advice': ",
    ),
    (
        {"guard": GuardOptions(loss_score=float("nan"))},
        "guard.detectors.spike.loss_threshold = nan: ",
    ),
    (
        {"guard": GuardOptions(loss_score="8")},
        "guard.detectors.spike.loss_threshold = '8': ",
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
        "guard.steps_until_good = 100: ",
    ),
    (
        {"guard": GuardOptions(escalation=(EscalationStep(action="jump"),))},
        "guard.escalation[0].action = 'jump': ",
    ),
    (
        {"guard": GuardOptions(escalation=(EscalationStep(action="lower_lr", factor=3.0),))},
        "guard.escalation[0].factor = 3.0: ",
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
        "guard.escalation[0] = 'skip': ",
    ),
    (
        {"guard": GuardOptions(remedies=(Remedy(kind="lr", value=2.0, from_step=1),))},
        "guard.remedies[0].value = 2.0: ",
    ),
    (
        {"guard": GuardOptions(remedies=(Remedy(kind="rate", value=0.5, from_step=1),))},
        "guard.remedies[0].kind = 'rate': ",
    ),
    ({"guard": None}, "guard: "),
    (
        {"guard": SnapshotSection()},
        "guard.every = 10: ",
    ),
    (
        {"snapshots": SnapshotSection(every=0)},
        "snapshots.every = 0: ",
    ),
    ({"snapshots": SnapshotSection(keep=1)}, "snapshots.keep = 1: "),
    (
        {"checkpoint": CheckpointSection(every=0)},
        "checkpoint.every = 0: ",
    ),
    (
        {"checkpoint": CheckpointSection(every=2.5)},
        "checkpoint.every = 2.5: ",
    ),
    (
        {"checkpoint": CheckpointSection(keep=1)},
        "checkpoint.keep = 1: ",
    ),
    (
        {"launch": LaunchSection(processes=-1)},
        "launch.processes = -1: ",
    ),
    (
        {"notify": NotifySection(on=("lunch",))},
        "notify.on[0] = 'lunch': ",
    ),
]


@pytest.mark.fault("E1")
@pytest.mark.parametrize(("sections", "place"), WRONG_SECTIONS)
def test_every_section_is_checked(sections: dict[str, Any], place: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_from_sections(**sections)
    assert str(caught.value).startswith(place)


WRONG_SETTINGS: list[tuple[Any, str]] = [
    (GuardOptions(), "settings = GuardOptions("),
    (3, "settings = 3: "),
    (
        {"guard": {"mod": "ask"}},
        "guard.mod = 'ask': ",
    ),
    ({1: {}}, "1: "),
]


@pytest.mark.fault("E1")
@pytest.mark.parametrize(("settings", "place"), WRONG_SETTINGS)
def test_what_is_no_settings_is_refused(settings: Any, place: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_guard(settings)
    assert str(caught.value).startswith(place)


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
    with pytest.raises(ConfigError) as caught:
        guard.set_mode("later")  # type: ignore[arg-type]
    assert (caught.value.key, caught.value.value) == ("guard.mode", "later")
    assert all(mode.value in caught.value.expected for mode in Mode)


class Frozen(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 1)
        self.requires_grad_(False)


WRONG_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"model": "gpt"}, "model = 'gpt': "),
    ({"model": nn.Linear}, "model = <class 'torch.nn.modules.linear.Linear'>: "),
    (
        {"model": Frozen()},
        "model = 'Frozen': ",
    ),
    ({"optimizer": None}, "optimizer: "),
    ({"optimizer": []}, "optimizer = []: "),
    ({"optimizer": ["adam"]}, "optimizer[0] = 'adam': "),
    ({"optimizer": torch.optim.SGD}, "optimizer = <class 'torch.optim.sgd.SGD'>: "),
    (
        {"scheduler": 0.1},
        "scheduler = 0.1: ",
    ),
    (
        {"scaler": True},
        "scaler = True: ",
    ),
    (
        {"data": [1, 2]},
        "data = [1, 2]: ",
    ),
    ({"data": SampleOrder}, "data = <class 'guardrail.decide.sample_order.SampleOrder'>: "),
    ({"batch_size": 0}, "batch_size = 0: "),
    ({"batch_size": 4.0}, "batch_size = 4.0: "),
    ({"batch_size": "4"}, "batch_size = '4': "),
    ({"batch_size": True}, "batch_size = True: "),
    ({"batch_size": OMITTED}, "batch_size: "),
    ({"total_steps": -1}, "total_steps = -1: "),
    ({"total_steps": 1e4}, "total_steps = 10000.0: "),
    ({"limit": 0}, "limit = 0: "),
    ({"clip": float("nan")}, "clip = nan: "),
    ({"clip": -1.0}, "clip = -1.0: "),
    ({"run": "runs/a"}, "run = 'runs/a': "),
    ({"device": "gpu"}, "ranks.device = 'gpu': "),
    (
        {"holders": range(0, 2)},
        "ranks.shard_ranks = range(0, 2): ",
    ),
    ({"counting": 1}, "ranks.counts_loss = 1: "),
    ({"replay": 3}, "hooks.replay = 3: "),
    ({"identity": "abc"}, "hooks.fingerprints = 'abc': "),
    (
        {"optimiser": 1},
        "optimiser: ",
    ),
]


@pytest.mark.fault("E1")
@pytest.mark.parametrize(
    ("parts", "place"),
    WRONG_ARGUMENTS,
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_every_argument_of_the_guard_is_checked(parts: dict[str, Any], place: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_guard(**parts)
    assert str(caught.value).startswith(place)


@pytest.mark.fault("E1")
def test_a_batch_size_that_a_function_gives_is_checked_too() -> None:
    guard = make_guard(batch_size=lambda step: 4 if step < 3 else 0)
    with pytest.raises(ConfigError) as caught:
        train(guard)
    assert (caught.value.key, caught.value.value) == ("batch_size(3)", 0)
    assert caught.value.expected.endswith(" >= 1")
    assert len(train(make_guard(batch_size=np.int64(4), total_steps=np.int32(3)))) == 3


WRONG_CONFIGURATIONS: list[tuple[dict[str, Any], str]] = [
    (
        {"train": TrainSection(steps=3, batch_size=0)},
        "train.batch_size = 0: ",
    ),
    (
        {"train": TrainSection(steps=3, precision="fp8")},
        "train.precision = 'fp8': ",
    ),
    ({"train": TrainSection()}, "train.steps = 0: "),
    (
        {"data": DataSection(sources=("nope.txt",))},
        "data.sources[0] = 'nope.txt': ",
    ),
    (
        {"guard": GuardOptions(mode="careful")},
        "guard.mode = 'careful': ",
    ),
    (
        {"launch": LaunchSection(processes=3)},
        "train.batch_size = 16: ",
    ),
]


@pytest.mark.fault("E1")
@pytest.mark.parametrize(("sections", "place"), WRONG_CONFIGURATIONS)
def test_the_configuration_of_the_trainer_is_checked(sections: dict[str, Any], place: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_trainer(**sections)
    assert str(caught.value).startswith(place)


@pytest.mark.fault("E1")
def test_a_section_for_a_backtest_is_checked(tmp_path: Path) -> None:
    from guardrail.backtest.backtest import run_backtest
    from guardrail.backtest.importers.sources import find_sources

    (tmp_path / "log.csv").write_text("step,loss\n" + "".join(f"{n},2.0\n" for n in range(1, 50)))
    (log,) = next(iter(find_sources([str(tmp_path / "log.csv")]))).read({})
    with pytest.raises(ConfigError) as caught:
        run_backtest(log, GuardOptions(window=2))
    assert caught.value.key.endswith("spike.history") and caught.value.value == 2
    assert caught.value.expected.endswith(" >= 16")


def message_of(make: Callable[..., object], *given: Any, **named: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        make(*given, **named)
    return str(caught.value)


def make_from_sections(**sections: Any) -> Guard:
    return make_guard(GuardConfig(**sections))


def make_trainer(**sections: Any) -> Trainer:
    return Trainer(Config(**{"train": TrainSection(steps=300), **sections}))


def test_the_messages_of_wrong_settings_in_python() -> None:
    messages = [message_of(make_from_sections, **given) for given, _ in WRONG_SECTIONS]
    messages += [message_of(make_guard, given) for given, _ in WRONG_SETTINGS]
    messages += [message_of(make_guard, **given) for given, _ in WRONG_ARGUMENTS]
    messages += [message_of(make_trainer, **given) for given, _ in WRONG_CONFIGURATIONS]
    assert_golden("errors_in_python.txt", "\n\n".join(messages) + "\n")
