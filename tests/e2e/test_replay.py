"""A stretch that is run again gives every number again, whatever happened in it; and one that does
not is found.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from guardrail.cli.main import main
from guardrail.core.errors import UsageError
from guardrail.core.events.event import Event
from guardrail.core.records.commands import Command
from guardrail.core.records.verdicts import Mode
from guardrail.decide.timelines import TimelineIndex
from guardrail.operate import replay_comparison, replay_plan
from guardrail.operate.replay import ReplayOutcome, make_outcome, make_scratch_run
from guardrail.operate.replay_comparison import Comparison
from guardrail.operate.replay_plan import ReplayPlan, machine_remarks, plan_replay, starts_in
from guardrail.rundir.checkpoint_folders import checkpoint_dirs
from guardrail.rundir.manifest import read_manifest
from guardrail.rundir.metrics import MetricsView
from guardrail.rundir.run_directory import RunDirectory
from tests.support.events import make_line
from tests.support.running import BATCH, BLIND, new_run, of_kind, tiny, train
from tests.support.texts import numbers_in

LR, SKIP, ROLLBACK, UNDO, STOP, POLICY = (
    "lr",
    "skip",
    "rollback",
    "undo",
    "stop",
    "mode",
)


def spike(first: int, last: int) -> dict[str, Any]:
    return {"kind": "spike_loss", "first": first, "last": last, "value": 50.0}


@pytest.fixture(scope="module")
def eventful(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Two ranks, two incidents, of which the second is undone in part, commands, evaluations, and
    an end in between.
    """
    folder = tmp_path_factory.mktemp("eventful")
    config = tiny(
        folder,
        world=2,
        faults=[spike(200, 224), spike(400, 408)],
        guard=BLIND,
        checkpoint={"every": 10, "keep": 3},
        data={"eval_fraction": 0.1},
        train={"steps": 64, "eval_every": 8},
    )
    run = new_run(config)
    for number, (step, kind, value) in enumerate(
        [
            (12, LR, 0.5),
            (15, SKIP, 2.0),
            (36, ROLLBACK, 30.0),
            (44, STOP, 0.0),
            (52, UNDO, math.nan),
            (54, POLICY, float(list(Mode).index(Mode.ADVISE))),
        ]
    ):
        run.send(Command(id=f"c{number}", kind=kind, value=value, at_step=step))
    assert train(run, 2) == "stopped"
    assert train(run, 2) == "finished"
    assert [event.data["effect"] for event in of_kind(run, "command")] == ["applied"] * 6
    assert len(of_kind(run, "rollback")) == 2 and len(of_kind(run, "undo")) == 1
    return run


def files(run: RunDirectory) -> dict[Path, tuple[int, int]]:
    return {path: ((info := path.stat()).st_mtime_ns, info.st_size) for path in run.path.rglob("*")}


class Again(NamedTuple):
    """A replay of the whole run, by ranks that are forked instead of launched."""

    stretch: ReplayPlan
    scratch: RunDirectory
    before: dict[Path, tuple[int, int]]  # files of the run before it

    def held_against(self, run: RunDirectory) -> ReplayOutcome:
        compared = Comparison(run, self.scratch, self.stretch)
        return make_outcome(run, self.scratch, self.stretch, compared, keep=False)


@pytest.fixture(scope="module")
def again(eventful: RunDirectory) -> Iterator[Again]:
    before = files(eventful)
    scratch = make_scratch_run(eventful, stretch := plan_replay(eventful))
    assert train(scratch, 2) in ("stopped", "finished")
    yield Again(stretch, scratch, before)
    shutil.rmtree(scratch.path)


def test_a_whole_run_from_its_beginning(eventful: RunDirectory, again: Again) -> None:
    found = again.held_against(eventful)
    assert found.same, found.sentence()
    assert (found.from_step, found.to_step, found.steps, found.missing) == (0, 64, 64, 0)
    assert {
        "loss",
        "grad_norm",
        "embed_grad_norm",
        "lr",
        "tokens",
        "first",
        "last",
        "eval_loss",
    } <= set(found.columns)
    assert (found.weights_step, found.weights_same) == (64, True)
    assert numbers_in(found.sentence()) == [1, 64, 64 * len(found.columns), 64]
    assert files(eventful) == again.before, "the run itself is only read"
    assert not [
        e for e in of_kind(again.scratch, "verdict") if e.seq > eventful.events()[-1].seq
    ], "nothing is decided"


