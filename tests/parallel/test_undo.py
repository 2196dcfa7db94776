"""A decision of the guard is taken back: the run goes on as one in which the guard was told to let
those batches be.
"""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from guardrail.backtest.rejudge import Rejudge
from guardrail.core.config import load_guard_options
from guardrail.core.events.decisions import HIGHER_LOSS, RECOVERED
from guardrail.core.events.event import Event
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.commands import Command
from guardrail.core.records.findings import FindingKind, Severity
from guardrail.core.records.spans import Span
from guardrail.core.records.verdicts import Action, Mode
from guardrail.decide.acceptance import ON_ALLOWLIST
from guardrail.decide.controller import Controller
from guardrail.decide.run_history import RunHistory
from guardrail.decide.sample_cursor import SampleCursor
from guardrail.decide.sample_order import SampleOrder
from guardrail.decide.undo import UndoPlan, find_undo_plan, lines_to_undo
from guardrail.report.quarantine import quarantine_lines
from guardrail.rundir.run_directory import RunDirectory
from tests.support.events import make_line
from tests.support.feed import BATCH as FED
from tests.support.feed import healthy_loss, obs, warmed
from tests.support.lab import wait_for
from tests.support.ranks import wait_ranks
from tests.support.running import (
    BLIND,
    FEW_SHAPES,
    SHAPES,
    assert_same,
    assert_whole,
    new_run,
    of_kind,
    prompt_disk,
    spans,
    start_run,
    table,
    tiny,
    train,
    trained,
)
from tests.support.texts import numbers_in
from trainer.config.config import Config

# -- which decision, and what goes with it


def line(
    seq: int, kind: str, first: int = 0, last: int = 8, cause: str = "rejected", **data: Any
) -> Event:
    span = Span(
        first=first, last=last, origin=cause, step=seq, positions=tuple(data.pop("positions", ()))
    )
    if kind != "undo":
        data = {"span": msgspec.to_builtins(span), **data}
    return make_line(
        seq=seq, time=0.0, step=seq, timeline=0, kind=kind, message=f"line {seq}", data=data
    )


def meant(events: list[Event], seq: int | None = None) -> UndoPlan:
    found = find_undo_plan(events, seq)
    assert isinstance(found, UndoPlan), found
    return found


ROLLED_BACK = [
    line(2, "skipped", 80, 88),
    line(4, "skipped", 200, 208),
    line(6, "skipped", 208, 216),
    line(7, "skipped", 190, 198, "user"),
    line(8, "rollback", 184, 224, "rollback", new_timeline=1),
]


def test_the_newest_decision_of_the_guard_and_not_of_a_person() -> None:
    events = [line(2, "skipped"), line(3, "skipped", 80, 88, "user")]
    assert meant(events).of == 2
    assert meant(events, 3).of == 3 and meant(events, 3).pardons == (), (
        "who was not rejected needs no pardon"
    )


def test_a_rollback_takes_back_the_batches_that_led_to_it_and_not_what_a_person_left_out() -> None:
    undoing = meant(ROLLED_BACK)
    assert [(span.first, span.origin) for span in undoing.spans] == [
        (184, "rollback"),
        (200, "rejected"),
        (208, "rejected"),
    ]
    assert (undoing.first, undoing.positions) == (184, 40)
    assert (undoing.pardons, undoing.rollbacks) == (((184, 224),), (1,))
    assert lines_to_undo(ROLLED_BACK, undoing) == [4, 6, 8]


def test_only_some_samples_of_a_batch() -> None:
    undoing = meant([line(4, "skipped", 200, 208, positions=(201, 202, 206))])
    assert (undoing.positions, undoing.pardons, undoing.first) == (3, ((201, 203), (206, 207)), 200)


def test_a_rollback_that_left_nothing_out_pardons_the_batch_that_it_was_about() -> None:
    verdict = make_line(
        seq=5, time=0.0, step=5, timeline=0, kind="verdict", data={"incident": 1, "batch": [40, 48]}
    )
    undoing = meant([verdict, line(6, "rollback", 24, 24, "rollback", new_timeline=1, incident=1)])
    assert (undoing.positions, undoing.first, undoing.pardons) == (0, 24, ((40, 48),))


def incident(seq: int, state: str) -> Event:
    return make_line(
        seq=seq, time=0.0, step=9, timeline=1, kind="incident", data={"number": 1, "state": state}
    )


