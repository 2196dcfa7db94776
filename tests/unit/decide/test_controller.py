from __future__ import annotations

import math
import random
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from guardrail.core.events.event import Event
from guardrail.core.files import encode_json
from guardrail.core.guard_options import EscalationStep, GuardOptions
from guardrail.core.records.findings import FindingKind, Observation, Severity
from guardrail.core.records.signals import (
    EMBED_GRAD_NORM,
    EMBED_SHARE,
    GRAD_NORM,
    LOSS,
    LOSS_SCALE,
    UPDATE_NORM,
)
from guardrail.core.records.verdicts import Action, Cause, Diagnosis, Mode, Verdict
from guardrail.decide.controller import Controller
from guardrail.decide.rollback import Rollback
from guardrail.decide.run_history import RunHistory
from tests.support.events import make_line
from tests.support.feed import BATCH, Trainer, healthy_loss, noisy, obs, plain, through_json, warmed
from tests.support.findings import make_finding
from tests.support.texts import numbers_in

DEFAULT = GuardOptions()
SKIP, PAUSE = EscalationStep(action="skip"), EscalationStep(action="pause")


def rejections(controller: Controller, step: int, count: int, **fields: Any) -> list[Verdict]:
    """`count` bad batches in a row at the same step, as the ledger hands them out."""
    first = (step - 1) * BATCH
    return [
        controller.observe(obs(step, 9.0, 0.5, first=first + BATCH * k, streak=k, **fields))
        for k in range(count)
    ]


# -- what is done ----------------------------------------------------------------------------------


def test_a_spike_is_left_out_with_its_own_samples() -> None:
    controller = Controller(DEFAULT)
    step = warmed(controller)
    verdict = controller.observe(obs(step, 9.0, 0.5))
    assert verdict.action is Action.SKIP and not verdict.accepted
    assert verdict.window == ((step - 1) * BATCH, step * BATCH)
    assert verdict.onset == step and verdict.would is None
    assert [f.kind for f in verdict.findings] == [FindingKind.LOSS_SPIKE]
    assert "loss 9 (normal 2" in verdict.reason and "rejection 1 of 3" in verdict.reason


def test_rejections_in_a_row_roll_back_from_the_batch_before_the_onset() -> None:
    controller = Controller(DEFAULT)
    step = warmed(controller)
    verdicts = rejections(controller, step, 3)
    assert [v.action for v in verdicts] == [Action.SKIP, Action.SKIP, Action.ROLLBACK]
    last = verdicts[-1]
    assert last.onset == step and last.before_step == step - 1
    assert last.window == ((step - 2) * BATCH, (step + 2) * BATCH)
    assert f"before step {step - 1}" in last.reason and "3 consecutive rejections" in last.reason


@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 0), (7, 3), (100, 400)])
def test_the_window_is_as_wide_as_configured(before: int, after: int) -> None:
    controller = Controller(GuardOptions(skip_before=before, skip_after=after))
    step = warmed(controller)
    last = rejections(controller, step, 3)[-1]
    assert last.window == ((step - 1 - before) * BATCH, (step + 2 + after) * BATCH)
    assert last.before_step == step - before


def test_a_window_that_reaches_before_the_beginning_starts_there() -> None:
    controller = Controller(GuardOptions(skip_before=100))
    for step in range(1, 41):
        controller.observe(obs(step, noisy(2.0)(step), 0.5))
    last = rejections(controller, 41, 3)[-1]
    assert last.window is not None and last.window[0] == 0 and last.before_step == 1


def test_rejections_before_anything_was_applied_are_handled() -> None:
    for before in (0, 1, 5):
        controller = Controller(GuardOptions(skip_before=before))
        verdicts = [
            controller.observe(
                obs(1, math.nan, 1.0, first=BATCH * k, last=BATCH * (k + 1), streak=k)
            )
            for k in range(3)
        ]
        assert [v.action for v in verdicts] == [Action.SKIP, Action.SKIP, Action.ROLLBACK]
        assert verdicts[-1].window == (0, 3 * BATCH) and verdicts[-1].before_step == 1


def test_divergence_rolls_back_at_once_to_before_its_onset() -> None:
    controller = Controller(GuardOptions(loss_score=20.0))
    step = warmed(controller)
    verdict = None
    for at in range(step, step + 40):
        verdict = controller.observe(obs(at, 1.25 * healthy_loss(at), 0.5))
        if verdict.action is not Action.APPLY:
            break
        assert verdict.accepted
    assert verdict is not None and verdict.action is Action.ROLLBACK
    assert verdict.findings[0].kind is FindingKind.DIVERGENCE
    assert verdict.onset is not None and abs(verdict.onset - step) <= 2
    assert verdict.window == ((verdict.onset - 2) * BATCH, verdict.step * BATCH)
    evidence = verdict.findings[0].sentence()
    reason = numbers_in(verdict.reason.removeprefix(evidence))
    assert reason == [verdict.before_step, verdict.window[0], verdict.window[1] - 1]


def test_signals_are_judged_together() -> None:
    controller = Controller(DEFAULT)
    step = warmed(controller)
    verdict = controller.observe(obs(step, 9.0, 500.0, embed=math.inf, nonfinite_grad=(1,)))
    kinds = [f.kind for f in verdict.findings]
    assert kinds[0] is FindingKind.NONFINITE and {
        FindingKind.LOSS_SPIKE,
        FindingKind.GRAD_SPIKE,
    } < set(kinds)
    assert verdict.incident == 1 and verdict.incident_state == "open"


def test_a_note_is_applied_and_said() -> None:
    controller = Controller(DEFAULT)
    step = warmed(controller)
    low, high = controller.bands()[GRAD_NORM]
    verdict = controller.observe(obs(step, healthy_loss(step), low * (high / low) ** 0.8))
    assert verdict.action is Action.APPLY and verdict.accepted and verdict.incident is None
    assert verdict.findings[0].severity is Severity.NOTE and verdict.reason.startswith(
        "noted: grad_norm"
    )


