"""Was the remedy enough: curves and what is held against them, incidents and how they end."""

import math
import random

import pytest

from guardrail.core.events.decisions import HIGHER_LOSS, OPEN, RECOVERED
from guardrail.core.guard_options import EscalationStep, GuardOptions
from guardrail.core.records.findings import Finding, FindingKind, Severity
from guardrail.core.records.signals import EMBED_GRAD_NORM
from guardrail.core.records.verdicts import Action, Cause, Remedy
from guardrail.decide.controller import Controller
from guardrail.decide.embedding_lead import embedding_leads
from guardrail.decide.escalation import choose_remedy, count_uses
from guardrail.decide.incident_line import make_incident_line
from guardrail.decide.incidents import PATIENCE, Incidents
from guardrail.decide.recovery import LEAST, compare_with_trend, fit_trend
from guardrail.decide.remedies.effects import compute_factor, format_effect, resets_moments
from guardrail.decide.remedies.registry import BY_ACTION
from guardrail.decide.rollback import Rollback
from tests.support.feed import BATCH, noisy, obs, warmed
from tests.support.findings import make_finding
from tests.support.texts import numbers_in


def falling(step: int, *, seed: int = 0, noise: float = 0.02) -> float:
    return 12.0 * step**-0.3 * math.exp(random.Random(1000 * seed + step).gauss(0.0, noise))


BEFORE = [(step, falling(step)) for step in range(40, 100)]


def test_a_power_law_is_continued() -> None:
    curve = fit_trend([(step, 12.0 * step**-0.3) for step in range(40, 100)])
    assert (
        curve is not None
        and curve.slope == pytest.approx(-0.3)
        and curve.noise == pytest.approx(0.0, abs=1e-12)
    )
    outcome = compare_with_trend(curve, [(step, 12.0 * step**-0.3) for step in range(110, 120)])
    assert (
        outcome is not None
        and outcome.got == pytest.approx(12.0 * 114.5**-0.3, rel=1e-3)
        and not outcome.lasting
    )


@pytest.mark.parametrize(("shift", "lasting"), [(0.0, False), (0.10, True)])
def test_an_offset_is_told_from_noise(shift: float, lasting: bool) -> None:
    for seed in range(20):
        curve = fit_trend([(step, falling(step, seed=seed)) for step in range(40, 100)])
        outcome = compare_with_trend(
            curve, [(s, falling(s, seed=seed) * math.exp(shift)) for s in range(110, 118)]
        )
        assert outcome is not None and outcome.lasting is lasting, (seed, outcome)
        assert outcome.offset == pytest.approx(outcome.got - outcome.expected)


def test_odd_values_do_not_bend_the_curve_and_a_rise_is_not_continued() -> None:
    odd = [(step, 40.0 if step % 10 == 0 else loss) for step, loss in BEFORE]
    clean, bent = fit_trend(BEFORE), fit_trend(odd)
    assert (
        clean is not None and bent is not None and bent.slope == pytest.approx(clean.slope, abs=0.1)
    )
    rising = fit_trend([(step, 2.0 + 0.01 * step) for step in range(40, 100)])
    assert rising is not None and rising.slope == 0.0


def test_without_numbers_nothing_is_claimed() -> None:
    assert (
        fit_trend(BEFORE[: LEAST - 1]) is None
        and fit_trend([(1, math.nan)] * 20) is None
        and fit_trend([(5, 2.0)] * 20) is None
    )
    assert (
        compare_with_trend(None, BEFORE) is None
        and compare_with_trend(fit_trend(BEFORE), []) is None
    )