def test_an_incident_from_the_checkpoint_before_it_by_the_command_line(
    eventful: RunDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the supervisor and torch elastic, as launch does it."""
    stretch = plan_replay(eventful, 2)
    assert stretch.base is not None and 0 < stretch.from_step < stretch.to_step < 64
    assert main(["replay", str(eventful.path), "--incident", "2", "--json", "--keep"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert (
        said["same"]
        and said["steps"] == stretch.to_step - stretch.from_step
        and said["first"] is None
    )
    scratch = RunDirectory.open(said["scratch"])
    assert scratch.path.parent == eventful.path.parent and len(scratch.metrics()) == said["steps"]
    shutil.rmtree(scratch.path)


def test_a_number_that_is_not_the_same_is_named(
    eventful: RunDirectory, again: Again, tmp_path: Path
) -> None:
    run = copied(eventful, tmp_path)
    view = run.metrics()
    row = int(np.flatnonzero(view.current() & (view.column("step") == 40))[0])
    table = np.memmap(
        run.metrics_path, dtype="<f8", mode="r+", shape=(len(view), len(view.columns))
    )
    column = view.columns.index("grad_norm")
    was = float(table[row, column])
    table[row, column] = np.nextafter(was, 9.0)
    table.flush()
    found = again.held_against(run)
    assert not found.same and found.first is not None
    assert (found.first.step, found.first.column, found.first.now) == (40, "grad_norm", was)
    assert found.sentence().endswith(f": {found.first.sentence()}")
    assert " grad_norm " in found.sentence() and numbers_in(found.sentence())[0] == 40


def test_the_same_numbers_with_other_weights_are_not_the_same(
    eventful: RunDirectory, again: Again, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay_comparison, "fingerprint", str)  # two folders, two fingerprints
    found = again.held_against(eventful)
    assert not found.same and found.first is None
    assert (found.weights_step, found.weights_same) == (64, False)
    assert numbers_in(found.sentence()) == [64]


def test_a_replay_that_lost_rows_is_not_called_the_same(eventful: RunDirectory) -> None:
    stretch = plan_replay(eventful)
    scratch = make_scratch_run(eventful, stretch)
    found = make_outcome(
        eventful, scratch, stretch, Comparison(eventful, scratch, stretch), keep=False
    )
    shutil.rmtree(scratch.path)
    assert not found.same and found.missing == 64
    assert numbers_in(found.sentence()) == [64, 1, 64], "64 of steps 1 to 64"


def copied(run: RunDirectory, folder: Path) -> RunDirectory:
    shutil.copytree(run.path, folder / "runs" / "copy")
    return RunDirectory.open(folder / "runs" / "copy")


# -- what cannot be replayed


def test_what_cannot_be_replayed_is_refused_with_a_way_out(
    eventful: RunDirectory, tmp_path: Path
) -> None:
    run = copied(eventful, tmp_path)
    with pytest.raises(UsageError, match=r" 9\n  hint: .* 1, 2"):
        plan_replay(run, 9)
    for folder in checkpoint_dirs(run.checkpoints):
        if int(folder.name.split("-")[1]) < 24:
            shutil.rmtree(folder)
    oldest = min(read_manifest(folder).step for folder in checkpoint_dirs(run.checkpoints))
    with pytest.raises(UsageError, match=r"incident 1 \(step 24\)") as caught:
        plan_replay(run, 1)
    assert numbers_in(str(caught.value).partition("hint: ")[2]) == [oldest, 0]
    assert plan_replay(run).to_step == 64, "from the beginning no checkpoint is needed"
    run.write_config(run.config_text().replace("processes = 2", "processes = 1"))
    with pytest.raises(UsageError) as caught:
        plan_replay(run)
    assert numbers_in(str(caught.value).removeprefix(run.name)) == [2, 0, 1], "ranks, then and now"


def test_a_device_that_is_not_here_and_a_run_without_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory.create(tmp_path, "young", "")
    with pytest.raises(UsageError) as caught:
        plan_replay(run)
    assert caught.value.kind == "no_steps"
    with run.metrics_writer() as writer:
        writer.append({"step": 1, "timeline": 0, "verdict": 0})
    run.append("started", world=1, device="cuda", versions={"torch": "1.0.0"})
    monkeypatch.setattr(replay_plan, "count_cuda_devices", lambda: 0)
    with pytest.raises(UsageError, match="CUDA devices"):
        plan_replay(run)
    (said,) = machine_remarks(run)
    assert said.startswith("torch was 1.0.0 and is ")
    monkeypatch.setattr(replay_plan, "count_cuda_devices", lambda: 1)
    assert plan_replay(run) == ReplayPlan(None, 0, 1)
    with pytest.raises(UsageError, match="`guardrail launch`"):
        make_scratch_run(run, plan_replay(run))
    assert list(run.path.parent.iterdir()) == [run.path]


def test_only_the_starts_of_the_stretch_count() -> None:
    def start(step: int, world: int) -> Event:
        kind = "restarted" if step else "started"
        return make_line(seq=1, time=0.0, step=step, timeline=0, kind=kind, data={"world": world})

    # that at step 20 gave up what 30 began
    events = [start(0, 1), start(30, 2), start(20, 3), start(60, 4)]

    def worlds(*stretch: int) -> list[int]:
        return [event.data["world"] for event in starts_in(events, ReplayPlan(None, *stretch))]

    assert (
        worlds(0, 10) == [1]
        and worlds(0, 30) == [1, 3]
        and worlds(25, 60) == [3]
        and worlds(60, 70) == [4]
    )


def test_positions_of_the_stretch_are_those_of_the_run(eventful: RunDirectory) -> None:
    """The fixture is what it claims: its present leaves out both windows and the skipped
    batches.
    """
    view = eventful.metrics()
    here = view.current() & (view.column("verdict") == 0)
    firsts = view.column("first")[here].tolist()
    assert 15 * BATCH not in firsts and 200 not in firsts and 400 in firsts, (
        "what was undone is met again"
    )


class Growing:
    """A run of which more rows are there each time; counts the numbers that are read of it."""

    def __init__(self, table: np.ndarray, columns: tuple[str, ...]) -> None:
        self.table, self.columns, self.rows, self.read = table, columns, 0, 0

    def metrics(self) -> MetricsView:
        outer = self

        class Counting(MetricsView):
            def column(self, name: str) -> np.ndarray:
                outer.read += len(self.array)
                return super().column(name)

        return Counting(self.columns, self.table[: self.rows], TimelineIndex)


@pytest.mark.fault("C3")
def test_each_row_of_a_replay_is_compared_once() -> None:
    """Not all rows each time that the replay is looked at."""
    columns = ("step", "timeline", "verdict", "loss", "grad_norm")
    table = np.zeros((4000, len(columns)))
    table[:, 0] = np.arange(1, 4001)
    table[:, 3:] = np.random.default_rng(0).normal(size=(4000, 2))
    run, scratch = Growing(table, columns), Growing(table.copy(), columns)
    run.rows = 4000
    compared = Comparison(run, scratch, ReplayPlan(None, 0, 4000))  # type: ignore[arg-type]
    for rows in range(0, 4001, 20):
        scratch.rows = rows
        compared.compare_new_rows()
        assert (compared.steps, compared.first) == (rows, None)
    assert scratch.read < 4 * table.size


def test_rows_are_compared_as_they_come_and_at_the_end() -> None:
    """A rollback within the replay, a number that is not the same, and a NaN that is."""
    columns = ("step", "timeline", "verdict", "loss")
    was = np.array([[step, 0, 0, math.nan if step == 3 else step / 10] for step in range(1, 11)])
    now = np.concatenate(
        [was[:6], np.array([[step, 1, 0, step / 10] for step in (5, 6, 7, 8, 9, 10)])]
    )
    now[5, 3] = 7.0  # step 6, abandoned by the rollback to step 4
    run, scratch = Growing(was, columns), Growing(now, columns)
    run.rows, scratch.rows = len(was), 5
    compared = Comparison(run, scratch, ReplayPlan(None, 0, 10))  # type: ignore[arg-type]
    compared.compare_new_rows()
    assert (compared.steps, compared.first, compared.missing) == (5, None, 5)
    scratch.rows = len(now)
    compared.compare_new_rows()
    assert (compared.steps, compared.first) == (10, None), "abandoned before it was looked at"
    now[11, 3] = 2.0
    compared.finish()
    assert compared.first is not None and (compared.first.step, compared.first.now) == (10, 2.0)
    assert compared.first.column == "timeline" or compared.first.column == "loss"
