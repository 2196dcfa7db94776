"""What people ask of a run: pause, answer, skip, roll back, learning rates. Each is answered in the
journal.
"""

import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guardrail.core.records.commands import Command
from guardrail.core.records.status import Phase, Status
from guardrail.core.records.verdicts import Mode
from guardrail.decide.control_commands.answer import NO_QUESTION
from guardrail.decide.control_commands.resume import NOT_PAUSED
from guardrail.rundir.checkpoint_folders import checkpoint_dirs
from guardrail.rundir.manifest import read_manifest
from guardrail.rundir.run_directory import RunDirectory
from tests.support.lab import wait_for
from tests.support.ranks import wait_ranks
from tests.support.running import (
    BATCH,
    BLIND,
    FEW_SHAPES,
    SHAPES,
    assert_same,
    assert_whole,
    final,
    new_run,
    of_kind,
    outcome,
    prompt_disk,
    spans,
    start_run,
    table,
    tiny,
    told,
    train,
    trained,
)
from trainer.config.config import Config
from trainer.config.schedule import Schedule
from trainer.train import Trainer

# step 21 is tried three times
SPIKE = {"kind": "spike_loss", "first": 160, "last": 184, "value": 50.0}


def asking(folder: Path, *, world: int = 1, **guard: Any) -> Config:
    guard = {"mode": "ask", **BLIND, **guard}
    return tiny(folder, world=world, faults=[SPIKE], guard=guard, train={"steps": 32})


def send(run: RunDirectory, name: str, kind: str, value: float = 0.0, at_step: int = 0) -> None:
    run.send(Command(id=name, kind=kind, value=value, at_step=at_step, who="tester"))


def answers(run: RunDirectory) -> dict[str, tuple[str, int]]:
    """Command id -> (applied or refused, the step at which it was)."""
    return {
        event.data["id"]: (event.data["effect"], event.step) for event in of_kind(run, "command")
    }


def status_of(run: RunDirectory) -> Status:
    status = run.read_status()
    assert status is not None
    return status


def parked(run: RunDirectory, world: int = 1) -> list[int]:
    """Start the ranks and wait until they are parked; their pids."""
    before = len(of_kind(run, "paused"))
    pids = start_run(run, world)
    wait_for(lambda: len(of_kind(run, "paused")) > before, what="a pause")
    wait_for(
        lambda: (s := run.read_status()) is not None and s.phase is Phase.PAUSED, what="its status"
    )
    return pids


def test_each_command_is_answered_with_its_step(tmp_path: Path) -> None:
    run = new_run(tiny(tmp_path, world=2, train={"steps": 60}))
    send(run, "slower", "lr", 0.5, at_step=5)
    send(run, "save", "checkpoint", at_step=7)
    send(run, "watch", "mode", list(Mode).index(Mode.ADVISE), at_step=9)
    send(run, "resume", "resume", at_step=11)
    send(run, "answer", "answer", 1, at_step=13)
    send(run, "nowhere", "rollback", 3, at_step=15)
    send(run, "shrink", "shrink-embedding", 0.1, at_step=17)
    send(run, "skip", "skip", 2, at_step=19)
    send(run, "stop", "stop", at_step=25)
    send(run, "late", "pause", at_step=40)
    (run.commands / "nonsense.json").write_text('{"kind": "dance"}')
    with prompt_disk():
        assert train(run, 2) == "stopped"
    given = answers(run)
    assert given.pop("nonsense")[0] == "refused"
    assert given == {
        "slower": ("applied", 5),
        "save": ("applied", 7),
        "watch": ("applied", 9),
        "resume": ("refused", 11),
        "answer": ("refused", 13),
        "nowhere": ("refused", 15),
        "shrink": ("applied", 17),
        "skip": ("applied", 19),
        "stop": ("applied", 25),
    }
    reasons = {event.data["id"]: event.data["reason"] for event in of_kind(run, "command")}
    assert reasons["resume"] == NOT_PAUSED
    assert reasons["answer"] == NO_QUESTION
    assert "step 3" in reasons["nowhere"]
    assert all(
        event.data["who"] == "tester"
        for event in of_kind(run, "command")
        if event.data["id"] in given
    )
    assert [path.name.split("-", 1)[1] for path in run.commands.iterdir()] == ["late.json"]
    assert status_of(run).mode is Mode.ADVISE and status_of(run).lr_factor == 0.5
    assert {read_manifest(path).step for path in checkpoint_dirs(run.checkpoints)} >= {0, 7, 20, 25}
    assert [(span.first, span.last, span.origin) for span in spans(run)] == [
        (19 * BATCH, 21 * BATCH, "user")
    ]
    assert len(table(run)) == 25
    assert_whole(run)