def test_an_incident_whose_loss_stays_up_is_given_time_and_then_closes_with_an_offset() -> None:
    for back_at, state in ((14, RECOVERED), (10_000, HIGHER_LOSS)):
        incidents = Incidents(confirm=4)
        assert incidents.note_anomaly(100, 100, curve=fit_trend(BEFORE)) == (1, OPEN)
        losses, states = list(BEFORE), []
        for step in range(100, 100 + PATIENCE * LEAST + 8):
            losses.append((step, falling(step) * (1.0 if step - 100 >= back_at else 1.2)))
            states.append(incidents.note_healthy(step, losses)[1])
        assert [one for one in states if one] == [state]
        assert incidents.outcome is not None
        assert incidents.outcome.lasting is (state == HIGHER_LOSS)


def test_a_crash_changes_nothing_about_when_an_incident_is_over() -> None:
    for crash in range(100, 106):
        incidents = Incidents(confirm=6)
        incidents.note_anomaly(100, 100, curve=fit_trend(BEFORE))
        losses, over = list(BEFORE), None
        for step in range(100, 110):
            if step == crash:
                again = Incidents(confirm=6)
                again.resume(1, is_open=True, onset=100, step=100, curve=incidents.curve)
                incidents = again
            losses.append((step, falling(step)))
            if incidents.note_healthy(step, losses, every_step=True)[1]:
                over = step
        assert over == 105


# -- the ladder ------------------------------------------------------------------------------------

DEFAULT = GuardOptions()


def done(rung: str, from_step: int = 100) -> Rollback:
    return Rollback(from_step=from_step, to_step=90, onset=95, window=(0, 1), escalation=rung)


def climb(
    cause: Cause | None,
    *,
    ladder: tuple[EscalationStep, ...] = DEFAULT.ladder,
    embedding: bool = False,
) -> list[str]:
    """The rungs that are taken one after the other until none is left."""
    taken: list[Rollback] = []
    while (
        remedy := choose_remedy(
            ladder, taken, taken, applied=101, cause=cause, embedding_leads=embedding
        )
    ) and len(taken) < 99:
        taken.append(done(remedy.action))
        if remedy.ends_run:
            break
    return [one.escalation for one in taken]


def test_the_ladder_is_gone_up_in_order_and_what_does_not_fit_is_passed_over() -> None:
    low, rest = ["lower_lr"] * 3, ["tighten_clip", "reset_moments"]
    assert climb(None) == ["rollback", "widen", "widen", "older", *low, *rest]
    assert climb(Cause.STATE) == ["rollback", *low, "older", *rest]
    assert climb(Cause.STATE, embedding=True) == [
        "rollback",
        "shrink_embedding",
        *low,
        "older",
        *rest,
    ]
    assert climb(None, embedding=True) == [
        "rollback",
        "widen",
        "widen",
        "older",
        "shrink_embedding",
        *low,
        *rest,
    ]
    upside_down = (
        EscalationStep(action="lower_lr"),
        EscalationStep(action="rollback", max_uses=2),
        EscalationStep(action="pause"),
    )
    assert climb(None, ladder=upside_down) == ["lower_lr", "rollback", "rollback", "pause"]
    assert climb(Cause.DATA, ladder=upside_down) == ["rollback", "rollback", "lower_lr", "pause"]
    assert climb(None, ladder=()) == []


def test_a_rung_rests_for_its_cooldown() -> None:
    ladder = (
        EscalationStep(action="lower_lr", max_uses=9, cooldown=50),
        EscalationStep(action="rollback", max_uses=9),
    )
    before = [done("lower_lr", 100)]
    remedies = [
        choose_remedy(ladder, [], before, applied=at, cause=None, embedding_leads=False)
        for at in (149, 150)
    ]
    assert [remedy and remedy.action for remedy in remedies] == ["rollback", "lower_lr"]


def test_each_widening_doubles() -> None:
    factors = []
    for times in range(3):
        uses = count_uses("widen", [done("rollback"), *[done("widen")] * times])
        factors.append(
            BY_ACTION["widen"](EscalationStep(action="widen"), uses=uses).window_factor()
        )
    assert factors == [2, 4, 8]
    rollback = BY_ACTION["rollback"](EscalationStep(action="rollback"), uses=1)
    assert rollback.window_factor() == 1