def test_batches_without_labels_are_left_out_and_never_add_up_to_a_rollback() -> None:
    controller = Controller(DEFAULT)
    step = warmed(controller)
    first = (step - 1) * BATCH
    before = controller.state_dict()
    for k in range(10):
        verdict = controller.observe(
            obs(step, math.nan, 0.0, first=first + BATCH * k, streak=k, tokens=0)
        )
        assert verdict.action is Action.SKIP and verdict.incident is None
        assert [f.kind for f in verdict.findings] == [FindingKind.NO_TOKENS]
    assert controller.state_dict() == before
    # Nor do they make the next rejection the last straw.
    verdict = controller.observe(obs(step, 9.0, 0.5, first=first + BATCH * 10, streak=10))
    assert verdict.action is Action.SKIP
    verdict = controller.observe(obs(step, 9.0, 0.5, first=first + BATCH * 11, streak=11))
    verdict = controller.observe(obs(step, 9.0, 0.5, first=first + BATCH * 12, streak=12))
    assert verdict.action is Action.ROLLBACK


# -- budget ----------------------------------------------------------------------------------------


def done(step: int) -> Rollback:
    return Rollback(from_step=step, to_step=step - 10, onset=step, window=(0, BATCH))


def test_the_budget_halts_and_healthy_steps_give_it_back() -> None:
    controller = Controller(GuardOptions(max_rollbacks=2, reset_budget_after=100))
    step = warmed(controller)
    controller.memory.load_rollbacks([*controller.memory.rollbacks, done(step - 60)])
    assert rejections(controller, step, 3)[-1].action is Action.ROLLBACK
    controller.memory.load_rollbacks([*controller.memory.rollbacks, done(step - 1)])
    halt = rejections(controller, step, 3)[-1]
    assert halt.action is Action.HALT and "2 rollbacks without 100 healthy steps" in halt.reason
    # exactly 100 steps were applied since
    controller.memory.load_rollbacks([done(step - 200), done(step - 101)])
    assert rejections(controller, step, 3)[-1].action is Action.ROLLBACK
    controller.memory.load_rollbacks([done(step - 199), done(step - 100)])
    assert rejections(controller, step, 3)[-1].action is Action.HALT


def test_rollbacks_are_read_from_the_journal_as_it_is_written() -> None:
    controller = Controller(GuardOptions(max_rollbacks=1))
    step = warmed(controller)
    data = {
        "to_step": 150,
        "from_step": step - 1,
        "onset": 160,
        "window": [2544, 3200],
        "tier": "memory",
        "new_timeline": 1,
    }
    span = {"cause": "user", "first": 1, "last": 2, "step": 3}
    (by_user,) = RunHistory.from_events([event("rollback", step, **data, span=span)]).rollbacks
    controller.memory.load_rollbacks([by_user])
    assert rejections(controller, step, 3)[-1].action is Action.ROLLBACK
    span = {"cause": "rollback", "first": 1, "last": 2, "step": 3}
    (by_guard,) = RunHistory.from_events([event("rollback", step, **data, span=span)]).rollbacks
    controller.memory.load_rollbacks([by_guard])
    assert rejections(controller, step, 3)[-1].action is Action.HALT


# -- modes -----------------------------------------------------------------------------------------


def test_ask_skips_by_itself_and_parks_before_a_rollback() -> None:
    controller = Controller(GuardOptions(mode=Mode.ASK, max_rollbacks=1))
    step = warmed(controller)
    verdicts = rejections(controller, step, 3)
    assert [v.action for v in verdicts] == [Action.SKIP, Action.SKIP, Action.PAUSE]
    assert verdicts[-1].would is Action.ROLLBACK
    assert verdicts[-1].window == ((step - 2) * BATCH, (step + 2) * BATCH)
    controller.memory.load_rollbacks([*controller.memory.rollbacks, done(step - 1)])
    assert rejections(controller, step, 3)[-1].would is Action.HALT


def test_a_person_can_overrule_and_is_not_asked_again_each_step() -> None:
    controller = Controller(GuardOptions(mode=Mode.ASK))
    step = warmed(controller)
    asked = rejections(controller, step, 3)[-1]
    assert asked.action is Action.PAUSE
    controller.overrule(obs(step, 9.0, 0.5, first=(step + 1) * BATCH))
    for at in range(step + 1, step + 60):
        assert (
            controller.observe(obs(at, noisy(9.0)(at), 0.5, first=(at + 1) * BATCH)).action
            is Action.APPLY
        )
    assert controller.observe(obs(step + 60, 20.0, 0.5)).action is Action.SKIP


def test_advise_changes_nothing_and_says_what_it_would_do() -> None:
    controller = Controller(GuardOptions(mode=Mode.ADVISE, max_rollbacks=2))
    step = warmed(controller)
    verdicts = [controller.observe(obs(at, 9.0, 0.5)) for at in range(step, step + 9)]
    assert all(v.action is Action.APPLY and not v.accepted for v in verdicts)
    skip, back, halt = Action.SKIP, Action.ROLLBACK, Action.HALT
    assert [v.would for v in verdicts] == [skip, skip, back, skip, skip, back, skip, skip, halt]
    assert verdicts[2].window == ((step - 2) * BATCH, (step + 2) * BATCH)
    assert [v.onset for v in verdicts[:6]] == [step] * 3 + [step + 3] * 3
    healthy = controller.observe(obs(step + 9, healthy_loss(step), 0.5))
    assert healthy.would is None and healthy.accepted


def test_advise_learns_where_the_run_stays() -> None:
    controller = Controller(GuardOptions(mode=Mode.ADVISE))
    step = warmed(controller)
    verdicts = [controller.observe(obs(at, noisy(9.0)(at), 0.5)) for at in range(step, step + 200)]
    assert verdicts[0].would is Action.SKIP
    assert all(v.would is None for v in verdicts[60:])
    assert controller.observe(obs(step + 200, 30.0, 0.5)).would is Action.SKIP