@pytest.mark.fault("T12")
def test_a_rollback_that_skipped_nothing_is_not_undone_once_its_batch_was_applied() -> None:
    """To go back would only repeat steps; while its incident is open, or a remedy of it holds,
    there is a reason to.
    """
    verdict = make_line(
        seq=5, time=0.0, step=5, timeline=0, kind="verdict", data={"incident": 1, "batch": [40, 48]}
    )
    back = line(6, "rollback", 24, 24, "rollback", new_timeline=1, incident=1)
    for state in (RECOVERED, HIGHER_LOSS):
        found = find_undo_plan([verdict, back, incident(7, state)])
        assert isinstance(found, str)
        assert numbers_in(found) == [6, 1], "the line, and its incident"
    assert not isinstance(find_undo_plan([verdict, back, incident(7, "repeated")]), str)
    remedies = [{"kind": "lr", "value": 0.5}]
    slower = line(6, "rollback", 24, 24, "rollback", new_timeline=1, incident=1, remedies=remedies)
    assert not isinstance(find_undo_plan([verdict, slower, incident(7, "recovered")]), str)
    skipped = line(6, "rollback", 24, 48, "rollback", new_timeline=1, incident=1)
    assert not isinstance(find_undo_plan([verdict, skipped, incident(7, "recovered")]), str)


@pytest.mark.parametrize(
    ("events", "seq", "named"),
    [
        ([], None, []),
        (
            [line(3, "skipped", 80, 88, "user")],
            None,
            [],
        ),
        (ROLLED_BACK, 5, [5]),
        (ROLLED_BACK, 4, [8]),
        ([line(2, "skipped"), line(3, "undo", lines=[2])], 2, [2]),
        (
            [line(2, "skipped"), line(3, "undo", lines=[2])],
            3,
            [3],
        ),
        (
            [line(2, "skipped"), line(3, "undo", lines=[2])],
            None,
            [],
        ),
    ],
)
def test_what_cannot_be_undone_is_said(
    events: list[Event], seq: int | None, named: list[int]
) -> None:
    """`named`: the journal lines in the reason."""
    found = find_undo_plan(events, seq)
    assert isinstance(found, str) and numbers_in(found) == named


# -- the quarantine


def test_samples_come_back_unless_somebody_else_leaves_them_out_too() -> None:
    ledger = SampleCursor(SampleOrder(samples=100, shuffled=False), batch_size=4)
    ledger.quarantine.read(["8", "9@1"])
    mine = Span(first=4, last=12, origin="rollback", step=2)
    rejected = Span(first=4, last=8, origin="rejected", step=2)
    other = Span(first=4, last=6, origin="user", step=9)
    before = list(ledger.quarantine.lines())
    for span in (rejected, mine, other):
        ledger.skip_span(span)
    batch = ledger.next_batch()
    assert batch is not None
    ledger.advance(batch, applied=True)
    assert ledger.undo_skips([mine, rejected]) == 4
    assert list(ledger.quarantine.lines()) == sorted(
        {*before, "4", "5"}, key=lambda text: int(text.split("@")[0])
    )
    assert ledger.spans == [other]
    following = ledger.next_batch()
    assert following is not None and following.positions == (6, 7, 9, 10) and following.streak == 0


def test_a_rollback_that_leaves_a_few_samples_out_takes_the_rejected_ones_with_it() -> None:
    ledger = SampleCursor(SampleOrder(samples=100, shuffled=False), batch_size=4)
    for span in (
        Span(first=8, last=12, origin="rejected", step=3),
        Span(first=12, last=16, origin="rejected", step=3, positions=(13,)),
        Span(first=16, last=20, origin="user", step=3),
        Span(first=24, last=28, origin="rejected", step=4),
    ):
        ledger.skip_span(span)
    assert ledger.rejected_positions(4, 24) == {8, 9, 10, 11, 13}


# -- pardons


def test_a_pardoned_jump_is_noted_and_applied_and_enters_no_baseline() -> None:
    told, plain = Controller(GuardOptions()), Controller(GuardOptions())
    step = warmed(told)
    warmed(plain)
    told.memory.allow([(step * FED - 1, step * FED)])
    bands = told.bands()
    verdict = told.observe(obs(step, 9.0, 0.5))
    assert verdict.action is Action.APPLY and verdict.incident is None and not verdict.accepted
    assert [f.severity for f in verdict.findings] == [Severity.NOTE] and verdict.reason.startswith(
        f"{ON_ALLOWLIST}: loss 9"
    )
    assert told.bands() == bands
    assert plain.observe(obs(step, 9.0, 0.5)).action is Action.SKIP
    # The next batch is judged as ever.
    assert told.observe(obs(step + 1, 9.0, 0.5)).action is Action.SKIP