def rejected(controller: Controller, step: int, *, rung: str) -> list[tuple[Action, str]]:
    first = (step - 1) * BATCH
    said = [
        controller.observe(obs(step, 9.0, 0.5, first=first + BATCH * k, streak=k)) for k in range(3)
    ]
    assert said[-1].escalation == rung, said[-1].reason
    return [(verdict.action, verdict.reason) for verdict in said]


def test_a_widened_window_is_twice_as_long_and_a_function_of_the_onset() -> None:
    for most, length in ((512, 8), (6, 6)):
        controller = Controller(GuardOptions(max_window=most))
        step = warmed(controller)
        controller.memory.load_rollbacks([*controller.memory.rollbacks, done("rollback", step - 1)])
        verdicts = [
            controller.observe(obs(step, 9.0, 0.5, first=(step - 1 + k) * BATCH, streak=k))
            for k in range(3)
        ]
        window = verdicts[-1].window
        # The plain one holds four batches: the one before the onset and three that were rejected.
        assert (
            window is not None
            and (window[1] - window[0]) // BATCH == length
            and verdicts[-1].escalation == "widen"
        )
        before = verdicts[-1].before_step
        assert before is not None and window[0] == (before - 1) * BATCH and before < step - 1
        assert " widen " in verdicts[-1].reason
        budget = controller.settings.reset_budget_after
        assert numbers_in(verdicts[-1].reason)[-5:-3] == [1, budget]


def test_the_rungs_of_a_run_that_does_not_recover() -> None:
    controller = Controller(GuardOptions(max_rollbacks=11))
    step = warmed(controller)
    for rung in (
        "rollback",
        "widen",
        "widen",
        "older",
        *["lower_lr"] * 3,
        "tighten_clip",
        "reset_moments",
        "halt",
    ):
        said = rejected(controller, step, rung=rung)
        if rung != "halt":
            assert [action for action, _ in said] == [Action.SKIP, Action.SKIP, Action.ROLLBACK]
            controller.memory.load_rollbacks([*controller.memory.rollbacks, done(rung, step - 1)])
        else:
            assert said[-1][0] is Action.HALT and "guard.escalation" in said[-1][1]


# -- remedies --------------------------------------------------------------------------------------


def test_a_remedy_is_a_function_of_the_step_that_returns_to_one() -> None:
    remedy = Remedy(kind="lr", value=0.5, from_step=10, hold_steps=2, ramp_steps=3)
    values = [compute_factor([remedy], "lr", step) for step in range(8, 17)]
    assert values == pytest.approx([1, 1, 0.5, 0.5, 0.625, 0.75, 0.875, 1, 1])
    assert (
        compute_factor([remedy, remedy], "lr", 10) == 0.25
        and compute_factor([remedy, remedy], "lr", 10, floor=0.4) == 0.4
    )
    assert compute_factor([remedy], "clip", 10) == 1.0
    reset = EscalationStep(action="reset_moments", factor=0.1)
    moments, low = BY_ACTION["reset_moments"](reset).effects(7)
    lower = EscalationStep(action="lower_lr", factor=0.3, hold_steps=20, ramp_steps=40)
    again = BY_ACTION["lower_lr"](lower, uses=1).effects(7)
    assert again == (Remedy(kind="lr", value=0.3**2, from_step=7, hold_steps=40, ramp_steps=80),)
    assert (
        resets_moments([moments, low], 7)
        and not resets_moments([moments, low], 8)
        and compute_factor([moments, low], "lr", 7) == 0.1
    )


def claim(
    signal: str, kind: FindingKind, *, onset: int = 9, severity: Severity = Severity.REJECT
) -> Finding:
    return make_finding(
        9, signal=signal, kind=kind, severity=severity, score=9.0, threshold=8.0, onset=onset
    )


