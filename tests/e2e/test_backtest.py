"""Recorded runs through the live controller: the same verdicts as live, what the command prints,
how it is scored.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from guardrail.backtest.backtest import run_backtest
from guardrail.backtest.importers.sources import find_sources
from guardrail.backtest.rejudge import Rejudge
from guardrail.backtest.scoring import score_runs
from guardrail.cli.main import main
from guardrail.core.config import load_guard_options
from guardrail.core.files import encode_json
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.commands import Command
from guardrail.core.records.findings import FindingKind, Observation
from guardrail.core.records.signals import EMBED_GRAD_NORM, GRAD_NORM, LOSS
from guardrail.core.records.verdicts import Action, Mode
from guardrail.decide.controller import Controller
from guardrail.rundir.run_directory import RunDirectory
from tests.support.running import BLIND, new_run, of_kind, tiny, train, train_with_a_stop, trained
from tests.support.texts import numbers_in

NAN = float("nan")


def noise(count: int, *, level: float = 3.0, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [level * math.exp(draw.gauss(0.0, 0.01)) for _ in range(count)]


def write_log(
    folder: Path,
    losses: Sequence[float | None],
    *,
    steps: Sequence[int] | None = None,
    norms: Sequence[Any] = (),
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["step,loss,grad_norm"]
    for row, loss in enumerate(losses):
        step = steps[row] if steps is not None else row + 1
        rows.append(f"{step},{'' if loss is None else loss},{norms[row] if norms else ''}")
    path = folder / "log.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main(["backtest", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def spiked(tmp_path: Path) -> Path:
    """A thousand records; a spike that stays for six of them at row 500, and one NaN at row 800."""
    losses = noise(1000)
    losses[500:506] = [9.0, 11.0, 12.0, 9.0, 8.0, 7.0]
    losses[800] = NAN
    return write_log(
        tmp_path / "spiked",
        losses,
        steps=range(10, 10_010, 10),
        norms=noise(1000, level=0.5, seed=1),
    )


# -- what it prints --------------------------------------------------------------------------------


def test_json(spiked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = run_json(capsys, str(spiked))
    (run,) = answer["runs"]
    assert (run["path"], run["records"]) == (str(spiked), 1000)
    assert run["steps"] == list(range(10, 10_010, 10))
    assert run["seconds"] >= 0
    first, *_, last = [alarm for alarm in run["alarms"] if alarm["verdict"] != "note"]
    keys = {
        "row",
        "step",
        "onset_row",
        "onset_step",
        "kind",
        "signal",
        "verdict",
        "score",
        "threshold",
    }
    assert all(set(alarm) == keys for alarm in run["alarms"])
    assert (first["row"], first["step"], first["onset_row"], first["onset_step"]) == (
        500,
        5010,
        500,
        5010,
    )
    assert (first["kind"], first["signal"], first["verdict"]) == ("loss_spike", "loss", "skip")
    assert first["score"] > first["threshold"] > 0
    assert (last["row"], last["kind"], last["verdict"]) == (800, "nan", "skip")
    assert "rollback" in {alarm["verdict"] for alarm in run["alarms"] if 500 <= alarm["row"] < 506}


def test_a_line_an_incident_and_a_summary(spiked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backtest", str(spiked)]) == 0
    head, spike, nan, *rest = capsys.readouterr().out.splitlines()
    place, found = head.split(": ")
    assert place == str(spiked) and found.endswith(f" (csv; {', '.join((LOSS, GRAD_NORM))})")
    assert numbers_in(found) == [1000, 10, 10_000], "records, first step, last step"
    assert spike.split()[:3] == ["step", "5,010", "rollback"] and numbers_in(spike)[-1] == 5060
    assert nan.split()[:4] == ["step", "8,010", "skip", "nan"]
    saved = next(line for line in rest if line.startswith("saved"))
    assert "at most 50 steps" in saved, "from the first act at 5,010 to the last alarm at 5,060"
    total = next(line for line in rest if " in 2 incidents (" in line)
    assert [int(word) for word in re.findall(r"\d+ (?=update|rollback)", total)] == [3, 1]


def test_settings_from_a_file_and_the_command_line(
    spiked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("[guard]\nloss_score = 1000.0\n")

    def acted(*arguments: str) -> set[int]:
        (run,) = run_json(capsys, str(spiked), *arguments)["runs"]
        return {
            alarm["row"]
            for alarm in run["alarms"]
            if alarm["verdict"] != "note" and alarm["row"] < 700
        }

    assert acted("--policy", str(policy), "--set", "guard.divergence_score=1000") == set()
    assert acted("--config", str(policy), "--set", "guard.loss_score=8") >= {500, 501, 502}
    assert acted("--set", "guard.mode=off") == set()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "guard.loss_scor=3"], " guard.detectors.spike.loss_threshold?"),
        (["--set", "train.steps=3"], "[guard]"),
        (["--set", "guard.loss_score=x"], "guard.detectors.spike.loss_threshold = "),
        (["--set", "guard.warmup=500"], " guard.detectors.spike.history "),
        (["--policy", "nowhere.toml"], "nowhere.toml"),
        (["--policy", "other.toml"], "[guard]"),
        (["--column", "loss"], "expected SIGNAL=NAME"),
        (["--labels", "nowhere.json"], "nowhere.json"),
        (["--labels", "other.toml"], "not JSON"),
    ],
)
def test_bad_usage(
    arguments: list[str],
    said: str,
    spiked: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(spiked.parent)
    Path("other.toml").write_text("[train]\nsteps = 3\n")
    assert main(["backtest", "log.csv", *arguments]) == 2
    output, errors = capsys.readouterr()
    assert output == "" and said in errors


def test_what_cannot_be_read_is_said_and_the_rest_done(
    spiked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = spiked.parent / "empty.csv"
    empty.touch()
    missing = spiked.parent / "missing.csv"
    assert main(["backtest", str(empty), str(spiked), str(missing)]) == 0
    output, errors = capsys.readouterr()
    assert output.startswith(f"{spiked}: 1,000 records")
    assert errors.splitlines() == [
        f"guardrail: {empty}: empty",
        f"guardrail: {missing}: {os.strerror(errno.ENOENT)}",
    ]
    assert main(["backtest", str(empty), str(missing)]) == 2
    output, errors = capsys.readouterr()
    assert output == "" and len(errors.splitlines()) == 2


# -- the controller sees what was recorded ---------------------------------------------------------


def test_the_same_code_as_live(spiked: Path) -> None:
    (log,) = next(find_sources([str(spiked)])).read({})
    controller = Controller(GuardOptions(), mode=Mode.ADVISE)
    expected = []
    for row, (step, loss, norm) in enumerate(
        zip(log.steps, log.columns["loss"].values, log.columns["grad_norm"].values, strict=True)
    ):
        obs = Observation(
            step=step, first=row, last=row + 1, signals={"loss": loss, "grad_norm": norm}
        )
        verdict = controller.observe(obs)
        if verdict.findings:
            expected.append((row, (verdict.would or Action.APPLY).value, verdict.findings[0].score))
    alarms = run_backtest(log, GuardOptions()).alarms
    assert [(a.row, a.verdict.replace("note", "apply"), a.score) for a in alarms] == expected
    assert len(expected) > 4


def test_a_blank_cell_is_not_observed_and_a_nan_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses: list[float | None] = [
        loss if row % 10 == 0 else None for row, loss in enumerate(noise(2000))
    ]
    losses[1500] = 30.0
    losses[1505] = NAN
    (run,) = run_json(capsys, str(write_log(tmp_path, losses, norms=noise(2000, level=0.5))))[
        "runs"
    ]
    acts = [(alarm["row"], alarm["kind"]) for alarm in run["alarms"] if alarm["verdict"] != "note"]
    assert acts == [(1500, "loss_spike"), (1505, "nan")]
    assert len(run["steps"]) == 2000


@pytest.mark.parametrize(("again", "level"), [(301, 2.0), (1, 6.0)], ids=["resumed", "another run"])
def test_a_counter_that_goes_back_is_one_note(
    again: int, level: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [*range(1, 401), *range(again, again + 400)]
    losses = [*noise(400, level=2.0), *noise(400, level=level, seed=2)]
    (run,) = run_json(capsys, str(write_log(tmp_path, losses, steps=steps)))["runs"]
    assert [(alarm["row"], alarm["kind"], alarm["verdict"]) for alarm in run["alarms"]] == [
        (400, "restart", "note")
    ]


def test_steps_that_begin_at_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = run_json(capsys, str(write_log(tmp_path, [NAN] * 20, steps=range(20))))["runs"]
    assert [alarm["row"] for alarm in run["alarms"]] == list(range(20))
    assert (run["alarms"][0]["onset_row"], run["alarms"][0]["onset_step"]) == (0, 0)


# -- a live run ------------------------------------------------------------------------------------


def as_journaled(findings: Any) -> Any:
    return json.loads(encode_json(findings))


def assert_as_live(run: RunDirectory) -> list[Action]:
    """Every row's verdict, with its evidence, is the one in the journal; returns the verdicts that
    were no apply.
    """
    judge = Rejudge(run, load_guard_options(run.path / "config.toml"), own=True)
    judged = list(judge)
    assert len(judged) == len(run.metrics())
    assert judge.lost == []
    said = [one.line for one in judged if one.line is not None]
    journal = [e for e in run.events() if e.kind in ("verdict", "finding")]
    assert sorted(event.seq for event in said) == [event.seq for event in journal], (
        "each line belongs to a row"
    )
    for one in judged:
        assert one.agrees, one
        if one.line is None:
            assert (
                one.verdict.action in (Action.APPLY, Action.FP16_OVERFLOW)
                and not one.verdict.findings
            )
            continue
        data = one.line.data
        assert data["findings"] == as_journaled(list(one.verdict.findings))
        assert data["onset"] == one.verdict.onset
        assert data["window"] == (list(one.verdict.window) if one.verdict.window else None)
        assert data["incident"] == one.verdict.incident
        assert data["would"] == (one.verdict.would.value if one.verdict.would else None)
    assert_bands_as_live(run)
    return [one.verdict.action for one in judged if one.verdict.action is not Action.APPLY]


def assert_bands_as_live(run: RunDirectory) -> None:
    """The state behind the verdicts is the same as well: each row met the thresholds that its
    metrics record.
    """
    view = run.metrics()
    compared = 0

    def watch(row: int, bands: dict[str, tuple[float, float]]) -> None:
        nonlocal compared
        for signal in (LOSS, GRAD_NORM, EMBED_GRAD_NORM):
            band = view.column(f"{signal}_baseline")[row], view.column(f"{signal}_threshold")[row]
            assert repr([float(value) for value in band]) == repr(
                list(bands.get(signal, (NAN, NAN)))
            ), (row, signal)
            compared += signal in bands

    for _ in Rejudge(run, load_guard_options(run.path / "config.toml"), own=True, watch=watch):
        pass
    assert compared > len(view)


def spike(first: int, last: int) -> dict[str, Any]:
    """A fault that multiplies the loss of every batch with a position in [first, last)."""
    return {"kind": "spike_loss", "first": first, "last": last, "value": 50.0}


def test_run_that_skipped_and_rolled_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nan = {"kind": "nan_loss", "first": 96, "last": 104}
    config = tiny(
        tmp_path, faults=[nan, spike(240, 264), spike(272, 296)], guard=BLIND, train={"steps": 50}
    )
    run = trained(config)
    actions = assert_as_live(run)
    assert actions.count(Action.ROLLBACK) == 2 and actions.count(Action.SKIP) >= 3
    answer = run_json(capsys, str(run.path))["runs"][0]
    assert answer["differing_from_live"] == []
    acts = [alarm["verdict"] for alarm in answer["alarms"] if alarm["verdict"] != "note"]
    assert acts == [action.value for action in actions]


def test_run_on_two_ranks_whose_rollback_came_after_a_restart(tmp_path: Path) -> None:
    config = tiny(
        tmp_path,
        world=2,
        faults=[spike(160, 176), spike(320, 344)],
        guard={"window_before": 4, **BLIND},
        checkpoint={"every": 10, "keep": 4},
        train={"steps": 50},
    )
    run = new_run(config)
    train_with_a_stop(run, 2, step=38)
    (done,) = of_kind(run, "rollback")
    assert (done.data["tier"], done.data["to_step"]) == ("disk", 30)
    actions = assert_as_live(run)
    assert {Action.SKIP, Action.ROLLBACK} == set(actions)


def test_run_that_was_resumed_into_other_data(tmp_path: Path) -> None:
    """The loss stands far below what it was: noted by the process that was resumed, and by nobody
    who was not.
    """
    low = {"kind": "spike_loss", "first": 160, "last": 176, "value": 0.5}
    run = new_run(tiny(tmp_path, faults=[low], train={"steps": 26}))
    run.send(Command(id="stop", kind="stop", at_step=20))
    assert train(run, 1) == "stopped"
    assert train(run, 1) == "finished"
    assert_as_live(run)
    (noted,) = of_kind(run, "finding")
    assert (
        noted.data["at_step"] == 21
        and noted.data["findings"][0]["kind"] == FindingKind.RESUME_JUMP.value
    )


def test_run_whose_mode_was_changed_and_that_was_sent_back_by_hand(tmp_path: Path) -> None:
    modes = {mode: float(index) for index, mode in enumerate(Mode)}
    config = tiny(
        tmp_path, faults=[spike(200, 208), spike(520, 544)], guard=BLIND, train={"steps": 64}
    )
    run = new_run(config)
    for id, step, kind, value in (
        ("advise", 20, "mode", modes[Mode.ADVISE]),
        ("back", 30, "rollback", 15.0),
        ("skip", 31, "skip", 2.0),
        ("off", 33, "mode", modes[Mode.OFF]),
        ("auto", 36, "mode", modes[Mode.AUTO]),
    ):
        run.send(Command(id=id, kind=kind, value=value, at_step=step))
    assert train(run, 1) == "finished"
    assert Action.ROLLBACK in assert_as_live(run)


def test_run_that_asked(tmp_path: Path) -> None:
    guard = {"mode": "ask", "ask_seconds": 0.2, **BLIND}
    run = trained(tiny(tmp_path, faults=[spike(240, 264)], guard=guard, train={"steps": 40}))
    assert Action.PAUSE in assert_as_live(run)


@pytest.mark.parametrize("mode", ["auto", "advise"])
def test_run_whose_gradients_overflowed(mode: str, tmp_path: Path) -> None:
    """Now and then, as a loss scale does, and then in a row whatever the scale."""
    faults = [
        {"kind": "overflow", "first": 0, "last": 10**6, "value": 4096.0},
        {"kind": "overflow", "first": 240, "last": 280, "value": 0.0},
    ]
    train = {"steps": 45, "precision": "fp16", "loss_scale_steps": 8}
    run = trained(tiny(tmp_path, faults=faults, train=train, guard={"overflows": 5, "mode": mode}))
    actions = assert_as_live(run)
    assert actions.count(Action.FP16_OVERFLOW) > 8
    assert actions.count(Action.ROLLBACK) == (mode == "auto")


def test_run_under_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What they would have said of the rows that there are: nothing, if they are blind."""
    run = trained(tiny(tmp_path, faults=[spike(240, 264)], guard=BLIND, train={"steps": 45}))
    blind = [f"--set=guard.{name}_score=1e6" for name in ("loss", "grad", "embed", "divergence")]
    answer = run_json(
        capsys, str(run.path), *blind, "--set=guard.window=32", "--set=guard.warmup=12"
    )["runs"][0]
    assert [alarm for alarm in answer["alarms"] if alarm["verdict"] != "note"] == []
    assert "differing_from_live" not in answer
    awake = ["--set=guard.window=32", "--set=guard.warmup=12"]
    answer = run_json(capsys, str(run.path), *awake)["runs"][0]
    assert {alarm["step"] for alarm in answer["alarms"] if alarm["verdict"] != "note"} == {31}