def test_no_pardon_for_what_is_not_finite_or_has_no_labels() -> None:
    controller = Controller(GuardOptions(allowlist=((0, 1 << 40),)))
    step = warmed(controller)
    assert controller.observe(obs(step, math.nan, 0.5)).action is Action.SKIP
    assert controller.observe(obs(step, math.nan, 0.0, tokens=0)).action is Action.SKIP


def test_a_pardoned_level_is_the_new_normal() -> None:
    controller = Controller(GuardOptions(loss_score=20.0))
    step = warmed(controller)
    first = step
    while controller.observe(obs(first, 1.25 * healthy_loss(first), 0.5)).action is Action.APPLY:
        first += 1
    told = Controller(GuardOptions(loss_score=20.0, allowlist=((0, first * FED),)))
    warmed(told)
    verdicts = [
        told.observe(obs(at, 1.25 * healthy_loss(at), 0.5)) for at in range(step, first + 60)
    ]
    assert {verdict.action for verdict in verdicts} == {Action.APPLY}
    (found,) = [v for v in verdicts if any(f.kind is FindingKind.DIVERGENCE for f in v.findings)]
    assert found.step == first and found.accepted


def test_pardons_and_the_budget_come_back_from_the_journal() -> None:
    rollback = {
        "from_step": 30,
        "to_step": 25,
        "onset": 29,
        "window": [184, 224],
        "new_timeline": 1,
    }
    undo = {
        "lines": [8],
        "spans": [msgspec.to_builtins(Span(first=184, last=224, origin="rollback", step=8))],
        "pardons": [[184, 224]],
        "rollbacks": [1],
        "to_step": 20,
        "new_timeline": 2,
    }
    events = [line(8, "rollback", 184, 224, "rollback", **rollback), line(9, "undo", **undo)]
    past = RunHistory.from_events(events)
    assert (past.spans, past.rollbacks, past.pardons, past.timeline) == ([], [], [(184, 224)], 2)
    assert past.lives(timeline=1, step=20) and not past.lives(timeline=1, step=21)
    controller = Controller(GuardOptions(allowlist=((1, 2),)))
    controller.rebuild(events)
    assert (controller.memory.rollbacks, controller.memory.allowlist) == ([], [(1, 2), (184, 224)])
    # The very same span may be left out again, as when the batch turns out to hold a NaN.
    assert len(RunHistory.from_events([*events, line(10, "skipped", 184, 224)]).spans) == 1


# -- a run


def spike(first: int, last: int) -> dict[str, Any]:
    return {"kind": "spike_loss", "first": first, "last": last, "value": 50.0}


# step 21 is tried three times and the run goes back; later one skip
FAULTS = [spike(160, 184), spike(240, 248)]


def undone(config: Config, *commands: tuple[int, float]) -> RunDirectory:
    run = new_run(config)
    for number, (step, seq) in enumerate(commands):
        run.send(Command(id=f"undo-{number}", kind="undo", value=seq, at_step=step, who="tester"))
    assert train(run, config.world) == "finished"
    return run


def letting(config: Config, run: RunDirectory) -> Config:
    """The configuration of a run that is told from its beginning what `run` pardoned, and what it
    still leaves out.
    """
    replace = msgspec.structs.replace
    file = run.path / "quarantine.txt"
    file.write_text("".join(f"{text}\n" for text in quarantine_lines(run)), encoding="utf-8")
    pardons = tuple(RunHistory.from_events(run.events()).pardons)
    assert pardons
    return replace(
        config,
        guard=replace(config.guard, allowlist=pardons),
        data=replace(config.data, quarantine=str(file)),
    )