def test_the_embedding_is_shrunk_from_the_next_step_on(tmp_path: Path) -> None:
    run, plain = (
        new_run(tiny(tmp_path, train={"steps": 12})),
        new_run(tiny(tmp_path, train={"steps": 12})),
    )
    send(run, "shrink", "shrink-embedding", 0.1, at_step=5)
    assert train(run, 1) == train(plain, 1) == "finished"
    losses = table(run, ("loss",)), table(plain, ("loss",))
    assert np.array_equal(losses[0][:6], losses[1][:6])
    assert not np.array_equal(losses[0][6:], losses[1][6:])


# -- pausing


@pytest.mark.parametrize(
    ("world", "strategy"), [(2, "ddp"), pytest.param(2, "fsdp", marks=pytest.mark.slow)]
)
def test_parked_for_longer_than_a_collective_may_take(
    tmp_path: Path, world: int, strategy: str
) -> None:
    launch = {"collective_seconds": 3.0}
    config = tiny(tmp_path, world=world, strategy=strategy, launch=launch, train={"steps": 30})
    run = new_run(config)
    send(run, "pause", "pause", at_step=10)
    pids = parked(run, world)
    began = time.monotonic()
    assert status_of(run).question == ""
    send(run, "again", "pause")
    send(run, "skip", "skip", 2)
    send(run, "save", "checkpoint")
    send(run, "watch", "mode", list(Mode).index(Mode.ADVISE))
    send(run, "back", "rollback", 5)
    wait_for(lambda: "back" in answers(run), what="answers while parked")
    # A rollback by hand does not end a pause by hand.
    wait_for(
        lambda: (status_of(run).phase, status_of(run).step) == (Phase.PAUSED, 5),
        what="a pause at step 5",
    )
    time.sleep(max(0.0, began + 5.0 - time.monotonic()))
    send(run, "resume", "resume")
    assert wait_ranks(pids) == [0, 0]
    assert outcome(run) == "finished"
    assert answers(run) == {
        "pause": ("applied", 10),
        "again": ("refused", 10),
        "skip": ("applied", 10),
        "save": ("applied", 10),
        "watch": ("applied", 10),
        "back": ("applied", 10),
        "resume": ("applied", 5),
    }
    assert_same(run, trained(told(config, run)))


def test_a_save_that_was_asked_for_while_parked_survives_a_kill(tmp_path: Path) -> None:
    config = tiny(tmp_path, train={"steps": 20})
    run, whole = new_run(config), trained(config)
    send(run, "pause", "pause", at_step=7)
    (pid,) = parked(run)
    send(run, "save", "checkpoint")
    wait_for(
        lambda: any(e.data.get("cp_step") == 7 for e in of_kind(run, "checkpoint")),
        what="a checkpoint",
    )
    os.kill(pid, signal.SIGKILL)
    assert wait_ranks([pid]) == [-signal.SIGKILL]
    assert train(run, 1) == "finished"
    assert of_kind(run, "restarted")[0].step == 7
    assert_same(run, whole)