def test_a_changed_verdict_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of a run whose configuration was edited afterwards do not agree with it."""
    run = trained(tiny(tmp_path, faults=[spike(240, 248)], train={"steps": 40}))
    run.write_config(re.sub(r"(threshold = )[\d.]+", r"\g<1>1e6", run.config_text()))
    answer = run_json(capsys, str(run.path))["runs"][0]
    rows = [row for row, verdict in enumerate(run.metrics().column("verdict")) if verdict]
    assert answer["differing_from_live"] == rows and rows


# -- scores ----------------------------------------------------------------------------------------

LABELS: dict[str, Any] = {
    "spikes": {
        "labels": [
            [1000, "loss_spike", True],
            [3000, "grad_spike", True],
            [4000, "divergence", False],
        ],
        "end_step": [1200, 3000, 5990],
        "may": [[2000, "loss_spike", True, 2050, "small"]],
        "auto_tolerated": [[2500, "grad_spike", True]],
        "use": "score",
    },
    "healthy": {
        "labels": [[None, "none", None]],
        "end_step": [],
        "may": [],
        "auto_tolerated": [],
        "use": "score",
    },
    "resumed": {
        "labels": [[50, "restart", False], [400, "nan", False]],
        "end_step": [60, None],
        "use": "score",
    },
    "other": {"labels": [[1, "nan", False]], "end_step": [9], "use": "fixture"},
    "absent": {"labels": [[1, "nan", False]], "end_step": [9], "use": "score"},
    "_comment": "no run",
}
ALARMS: dict[str, Any] = {
    "spikes": (
        range(0, 6000, 10),
        [
            *[
                (98, "note"),
                (103, "skip"),
                (104, "rollback"),
                (140, "skip"),
                (145, "skip"),
                (160, "note"),
            ],
            *[
                (203, "skip"),
                (250, "note"),
                (252, "skip"),
                (300, "note"),
                (330, "rollback"),
                (390, "pause"),
            ],
            *[(420, "skip"), (425, "halt")],
        ],
    ),
    "healthy": (range(500), [(10, "note"), (20, "note"), (31, "note"), (200, "halt")]),
    "resumed": (
        [*range(100), *range(50, 450)],
        [(48, "skip"), (52, "note"), (100, "note"), (453, "skip")],
    ),
    "other": ([1, 2], []),
}


def test_figures_are_those_of_the_original_scorer() -> None:
    """Frozen from the script with which the labels were published."""
    total, marks = score_runs(LABELS, ALARMS)
    assert total == {
        **{"grave": 4, "acted": 3, "labelled": 5, "noted": 4, "records": 1600},
        **{
            "false_rollbacks": 3,
            "false_skips": 2,
            "false_notes": 4,
            "act_recall": 0.75,
            "note_recall": 0.8,
        },
        **{
            "false_rollbacks_per_10k": 18.75,
            "false_skips_per_10k": 12.5,
            "false_notes_per_10k": 25.0,
        },
        **{"delay_median": 3, "delay_p90": 3, "missing": ["absent"]},
    }
    assert dataclasses.asdict(marks["spikes"]) == {
        **{"grave": 2, "acted": 2, "labelled": 3, "noted": 3, "delays": [3, 20], "records": 600},
        **{"false_rollbacks": 2, "false_skips": 2, "false_notes": 1, "missing": False},
    }
    assert (marks["healthy"].false_notes, marks["healthy"].false_rollbacks) == (2, 1)
    assert (marks["resumed"].acted, marks["resumed"].delays, marks["resumed"].false_notes) == (
        1,
        [3],
        1,
    )


def test_labels(spiked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = [[5010, "loss_spike", True], [8010, "nan", True]]
    labels = {"spiked": {"labels": events, "end_step": [5060, 8010], "use": "score"}}
    labels["elsewhere"] = labels["spiked"]
    file = tmp_path / "labels.json"
    file.write_text(json.dumps(labels))
    answer = run_json(capsys, str(spiked.parent), "--labels", str(file))
    assert answer["figures"]["acted"] == 2 and answer["figures"]["missing"] == ["elsewhere"]
    assert answer["scored"]["spiked"]["delays"] == [0, 0]
    assert main(["backtest", str(spiked), "--labels", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "act_recall               0.5" in lines
    assert any(line.split()[:3] == ["spiked", "2/2", "2/2"] for line in lines)


# -- pictures --------------------------------------------------------------------------------------


def test_plot_without_matplotlib(
    spiked: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["backtest", str(spiked), "--plot", str(tmp_path / "plots")]) == 2
    output, errors = capsys.readouterr()
    assert output == "" and "pip install 'guardrail[plot]'" in errors
    assert not (tmp_path / "plots").exists()


# matplotlib 3.7 uses names of pyparsing that pyparsing 3.3 deprecates.
@pytest.mark.filterwarnings("ignore:.* deprecated.* use :DeprecationWarning")
@pytest.mark.parametrize("ending", ["png", "svg"])
def test_plot(
    ending: str, spiked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    write_log(tmp_path / "nan", [NAN] * 50)
    arguments = ["--svg"] if ending == "svg" else []
    assert main(["backtest", str(tmp_path), "--plot", str(tmp_path / "plots"), *arguments]) == 0
    drawn = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert drawn == [f"nan-log.{ending}", f"spiked-log.{ending}"]
    magic = {"png": b"\x89PNG", "svg": b"<?xml"}[ending]
    assert (tmp_path / "plots" / drawn[1]).read_bytes().startswith(magic)


def test_verdicts_are_json_that_a_strict_parser_reads(
    spiked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["backtest", str(spiked), "--json"]) == 0
    assert msgspec.json.decode(capsys.readouterr().out)["summary"]["records"] == 1000