@pytest.mark.parametrize(
    ("world", "strategy"),
    [SHAPES[0], pytest.param(*SHAPES[1], marks=pytest.mark.slow), FEW_SHAPES[2]],
)
def test_an_undone_rollback_and_skip_leave_a_run_that_was_told_so_from_its_beginning(
    tmp_path: Path, world: int, strategy: str
) -> None:
    config = tiny(
        tmp_path, world=world, strategy=strategy, faults=FAULTS, guard=BLIND, train={"steps": 44}
    )
    run = undone(config, (24, math.nan), (36, math.nan))
    first, second = of_kind(run, "undo")
    assert [event.data["samples"] for event in (first, second)] == [32, 8]
    assert len(of_kind(run, "rollback")) == 1 and quarantine_lines(run) == []
    assert of_kind(run, "command")[0].data["who"] == "tester"
    assert not [e for e in of_kind(run, "verdict") if e.timeline > first.data["new_timeline"]]
    notes = [event.message for event in of_kind(run, "finding")]
    assert sum(f"{ON_ALLOWLIST}: loss" in note for note in notes) == 4, (
        "each batch was found odd again, and applied"
    )
    assert_whole(run)
    assert table(run)[:, 1].tolist() == [8.0 * step for step in range(44)], "no batch is missing"
    told = letting(config, run)
    judged = list(Rejudge(run, load_guard_options(run.path / "config.toml"), own=True))
    assert [one.verdict.action for one in judged] == [one.done for one in judged], "as live"
    assert_same(run, trained(told))
    if world > 1:
        return
    off = msgspec.structs.replace(told, guard=msgspec.structs.replace(told.guard, mode=Mode.OFF))
    assert_same(run, trained(off))


def test_a_crash_after_an_undo_forgets_no_pardon(tmp_path: Path) -> None:
    config = tiny(tmp_path, faults=FAULTS, guard=BLIND, train={"steps": 40})
    whole = undone(config, (24, math.nan))
    run = new_run(config)
    run.send(Command(id="undo", kind="undo", value=math.nan, at_step=24))
    run.send(Command(id="pause", kind="pause", at_step=28))
    (pid,) = start_run(run, 1)
    wait_for(lambda: of_kind(run, "paused"), what="a pause")
    os.kill(pid, signal.SIGKILL)
    assert wait_ranks([pid]) == [-signal.SIGKILL]
    assert train(run, 1) == "finished"
    assert len(of_kind(run, "undo")) == 1
    assert of_kind(run, "restarted")[0].step * 8 <= 160, "the pardoned batches are met once more"
    assert_same(run, whole)


def test_an_undo_answers_the_question_of_the_guard(tmp_path: Path) -> None:
    """The batch under question is given back, and judged anew behind the one that is pardoned."""
    config = tiny(
        tmp_path,
        world=2,
        faults=[spike(160, 184)],
        guard={"mode": "ask", **BLIND},
        train={"steps": 30},
    )
    run = new_run(config)
    pids = start_run(run, 2)
    wait_for(lambda: of_kind(run, "paused"), what="a question")
    run.send(Command(id="undo", kind="undo", value=math.nan))
    assert wait_ranks(pids) == [0, 0]
    assert len(of_kind(run, "paused")) == 1, "one rejection in a row is no question"
    assert sorted(int(text) for text in quarantine_lines(run)) == [
        *range(160, 168),
        *range(176, 184),
    ]
    assert_same(run, trained(letting(config, run)))


def test_an_undo_out_of_reach_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    config = tiny(
        tmp_path,
        faults=[{"kind": "nan_loss", "first": 8, "last": 16}],
        train={"steps": 40},
        checkpoint={"every": 5, "keep": 2},
        snapshots={"every": 5, "keep": 2},
        guard={"confirm": 1, "divergence_steps": 2, "warmup": 8},
    )
    plain = trained(config)
    with prompt_disk():
        run = undone(config, (38, math.nan), (39, 1.0))
    (skip,) = of_kind(run, "skipped")
    refused = [event.data["reason"] for event in of_kind(run, "command")]
    too_late, no_decision = refused
    assert numbers_in(too_late) == [skip.seq]
    assert no_decision == find_undo_plan(run.events(), 1) and numbers_in(no_decision) == [1]
    assert not of_kind(run, "undo")
    assert_same(run, plain)


def test_an_undone_nan_is_rejected_again(tmp_path: Path) -> None:
    config = tiny(
        tmp_path, faults=[{"kind": "nan_loss", "first": 160, "last": 168}], train={"steps": 26}
    )
    run = undone(config, (22, math.nan))
    assert len(of_kind(run, "undo")) == 1
    assert [(span.first, span.last) for span in spans(run)] == [(160, 168), (160, 168)]
    assert np.isfinite(table(run)).all()
    assert_same(run, trained(config))
