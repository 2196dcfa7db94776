"""What a command would do is foretold from the records, and comes true."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from guardrail.cli.ctl import command as ctl
from guardrail.core.errors import GuardrailError
from guardrail.core.events.event import Event
from guardrail.core.events.run_state import Paused
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.commands import Command
from guardrail.core.records.spans import Span
from guardrail.core.records.status import Phase, SnapshotInfo
from guardrail.core.records.verdicts import Remedy
from guardrail.decide.control_commands import registry
from guardrail.decide.control_commands.answer import NO_QUESTION
from guardrail.decide.control_commands.resume import NOT_PAUSED
from guardrail.decide.questions import CHOICES
from guardrail.decide.remedies.effects import format_effect
from guardrail.decide.run_history import RunHistory
from guardrail.decide.sample_cursor import SampleCursor
from guardrail.decide.sample_order import SampleOrder
from guardrail.decide.undo import positions_of
from guardrail.launch.log_printer import format_event
from guardrail.operate.preview import preview_command as of
from guardrail.operate.preview import rollback_for
from guardrail.operate.run_state import AppliedStep, RunState
from guardrail.rundir.run_directory import RunDirectory
from tests.support.events import make_line
from tests.support.fake_run import FakeRun
from tests.support.lab import wait_for
from tests.support.ranks import wait_ranks
from tests.support.running import BATCH, BLIND, new_run, of_kind, start_run, table, tiny, train
from tests.support.texts import numbers_in

NAN = math.nan


def info(step: int, tier: str = "memory", state: str = "good", **fields: Any) -> SnapshotInfo:
    return SnapshotInfo(
        step=step, cursor=step * BATCH, timeline=0, tier=tier, state=state, **fields
    )


def scene(*states: SnapshotInfo, step: int = 30, **fields: Any) -> RunState:
    """30 steps of 2 s each; the learning rate of step n is n."""
    rows = [AppliedStep(n, (n - 1) * BATCH, n * BATCH, float(n), 2.0) for n in range(1, step + 1)]
    order = SampleCursor(SampleOrder(samples=1000, shuffled=False), batch_size=1)
    return RunState(
        **{
            "step": step,
            "cursor": step * BATCH,
            "states": states,
            "rows": rows,
            "order": order,
            **fields,
        }
    )


def wish(kind: str, value: float = 0.0) -> Command:
    return Command(id="x", kind=kind, value=value)


def test_the_newest_good_state_of_the_ring_before_one_on_disk_and_before_a_candidate() -> None:
    here = scene(info(29, state="candidate"), info(20), info(24, "disk"), info(28, state="suspect"))
    back = of(here, wish("rollback", NAN))
    assert (back.to_step, back.tier, back.state) == (20, "memory", "good")
    assert (back.steps_lost, back.seconds_lost, back.window, back.samples) == (
        10,
        20.0,
        (160, 240),
        80,
    )
    # the next step's rate is taken to be the last one's
    assert (back.lr_before, back.lr) == (30.0, 21.0)
    said = back.sentence()
    assert numbers_in(said) == [20, 10, 20.0, 80, 21, 30] and "(memory)" in said
    assert of(scene(info(29, state="candidate")), wish("rollback", NAN)).state == "candidate"


def test_the_batch_under_question_is_left_out_as_well() -> None:
    assert of(scene(info(20), end=260), wish("rollback", 20)).window == (160, 260)


@pytest.mark.parametrize(("step", "named"), [(12, [12]), (30, [30]), (NAN, [])])
def test_a_state_that_is_not_there_is_said(step: float, named: list[int]) -> None:
    back = of(scene(info(30)), wish("rollback", step))
    assert not back.possible and numbers_in(back.refusal) == named
    assert back.refusal in back.sentence()


def test_what_is_left_out_already_does_not_count_again() -> None:
    here = scene(info(20))
    assert here.order is not None
    here.order.skip_span(Span(first=168, last=176, origin="rejected", step=22))
    assert of(here, wish("rollback", 20)).samples == 80 - 8
    assert of(here, wish("skip", 2)).window == (240, 256)


@pytest.mark.parametrize(("kind", "value"), [("rollback", 20), ("skip", 80)])
def test_what_would_leave_no_data_is_refused_as_the_guard_refuses_it(
    kind: str, value: float
) -> None:
    here = scene(info(20))
    assert here.order is not None and of(here, wish(kind, value)).possible
    order = here.order.order
    kept = order.samples(160, 240) if kind == "rollback" else order.samples(240, 320)
    for sample in set(range(order.n_samples)) - set(kept):
        here.order.quarantine.add(sample)
    refused = of(here, wish(kind, value))
    assert not refused.possible
    window = (160, 240) if kind == "rollback" else (240, 320)
    assert refused.refusal == here.order.why_user_may_not_skip(*window)
    assert numbers_in(refused.refusal) == [order.n_samples]


def test_a_skip_of_two_batches_passes_over_what_is_left_out() -> None:
    here = scene()
    assert here.order is not None
    here.order.skip_span(Span(first=244, last=252, origin="user", step=22))
    skip = of(here, wish("skip", 2))
    assert (skip.window, skip.samples) == ((240, 264), 16)


def test_a_rate_set_by_hand_holds_from_the_target_on_and_a_remedy_comes_on_top() -> None:
    past = RunHistory()
    past.lr.set(26, 0.5)
    here = scene(info(20), history=past)
    assert of(here, wish("rollback", NAN)).lr == 21 * 0.5
    remedy = Remedy(kind="lr", value=0.5, from_step=21, hold_steps=9)
    lowered = rollback_for(here, (176, 240), remedies=[remedy])
    assert lowered.lr == 21 * 0.25
    assert lowered.sentence().endswith(format_effect(remedy))
    later = msgspec.structs.replace(remedy, from_step=22)
    assert rollback_for(here, (176, 240), remedies=[later]).lr == 21 * 0.5, (
        "it holds from the next step but one on"
    )
    assert of(here, wish("lr", 0.1)).lr == pytest.approx(30 / 0.5 * 0.1)
    assert past.lr.changes == [(26, 0.5)], "a preview changes nothing"


def test_older_goes_further_back_than_the_window_and_what_is_kept_of_a_window_is_not_counted() -> (
    None
):
    here = scene(info(28), info(20), info(10, "disk"))
    older = rollback_for(here, (224, 240), before_step=19)
    assert (older.to_step, older.tier, older.steps_lost) == (10, "disk", 20)
    assert rollback_for(here, (224, 240), before_step=29).to_step == 28
    assert rollback_for(here, (224, 240), before_step=5).to_step == 28, (
        "no state is that old: the newest one"
    )
    few = rollback_for(here, (224, 240), positions=(225, 238))
    assert (few.window, few.samples) == ((224, 240), 2)


def test_seconds_that_no_row_has_measured_are_not_made_up() -> None:
    here = scene(info(20))
    short = RunState(step=30, cursor=240, states=here.states, rows=here.rows[:-1])
    back = of(short, wish("rollback", NAN))
    assert math.isnan(back.seconds_lost) and "of training" not in back.sentence()


def decision(
    seq: int, kind: str, first: int, last: int, cause: str, step: int, **data: Any
) -> Event:
    span = Span(first=first, last=last, origin=cause, step=step)
    data = {"span": msgspec.to_builtins(span), "incident": 1, **data}
    return make_line(
        seq=seq, time=0.0, step=step, timeline=0, kind=kind, message=f"line {seq}", data=data
    )


def test_remedies_in_force_count_for_what_is_and_what_will_be() -> None:
    past = RunHistory()
    rate = Remedy(
        kind="lr", value=0.5, from_step=16, hold_steps=10, ramp_steps=0
    )  # of the rows 16 to 25
    alpha = Remedy(kind="embed_alpha", value=0.2, from_step=16, hold_steps=40)
    past.remedies = [(1, rate), (2, alpha)]
    here = scene(info(20), history=past, settings=GuardOptions(embed_floor=0.15))
    back = of(here, wish("rollback", NAN))
    assert (back.lr_before, back.lr) == (30.0, 21.0), (
        "the row of step 21 was made with the rate that it will have"
    )
    assert (back.alpha_before, back.alpha) == (0.2, 0.2)
    more = rollback_for(
        here, (160, 240), remedies=[msgspec.structs.replace(alpha, from_step=21, value=0.5)]
    )
    assert (more.alpha_before, more.alpha) == (0.2, 0.15)
    said = more.sentence()
    assert said.index("x0.15") < said.index("x0.2"), "the new factor, then the old one"
    assert of(here, wish("shrink-embedding", 2.0)).alpha == 0.4
    # Undone, a decision takes its remedy with it.
    events = [decision(4, "skipped", 232, 240, "rejected", 29)]
    past.remedies[1] = (events[0].span, alpha)
    gone = of(scene(info(20), history=past, events=events), wish("undo", NAN))
    assert (gone.alpha_before, gone.alpha, gone.lr) == (0.2, 1.0, 21.0)


def test_an_undo_goes_to_the_newest_state_from_before_the_decision_candidates_too() -> None:
    events = [
        decision(4, "skipped", 200, 208, "rejected", 25),
        decision(6, "skipped", 240, 264, "user", 28),
    ]
    here = scene(info(20), info(25, state="candidate"), info(26, state="suspect"), events=events)
    undo = of(here, wish("undo", NAN))
    assert (undo.value, undo.to_step, undo.returned, undo.window) == (4, 25, 8, (200, 208))
    assert 'undone is "line 4"' in undo.sentence()
    late = of(scene(info(26), events=events), wish("undo", NAN))
    assert not late.possible and numbers_in(late.refusal) == [4]


@pytest.mark.parametrize(
    ("kind", "value", "named"),
    [
        ("mode", 1, ("ask ", " auto")),
        ("stop", 0, (" 30",)),
        ("shrink-embedding", 0.1, ("x0.1 ", " x1, ", " 31")),
        ("resume", 0, (NOT_PAUSED,)),
        ("answer", 0, (NO_QUESTION,)),
    ],
)
def test_the_rest_is_said_in_words(kind: str, value: float, named: tuple[str, ...]) -> None:
    said = of(scene(), wish(kind, value)).sentence()
    places = [said.index(word) for word in named]
    assert places == sorted(places), said


@pytest.mark.fault("T7")
def test_resume_does_nothing_while_a_question_is_open_and_its_preview_says_so(
    tmp_path: Path,
) -> None:
    run = FakeRun().begin().advance(300).spike().ask("proposed: rollback").write(tmp_path)
    shown = of(RunState.read(run), wish("resume"))
    assert not shown.possible
    assert all(f"answer {choice}" in shown.refusal for choice in CHOICES)


@pytest.mark.fault("B3")
def test_a_preview_of_a_damaged_run_is_a_sentence(tmp_path: Path) -> None:
    run = FakeRun().begin().advance(300).write(tmp_path)
    run.append("rollback", "of another version", step=200)
    run.append("undo", "of another version", step=200, spans=7, lines="x")
    run.append("command", "of another version", command="lr", effect="applied", value="much")
    assert of(RunState.read(run), wish("stop")).possible
    (run.path / "metrics.json").write_text('{"columns": ["step", "loss"]}')
    done = CliRunner().invoke(ctl, [str(run.path), "rollback", "--preview"], standalone_mode=False)
    assert done.exception is None or isinstance(done.exception, GuardrailError)


def test_a_run_of_which_nothing_is_known() -> None:
    for kind in registry.command_names():
        assert of(RunState(), wish(kind, 1.0)).sentence()


# -- a run


# step 21 is tried three times
SPIKE = {"kind": "spike_loss", "first": 160, "last": 184, "value": 50.0}


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_parked_beyond_the_timeout_of_a_collective_and_what_was_foretold_comes_true(
    tmp_path: Path, strategy: str
) -> None:
    seconds = 2.0
    config = tiny(
        tmp_path,
        world=2,
        strategy=strategy,
        faults=[SPIKE],
        guard={"mode": "ask", "answer_timeout": 900.0, "answer_default": "continue", **BLIND},
        train={"steps": 28},
        launch={"collective_seconds": seconds},
    )
    run = new_run(config)
    pids = start_run(run, 2)
    wait_for(
        lambda: (s := run.read_status()) is not None and s.phase is Phase.PAUSED and s.question,
        what="a question",
    )
    began = time.monotonic()
    status = run.read_status()
    assert status is not None
    assert status.default == "continue" and 800 < status.deadline - time.time() <= 900
    (paused,) = of_kind(run, "paused")
    assert paused.data["findings"] and paused.data["incident"] == 1 and paused.data["end"] == 184
    proposed, going_on, stop = paused.data["proposals"]
    assert [p["action"] for p in (proposed, going_on, stop)] == ["rollback", "go on", "stop"]
    assert numbers_in(going_on["remark"]) == [21] and going_on["samples"] == 0
    said = format_event(paused).splitlines()
    assert (
        "proposed: rollback" in said[0]
        and said[1].strip() == f"answer accept: {proposed['text']}"
        and len(said) == 4
    )
    by_hand = foretold(run, "rollback", "10")
    assert (by_hand["to_step"], by_hand["steps_lost"], by_hand["window"]) == (10, 10, [80, 184])
    assert foretold(run, "rollback", "3", code=2)["refusal"].endswith("of step 3")
    assert foretold(run, "answer", "1")["remark"] == going_on["remark"]
    each = (
        CliRunner()
        .invoke(ctl, [str(run.path), "answer", "--preview"], standalone_mode=False)
        .stdout.splitlines()
    )
    assert [line.split(":")[:2] for line in each] == [
        ["accept", " rollback"],
        ["continue", " go on"],
        ["stop", " stop"],
    ]
    assert each[0] == f"accept: {proposed['text']}"
    newest = foretold(run, "undo")
    assert (newest["to_step"], newest["returned"]) == (20, 8)
    time.sleep(max(0.0, began + 1.5 * seconds - time.monotonic()))
    run.send(Command(id="yes", kind="answer", value=0))
    assert wait_ranks(pids) == [0, 0]
    (done,) = of_kind(run, "rollback")
    assert [proposed[name] for name in ("to_step", "tier", "window")] == [
        done.data[name] for name in ("to_step", "tier", "window")
    ]
    assert proposed["steps_lost"] == done.data["from_step"] - done.data["to_step"]
    # Two batches of the window had been rejected, and so were left out, before the guard asked.
    assert proposed["samples"] == done.data["count"] - 2 * BATCH
    rows = run.metrics()
    given_up = (rows.column("timeline") == 0) & (rows.column("step") > done.data["to_step"])
    lost = rows.column("step_time")[given_up & (rows.column("verdict") == 0)]
    assert proposed["seconds_lost"] == pytest.approx(float(np.sum(lost)))
    assert table(run, ("step", "lr"))[done.data["to_step"], 1] == proposed["lr"]
    status = run.read_status()
    assert status is not None and (status.question, status.deadline, status.default) == (
        "",
        0.0,
        "",
    )


ESCALATION = [
    {"do": "skip"},
    {"do": "rollback"},
    {"do": "widen"},
    {"do": "lower_lr", "factor": 0.5, "hold": 9, "back": 6},
    {"do": "older", "steps": 8},
    {"do": "tighten_clip", "factor": 0.1, "hold": 8, "back": 0},
    {"do": "reset_moments", "factor": 0.2, "hold": 12, "back": 4},
]
ALPHA = {"kind": "embed_alpha", "value": 0.3, "from_step": 12, "hold": 30, "back": 10}


def test_each_rung_does_what_was_foretold(tmp_path: Path) -> None:
    """Nobody answers, so what is proposed is done, after it has been foretold."""
    config = tiny(
        tmp_path,
        faults=[SPIKE | {"first": 240, "last": 240 + 30 * BATCH}],
        guard={
            "mode": "ask",
            "ask_seconds": 0.01,
            "ladder": ESCALATION,
            "window_max": 8,
            "rollbacks": 6,
            "remedies": [ALPHA],
            **BLIND,
        },
        checkpoint={"every": 10, "keep": 4},
        train={"steps": 46},
    )
    run = new_run(config)
    assert train(run, 1) == "halted"
    events = run.events()
    backs = of_kind(run, "rollback")
    assert [back.data["rung"] for back in backs] == [str(rung["do"]) for rung in ESCALATION[1:]]
    *asked, last = (event for event in events if isinstance(event, Paused))
    assert last.proposals[0]["action"] == "halt"
    for tried, (question, back) in enumerate(zip(asked, backs, strict=True)):
        evidence = question.findings[0].sentence()
        why = question.message.partition(evidence)[2]
        assert why, "the message begins with what was found"
        budget = [tried, 200] if tried else []
        first, end = back.data["window"]
        assert numbers_in(why)[: len(budget) + 1] == [3, *budget], "rejections, and rollbacks"
        assert numbers_in(why)[len(budget) + 2 :][:2] == [first, end - 1]
        assert not tried or f" {back.data['rung']} " in why
    assert numbers_in(last.message)[-2:] == [6, 200] and "guard.max_rollbacks" in last.message
    view = run.metrics()
    step, lr, timeline = (view.column(name) for name in ("step", "lr", "timeline"))
    for question, back in zip(asked, backs, strict=True):
        said = question.data["proposals"][0]
        assert (said["to_step"], said["tier"]) == (back.data["to_step"], back.data["tier"]), (
            back.message
        )
        assert said["steps_lost"] == back.data["from_step"] - back.data["to_step"]
        before = RunHistory.from_events(event for event in events if event.seq < back.seq)
        span, out = (
            back.span,
            {position for span in before.spans for position in positions_of(span)},
        )
        assert span is not None and said["window"] == [span.first, span.last]
        assert said["samples"] == len(set(positions_of(span)) - out)
        first = (timeline == back.data["new_timeline"]) & (step == said["to_step"] + 1)
        assert set(lr[first]) == {said["lr"]}, back.message
        effects = RunHistory.from_events(
            event for event in events if event.seq <= back.seq
        ).effects(said["to_step"] + 1, config.guard)
        assert said["alpha"] == effects.embed_alpha == 0.3
        assert all(
            f"from step {remedy['from_step']}" in said["text"] for remedy in back.data["remedies"]
        )
    assert backs[3].data["to_step"] < backs[3].data["onset"] - 8, "older"


def foretold(run: RunDirectory, *words: str, code: int = 0) -> dict[str, Any]:
    found = CliRunner().invoke(
        ctl, [str(run.path), *words, "--preview", "--json"], standalone_mode=False
    )
    assert found.return_value == code and found.exception is None, found.output
    answer: dict[str, Any] = msgspec.json.decode(found.stdout)
    assert not list(run.commands.iterdir()), "a preview sends nothing"
    return answer


@pytest.mark.parametrize(("default", "left"), [("go_on", "finished"), ("stop", "stopped")])
def test_the_default_is_taken_after_the_deadline(tmp_path: Path, default: str, left: str) -> None:
    guard = {"mode": "ask", "ask_seconds": 0.2, "ask_default": default, **BLIND}
    run = new_run(tiny(tmp_path, faults=[SPIKE], guard=guard, train={"steps": 24}))
    assert wait_ranks(start_run(run, 1)) == [0]
    assert of_kind(run, "ended")[-1].data["phase"] == left
    assert not of_kind(run, "rollback") and of_kind(run, "command")[0].data["who"] == "guard"
