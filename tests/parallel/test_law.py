"""The law of exactness from end to end, in one run of four epochs: a rollback, one that is widened,
a quarantine of two samples out of a batch, a death right behind its journal line, and then a
decision taken back. What is left at the end is the run of somebody who was told from the beginning
what is left out, and had no guard."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from guardrail.core.events.event import Event
from guardrail.core.records.commands import Command
from guardrail.decide.control_commands.registry import own_lines
from guardrail.decide.run_history import RunHistory
from guardrail.report.quarantine import quarantine_lines
from guardrail.rundir.checkpoint_folders import checkpoint_dirs
from guardrail.rundir.manifest import read_manifest
from guardrail.rundir.run_directory import RunDirectory
from tests.support.ranks import wait_ranks
from tests.support.running import (
    BATCH,
    BLIND,
    LENGTH,
    SHAPES,
    assert_same,
    assert_whole,
    corpus_of,
    new_run,
    of_kind,
    prompt_disk,
    said,
    start_run,
    tiny,
    told,
    train,
    trained,
    write_corpus,
)
from tests.support.texts import numbers_in
from trainer.config.config import Config

PIECES, SAMPLES = 8, 200
NEITHER = ("checkpoint", "started", "ended")
ESCALATION = [{"do": "skip"}, {"do": "rollback"}, {"do": "widen", "times": 2}]


def mild_then_strong(batch: int, mild: float, strong: float) -> list[dict[str, Any]]:
    """Three bad batches that are applied, and one that is found out: an update of such data is in
    the weights.
    """
    parts = ((batch, batch + 3, mild), (batch + 3, batch + 4, strong))
    return [
        {"kind": "spike_loss", "first": first * BATCH, "last": last * BATCH, "value": value}
        for first, last, value in parts
    ]


STORY = [
    *mild_then_strong(35, 1.45, 1.8),
    *mild_then_strong(51, 1.75, 2.5),
    {"kind": "noise_tokens", "first": 620, "last": 623},
]


def config_of(
    folder: Path,
    *,
    world: int,
    strategy: str,
    faults: list[dict[str, Any]] = STORY,
    score: float = 5.0,
    epochs: int = 4,
) -> Config:
    """Eight pieces of text over and over, a document a sample, so that two samples of noise stand
    out.
    """
    write_corpus(folder / "whole", documents=PIECES)
    text = "".join(
        file.read_text(encoding="utf-8") for file in sorted((folder / "whole").iterdir())
    )
    (folder / "corpus").mkdir()
    for number in range(SAMPLES + 1):
        start = number % PIECES * LENGTH
        (folder / "corpus" / f"{number:04d}.txt").write_text(
            text[start : start + LENGTH - 1], encoding="utf-8"
        )
    config = tiny(
        folder,
        world=world,
        strategy=strategy,
        data={"order": "shuffled"},
        model={"dropout": 0.01},
        optim={"lr": 1e-2},
        train={"steps": 0, "epochs": epochs},
        faults=faults,
        guard={"loss_score": score, "window_max": 10, "ladder": ESCALATION},
        checkpoint={"every": 10, "keep": 4},
    )
    assert len(corpus_of(config).train) == SAMPLES
    return config


def killed_behind(run: RunDirectory, world: int, wanted: Callable[[Event], bool]) -> bool:
    """Train until rank 0 dies at once behind the first journal line that is wanted; False where
    none was.
    """
    write_event = RunDirectory.write_event

    def lethal(self: RunDirectory, given: Event) -> Event:
        event = write_event(self, given)
        if wanted(event):
            os.kill(os.getpid(), signal.SIGKILL)
        return event

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "write_event", lethal)
        codes = wait_ranks(start_run(run, world))
    assert codes[0] in (0, -signal.SIGKILL)
    return codes[0] == -signal.SIGKILL


def of_samples(event: Event) -> bool:
    span = event.data.get("span")
    return event.kind == "skipped" and bool(
        span["positions"] if isinstance(span, dict) else span.positions
    )


def send_undo(run: RunDirectory, seq: int, at_step: int) -> None:
    run.send(
        Command(id=f"undo-{seq}", kind="undo", value=float(seq), at_step=at_step, who="tester")
    )


def pardoning(config: Config, run: RunDirectory) -> Config:
    """As `told`, but with the guard on: it knows from the beginning what `run` pardoned."""
    lines = told(config, run).data.quarantine
    replace = msgspec.structs.replace
    pardons = tuple(RunHistory.from_events(run.events()).pardons)
    return replace(
        config,
        guard=replace(config.guard, pardon=pardons),
        data=replace(config.data, quarantine=lines),
    )


def crashed(config: Config) -> tuple[RunDirectory, Event, Event]:
    """(A run that died right behind the line of two samples, its widened rollback, that line)."""
    run = new_run(config)
    assert killed_behind(run, config.world, of_samples)
    first, widened = of_kind(run, "rollback")
    (narrowed,) = filter(of_samples, of_kind(run, "skipped"))
    assert (first.data["rung"], widened.data["rung"]) == ("rollback", "widen")
    window = widened.data["window"]
    assert window[1] - window[0] > 8 * BATCH and window[0] < 2 * SAMPLES < window[1], (
        "across an epoch's end"
    )
    assert narrowed.data["count"] == 2 and narrowed.step > widened.step
    return run, widened, narrowed


def undone(config: Config, run: RunDirectory, seq: int, *, at_step: int = 60) -> None:
    send_undo(run, seq, at_step)
    assert train(run, config.world) == "finished"
    assert of_kind(run, "undo")[0].data["lines"] == [seq]
    assert len(of_kind(run, "restarted")) == 1
    assert_whole(run)


def test_a_widened_rollback_then_two_samples_then_a_crash_then_an_undo(tmp_path: Path) -> None:
    config = config_of(tmp_path, world=2, strategy="ddp")
    run, widened, _ = crashed(config)
    undone(config, run, widened.seq)
    back = of_kind(run, "undo")[0].data
    assert back["to_step"] < widened.data["onset"] and back["samples"] == widened.data["count"]
    assert {line.split("@")[-1] for line in quarantine_lines(run)} >= {"3"}, (
        "the two samples are still left out"
    )
    assert any("allowlist" in event.message for event in of_kind(run, "finding"))
    assert_same(run, trained(told(config, run)))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["rollback", "widen", "samples"])
@pytest.mark.parametrize(("world", "strategy"), SHAPES)
def test_whichever_decision_is_taken_back(
    tmp_path: Path, world: int, strategy: str, which: str
) -> None:
    config = config_of(tmp_path, world=world, strategy=strategy)
    run, widened, narrowed = crashed(config)
    undone(
        config,
        run,
        {"rollback": of_kind(run, "rollback")[0], "widen": widened, "samples": narrowed}[which].seq,
    )
    assert_same(run, trained(told(config, run)))
    assert_same(run, trained(pardoning(config, run)))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_killed_behind_each_line_of_the_journal(tmp_path: Path, strategy: str) -> None:
    """Whatever has just been written down, and has not taken effect: the run that goes on is the
    one it would be.
    """
    config = config_of(tmp_path, world=2, strategy=strategy)

    def asked() -> RunDirectory:
        run = new_run(config)
        run.send(Command(id="undo", kind="undo", value=math.nan, at_step=60))
        return run

    whole = asked()
    assert train(whole, 2) == "finished"
    (undo,) = of_kind(whole, "undo")
    assert undo.data["samples"] == 2
    # Copies and saves come when a disk is ready; what decides comes at the same place in every run.
    for line in [said(event) for event in whole.events() if event.kind not in NEITHER]:
        run = asked()
        assert killed_behind(run, 2, lambda event, line=line: said(event) == line)
        assert train(run, 2) == "finished"
        assert_whole(run)
        assert_same(run, whole)


@pytest.mark.parametrize(
    ("kind", "value"),
    [("skip", 2.0), ("rollback", math.nan), ("undo", math.nan)],
)
def test_killed_between_the_answer_to_a_command_and_its_deed(
    tmp_path: Path, kind: str, value: float
) -> None:
    fault = {"kind": "spike_loss", "first": 20 * BATCH, "last": 21 * BATCH, "value": 50.0}
    config = tiny(
        tmp_path, faults=[fault], checkpoint={"every": 10, "keep": 4}, train={"steps": 32}
    )

    def asked() -> RunDirectory:
        run = new_run(config)
        run.send(Command(id="asked", kind=kind, value=value, at_step=24))
        return run

    whole, run = asked(), asked()
    run.append("note", "lines stand elsewhere in another run's journal")
    assert train(whole, 1) == "finished"
    assert killed_behind(run, 1, lambda event: event.kind == "command")
    assert run.commands_pending(), "it was taken, and is still to be done"
    assert train(run, 1) == "finished"
    line = own_lines()[kind]
    deeds = []
    for one in (whole, run):
        deeds.append([(e.step, said(e)) for e in one.events() if isinstance(e, line)])
    assert deeds[0] == deeds[1] != []
    assert not run.commands_pending()
    assert_same(run, whole)


# -- what is suspect


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_suspect_checkpoint_is_not_gone_on_from_though_it_is_the_newest(
    tmp_path: Path, strategy: str
) -> None:
    """The run goes back to a checkpoint before the onset, and dies as soon as it has called those
    behind it suspect.
    """
    config = tiny(
        tmp_path,
        world=2,
        strategy=strategy,
        faults=[{"kind": "spike_loss", "first": 320, "last": 344, "value": 50.0}],
        guard={"window_before": 16, **BLIND},
        checkpoint={"every": 10, "keep": 4},
        train={"steps": 44},
    )
    run = new_run(config)
    with prompt_disk():
        assert killed_behind(
            run, 2, lambda e: e.kind == "checkpoint" and e.data["state"] == "suspect"
        )
    (back,) = of_kind(run, "rollback")
    assert (back.data["tier"], back.data["to_step"]) == ("disk", 20)
    steps = [read_manifest(path).step for path in checkpoint_dirs(run.checkpoints)]
    assert {30, 40} <= set(steps), "they are still there, whole"
    assert train(run, 2) == "finished"
    (again,) = of_kind(run, "restarted")
    assert again.step == 20, "the ones of steps 30 and 40 hold what was given up"
    assert_same(run, trained(told(config, run)))


# -- a window of which only a few samples are to blame

# two samples of a batch that is applied, and four of the one behind it
NOISE = (506, 507, 512, 513, 514, 515)


@pytest.mark.ci_slow
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_rollback_leaves_out_the_few_samples_that_explain_it(
    tmp_path: Path, strategy: str
) -> None:
    faults = [
        {"kind": "noise_tokens", "first": first, "last": last}
        for first, last in ((NOISE[0], 508), (NOISE[2], 516))
    ]
    config = config_of(tmp_path, world=2, strategy=strategy, faults=faults, score=11.5, epochs=3)
    run = new_run(config)
    assert killed_behind(run, 2, lambda event: event.kind == "rollback")
    assert train(run, 2) == "finished"
    (back,) = of_kind(run, "rollback")
    first, last = back.data["window"]
    assert last - first > 2 * BATCH and first <= NOISE[0] and NOISE[-1] < last
    assert tuple(back.data["span"]["positions"]) == NOISE and back.data["count"] == len(NOISE)
    (verdict,) = of_kind(run, "verdict")
    assert numbers_in(verdict.message)[-3:] == [len(NOISE), first, last - 1]
    assert len(quarantine_lines(run)) == len(NOISE), "the rest of the window is kept"
    assert_whole(run)
    assert_same(run, trained(told(config, run)))