def test_stop_at_an_evaluation_says_nothing_after_its_last_word(tmp_path: Path) -> None:
    run = new_run(
        tiny(tmp_path, data={"eval_fraction": 0.1}, train={"steps": 30, "eval_every": 10})
    )
    send(run, "stop", "stop", at_step=10)
    assert train(run, 1) == "stopped"
    assert run.events()[-1].kind == "ended"
    assert [event.step for event in of_kind(run, "eval")] == [10]
    assert status_of(run).phase is Phase.STOPPED and run.read_ranks()[0].phase is Phase.STOPPED


# -- asking


@pytest.mark.parametrize(
    ("world", "strategy"),
    [SHAPES[0], pytest.param(*SHAPES[1], marks=pytest.mark.slow), FEW_SHAPES[2]],
)
def test_ask_and_do_as_proposed(tmp_path: Path, world: int, strategy: str) -> None:
    ask = tiny(
        tmp_path,
        world=world,
        strategy=strategy,
        faults=[SPIKE],
        guard={"mode": "ask", **BLIND},
        train={"steps": 32},
    )
    run = new_run(ask)
    pids = parked(run, world)
    wait_for(lambda: status_of(run).question, what="a question")
    assert "rollback" in status_of(run).question and "loss" in status_of(run).question
    (paused,) = of_kind(run, "paused")
    assert (paused.step, paused.data["proposals"][0]["action"]) == (20, "rollback")
    send(run, "yes", "answer", 0)
    assert wait_ranks(pids) == [0] * world
    assert status_of(run).question == ""
    assert len(of_kind(run, "rollback")) == 1
    auto = tiny(
        tmp_path, world=world, strategy=strategy, faults=[SPIKE], guard=BLIND, train={"steps": 32}
    )
    assert_same(run, trained(auto))


def test_ask_and_go_on(tmp_path: Path) -> None:
    config = asking(tmp_path, world=2)
    run = new_run(config)
    pids = parked(run, 2)
    send(run, "no", "answer", 1)
    assert wait_ranks(pids) == [0, 0]
    assert not of_kind(run, "rollback")
    assert [span.first for span in spans(run)] == [160, 168]
    assert table(run)[20, 1] == 176, "the update under question was applied"
    assert_same(run, trained(told(config, run)))


def test_ask_and_stop_and_be_asked_again(tmp_path: Path) -> None:
    run = new_run(asking(tmp_path))
    pids = parked(run)
    send(run, "stop", "answer", 2)
    assert wait_ranks(pids) == [0]
    assert outcome(run) == "stopped"
    assert len(table(run)) == 20 and [span.first for span in spans(run)] == [160, 168]
    pids = parked(run)
    send(run, "yes", "answer", 0)
    assert wait_ranks(pids) == [0]
    assert outcome(run) == "finished"
    assert_same(run, trained(tiny(tmp_path, faults=[SPIKE], guard=BLIND, train={"steps": 32})))


@pytest.mark.parametrize(("kind", "value"), [("skip", 2), ("rollback", 10)])
def test_ask_and_answer_by_another_deed(tmp_path: Path, kind: str, value: float) -> None:
    config = asking(tmp_path, world=2)
    run = new_run(config)
    pids = parked(run, 2)
    send(run, "slower", "lr", 1.0)
    send(run, "deed", kind, value)
    assert wait_ranks(pids) == [0, 0]
    assert answers(run) == {"slower": ("applied", 20), "deed": ("applied", 20)}
    assert spans(run)[-1].origin == "user"
    left_out = [176, 192] if kind == "skip" else [80, 184]
    assert [spans(run)[-1].first, spans(run)[-1].last] == left_out
    assert_same(run, trained(told(config, run)))


def test_a_rate_that_is_set_while_the_guard_asks_is_that_of_the_update_and_of_its_row(
    tmp_path: Path,
) -> None:
    config = asking(tmp_path)
    run = new_run(config)
    pids = parked(run)
    send(run, "slower", "lr", 0.5)
    send(run, "on", "answer", 1)
    assert wait_ranks(pids) == [0]
    assert answers(run) == {"slower": ("applied", 20), "on": ("applied", 20)}
    schedule = Schedule.from_section(config.optim, steps=32)
    assert table(run, ("lr",))[:, 0].tolist() == [
        schedule(s) * (0.5 if s > 20 else 1.0) for s in range(1, 33)
    ]