def test_advise_says_once_that_the_loss_has_diverged() -> None:
    controller = Controller(GuardOptions(mode=Mode.ADVISE, loss_score=20.0))
    step = warmed(controller)
    verdicts = [
        controller.observe(obs(at, 1.25 * healthy_loss(at), 0.5)) for at in range(step, step + 200)
    ]
    assert [v.would for v in verdicts if v.would is not None] == [Action.ROLLBACK]


def test_off_is_silent_and_begins_anew_when_it_is_left() -> None:
    controller = Controller(GuardOptions(mode=Mode.OFF))
    for step in range(1, 101):
        verdict = controller.observe(obs(step, math.nan if step % 3 else 2.0, 0.5))
        assert verdict == Verdict(action=Action.APPLY, step=step)
    assert controller.bands() == {} and controller.healthy_through == 100
    controller.set_mode(Mode.AUTO)
    assert controller.observe(obs(101, math.nan, 0.5)).action is Action.SKIP
    for step in range(101, 180):
        assert controller.observe(obs(step, noisy(5.0)(step), 0.5)).action is Action.APPLY
    assert rejections(controller, 180, 3)[-1].window == (178 * BATCH, 182 * BATCH)


def test_old_knowledge_is_dropped_when_off_is_left() -> None:
    controller = Controller(DEFAULT)
    step = warmed(controller)
    controller.set_mode(Mode.OFF)
    controller.observe(obs(step, 9.0, 0.5))
    controller.set_mode(Mode.AUTO)
    assert controller.observe(obs(step + 1, 9.0, 0.5)).action is Action.APPLY


def test_the_mode_argument_wins_over_the_settings() -> None:
    assert Controller(DEFAULT, mode=Mode.ADVISE).mode is Mode.ADVISE


# -- incidents, bands, confirmation ----------------------------------------------------------------


def test_an_incident_runs_from_the_first_finding_to_confirm_healthy_steps() -> None:
    controller = Controller(GuardOptions(steps_until_good=4))
    step = warmed(controller)
    states = [(v.incident, v.incident_state) for v in rejections(controller, step, 2)]
    assert states == [(1, "open"), (1, "")]
    after = [controller.observe(obs(at, healthy_loss(at), 0.5)) for at in range(step, step + 5)]
    assert [(v.incident, v.incident_state) for v in after] == [(1, "")] * 3 + [
        (1, "recovered"),
        (None, ""),
    ]
    assert controller.observe(obs(step + 5, 9.0, 0.5)).incident == 2


def test_bands_are_in_the_units_of_the_signal_and_part_right_from_wrong() -> None:
    controller = Controller(DEFAULT)
    assert controller.bands() == {}
    step = warmed(controller)
    bands = controller.bands()
    assert set(bands) == {LOSS, GRAD_NORM}
    for signal, (baseline, threshold) in bands.items():
        for factor, action in ((0.999, Action.APPLY), (1.001, Action.SKIP)):
            signals = {LOSS: bands[LOSS][0], GRAD_NORM: bands[GRAD_NORM][0]} | {
                signal: threshold * factor
            }
            twin = Controller(DEFAULT)
            twin.load_state_dict(controller.state_dict())
            assert (
                twin.observe(Observation(step=step, first=1, last=2, signals=signals)).action
                is action
            )
        assert 0 < baseline < threshold


def test_states_are_not_called_healthy_while_the_loss_rises() -> None:
    controller = Controller(GuardOptions(loss_score=20.0))
    assert controller.healthy_through == 0
    step = warmed(controller)
    assert controller.healthy_through == step - 1
    reached = []
    for at in range(step, step + 40):
        if controller.observe(obs(at, 1.25 * healthy_loss(at), 0.5)).action is not Action.APPLY:
            break
        reached.append(controller.healthy_through)
    assert max(reached) < step + 12 and reached[-1] <= step + 1


# -- restarts in one log ---------------------------------------------------------------------------


def test_a_step_counter_that_goes_back_is_a_new_run_and_no_alarm_storm() -> None:
    controller = Controller(GuardOptions(mode=Mode.ADVISE))
    warmed(controller)
    verdicts = [
        controller.observe(obs(at, healthy_loss(at), noisy(0.5)(at), first=at * 9999))
        for at in range(1, 100)
    ]
    assert [f.kind for f in verdicts[0].findings] == [FindingKind.RESTART]
    assert all(not v.findings and v.would is None for v in verdicts[1:])
    assert controller.observe(obs(100, 9.0, 0.5)).would is Action.SKIP


def test_a_log_that_was_resumed_keeps_its_baseline() -> None:
    controller = Controller(GuardOptions(mode=Mode.ADVISE))
    warmed(controller)
    verdict = controller.observe(obs(180, healthy_loss(180), 0.5))
    assert [f.kind for f in verdict.findings] == [FindingKind.RESTART] and verdict.accepted
    assert verdict.reason.endswith(f": {verdict.findings[0].sentence()}")
    assert numbers_in(verdict.reason) == [180]
    assert controller.observe(obs(181, 3.5, 0.5)).would is Action.SKIP
    assert controller.observe(obs(182, 3.5, 0.5)).findings[0].kind is FindingKind.LOSS_SPIKE
    verdict = controller.observe(obs(183, 3.5, 0.5))
    assert verdict.onset == 181 and verdict.window == (179 * BATCH, 183 * BATCH)


def test_a_step_that_is_logged_twice_is_no_restart() -> None:
    controller = Controller(GuardOptions(mode=Mode.ADVISE))
    for step in range(1, 201):
        for _ in range(2):
            assert not controller.observe(obs(step, noisy(2.0)(step), 0.5)).findings
    assert controller.observe(obs(201, 9.0, 0.5)).would is Action.SKIP


# -- properties ------------------------------------------------------------------------------------

HYPOTHESIS = settings(deadline=None, derandomize=True, max_examples=40)

positive = st.floats(min_value=1e-6, max_value=1e6)
anything = st.one_of(
    st.none(),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e30, 1e300, 5e-324, math.nan, math.inf, -math.inf]),
    st.floats(),
)


