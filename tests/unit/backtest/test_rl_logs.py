"""Logs of reinforcement learning: what is read, what is judged, and what a live guard does with
such signals.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from guardrail.backtest.backtest import run_backtest
from guardrail.backtest.importers import names
from guardrail.backtest.importers.sources import find_sources
from guardrail.backtest.result import BacktestResult
from guardrail.cli.main import main
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.findings import FindingKind, Observation, Severity
from guardrail.core.records.signals import LOSS
from guardrail.core.records.verdicts import Action, Mode
from guardrail.decide.controller import Controller
from tests.support.feed import noisy, through_json
from tests.support.golden import assert_golden
from tests.support.places import TESTS

CASES = TESTS / "cases" / "rl"
pytestmark = pytest.mark.fault("RL")


def judged(name: str, folder: Path = CASES) -> BacktestResult:
    ((log,),) = (source.read({}) for source in find_sources([str(folder / name)]))
    return run_backtest(log, GuardOptions())


def acts(result: BacktestResult) -> list[tuple[int, str, str]]:
    return [
        (alarm.step, alarm.signal, alarm.verdict)
        for alarm in result.alarms
        if alarm.verdict != "note"
    ]


# -- nothing is acted on that is healthy -----------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CASES.iterdir()), ids=lambda path: path.name)
def test_nothing_is_acted_on(path: Path) -> None:
    """But for the one record whose gradient norm is 700 times the usual one."""
    result = judged(path.name)
    assert acts(result) == ([(31, "grad_norm", "skip")] if path.name == "r06_blowup.jsonl" else [])
    if "megatron" not in path.name and "sameloss" not in path.name:
        assert result.loss == "signed"


def test_loss_of_zero_without_any_other_signal_is_noted_at_most() -> None:
    result = judged("c09_grad0.jsonl")
    assert result.policy_column == "" and 0 < len(result.alarms) <= 3


# -- what is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "records", "steps", "apart"),
    [
        ("c05_verl.log", 40, (1, 40), {}),
        ("c05_verl.jsonl", 40, (1, 40), {}),
        ("c05_openrlhf.log", 40, (1, 40), {}),
        ("c05_swift.jsonl", 40, (5, 200), {}),
        ("c06_mixed_kinds.jsonl", 60, (1, 60), {"evaluation": 12}),
        ("c06_mixed_sameloss.jsonl", 60, (1, 60), {"evaluation": 12}),
        ("c06_policy_only.jsonl", 60, (1, 60), {"evaluation": 60}),
    ],
)
def test_records(name: str, records: int, steps: tuple[int, int], apart: dict[str, int]) -> None:
    result = judged(name)
    assert (len(result.steps), (result.steps[0], result.steps[-1]), result.other_rows) == (
        records,
        steps,
        apart,
    )


def test_signals_of_verl() -> None:
    result = judged("c05_verl.jsonl")
    assert result.names == {"loss": "data/actor/pg_loss", "grad_norm": "data/actor/grad_norm"}
    assert result.further["value_loss"] == "data/critic/vf_loss"
    assert result.further["reward"] == "data/critic/rewards/mean"
    result = judged("c05_verl.log")
    assert result.names == {"loss": "actor/pg_loss", "grad_norm": "actor/grad_norm"}
    assert {"kl", "entropy", "reward", "completion_length", "clipped_ratio", "clip_frac"} <= set(
        result.further
    )


def test_signals_of_openrlhf() -> None:
    result = judged("c05_openrlhf.log")
    assert result.names == {"loss": "act_loss", "grad_norm": "actor_gn"}
    assert result.further == {"kl": "kl", "reward": "rm", "completion_length": "glen"}


def test_signals_on_a_line_of_the_trainer(tmp_path: Path) -> None:
    line = (
        "{{'loss': {loss:.4f}, 'grad_norm': 0.3, 'rewards/f/mean': 0.5, 'reward': 0.5, "
        "'kl': 0.01, 'epoch': {epoch}}}"
    )
    draw = random.Random(0)
    lines = [line.format(loss=draw.gauss(0, 0.1), epoch=step / 100) for step in range(40)]
    lines.insert(20, "{'eval_loss': 4.2, 'eval_reward': 0.5, 'epoch': 0.2}")
    lines.append("{'train_runtime': 12.0, 'train_loss': 0.02, 'epoch': 0.4}")
    path = tmp_path / "out.txt"
    path.write_text("\n".join(lines))
    result = judged(path.name, tmp_path)
    assert len(result.steps) == 40 and acts(result) == []
    assert result.other_rows == {"evaluation": 1, "summary": 1}
    assert result.further == {"reward": "reward", "kl": "kl"}


@pytest.mark.fault("E7", "E16")
@pytest.mark.parametrize(
    ("name", "records", "last", "alarm"),
    [
        ("meg.log", 299, 299, (201, "nan")),
        ("swift.log", 199, 995, (750, "loss_spike")),
        ("gradtensor.jsonl", 199, 199, (150, "grad_spike")),
    ],
)
def test_rows_that_were_not_read(
    name: str, records: int, last: int, alarm: tuple[int, str]
) -> None:
    result = judged(name, CASES.parent / "logs")
    assert (len(result.steps), result.steps[-1]) == (records, last)
    first = result.alarms[0]
    assert (first.step, first.kind) == alarm and first.verdict == "skip"


# -- what is asked for -----------------------------------------------------------------------------


def printed(capsys: pytest.CaptureFixture[str], name: str, *options: str) -> tuple[int, str, str]:
    code = main(["backtest", str(CASES / name), *options])
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    "options", [("--column", "kl=kl"), ("--set", 'guard.extra_signals=["kl"]')]
)
def test_one_option_is_enough(options: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = printed(capsys, "c03b_kl.jsonl", *options, "--json")
    (run,) = json.loads(out)["runs"]
    assert code == 0 and run["columns"]["kl"] == "kl" and "kl" not in run["recorded_only"]
    assert {(alarm["signal"], alarm["verdict"]) for alarm in run["alarms"]} == {("kl", "note")}


def test_what_nothing_judges_is_recorded_only(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = printed(capsys, "c03b_kl.jsonl", "--json")
    (run,) = json.loads(out)["runs"]
    assert code == 0 and run["recorded_only"] == {"reward": "reward", "kl": "kl"}
    assert run["alarms"] == []


def test_the_text_about_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for name, *options in (
        ("c03b_kl.jsonl",),
        ("c03b_kl.jsonl", "--column", "kl=kl"),
        ("c06_mixed_kinds.jsonl",),
    ):
        code, out, errors = printed(capsys, name, *options)
        texts += [" ".join(["$ guardrail backtest", name, *options]), out + errors]
        assert code == 0
    assert_golden("backtest.txt", "\n".join(texts).replace(f"{CASES}/", ""))


@pytest.mark.parametrize("name", ["c03_reward.jsonl", "c05_verl.log"])
@pytest.mark.parametrize(
    "options", [("--column", "entropy=nosuch"), ("--set", 'guard.extra_signals=["nosuch"]')]
)
def test_a_column_that_is_not_there_is_an_error(
    name: str, options: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, errors = printed(capsys, name, *options)
    assert code == 2 and "'nosuch'" in errors
    assert "reward, entropy" in errors if name == "c03_reward.jsonl" else "actor/entropy" in errors


def test_signals_of_a_policy_file_are_noted_where_they_are_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "guard.toml"
    policy.write_text("[guard]\nsignals = ['reward', 'router']\n")
    code, out, errors = printed(capsys, "c05_verl.log", "--policy", str(policy))
    assert code == 0 and "critic/rewards/mean" in out.splitlines()[0]
    notes = [line for line in errors.splitlines() if "c05_verl.log: guard.extra_signals" in line]
    assert len(notes) == 1 and "'router'" in notes[0]


def test_a_column_of_console_text(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = printed(capsys, "c05_verl.log", "--column", "kl=actor/ppo_kl")
    assert code == 0 and "actor/ppo_kl" in out.splitlines()[0]


def test_a_reward_taken_for_the_loss_is_not_impossible(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = printed(capsys, "c03_reward.jsonl", "--column", "loss=reward")
    assert code == 0 and "impossible" not in out and "rollback " not in out


def test_json_says_what_was_taken_as_what(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = printed(capsys, "c06_mixed_kinds.jsonl", "--json")
    run = json.loads(out)["runs"][0]
    assert run["rows_apart"] == {"evaluation": 12} and run["loss"] == "signed"
    assert run["recorded_only"] == {"reward": "reward", "kl": "kl"}


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "loss", "norm"),
    [
        (
            ["critic/vf_loss", "critic/grad_norm", "actor/pg_loss", "actor/grad_norm"],
            "actor/pg_loss",
            "actor/grad_norm",
        ),
        (["actor/entropy_loss", "loss/value_avg", "loss/policy_avg"], "loss/policy_avg", None),
        (["value_loss", "policy_loss"], "policy_loss", None),
        (["train/cross_entropy_loss", "entropy"], "train/cross_entropy_loss", None),
        (["loss_pg", "loss_rep"], "loss_pg", None),
        (["data/train/loss"], "data/train/loss", None),
        (["kl_loss", "entropy_loss", "vf_loss"], None, None),
    ],
)
def test_losses_of_policies(columns: list[str], loss: str | None, norm: str | None) -> None:
    chosen = names.Chooser().choose(columns)
    assert (chosen.get("loss"), chosen.get("grad_norm")) == (loss, norm)


def test_names_that_show_reinforcement_learning() -> None:
    from guardrail.core.objective import is_policy_loss, shows_policy

    for name in (
        "reward",
        "train/rewards/mean",
        "kl",
        "policy/approxkl_avg",
        "mean_advantage",
        "actor/pg_clipfrac",
    ):
        assert shows_policy(name), name
    for name in (
        "loss",
        "rewards/chosen",
        "rewards/margins",
        "teacher_kl",
        "grad_clip_ratio",
        "update_ratio",
        "entropy",
    ):
        assert not shows_policy(name), name
    assert is_policy_loss("actor/pg_loss") and not is_policy_loss("critic/vf_loss")


# -- a live guard follows the same rule ------------------------------------------------------------


def signed_run(controller: Controller, steps: range, **signals: float) -> list[Action]:
    """A policy loss around 0, and exactly 0 in every third step."""
    actions = []
    for step in steps:
        draw = random.Random(step)
        loss = 0.0 if step % 3 == 0 else draw.gauss(0.0, 0.05)
        observed = {LOSS: loss, "grad_norm": noisy(0.5, noise=0.1)(step), **signals}
        verdict = controller.observe(
            Observation(step=step, first=step, last=step + 1, signals=observed)
        )
        actions.append(verdict.action)
    return actions


@pytest.mark.parametrize(
    ("settings", "signals"),
    [
        (GuardOptions(extra_signals=("reward",)), {"reward": 0.5}),
        (GuardOptions(loss="signed"), {}),
        (GuardOptions(), {}),
    ],
    ids=["by its signals", "by the setting", "by its values"],
)
def test_a_live_guard_does_not_act_on_a_policy_loss(
    settings: GuardOptions, signals: dict[str, float]
) -> None:
    controller = Controller(settings, mode=Mode.AUTO)
    assert set(signed_run(controller, range(1, 300), **signals)) == {Action.APPLY}
    assert controller.detector_set.signed_loss.loss_kind == "signed"
    # What is no number, and what no update of a working run gives, is acted on all the same.
    for loss in (math.nan, math.inf, 1e4, -1e4):
        observed = {LOSS: loss, "grad_norm": 0.5, **signals}
        verdict = controller.observe(Observation(step=300, first=300, last=301, signals=observed))
        assert not verdict.accepted, loss
    noted = controller.observe(
        Observation(step=300, first=300, last=301, signals={LOSS: 3.0, **signals})
    )
    assert noted.accepted and noted.findings[0].severity is Severity.NOTE


def test_a_signed_loss_travels_with_the_state() -> None:
    controller, other = Controller(GuardOptions()), Controller(GuardOptions())
    signed_run(controller, range(1, 100))
    state = through_json(controller.state_dict())
    assert other.load_state_dict(state) == [] and other.state_dict() == controller.state_dict()
    assert other.detector_set.signed_loss.loss_kind == "signed"
    assert signed_run(other, range(100, 200)) == signed_run(controller, range(100, 200))


def test_an_old_state_is_that_of_a_positive_loss() -> None:
    controller = Controller(GuardOptions())
    state: dict[str, Any] = through_json(controller.state_dict())
    del state["detectors"]["signed_loss"]
    assert controller.load_state_dict(state) == ["signed_loss"]
    assert controller.detector_set.signed_loss.loss_kind == "unknown"


def test_a_cross_entropy_of_zero_is_impossible_once_its_kind_is_known() -> None:
    controller = Controller(GuardOptions(), mode=Mode.AUTO)
    for step in range(1, 50):
        signals = {LOSS: noisy(2.0)(step)}
        assert controller.observe(
            Observation(step=step, first=step, last=step + 1, signals=signals)
        ).accepted
    verdict = controller.observe(Observation(step=50, first=50, last=51, signals={LOSS: 0.0}))
    assert verdict.action is Action.SKIP
    (finding,) = verdict.findings
    assert (finding.kind, finding.signal, finding.value) == (FindingKind.IMPOSSIBLE, LOSS, 0.0)
    assert finding.sentence() in verdict.reason


def test_zeros_at_the_start_do_not_blind_the_guard_for_good() -> None:
    """A loss that was 0 at first and has behaved like a cross-entropy since then is judged as
    one.
    """
    controller = Controller(GuardOptions(), mode=Mode.AUTO)
    for step in range(1, 200):
        signals = {LOSS: 0.0 if step < 10 else noisy(2.0)(step)}
        assert controller.observe(
            Observation(step=step, first=step, last=step + 1, signals=signals)
        ).accepted
        if step == 35:
            assert controller.detector_set.signed_loss.loss_kind == "signed"
    assert controller.detector_set.signed_loss.loss_kind == "positive"
    verdict = controller.observe(Observation(step=200, first=200, last=201, signals={LOSS: 20.0}))
    assert verdict.action is Action.SKIP


def test_a_positive_loss_that_turns_negative_is_signed() -> None:
    """No cross-entropy is ever negative, however long it was positive before."""
    controller = Controller(GuardOptions(), mode=Mode.AUTO)
    for step in range(1, 60):
        loss = -0.1 if step in (40, 45, 50) else noisy(0.3)(step)
        assert controller.observe(
            Observation(step=step, first=step, last=step + 1, signals={LOSS: loss})
        ).accepted
        expected = "signed" if step >= 50 else "positive"
        assert controller.detector_set.signed_loss.loss_kind == (
            expected if step >= 20 else "unknown"
        )


@pytest.mark.fault("E16")
def test_a_loss_of_zero_is_reported_with_the_gradients_that_are_not_finite() -> None:
    controller = Controller(GuardOptions(loss="positive"), mode=Mode.AUTO)
    observed = {LOSS: 0.0, "grad_norm": math.nan}
    verdict = controller.observe(Observation(step=1, first=0, last=1, signals=observed))
    found = [(finding.kind, finding.signal) for finding in verdict.findings]
    assert found == [(FindingKind.NONFINITE, "grad_norm"), (FindingKind.IMPOSSIBLE, LOSS)]
    sentences = " and ".join(finding.sentence() for finding in verdict.findings)
    assert verdict.reason.startswith(sentences)
