"""Incidents of real ranks are replayed: a rollback with a remedy, single samples in quarantine, an
undo. And a journal in which one line was falsified does not give the numbers of the run."""

from __future__ import annotations

import json
import math
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from guardrail.cli.main import main
from guardrail.core.records.commands import Command
from guardrail.operate import replay as replaying
from guardrail.operate.replay_comparison import Comparison
from guardrail.operate.replay_plan import ReplayPlan
from guardrail.rundir.run_directory import RunDirectory
from tests.e2e.test_attribution import LENGTH, plant
from tests.support.running import new_run, of_kind, spans, tiny, train

STRUCK, UNDONE, STEPS = 24, 46, 48
ESCALATION = [{"do": "skip"}, {"do": "lower_lr", "factor": 0.5, "hold": 2, "back": 2, "times": 3}]


@pytest.fixture(scope="module", params=["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Two ranks: something strikes the state, which calls for a rollback and a lower rate; of
    documents of noise single samples are left out; and the newest of these decisions is undone."""
    folder = tmp_path_factory.mktemp(request.param)
    plant(folder)
    config = tiny(
        folder,
        world=2,
        strategy=request.param,
        data={"sequence_length": LENGTH},
        optim={"lr": 1e-2},
        faults=[{"kind": "spike_loss", "step": STRUCK, "times": 2, "value": 40.0}],
        guard={"confirm": 1, "ladder": [*ESCALATION]},
        checkpoint={"every": 8, "keep": 6},
        train={"steps": STEPS},
    )
    made = new_run(config)
    made.send(Command(id="back", kind="undo", value=math.nan, at_step=UNDONE))
    assert train(made, 2) == "finished"
    assert of_kind(made, "rollback") and len(of_kind(made, "undo")) == 1
    assert any(span.positions for span in spans(made)) and incidents(made)[0] < incidents(made)[-1]
    return made


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are forked instead of launched, and what struck the state by itself does not come
    again; all else is the command's own. tests/e2e/test_replay.py launches them.

    Forked ranks share the standard output of the test, and with torch 2.10 Gloo prints there. So the
    tests read the command's output by `capsys`, not `capfd`."""

    def follow(
        scratch: RunDirectory, compared: Comparison, stretch: ReplayPlan, tell: Any, signals: Any
    ) -> None:
        tree = tomllib.loads(scratch.config_text())
        scratch.write_config(tomli_w.dumps(tree | {"faults": []}))
        assert train(scratch, 2) in ("stopped", "finished")

    monkeypatch.setattr(replaying, "_follow", follow)


def incidents(run: RunDirectory) -> list[int]:
    """The one that went back, one that left single samples out, and the one that was undone."""
    (undo,) = of_kind(run, "undo")
    lines = [*of_kind(run, "skipped"), *of_kind(run, "rollback")]
    chosen = [event for event in lines if event.data["span"]["positions"]]
    return [
        of_kind(run, "rollback")[0].data["incident"],
        chosen[0].data["incident"],
        undo.data["incident"],
    ]


def test_every_kind_of_incident_gives_the_same_numbers(
    run: RunDirectory, forked: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in sorted({*incidents(run)}):
        assert main(["replay", str(run.path), "--incident", str(number), "--json"]) == 0, number
        said = json.loads(capsys.readouterr().out)
        assert (
            said["same"]
            and said["steps"] == said["to_step"] - said["from_step"] > 0
            and not said["missing"]
        )
        assert said["incident"] == number and {"loss", "grad_norm", "lr", "last"} <= set(
            said["columns"]
        )


def falsified(
    run: RunDirectory, folder: Path, change: Callable[[dict[str, Any]], bool]
) -> RunDirectory:
    """A copy of a run in whose journal the first decision that `change` takes is another."""
    shutil.copytree(run.path, folder / "runs" / "copy")
    copy = RunDirectory.open(folder / "runs" / "copy")
    lines = [json.loads(line) for line in copy.journal_path.read_text().splitlines()]
    assert any(line["kind"] in ("skipped", "rollback") and change(line) for line in lines)
    copy.journal_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return copy


def other_sample(line: dict[str, Any]) -> bool:
    """Another sample of the same batch was left out than the one that was."""
    span = line["span"]
    free = [at for at in range(span["first"], span["last"]) if at not in span["positions"]]
    if not span["positions"]:
        return False
    span["positions"] = sorted([free[len(free) // 2], *span["positions"][1:]])
    return True


def other_rate(line: dict[str, Any]) -> bool:
    """The lower rate was another one."""
    for remedy in line.get("remedies", ()):
        if remedy["kind"] == "lr":
            remedy["value"] *= 1.0 + 1e-9
            return True
    return False


@pytest.mark.parametrize(("change", "column"), [(other_sample, "loss"), (other_rate, "lr")])
def test_a_falsified_line_is_found_and_the_number_named(
    run: RunDirectory,
    forked: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Any]], bool],
    column: str,
) -> None:
    copy = falsified(run, tmp_path, change)
    assert main(["replay", str(copy.path), "--json"]) == 5
    said = json.loads(capsys.readouterr().out)
    assert not said["same"] and said["first"]["column"] == column
    assert said["first"]["step"] > 0 and said["first"]["was"] != said["first"]["now"]
