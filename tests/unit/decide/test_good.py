"""Good means good: what lies within an incident never becomes it, and the last good state from
before stays.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from guardrail.backtest.rejudge import Rejudge
from guardrail.cli.main import main
from guardrail.core.events.decisions import HIGHER_LOSS, OPEN, RECOVERED
from guardrail.core.events.event import Event
from guardrail.core.events.kinds import with_data
from guardrail.core.files import encode_json
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.commands import Command
from guardrail.core.records.findings import Observation
from guardrail.core.records.status import Phase, Status, Unresolved
from guardrail.core.records.verdicts import Action, Mode, Verdict
from guardrail.decide.control_commands.accept import NO_INCIDENT
from guardrail.decide.controller import Controller
from guardrail.decide.incident_line import make_incident_line
from guardrail.decide.incidents import Incidents
from guardrail.decide.recovery import fit_trend
from guardrail.launch.log_printer import format_step
from guardrail.operate import preview
from guardrail.operate.run_state import RunState
from guardrail.operate.run_summary import summarize_run
from guardrail.report.output import summary_text
from guardrail.rundir.checkpoint_folders import checkpoint_dirs
from guardrail.rundir.manifest import read_manifest
from guardrail.rundir.run_directory import RunDirectory
from tests.support.events import make_line
from tests.support.feed import BATCH, noisy, obs
from tests.support.jumping import HIGH, USUAL, Loop
from tests.support.texts import numbers_in

ONSET = 101


# -- the pure core ---------------------------------------------------------------------------------


class Fed:
    """A controller in a made-up run: the loss is `HIGH` from step `ONSET` up to `back`. Keeps the
    journal's lines.
    """

    def __init__(self, mode: Mode, *, back: int = 10_000) -> None:
        self.controller = Controller(GuardOptions(mode=mode))
        self.back, self.step = back, 0
        self.events: list[Event] = []
        self.good: set[int] = set()  # steps whose state was ever good

    def to(self, last: int) -> Fed:
        """Feed steps up to `last`. Whatever is rejected is applied all the same, as by a user who
        says go on.
        """
        controller = self.controller
        while self.step < last:
            self.step += 1
            seen = self.seen()
            verdict = controller.observe(seen)
            self.tell(verdict)
            if verdict.action is not Action.APPLY:
                controller.overrule(seen)
            self.good |= {
                s
                for s in range(max(0, self.step - self.step % 5 - 40), self.step + 1, 5)
                if self.is_good(s)
            }
        return self

    def is_good(self, step: int) -> bool:
        """As the guard asks it: enough healthy steps have followed, and no incident holds the
        state.
        """
        controller = self.controller
        within = controller.memory.incidents.is_within
        return step + controller.settings.confirm <= controller.healthy_through and not within(step)

    def seen(self) -> Observation:
        level = HIGH if ONSET <= self.step < self.back else USUAL
        return obs(self.step, noisy(level)(self.step), noisy(0.5, seed=1, noise=0.2)(self.step))

    def tell(self, verdict: Verdict) -> None:
        if verdict.findings:
            data = {"action": verdict.action, "would": verdict.would, "findings": verdict.findings}
            self.event(
                "verdict",
                **data,
                incident=verdict.incident,
                onset=verdict.onset,
                at_step=verdict.step,
            )
        if verdict.incident_state:
            line = with_data(make_incident_line(self.controller.memory, verdict))
            self.event("incident", line.message, **line.data)

    def event(self, kind: str, message: str = "", **data: Any) -> None:
        plain = json.loads(encode_json(data))
        seq = len(self.events) + 1
        self.events.append(
            make_line(
                seq=seq,
                time=0.0,
                step=self.step,
                timeline=0,
                kind=kind,
                message=message,
                data=plain,
            )
        )

    def restarted(self) -> Fed:
        """The same run in a process that knows its checkpoint and its journal."""
        other = Fed(self.controller.mode, back=self.back)
        other.step, other.events, other.good = self.step, list(self.events), set(self.good)
        other.controller.load_state_dict(json.loads(json.dumps(self.controller.state_dict())))
        other.controller.rebuild(other.events)
        return other

    def states(self) -> list[str]:
        return [str(event.data["state"]) for event in self.events if event.kind == "incident"]


@pytest.mark.fault("T1")
@pytest.mark.parametrize("mode", [Mode.ADVISE, Mode.ASK])
def test_nothing_becomes_good_from_the_onset_on_while_the_loss_stays_up(mode: Mode) -> None:
    run = Fed(mode).to(400)
    assert max(run.good) < ONSET
    assert (run.states()[0], run.states()[-1]) == (OPEN, HIGHER_LOSS)
    unresolved = run.controller.unresolved()
    assert unresolved is not None and (unresolved.since, unresolved.is_open) == (ONSET, False)
    assert unresolved.offset == pytest.approx(HIGH - USUAL, abs=0.5)
    assert unresolved.headline().startswith("LOSS +8.") and unresolved.headline().endswith(
        f" since {ONSET}"
    )


@pytest.mark.fault("T1")
def test_what_lies_within_an_incident_stays_a_candidate_when_the_loss_is_back() -> None:
    run = Fed(Mode.ADVISE, back=300).to(500)
    assert HIGHER_LOSS in run.states() and run.states()[-1] == RECOVERED
    assert run.controller.unresolved() is None
    resolved = next(e.data["at_step"] for e in reversed(run.events) if e.kind == "incident")
    assert not run.good & set(range(ONSET, resolved))
    assert run.good >= {90, resolved + 5 - resolved % 5, 480}


@pytest.mark.parametrize("crash", [95, ONSET, 120, 200, 310, 330])
@pytest.mark.fault("T1")
def test_a_restart_knows_the_incident_that_is_not_over(crash: int) -> None:
    calm, again = (
        Fed(Mode.ADVISE, back=300).to(400),
        Fed(Mode.ADVISE, back=300).to(crash).restarted().to(400),
    )
    assert again.states() == calm.states() and again.good == calm.good
    assert again.controller.memory.incidents.ended == calm.controller.memory.incidents.ended


def test_a_curve_is_not_followed_for_thousands_of_steps() -> None:
    """Its error grows with the distance: then any loss would fit, and the run would call itself
    recovered.
    """
    incidents = Incidents(confirm=8)
    incidents.note_anomaly(
        400,
        400,
        curve=fit_trend([(step, noisy(USUAL, noise=0.1)(step)) for step in range(352, 400)]),
    )
    for begin, until in ((400, 440), (39_000, 39_100)):
        for step in range(begin, until):
            incidents.note_healthy(
                step, [(s, HIGH) for s in range(max(begin, step - 40), step + 1)], every_step=True
            )
    assert [one.onset for one in incidents.unresolved] == [400]
    assert not incidents.may_recover(39_200, [(step, HIGH) for step in range(39_100, 39_200)])
    assert incidents.may_recover(39_200, [(step, USUAL) for step in range(39_100, 39_200)])
    assert incidents.note_healthy(40_000, [(step, USUAL) for step in range(39_900, 40_001)]) == (
        1,
        "recovered",
    )


def test_what_is_accepted_is_over_and_later_states_become_good() -> None:
    for at in (110, 300):  # while the incident is open, and behind it
        run = Fed(Mode.ADVISE).to(at)
        first = run.step * BATCH
        run.event("command", command="accept", effect="applied", batch=[first, first + BATCH])
        assert run.controller.memory.accept(run.step, (first, first + BATCH)) == (1,)
        again = run.restarted()
        for one in (run, again):
            one.to(at + 60)
            assert one.controller.unresolved() is None
            assert not one.good & set(range(ONSET, at)) and {at, at + 40} <= one.good, one.good
        assert run.good == again.good


def test_to_go_back_before_the_onset_leaves_the_incident_behind_and_into_it_brings_it_back() -> (
    None
):
    run = Fed(Mode.ADVISE, back=300).to(400)
    incidents = run.controller.memory.incidents
    (one,) = incidents.ended
    assert one.until is not None and not incidents.is_within(one.until)
    incidents.rewind(one.until - 10)
    assert (
        incidents.since == ONSET
        and incidents.is_within(one.until - 10)
        and incidents.is_within(one.until + 100)
    )
    incidents.rewind(ONSET - 1)
    assert incidents.since is None and not incidents.is_within(ONSET)


def test_to_go_back_for_another_incident_does_not_go_back_before_the_unresolved_one() -> None:
    controller = Fed(Mode.ASK).to(400).controller
    assert not controller.is_good(390) and controller.is_settled(390)
    assert not controller.is_settled(395)  # too few steps have followed
    assert not Fed(Mode.ASK).to(110).controller.is_settled(102)  # its own incident is still open


# -- a guard ---------------------------------------------------------------------------------------


def good_in_journal(run: RunDirectory) -> set[int]:
    lines = [event.data for event in run.events() if event.kind == "checkpoint"]
    return {int(data["cp_step"]) for data in lines if data["state"] == "good"}


@pytest.mark.fault("T1")
def test_a_run_in_advise_keeps_the_last_good_state_from_before_what_no_one_dealt_with(
    tmp_path: Path,
) -> None:
    loop = Loop(tmp_path, mode=Mode.ADVISE).train()
    assert max(good_in_journal(loop.run)) < loop.onset
    here = {read_manifest(path).step for path in checkpoint_dirs(loop.run.checkpoints)}
    good = {step for step, state in loop.states().items() if state == "good"}
    # the two, the oldest, the newest candidates
    assert good == {40, 50} and good <= here and len(here) <= 2 + 2 + 2
    memory = [info for info in loop.guard.snapshots.ring.infos() if info.state == "good"]
    assert memory and max(info.step for info in memory) < loop.onset
    shown = preview.preview_command(
        RunState.read(loop.run, status=loop.status()),
        Command(id="x", kind="rollback", value=math.nan),
    )
    assert shown.to_step is not None and shown.to_step < loop.onset


def test_the_status_says_what_is_unresolved_and_that_nothing_was_done(tmp_path: Path) -> None:
    loop, heads = Loop(tmp_path, mode=Mode.ADVISE), []
    for step in loop.guard:
        loop.take(step)
        unresolved = loop.status().unresolved
        heads.append(unresolved.headline() if unresolved is not None else "")
    assert set(heads[:58]) == {""} and heads[62] == "UNSTABLE, no action (advise)"
    assert heads[-1].startswith("LOSS +8.") and heads[-1].endswith("since 60")
    unresolved = loop.status().unresolved
    assert unresolved is not None and not unresolved.acted
    assert unresolved.let_pass == "advise" and unresolved.sentence().endswith("(advise)")
    assert msgspec.json.decode(encode_json(loop.status()), type=Status).unresolved == unresolved


@pytest.mark.fault("T1")
def test_the_guard_that_was_told_to_go_on_calls_nothing_good(tmp_path: Path) -> None:
    loop = Loop(
        tmp_path, mode=Mode.ASK, ask_seconds=0.01, ask_default="go_on", persist=1, cause_test=False
    ).train()
    assert loop.guard.phase is not None and loop.guard.phase.value == "finished"
    assert max(good_in_journal(loop.run)) < loop.onset


def test_accept_lets_later_states_become_good_and_is_refused_where_nothing_is_to_accept(
    tmp_path: Path,
) -> None:
    loop = Loop(tmp_path, mode=Mode.ADVISE, steps=150)
    loop.send("accept", at_step=30)
    loop.send("accept", at_step=122)
    shown = None
    for step in loop.guard:
        if step.number == 122:
            scene = RunState.read(loop.run, status=loop.status())
            shown = preview.preview_command(scene, Command(id="x", kind="accept"))
        loop.take(step)
    answers = [event.data for event in loop.run.events() if event.kind == "command"]
    assert [data["effect"] for data in answers] == ["refused", "applied"]
    assert answers[0]["reason"] == NO_INCIDENT
    assert shown is not None and shown.possible and "LOSS" not in shown.sentence()
    assert "+8." in shown.sentence() and "since step 60" in shown.sentence()
    assert loop.status().unresolved is None
    good = good_in_journal(loop.run)
    assert not good & set(range(60, 122)) and good >= {130, 140}
    # The rows and the journal alone lead to the same verdicts.
    rejudge = Rejudge(loop.run, loop.guard.config.guard, own=True)
    assert all(row.agrees for row in rejudge) and not rejudge.lost
    assert (
        rejudge._controller.memory.incidents.ended == loop.guard.controller.memory.incidents.ended
    )


@pytest.mark.fault("T1")
def test_a_resumed_run_still_knows_what_is_unresolved(tmp_path: Path) -> None:
    first = Loop(tmp_path, mode=Mode.ADVISE)
    first.send("stop", at_step=110)
    first.train()
    again = Loop(tmp_path, mode=Mode.ADVISE)
    heads = []
    for step in again.guard:
        heads.append(again.status().unresolved)
        again.take(step)
    assert all(one is not None and one.since == 60 for one in heads)
    assert max(good_in_journal(again.run)) < 60
    assert {40, 50} <= {step for step, state in again.states().items() if state == "good"}


@pytest.mark.fault("A10")
def test_to_be_loaded_makes_no_state_good(tmp_path: Path) -> None:
    first = Loop(tmp_path, confirm=10)
    first.send("stop", at_step=23)
    first.train()
    assert first.states() == {0: "good", 10: "good", 20: "candidate", 23: "candidate"}
    again = Loop(tmp_path, confirm=10, steps=32)
    again.send("rollback", at_step=24, value=20.0)
    seen: dict[int, str] = {}
    for step in again.guard:
        if again.guard.timeline == 2:  # behind the rollback, for which only the disk had the state
            seen[step.number] = next(
                info.state for info in again.guard.snapshots.ring.infos() if info.step == 20
            )
        again.take(step)
    assert seen == {number: "candidate" if number <= 30 else "good" for number in range(21, 33)}


def test_lines_list_and_report_say_what_is_unresolved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing writes the heartbeat of this run: the list need not wait long for it.
    monkeypatch.setattr("guardrail.rundir.liveness.FIRST_SECONDS", 0.2)
    run = RunDirectory.create(tmp_path, "one", "")
    one = Unresolved(incident=1, since=60, loss=10.3, expected=1.8, let_pass="advise")
    status = Status(run=run.name, phase=Phase.STEP, step=90, unresolved=one)
    run.write_status(status)
    values = {
        "step": 60,
        "loss": 10.3,
        "grad_norm": 1.0,
        "embed_grad_norm": 1.0,
        "lr": 0.1,
        "eval_loss": math.nan,
    }
    assert "LOSS +8.5 since 60" in format_step(values, status)
    assert "LOSS" not in format_step({**values, "step": 59}, status)
    assert main(["runs", "--root", str(tmp_path)]) == 0
    assert capsys.readouterr().out.rstrip().endswith("LOSS +8.5 since 60")
    assert (
        summarize_run(run, lambda run, status: True).as_dict()["unresolved"] == "LOSS +8.5 since 60"
    )
    assert one.sentence()[1:] in summary_text(run)
    in_hand = Unresolved(incident=1, since=60, is_open=True, acted=True, loss=2.0, expected=1.8)
    assert (
        in_hand.headline() == ""
        and Unresolved(incident=1, since=60).headline() == "UNSTABLE since 60"
    )


def test_a_loss_that_is_not_above_its_trend_is_not_said_to_be() -> None:
    above = Unresolved(incident=1, since=400, loss=10.3, expected=1.8)
    assert numbers_in(above.sentence()) == [400, 10.3, 8.5]
    below = Unresolved(incident=1, since=120, is_open=True, acted=True, loss=2.86, expected=2.912)
    assert numbers_in(below.sentence()) == [120, 2.86]
    over = Unresolved(incident=1, since=120, loss=2.86, expected=2.912)
    assert below.headline() == "" and over.headline() == "LOSS NORMAL, not confirmed"