def test_who_leads() -> None:
    embed, share = (
        claim("embed_grad_norm", FindingKind.EMBED_SPIKE),
        claim("embed_share", FindingKind.EMBED_SPIKE),
    )
    loss, nan = claim("loss", FindingKind.LOSS_SPIKE), claim("loss", FindingKind.NONFINITE)
    assert embedding_leads([embed]) and embedding_leads([share, loss])
    assert embedding_leads([claim("embed_grad_norm", FindingKind.EMBED_SPIKE, onset=7), loss])
    assert (
        not embedding_leads([embed, loss])
        and not embedding_leads([loss])
        and not embedding_leads([share, nan])
    )


def test_the_embedding_that_leads_is_shrunk() -> None:
    controller = Controller(DEFAULT)
    for step in range(1, 100):
        controller.observe(
            obs(step, noisy(2.0)(step), noisy(0.5, seed=1)(step), embed=noisy(0.1, seed=2)(step))
        )
    verdict = controller.observe(obs(100, 2.0, 0.5, embed=5.0))
    assert (verdict.action, verdict.findings[0].signal) == (Action.SKIP, EMBED_GRAD_NORM)
    assert verdict.remedies == (
        Remedy(kind="embed_alpha", value=0.5, from_step=100, hold_steps=100, ramp_steps=200),
    )
    assert verdict.reason.endswith(format_effect(verdict.remedies[0]))
    assert controller.observe(obs(100, 9.0, 0.5, embed=0.1)).remedies == ()


# -- case 13: a norm that jumps to a new level and stays -------------------------------------------


def high(controller: Controller, step: int, loss: float) -> list[Action]:
    first = (step - 1) * BATCH
    return [
        controller.observe(obs(step, loss, 40.0, first=first + BATCH * k, streak=k)).action
        for k in range(3)
    ]


def test_a_norm_that_stays_up_while_the_loss_is_as_usual_is_gone_back_for_once_and_then_accepted() -> (
    None
):
    controller = Controller(DEFAULT)
    for step in range(1, 100):
        controller.observe(obs(step, noisy(2.0)(step), noisy(0.5, seed=1)(step)))
    assert high(controller, 100, 2.0) == [Action.SKIP, Action.SKIP, Action.ROLLBACK]
    controller.memory.load_rollbacks([*controller.memory.rollbacks, done("rollback", 99)])
    assert high(controller, 100, 2.0) == [Action.SKIP, Action.SKIP, Action.APPLY]
    for step in range(101, 130):
        verdict = controller.observe(obs(step, noisy(2.0)(step), noisy(40.0, seed=1)(step)))
        assert verdict.action is Action.APPLY and not verdict.findings
    # From there on the new level is what a spike is held against.
    assert controller.observe(obs(130, 2.0, 4000.0)).action is Action.SKIP


def test_a_norm_that_stays_up_is_not_accepted_where_the_loss_has_something_of_it() -> None:
    controller = Controller(DEFAULT)
    for step in range(1, 100):
        controller.observe(obs(step, noisy(2.0)(step), noisy(0.5, seed=1)(step)))
    controller.memory.load_rollbacks([*controller.memory.rollbacks, done("rollback", 99)])
    assert high(controller, 100, 2.3) == [Action.SKIP, Action.SKIP, Action.ROLLBACK]


def test_a_place_that_spikes_again_has_recurred() -> None:
    controller = Controller(DEFAULT)
    step = warmed(controller)
    states = []
    for _ in range(2):
        first = (step - 1) * BATCH
        said = [
            controller.observe(obs(step, 9.0, 0.5, first=first + BATCH * k, streak=k))
            for k in range(3)
        ]
        states += [verdict.incident_state for verdict in said]
        controller.memory.load_rollbacks([*controller.memory.rollbacks, done("rollback", step - 1)])
    assert states == ["open", "", "", "", "", "repeated"]
    line = make_incident_line(controller.memory, said[-1])
    assert line.state == "repeated" and line.curve == controller.memory.incidents.curve is not None
