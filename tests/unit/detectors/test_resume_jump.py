from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from guardrail.core.events.decisions import FindingNoted
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.findings import FindingKind
from guardrail.core.records.verdicts import Action, Mode, Verdict
from guardrail.core.toml_file import dump_toml
from guardrail.decide.controller import Controller
from guardrail.detectors.resume_jump import ROWS
from tests.support.feed import noisy, obs, through_json, warmed
from tests.support.running import new_run, of_kind, tiny, train
from tests.support.texts import numbers_in


def resumed(mode: Mode = Mode.AUTO) -> tuple[Controller, Controller, int]:
    """(Controller that went on, controller that was resumed from its state, next step)."""
    whole = Controller(GuardOptions(), mode=mode)
    step = warmed(whole)
    fresh = Controller(GuardOptions(), mode=mode)
    fresh.load_state_dict(through_json(whole.state_dict()))
    fresh.note_resume()
    return whole, fresh, step


def jumps(verdict: Verdict) -> list[str]:
    return [f.signal for f in verdict.findings if f.kind is FindingKind.RESUME_JUMP]


@pytest.mark.parametrize("factor", [1.13, 0.8])
def test_a_loss_that_is_off_after_a_resume_is_noted_once_up_or_down(factor: float) -> None:
    _, fresh, step = resumed()
    verdicts = [
        fresh.observe(obs(at, factor * noisy(2.06)(at), 0.5)) for at in range(step, step + 10)
    ]
    assert [v.step for v in verdicts if jumps(v)] == [step]
    assert verdicts[0].action is Action.APPLY
    (found,) = (f for f in verdicts[0].findings if f.kind is FindingKind.RESUME_JUMP)
    assert found.baseline == pytest.approx(2.0, abs=0.1)
    assert found.value == pytest.approx(factor * found.baseline, rel=0.05)
    shown = [float(f"{found.value:.4g}"), float(f"{found.baseline:.4g}")]
    assert numbers_in(found.sentence()) == shown


def test_a_norm_that_is_off_is_named_beside_it() -> None:
    _, fresh, step = resumed()
    assert jumps(fresh.observe(obs(step, 2.06, 0.02))) == ["grad_norm"]
    assert jumps(fresh.observe(obs(step + 1, 1.5, 0.02))) == ["loss"]


def test_a_run_that_goes_on_where_it_was_is_not_mentioned() -> None:
    _, fresh, step = resumed()
    for at in range(step, step + 40):
        assert not fresh.observe(
            obs(at, noisy(2.06)(at), noisy(0.5, seed=1, noise=0.2)(at))
        ).findings


def test_later_drops_are_none_of_its_business() -> None:
    _, fresh, step = resumed()
    for at in range(step, step + ROWS):
        assert not fresh.observe(obs(at, noisy(2.06)(at), 0.5)).findings
    assert not fresh.observe(obs(step + ROWS, 1.2, 0.5)).findings


@pytest.mark.parametrize("loss", [9.0, 2.06, 0.5])
def test_what_a_resumed_run_decides_is_what_an_unbroken_one_decides(loss: float) -> None:
    whole, fresh, step = resumed()
    for at in range(step, step + 6):
        a, b = (one.observe(obs(at, loss, 0.5, streak=0)) for one in (whole, fresh))
        assert (a.action, a.onset, a.window, a.before_step) == (
            b.action,
            b.onset,
            b.window,
            b.before_step,
        )
        assert whole.state_dict() == fresh.state_dict()


def test_a_rollback_ends_the_watch() -> None:
    _, fresh, step = resumed()
    fresh.load_state_dict(through_json(fresh.state_dict()))
    assert not jumps(fresh.observe(obs(step, 1.2, 0.5)))


def test_a_recorded_log_that_goes_back_a_little_was_resumed_too() -> None:
    controller = Controller(GuardOptions(mode=Mode.ADVISE))
    step = warmed(controller)
    first = controller.observe(obs(step - 20, noisy(2.06)(step), 0.5))
    assert [f.kind for f in first.findings] == [FindingKind.RESTART]
    copy = Controller(GuardOptions(mode=Mode.ADVISE))
    copy.load_state_dict(through_json(controller.state_dict()))
    for one in (controller, copy):
        assert jumps(one.observe(obs(step - 19, 1.5, 0.5))) == ["loss"]
        assert not jumps(one.observe(obs(step - 18, 1.5, 0.5)))


def test_the_guard_watches_the_first_steps_of_a_resumed_run(tmp_path: Path) -> None:
    config = tiny(tmp_path, train={"steps": 40})
    run = new_run(config)
    assert train(run, 1) == "finished"
    fault = {"kind": "spike_loss", "step": 41, "value": 0.2}
    longer = tiny(tmp_path, train={"steps": 44}, faults=[fault])
    run.write_config(dump_toml(msgspec.structs.replace(longer, run=config.run)))
    assert train(run, 1) == "finished"
    told = [
        (event.at_step, found)
        for event in run.events()
        if isinstance(event, FindingNoted)
        for found in event.findings
    ]
    assert [(step, f.signal) for step, f in told if f.kind is FindingKind.RESUME_JUMP] == [
        (41, "loss"),
        (41, "grad_norm"),
    ]
    assert not of_kind(run, "verdict")
