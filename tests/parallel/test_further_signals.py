"""Signals besides the usual ones: numbers that a loop hands over, norms by block, the norm of each
update.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from guardrail.backtest.backtest import run_backtest
from guardrail.backtest.importers import run_directory
from guardrail.cli.main import main
from guardrail.core.config import build_config, load_guard_options
from guardrail.core.errors import ConfigError, UsageError
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.findings import FindingKind, Observation, Severity
from guardrail.core.records.signals import METRIC_COLUMNS, UPDATE_NORM
from guardrail.core.records.verdicts import Action, Verdict
from guardrail.decide.controller import Controller
from guardrail.decide.detector_set import MOST_NAMED
from guardrail.rundir.run_directory import RunDirectory
from guardrail.torch.measure.gradient_norms import block_name
from guardrail.torch.measure.reduction import StepReduction
from guardrail.torch.measure.update_norm import UpdateNorm
from tests.support.ranks import run_ranks
from tests.support.tiny import Setup, Tiny
from tests.unit.torch.test_guard import Loop

SETTINGS = GuardOptions(window=32, warmup=12, steps_until_good=4)


def observation(step: int, **signals: float) -> Observation:
    dice = random.Random(step)
    usual = {"loss": 2.0 * math.exp(dice.gauss(0, 0.01)), "grad_norm": math.exp(dice.gauss(0, 0.1))}
    return Observation(step=step, first=step, last=step + 1, signals=usual | signals)


def watched(
    controller: Controller, steps: range, names: tuple[str, ...], **special: float
) -> list[Verdict]:
    """Ordinary steps; `special` values in the last one."""
    verdicts = []
    for step in steps:
        dice = random.Random(-step)
        signals = {name: math.exp(dice.gauss(0, 0.05)) for name in names}
        verdicts.append(controller.observe(observation(step, **signals, **{})))
        if step == steps[-1] - 1 and special:
            return [*verdicts, controller.observe(observation(step + 1, **(signals | special)))]
    return verdicts


def test_a_spike_of_a_named_signal_is_noted_and_applied() -> None:
    controller = Controller(SETTINGS)
    *healthy, noted = watched(controller, range(1, 60), ("router",), router=1e4)
    assert not any(verdict.findings for verdict in healthy)
    (finding,) = noted.findings
    assert noted.action is Action.APPLY and finding.severity is Severity.NOTE
    assert (finding.signal, finding.kind, finding.value) == ("router", FindingKind.SPIKE, 1e4)
    # What nobody has said the meaning of keeps no state from being called good.
    assert controller.healthy_through == noted.step
    assert "router" in controller.bands()


def test_a_name_that_a_detector_has_is_a_signal_too() -> None:
    controller = Controller(SETTINGS)
    verdicts = watched(controller, range(1, 60), ("growth", "stuck_loss"), growth=1e4)
    assert [finding.signal for finding in verdicts[-1].findings] == ["growth"]


def test_the_foremost_layers_stand_for_all() -> None:
    names = tuple(f"grad_norm/layers.{index}" for index in range(8))
    special = {name: 10.0 ** (4 + index) for index, name in enumerate(names)}
    *_, noted = watched(Controller(SETTINGS), range(1, 60), names, **special)
    assert len(noted.findings) == MOST_NAMED
    assert [f.signal for f in noted.findings] == list(names[: -MOST_NAMED - 1 : -1])
    assert {f.kind for f in noted.findings} == {FindingKind.GRAD_SPIKE}


def test_what_is_not_a_positive_number_teaches_nothing() -> None:
    for junk in (math.nan, math.inf, 0.0, -3.0):
        controller, other = Controller(SETTINGS), Controller(SETTINGS)
        verdicts = watched(controller, range(1, 60), ("router",), router=junk)
        watched(other, range(1, 59), ("router",))
        assert not verdicts[-1].findings
        assert (
            controller.detectors["named router"].state_dict()
            == other.detectors["named router"].state_dict()
        )


def test_a_state_knows_which_signals_there_were() -> None:
    controller = Controller(SETTINGS)
    watched(controller, range(1, 40), ("router",))
    state = controller.state_dict()
    watched(controller, range(40, 60), ("router", "late"))
    assert controller.load_state_dict(state) == [] and controller.state_dict() == state
    fresh = Controller(SETTINGS)
    assert fresh.load_state_dict(state) == []
    assert fresh.state_dict() == state
    names = ("router", "late")
    assert watched(fresh, range(40, 70), names, router=1e4) == watched(
        controller, range(40, 70), names, router=1e4
    )


@pytest.mark.parametrize("names", [["loss"], ["a", "a"], ["update_norm"], [" "], ["step"], [""]])
def test_names_that_are_taken_are_refused(names: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"guard\.extra_signals"):
        build_config({"guard": {"signals": names}}, file="x.toml", base=tmp_path)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("layers.3.attention.q.weight", "layers.3"),
        ("model.layers.11.mlp.experts.2.up.weight", "model.layers.11"),
        ("transformer.h.0.ln_1.bias", "transformer.h.0"),
        ("embed.weight", "embed"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("scale", "scale"),
    ],
)
def test_blocks_by_name(name: str, block: str) -> None:
    assert block_name(name) == block


# -- over ranks


def reduced(rank: int, kind: str) -> dict[str, Any]:
    setup = Setup(kind, "momentum")
    options: dict[str, Any] = {"layers": True, "named": ("router_loss", "rare"), "updates": True}
    probes = StepReduction(setup.model, rank=setup.rank, world=setup.world, **options)
    updates = UpdateNorm(probes.parameters, probes.weights)
    full = lambda: [  # noqa: E731
        (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for p in setup.model.parameters()
    ]
    old = full()
    updates.before()
    setup.step(1)
    updates.after()
    moved = torch.nn.utils.get_total_norm([a - b for a, b in zip(full(), old, strict=True)]).item()
    setup.inner.zero_grad()
    for index, parameter in enumerate(setup.model.parameters()):
        parameter.grad = torch.ones_like(parameter) * (index + 1)
    named: dict[str, Any] = {"router_loss": torch.tensor(2.0 + setup.rank)} | (
        {"rare": 5.0} if rank == 0 else {}
    )
    common: dict[str, Any] = {"nominal_tokens": None, "step_time": 0.1}
    given = probes.reduce(torch.tensor(1.0), 1, named=named, update_square=updates.square, **common)
    without = probes.reduce(torch.tensor(1.0), 1, **common)
    sizes = [(block_name(n), p.numel()) for n, p in Tiny().named_parameters()]
    want: dict[str, float] = {}
    for index, (block, size) in enumerate(sizes):
        want[block] = want.get(block, 0.0) + size * (index + 1) ** 2
    norms = {f"grad_norm/{block}": square**0.5 for block, square in want.items()}
    return {
        "given": given.further,
        "without": without.further,
        "moved": moved,
        "norms": norms,
        "whole": given.grad_norm,
    }


@pytest.mark.parametrize(("world", "kind"), [(1, "plain"), (2, "ddp"), (2, "fsdp")])
def test_one_reduction_carries_them_all(tmp_path: Path, world: int, kind: str) -> None:
    ranks = run_ranks(reduced, world, kind, folder=tmp_path, init=world > 1)
    first = ranks[0]
    assert all(rank["given"] == first["given"] for rank in ranks)
    assert first["given"]["router_loss"] == (2.0 if world == 1 else 2.5)
    assert first["given"]["rare"] == 5.0, "the mean over those that gave one"
    assert (
        first["given"][UPDATE_NORM] == pytest.approx(first["moved"], rel=1e-5)
        and first["moved"] > 0
    )
    blocks = {
        name: value for name, value in first["given"].items() if name.startswith("grad_norm/")
    }
    assert blocks == pytest.approx(first["norms"], rel=1e-6)
    assert list(blocks) == [
        "grad_norm/blocks.0",
        "grad_norm/blocks.1",
        "grad_norm/embed",
        "grad_norm/norm",
    ]
    assert sum(value**2 for value in blocks.values()) == pytest.approx(first["whole"] ** 2)
    assert first["without"].keys() == blocks.keys(), "what no rank gave is not there"


def test_a_number_that_was_not_announced_is_refused() -> None:
    probes = StepReduction(Tiny(), rank=0, world=1, named=("a",))
    with pytest.raises(UsageError, match=r"'b'.*guard.extra_signals \(a\)"):
        probes.reduce(torch.tensor(1.0), 1, nominal_tokens=None, step_time=0.0, named={"b": 1.0})


# -- in a loop


class Handing(Loop):
    """Hands a number of its own over, every other step."""

    def train(self) -> Handing:
        for step in self.guard:
            self.attempts.append(step)
            loss = self.loss(step)
            loss.backward()
            step.finish(loss, signals={"router": loss.detach() * 3} if step.number % 2 else None)
        return self


MEASURED: dict[str, Any] = {"layers": True, "update_norm": True, "signals": ("router",)}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, Handing]:
    config = "[guard]\nwarmup = 10\nwindow = 32\nconfirm = 4\nlayers = true\nupdate_norm = true\nsignals = ['router']\n"
    run = RunDirectory.create(tmp_path_factory.mktemp("runs"), "further", config)
    with run.lock("test"):
        return run, Handing(bad=range(60, 72), run=run, **MEASURED).train()


def test_a_loop_records_what_it_hands_over(recorded: tuple[RunDirectory, Handing]) -> None:
    run, loop = recorded
    view = run.metrics()
    blocks = ["grad_norm/embed", "grad_norm/norm", "grad_norm/out"]
    assert view.columns == (*METRIC_COLUMNS, *blocks, "router", UPDATE_NORM)
    steps, router, loss = view.column("step"), view.column("router"), view.column("loss")
    told = steps % 2 == 1
    assert np.isnan(router[~told]).all()
    np.testing.assert_allclose(router[told], 3 * loss[told], rtol=1e-6)
    squares = sum(view.column(name) ** 2 for name in blocks)
    np.testing.assert_allclose(squares**0.5, view.column("grad_norm"), rtol=1e-6)
    updates = view.column(UPDATE_NORM)
    assert np.isnan(updates[0]) and (updates[1:] > 0).all()
    assert any(
        step.verdict is not None and step.verdict.action is Action.ROLLBACK
        for step in loop.attempts
    )


def test_after_a_rollback_the_update_before_it_is_known(
    recorded: tuple[RunDirectory, Handing],
) -> None:
    """The steps from the restored state on meet the very norms that they met the first time."""
    view = recorded[0].metrics()
    steps, timelines, updates = (
        view.column(name).tolist() for name in ("step", "timeline", UPDATE_NORM)
    )
    first = timelines.index(1.0)
    before = [row for row in range(first) if steps[row] == steps[first]]
    assert before and updates[first] == updates[before[0]]


def test_its_verdicts_are_those_of_a_backtest(recorded: tuple[RunDirectory, Handing]) -> None:
    run = recorded[0]
    log = run_directory.read_run(run, "run")
    assert {"router", UPDATE_NORM, "grad_norm/out"} <= set(log.columns)
    result = run_backtest(log, load_guard_options(run.path / "config.toml"), own=True)
    assert result.differing == [] and result.messages == []
    assert any(alarm.verdict == "rollback" for alarm in result.alarms)


def test_any_column_of_a_log_can_be_watched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "log.csv"
    lines = ["step,loss,aux_balance"]
    for step in range(1, 100):
        dice = random.Random(step)
        lines.append(
            f"{step},{2 + dice.gauss(0, 0.01):.6f},{50.0 if step == 80 else 0.1 + dice.random() / 100:.6f}"
        )
    file.write_text("\n".join(lines), encoding="utf-8")
    assert main(["backtest", str(file), "--json"]) == 0
    assert '"alarms": []' in capsys.readouterr().out
    assert main(["backtest", str(file), "--column", "balance=aux_balance", "--json"]) == 0
    out = capsys.readouterr().out
    assert '"signal": "balance"' in out and '"kind": "spike"' in out and '"step": 80' in out