def test_a_command_that_comes_with_the_step_under_question_is_answered_at_once(
    tmp_path: Path,
) -> None:
    """It could be a stop, and whoever sent it waits."""
    run = new_run(asking(tmp_path))
    for name in ("first", "second"):  # each attempt at step 21 takes one command
        send(run, name, "checkpoint", at_step=21)
    send(run, "slower", "lr", 0.5, at_step=21)
    pids = parked(run)
    wait_for(lambda: "slower" in answers(run), what="an answer while the guard asks")
    send(run, "yes", "answer", 0)
    assert wait_ranks(pids) == [0]
    given = answers(run)
    assert list(given) == ["first", "second", "slower", "yes"]
    assert given["slower"] == ("applied", 20)
    assert not list(run.commands.iterdir())


def test_ask_decides_alone_after_its_deadline(tmp_path: Path) -> None:
    run = trained(asking(tmp_path, ask_seconds=0.3))
    assert len(of_kind(run, "paused")) == len(of_kind(run, "rollback")) == 1


# -- the end of the budget


@pytest.mark.parametrize("mode", ["auto", "ask"])
def test_out_of_budget_and_nobody_there(tmp_path: Path, mode: str) -> None:
    run = new_run(asking(tmp_path, world=2, mode=mode, rollbacks=0))
    assert train(run, 2) == "halted"
    assert status_of(run).phase is Phase.HALTED and status_of(run).step == 20
    (ended,) = of_kind(run, "ended")
    assert ended.data["saved"] and "guard.max_rollbacks" in ended.data["reason"]
    assert read_manifest(checkpoint_dirs(run.checkpoints)[0]).step == 20
    assert final(run)


def test_out_of_budget_with_a_screen_it_waits(tmp_path: Path) -> None:
    run = new_run(asking(tmp_path, rollbacks=0))
    run.screen_seen()
    (pid,) = parked(run)
    assert "halt" in status_of(run).question
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    run.screen_gone()
    assert wait_ranks([pid]) == [0]
    assert outcome(run) == "halted"


# -- rates that people set


def killed_at(patch: pytest.MonkeyPatch, step_number: int) -> None:
    whole = Trainer.train_step

    def lethal(self: Trainer, step: Any) -> None:
        if step.number == step_number:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(self, step)

    patch.setattr(Trainer, "train_step", lethal)


def test_a_learning_rate_factor_is_exact_under_rollback_and_crash(tmp_path: Path) -> None:
    config = tiny(
        tmp_path,
        world=2,
        faults=[SPIKE],
        guard=BLIND,
        train={"steps": 40},
        checkpoint={"every": 10},
    )

    def commanded() -> RunDirectory:
        run = new_run(config)
        send(run, "slower", "lr", 0.5, at_step=8)
        send(run, "slowest", "lr", 0.25, at_step=19)
        return run

    whole, killed = commanded(), commanded()
    assert train(whole, 2) == "finished"
    to_step = of_kind(whole, "rollback")[0].data["to_step"]
    assert to_step == 15
    # 0.25 was set because of what was seen; after going back behind that, it holds from there on.
    schedule = Schedule.from_section(config.optim, steps=40)
    factors = [1.0] * 8 + [0.5] * 7 + [0.25] * 25
    assert table(whole, ("lr",))[:, 0].tolist() == [
        schedule(step) * factor for step, factor in enumerate(factors, start=1)
    ]
    for step_number in (14, 20, 27):
        with pytest.MonkeyPatch.context() as patch:
            killed_at(patch, step_number)
            assert wait_ranks(start_run(killed, 2)) == [-signal.SIGKILL] * 2
    assert train(killed, 2) == "finished"
    assert len(of_kind(killed, "restarted")) == 3
    assert answers(killed) == answers(whole)
    assert_same(killed, whole)
    assert math.isclose(status_of(killed).lr_factor, 0.25)