@st.composite
def runs(draw: st.DrawFn, *, length: int = 160) -> list[tuple[float, float, float]]:
    """(loss, grad_norm, embed_grad_norm) of a noisy run with trouble in it."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    noise = draw(st.sampled_from([0.0, 0.005, 0.05, 0.4]))
    slope = draw(st.sampled_from([0.0, -0.01, 0.01]))
    rows = [
        (
            2.0 * math.exp(slope * t + rng.gauss(0, noise)),
            0.5 * math.exp(rng.gauss(0, 0.2)),
            0.1 * math.exp(rng.gauss(0, 0.3)),
        )
        for t in range(length)
    ]
    for _ in range(draw(st.integers(0, 6))):
        at, width = draw(st.integers(0, length - 1)), draw(st.integers(1, 5))
        factors = [draw(st.sampled_from([1.0, 1.3, 4.0, 50.0, 1e4])) for _ in range(3)]
        for t in range(at, min(length, at + width)):
            rows[t] = tuple(value * factor for value, factor in zip(rows[t], factors, strict=True))  # type: ignore
    return rows


def drive(
    controller: Controller,
    rows: list[tuple[Any, Any, Any]],
    *,
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> list[tuple[Observation, Verdict]]:
    """Feed rows as a run of auto mode would meet them: a rejected batch does not advance the step.

    A rollback is answered like a rejection, without going back.
    """
    step, streak, told = 1, 0, []
    for index, row in enumerate(rows):
        values = {
            name: value * factor
            for name, value, factor in zip(
                (LOSS, GRAD_NORM, EMBED_GRAD_NORM), row, scale, strict=True
            )
            if value is not None
        }
        seen = Observation(
            step=step, first=index * BATCH, last=(index + 1) * BATCH, signals=values, streak=streak
        )
        verdict = controller.observe(seen)
        told.append((seen, verdict))
        if verdict.action is Action.APPLY:
            step, streak = step + 1, 0
        elif verdict.action is Action.SKIP:
            streak += 1
        else:
            streak = 0
    return told


EVERY = (LOSS, GRAD_NORM, EMBED_GRAD_NORM, EMBED_SHARE, UPDATE_NORM, LOSS_SCALE)
SHORT = GuardOptions(window=32, warmup=8, divergence_steps=10)


@HYPOTHESIS
@given(runs(), st.tuples(positive, positive, positive))
def test_the_units_of_a_signal_do_not_matter(
    rows: list[Any], scale: tuple[float, float, float]
) -> None:
    def told(factors: tuple[float, float, float]) -> list[Any]:
        verdicts = [verdict for _, verdict in drive(Controller(SHORT), rows, scale=factors)]
        return [
            (v.action, v.window, v.onset, [(f.kind, f.severity) for f in v.findings])
            for v in verdicts
        ]

    assert told(scale) == told((1.0, 1.0, 1.0))


@HYPOTHESIS
@given(st.lists(st.tuples(anything, anything, anything), max_size=80), st.sampled_from(list(Mode)))
@example([(math.nan,) * 3] * 50, Mode.AUTO)
@example([(0.0, 0.0, 0.0)] * 50, Mode.ADVISE)
@example([(1.0, 1.0, 1.0)] * 80, Mode.AUTO)
@example([(1e-300, 5e-324, 1e300), (1e19, 1e19, 1e-300)] * 30, Mode.AUTO)
def test_no_number_raises_and_none_disables_a_detector(rows: list[Any], mode: Mode) -> None:
    controller = Controller(SHORT, mode=mode)
    drive(controller, rows)
    through_json(controller.state_dict())
    # Nothing is rolled back here, so let it learn where the run stays, as `advise` does.
    controller.set_mode(Mode.ADVISE)
    for step in range(10_000, 10_150):
        loss, grad, embed = (
            noisy(2.0)(step),
            noisy(0.5, noise=0.2)(step),
            noisy(0.1, noise=0.2)(step),
        )
        controller.observe(obs(step, loss, grad, embed=embed))
    for loss, grad, embed in (
        (20.0, 0.5, 0.1),
        (2.0, 500.0, 0.1),
        (2.0, 0.5, 100.0),
        (math.nan, 0.5, 0.1),
    ):
        verdict = controller.observe(obs(10_150, loss, grad, embed=embed))
        assert not verdict.accepted, (loss, grad, embed, controller.bands())


@HYPOTHESIS
@given(
    st.lists(st.fixed_dictionaries({}, optional={name: anything for name in EVERY}), max_size=80),
    st.sampled_from(list(Mode)),
    st.booleans(),
)
def test_no_number_of_any_signal_raises_and_each_state_can_be_kept(
    rows: list[dict[str, Any]], mode: Mode, resumed: bool
) -> None:
    controller = Controller(SHORT, mode=mode)
    step, streak = 1, 0
    for index, row in enumerate(rows):
        if resumed and index == 40:
            controller.note_resume()
        signals = {name: value for name, value in row.items() if value is not None}
        verdict = controller.observe(
            Observation(step=step, first=index, last=index + 1, signals=signals, streak=streak)
        )
        verdict.reason.encode()
        step, streak = (step + 1, 0) if verdict.action is Action.APPLY else (step, streak + 1)
        copy = Controller(SHORT, mode=mode)
        assert copy.load_state_dict(through_json(controller.state_dict())) == []
    controller.bands()
    assert controller.healthy_through <= step


@HYPOTHESIS
@given(runs(), st.integers(0, 159), st.sampled_from([Mode.AUTO, Mode.ADVISE, Mode.ASK]))
def test_state_through_json_at_any_row_gives_the_same_verdicts(
    rows: list[Any], cut: int, mode: Mode
) -> None:
    whole = Controller(SHORT, mode=mode)
    told = drive(whole, rows)
    first = Controller(SHORT, mode=mode)
    for seen, _ in told[:cut]:
        first.observe(seen)
    second = Controller(SHORT, mode=mode)
    second.load_state_dict(through_json(first.state_dict()))
    second.memory.load_rollbacks(first.memory.rollbacks)
    for seen, verdict in told[cut:]:
        again = second.observe(seen)
        assert plain(
            msgspec.structs.replace(again, incident=None, incident_state="", outcome=None)
        ) == plain(msgspec.structs.replace(verdict, incident=None, incident_state="", outcome=None))
    assert second.state_dict() == whole.state_dict()


@HYPOTHESIS
@given(
    runs(),
    st.one_of(
        st.floats(min_value=1e4, max_value=1e308), st.sampled_from([math.nan, math.inf, 1e30])
    ),
)
def test_a_spike_of_any_height_leaves_the_baseline_as_it_was(
    rows: list[Any], height: float
) -> None:
    controller = Controller(SHORT)
    told = drive(controller, rows)
    before, bands = through_json(controller.state_dict()), controller.bands()
    step, first = told[-1][0].step + 1, told[-1][0].last
    for signal in (LOSS, GRAD_NORM, EMBED_GRAD_NORM):
        value = (
            height * max(1.0, *(values for row in rows for values in row))
            if math.isfinite(height)
            else height
        )
        signals = told[-1][0].signals | {
            signal: min(value, 1e308) if math.isfinite(value) else value
        }
        verdict = controller.observe(
            Observation(step=step, first=first, last=first + BATCH, signals=signals)
        )
        assert verdict.action is not Action.APPLY
        assert through_json(controller.state_dict()) == before
        assert controller.bands() == bands


@HYPOTHESIS
@given(runs())
def test_rejected_batches_leave_no_trace_in_the_state(rows: list[Any]) -> None:
    """What makes crash recovery exact: accepted steps, the ledger's streak and the journal's facts
    are all it takes.
    """
    whole = Controller(SHORT)
    told = drive(whole, rows)
    fresh = Controller(SHORT)
    for seen, verdict in told:
        if verdict.action is Action.APPLY:
            again = fresh.observe(seen)
        else:
            # A copy judges the rejected batch, so that `fresh` itself sees accepted ones alone.
            judge = Controller(SHORT)
            judge.load_state_dict(through_json(fresh.state_dict()))
            again = judge.observe(seen)
        assert (again.action, again.window, again.onset, again.reason) == (
            verdict.action,
            verdict.window,
            verdict.onset,
            verdict.reason,
        )
    assert fresh.state_dict() == whole.state_dict()


# -- whole runs ------------------------------------------------------------------------------------

CORRUPT = range(2000, 2000 + 5 * BATCH)


def corrupted(order_seed_samples: int = 100_000) -> list[int]:
    """The sample ids at five batches' positions in the middle of the order, as a corrupted stretch
    of data.
    """
    from guardrail.decide.sample_order import SampleOrder

    return SampleOrder(samples=order_seed_samples, seed=3).samples(CORRUPT.start, CORRUPT.stop)


def test_a_run_meets_corrupted_data_rolls_back_and_goes_on() -> None:
    run = Trainer(DEFAULT, bad=corrupted()).run(300)
    actions = [v.action for v in run.verdicts if v.action is not Action.APPLY]
    assert actions == [Action.SKIP, Action.SKIP, Action.ROLLBACK, Action.SKIP, Action.SKIP]
    assert run.poison == 0.0 and run.verdicts[-1].incident is None
    assert len(run.quarantined()) == 6 * BATCH  # five bad batches and the one before the onset


def test_afterwards_all_is_as_if_the_data_had_been_left_out_from_the_beginning() -> None:
    run = Trainer(DEFAULT, bad=corrupted()).run(300)
    told = Trainer(GuardOptions(mode=Mode.OFF), bad=corrupted(), quarantine=run.quarantined()).run(
        300
    )
    assert told.story(300) == run.story(300)


@pytest.mark.parametrize("every", [1, 7, 50, 130])
def test_what_is_left_out_does_not_depend_on_which_snapshots_there_are(every: int) -> None:
    settings = GuardOptions(skip_before=3, skip_after=2)
    assert Trainer(settings, bad=corrupted(), every=every).run(300).story(300) == Trainer(
        settings, bad=corrupted(), every=10
    ).run(300).story(300)


def test_a_second_rollback_inside_the_stretch_that_is_run_again() -> None:
    """The second corrupted stretch lies between the snapshot and the first one, and shows only
    after a shift.
    """
    settings = GuardOptions(skip_before=30)
    bad = corrupted()
    run = Trainer(settings, bad=bad, every=100).run(300)
    told = Trainer(GuardOptions(mode=Mode.OFF), bad=bad, quarantine=run.quarantined()).run(300)
    assert told.story(300) == run.story(300)


def test_damage_that_leaks_into_the_weights_is_rolled_back_too() -> None:
    """Bad samples that the spike detector lets pass: each raises the loss of every later step a
    little.
    """
    bad = corrupted()[:3]
    run = Trainer(GuardOptions(loss_score=200.0, skip_before=2), bad=bad, every=10).run(300)
    kinds = {f.kind for v in run.verdicts for f in v.findings if v.action is Action.ROLLBACK}
    assert kinds == {FindingKind.DIVERGENCE}
    assert run.poison == 0.0
    told = Trainer(GuardOptions(mode=Mode.OFF), bad=bad, quarantine=run.quarantined()).run(300)
    assert told.story(300) == run.story(300)


@pytest.mark.parametrize("seed", range(12))
def test_crashes_at_any_moment_change_nothing(seed: int) -> None:
    rng = random.Random(seed)
    bad = corrupted() + [rng.randrange(100_000) for _ in range(200)]
    settings = GuardOptions(skip_before=rng.choice([0, 1, 20]), max_rollbacks=50)
    every = rng.choice([5, 25, 60])
    calm = Trainer(settings, bad=bad, every=every).run(300)
    crashes = [rng.randrange(1, 320) for _ in range(8)]
    assert any(v.action is Action.SKIP for v in calm.verdicts)
    assert Trainer(settings, bad=bad, every=every, crash_at=crashes).run(300).story(
        300
    ) == calm.story(300)


def test_trouble_that_never_ends_halts_within_the_budget() -> None:
    run = Trainer(GuardOptions(max_rollbacks=3), bad=range(100_000), every=10, samples=100_000)
    run.bad = set()
    run.run(100)
    run.bad = set(range(100_000))
    run.run(300)
    assert run.halted
    assert [v.action for v in run.verdicts if v.action in (Action.ROLLBACK, Action.HALT)] == [
        Action.ROLLBACK,
        Action.ROLLBACK,
        Action.ROLLBACK,
        Action.HALT,
    ]


# -- the journal -----------------------------------------------------------------------------------


def event(kind: str, step: int, **data: Any) -> Event:
    encoded = msgspec.json.decode(encode_json(data))
    return make_line(seq=1, time=0.0, step=step, timeline=0, kind=kind, data=encoded)


def test_facts_come_back_from_the_journal() -> None:
    whole = Controller(GuardOptions(max_rollbacks=1))
    step = warmed(whole)
    state = through_json(whole.state_dict())
    first = (step - 1) * BATCH
    events = []

    def tell(verdict: Verdict) -> None:
        data = {
            "action": verdict.action,
            "findings": verdict.findings,
            "window": verdict.window,
            "at_step": step,
        }
        events.append(event("verdict", step - 1, **data))
        if verdict.incident_state:
            events.append(
                event(
                    "incident",
                    step - 1,
                    number=verdict.incident,
                    state=verdict.incident_state,
                    onset=verdict.onset,
                )
            )

    tell(whole.observe(obs(step, math.nan, 0.5, first=first, tokens=0)))
    tell(
        whole.observe(obs(step, math.nan, 0.5, first=first + BATCH, streak=1, nonfinite_loss=(0,)))
    )
    done = {"to_step": 150, "from_step": 190, "onset": 160, "window": [2544, 3200]}
    events.append(event("rollback", 150, new_timeline=1, **done))
    whole.memory.load_rollbacks(RunHistory.from_events(events[-1:]).rollbacks)

    fresh = Controller(GuardOptions(max_rollbacks=1))
    fresh.load_state_dict(state)
    fresh.rebuild(events)
    assert fresh.memory.rollbacks == whole.memory.rollbacks
    for k in (2, 3):
        seen = obs(step, 9.0, 0.5, first=first + BATCH * k, streak=k)
        again, verdict = fresh.observe(seen), whole.observe(seen)
        assert again == verdict
        assert again.action is (Action.SKIP if k == 2 else Action.HALT)
    assert fresh.memory.incidents.number == 1 and fresh.memory.incidents.open
    assert fresh.observe(obs(step, 9.0, 0.5, first=first + BATCH * 9)).incident == 1


def test_a_closed_incident_stays_closed_after_a_restart() -> None:
    fresh = Controller(DEFAULT)
    fresh.rebuild(
        [
            event("incident", 10, number=3, state="open", onset=9),
            event("incident", 20, number=3, state="recovered", onset=9),
        ]
    )
    step = warmed(fresh)
    assert fresh.observe(obs(step, 9.0, 0.5)).incident == 4


def test_a_state_of_an_older_version_can_be_loaded() -> None:
    controller = Controller(DEFAULT)
    warmed(controller)
    state = through_json(controller.state_dict())
    del state["detectors"]["divergence"]
    del state["detectors"][GRAD_NORM]["tail"]
    state["detectors"]["something new"] = {"x": 1}
    fresh = Controller(GuardOptions(window=64, divergence_steps=5))
    assert fresh.load_state_dict(state) == [GRAD_NORM, "divergence"]
    assert set(fresh.bands()) == {LOSS}
    assert fresh.observe(obs(201, 9.0, 0.5)).action is Action.SKIP
    assert fresh.observe(obs(201, healthy_loss(201), 0.5)).action is Action.APPLY


def test_a_state_is_a_copy() -> None:
    controller = Controller(DEFAULT)
    step = warmed(controller)
    state = controller.state_dict()
    kept = through_json(state)
    for at in range(step, step + 50):
        controller.observe(obs(at, healthy_loss(at), 0.5))
    assert through_json(state) == kept


def test_sentences_say_what_happened() -> None:
    spike = make_finding(7, value=11.5, baseline=2.31, score=41.2, threshold=8.0)
    assert spike.sentence() == "loss 11.5 (normal 2.31), score 41.2 (limit 8)"
    unusable = msgspec.structs.replace(
        spike, kind=FindingKind.NONFINITE, value=math.nan, ranks=(2,)
    ).sentence()
    assert unusable.startswith("loss ") and " nan " in unusable and numbers_in(unusable) == [2]


# -- the cause of an incident ----------------------------------------------------------------------


def diagnosed(controller: Controller, at: Observation, cause: Cause) -> Verdict:
    """The verdict on an observation after a replay has told the cause."""
    verdict = controller.observe(at)
    assert controller.needs_cause_test(verdict)
    return controller.apply_diagnosis(
        at, verdict, Diagnosis(cause=cause, reason="...", rank=1, host="node7")
    )


def test_where_the_cause_is_unknown_nothing_changes() -> None:
    controller, other = Controller(DEFAULT), Controller(DEFAULT)
    step = warmed(controller)
    assert warmed(other) == step
    bad = obs(step, 9.0, 0.5)
    verdict, plainly = diagnosed(controller, bad, Cause.UNKNOWN), other.observe(bad)
    assert verdict == msgspec.structs.replace(plainly, cause=Cause.UNKNOWN)
    again = controller.observe(obs(step, 9.0, 0.5, first=step * BATCH, streak=1))
    assert again.action is Action.SKIP and controller.needs_cause_test(again)


def nth(step: int, streak: int) -> Observation:
    """A bad batch behind `streak` others that were left out."""
    return obs(step, 9.0, 0.5, first=(step - 1 + streak) * BATCH, streak=streak)


@pytest.mark.parametrize("cause", [Cause.DATA, Cause.DATA_AND_STATE])
def test_data_to_blame_is_left_out_however_often_in_a_row(cause: Cause) -> None:
    controller = Controller(GuardOptions(max_data_skips=20))
    step = warmed(controller)
    verdict = diagnosed(controller, nth(step, 0), cause)
    asked = []
    for streak in range(1, 21):
        assert verdict.action is Action.SKIP and verdict.escalation == "skip"
        assert numbers_in(verdict.reason)[-2:] == [streak, 20]
        verdict = controller.observe(nth(step, streak))
        if controller.needs_cause_test(verdict):
            asked.append(streak + 1)
            verdict = controller.apply_diagnosis(nth(step, streak), verdict, Diagnosis(cause=cause))
    # Whether it still is the data is asked at 3 in a row, 6, 12, and before the run is given up.
    assert asked == [3, 6, 12, 21]
    assert (verdict.action, verdict.escalation) == (Action.HALT, "halt")
    assert numbers_in(verdict.reason)[-1] == 20 and "guard.max_data_skips" in verdict.reason


def test_a_stretch_of_bad_data_without_an_end_asks_where_there_is_somebody() -> None:
    for guard in (
        GuardOptions(max_data_skips=2, mode=Mode.ASK),
        GuardOptions(max_data_skips=2, escalation=(SKIP, PAUSE)),
    ):
        controller = Controller(guard)
        step = warmed(controller)
        diagnosed(controller, nth(step, 0), Cause.DATA)
        verdict = controller.observe(nth(step, 2))
        assert (verdict.action, verdict.would) == (Action.PAUSE, Action.HALT)


def test_it_is_the_state_after_all() -> None:
    controller = Controller(DEFAULT)
    step = warmed(controller)
    diagnosed(controller, nth(step, 0), Cause.DATA)
    verdict = diagnosed(controller, nth(step, 2), Cause.STATE)
    assert verdict.action is Action.ROLLBACK and verdict.window is not None
    assert verdict.window[0] == verdict.window[1], (
        "what was left out stays out, and nothing else is"
    )


def test_an_update_of_bad_data_is_gone_back_for_once() -> None:
    controller = Controller(DEFAULT)
    step = warmed(controller)
    first = controller.observe(nth(step, 0))
    verdict = controller.apply_diagnosis(
        nth(step, 0), first, Diagnosis(cause=Cause.DATA, applied=True)
    )
    assert (verdict.action, verdict.before_step) == (Action.ROLLBACK, step - 1)
    assert verdict.window == ((step - 2) * BATCH, step * BATCH)
    assert numbers_in(verdict.reason)[-3:] == [step - 1, (step - 2) * BATCH, step * BATCH - 1]
    # It is out of the weights now: what is left of the stretch is only left out.
    done = Rollback(
        from_step=step - 1, to_step=190, onset=step - 1, window=verdict.window, incident=1
    )
    controller.memory.load_rollbacks([done])
    assert [controller.observe(nth(step, streak)).action for streak in range(5)] == [
        Action.SKIP
    ] * 5


def few(controller: Controller, positions: tuple[int, ...], cause: Cause = Cause.DATA) -> Verdict:
    """A rollback for the batch at hand, of which a replay has named some samples."""
    step = controller.applied[-1].step + 1 if controller.applied else warmed(controller)
    at = nth(step, 0)
    told = Diagnosis(
        cause=cause, applied=True, positions=tuple((step - 1) * BATCH + p for p in positions)
    )
    return controller.apply_diagnosis(at, controller.observe(at), told)


def test_only_the_samples_to_blame_of_a_window_are_left_out_until_that_was_not_enough() -> None:
    controller = Controller(DEFAULT)
    verdict = few(controller, (-2, 3))
    assert verdict.action is Action.ROLLBACK and verdict.window is not None
    here = (verdict.step - 1) * BATCH
    assert verdict.positions == (here - 2, here + 3)
    assert numbers_in(verdict.reason)[-3:] == [2, here - BATCH, here + BATCH - 1]
    went = Rollback(
        from_step=verdict.step - 1,
        to_step=190,
        onset=verdict.step,
        window=verdict.window,
        escalation="rollback",
        incident=1,
    )
    controller.memory.load_rollbacks([went])
    again = few(controller, (3,))
    assert (again.escalation, again.positions) == ("widen", ()), (
        "what is left of the window goes as well"
    )


@pytest.mark.parametrize(
    ("positions", "cause"), [((3,), Cause.STATE), ((3, 5000), Cause.DATA), ((), Cause.DATA)]
)
def test_a_window_that_its_samples_do_not_explain_goes_whole(
    positions: tuple[int, ...], cause: Cause
) -> None:
    assert few(Controller(DEFAULT), positions, cause).positions == ()


def test_without_the_rung_skip_bad_data_is_gone_back_for() -> None:
    controller = Controller(GuardOptions(escalation=(EscalationStep(action="rollback"),)))
    assert diagnosed(controller, nth(warmed(controller), 0), Cause.DATA).action is Action.ROLLBACK


def test_where_the_state_is_to_blame_the_run_goes_back_at_once_and_leaves_nothing_out() -> None:
    controller = Controller(DEFAULT)
    step = warmed(controller)
    verdict = diagnosed(controller, obs(step, 9.0, 0.5), Cause.STATE)
    assert (verdict.action, verdict.before_step, verdict.incident_state) == (
        Action.ROLLBACK,
        step - 1,
        "open",
    )
    assert verdict.window == ((step - 2) * BATCH, (step - 2) * BATCH)
    evidence = verdict.findings[0].sentence()
    assert numbers_in(verdict.reason.removeprefix(evidence)) == [step - 1]
    # It is known from now on: no other replay, and no update left out in vain.
    again = controller.observe(obs(step, 9.0, 0.5))
    assert again.action is Action.ROLLBACK and not controller.needs_cause_test(again)


def known_state(controller: Controller) -> int:
    """An incident whose cause is the state, gone back for once; returns the step of its trouble."""
    step = warmed(controller)
    back = diagnosed(controller, obs(step, 9.0, 0.5), Cause.STATE)
    assert back.action is Action.ROLLBACK and back.window is not None
    went = Rollback(
        from_step=step - 1,
        to_step=step - 2,
        onset=step,
        window=back.window,
        escalation=back.escalation,
        incident=1,
    )
    controller.memory.load_rollbacks([went])
    return step


def test_the_cause_is_asked_again_where_going_back_for_it_was_in_vain() -> None:
    controller = Controller(DEFAULT)
    step = known_state(controller)
    again = controller.observe(obs(step, 9.0, 0.5))
    assert (again.incident, again.incident_state, again.action) == (1, "repeated", Action.ROLLBACK)
    assert controller.needs_cause_test(again)
    after = controller.apply_diagnosis(obs(step, 9.0, 0.5), again, Diagnosis(cause=Cause.DATA))
    assert (after.action, after.cause) == (Action.SKIP, Cause.DATA)
    assert not controller.needs_cause_test(controller.observe(nth(step, 1))), (
        "the next batch of the same trouble"
    )


def test_trouble_with_data_behind_trouble_with_the_state_does_not_use_the_rollbacks_up() -> None:
    """One incident, since the steps between are fewer than `confirm`: first the state, then bad
    data here and there.
    """
    controller = Controller(GuardOptions(steps_until_good=50, max_rollbacks=2))
    step = known_state(controller)
    for _ in range(8):
        for _ in range(3):
            assert controller.observe(obs(step, healthy_loss(step), 0.5)).action is Action.APPLY
            step += 1
        verdict = diagnosed(controller, obs(step, 9.0, 0.5), Cause.DATA)
        assert (verdict.incident, verdict.onset, verdict.action) == (1, step, Action.SKIP)


def test_the_cause_is_asked_again_where_another_signal_is_in_trouble() -> None:
    controller = Controller(DEFAULT)
    step = warmed(controller)
    diagnosed(controller, nth(step, 0), Cause.STATE)
    assert not controller.needs_cause_test(controller.observe(nth(step, 1)))
    other = msgspec.structs.replace(
        nth(step, 1), signals={LOSS: healthy_loss(step), GRAD_NORM: 50.0}
    )
    assert diagnosed(controller, other, Cause.DATA).action is Action.SKIP
    # Told for the gradient norm alone; and once for both, neither is another.
    both = msgspec.structs.replace(nth(step, 2), signals={LOSS: 9.0, GRAD_NORM: 50.0})
    diagnosed(controller, both, Cause.DATA)
    assert not controller.needs_cause_test(controller.observe(other))


def test_hardware_that_does_not_repeat_itself_is_tried_again_and_named_where_it_does_so_too_often() -> (
    None
):
    controller = Controller(GuardOptions(max_retries=2))
    step = warmed(controller)
    before = controller.state_dict()
    verdicts = [diagnosed(controller, obs(step, 9.0, 0.5), Cause.HARDWARE) for _ in range(3)]
    assert [verdict.action for verdict in verdicts] == [Action.RETRY, Action.RETRY, Action.HALT]
    assert controller.state_dict() == before and not any(verdict.accepted for verdict in verdicts)
    assert all("node7" in verdict.reason for verdict in verdicts)
    assert numbers_in(verdicts[0].reason)[-3:] == [1, 1, 2], "the rank, and this retry of how many"
    budget = controller.settings.reset_budget_after
    assert numbers_in(verdicts[2].reason)[-4:] == [1, 3, budget, 2], "the rank, and how often"
    asking = Controller(GuardOptions(max_retries=0, mode=Mode.ASK))
    assert warmed(asking) == step
    parked = diagnosed(asking, obs(step, 9.0, 0.5), Cause.HARDWARE)
    assert (parked.action, parked.would) == (Action.PAUSE, Action.HALT)


def test_enough_healthy_steps_forgive_the_hardware() -> None:
    controller = Controller(GuardOptions(max_retries=1, reset_budget_after=20))
    step = warmed(controller)
    for _ in range(3):
        assert diagnosed(controller, obs(step, 9.0, 0.5), Cause.HARDWARE).action is Action.RETRY
        for _ in range(20):
            assert controller.observe(obs(step, healthy_loss(step), 0.5)).action is Action.APPLY
            step += 1


def test_causes_outlive_a_crash() -> None:
    controller, other = (
        Controller(GuardOptions(max_retries=1)),
        Controller(GuardOptions(max_retries=1)),
    )
    step = warmed(controller)
    warmed(other)
    for cause in (Cause.HARDWARE, Cause.STATE):
        diagnosed(controller, obs(step, 9.0, 0.5), cause)
    told = [
        event("incident", step - 1, number=1, state="open", onset=step),
        event(
            "diagnosis",
            step - 1,
            incident=1,
            cause="hardware or nondeterminism",
            rank=1,
            host="node7",
            at_step=step,
        ),
        event(
            "diagnosis",
            step - 1,
            incident=1,
            cause="state",
            at_step=step,
            onset=step,
            signals=[LOSS],
        ),
        event("verdict", step - 1, action="rollback", at_step=step, findings=[]),
    ]
    other.rebuild(told)
    expected, found = (one.observe(obs(step, 9.0, 0.5)) for one in (controller, other))
    assert plain(found) == plain(expected) and found.cause is Cause.STATE
    assert not controller.needs_cause_test(expected) and not other.needs_cause_test(found), (
        "told for this very trouble"
    )
    other.rebuild(told[:2])
    assert diagnosed(other, obs(step, 9.0, 0.5), Cause.HARDWARE).action is Action.HALT


def test_no_cause_is_looked_for_where_nothing_is_done_or_nobody_wants_it() -> None:
    for idle in (GuardOptions(mode=Mode.ADVISE), GuardOptions(cause_test=False)):
        controller = Controller(idle)
        step = warmed(controller)
        assert not controller.needs_cause_test(controller.observe(obs(step, 9.0, 0.5)))
    controller = Controller(DEFAULT)
    step = warmed(controller)
    assert not controller.needs_cause_test(controller.observe(obs(step, healthy_loss(step), 0.5)))
    assert not controller.needs_cause_test(controller.observe(obs(step, math.nan, 0.0, tokens=0)))
