"""What `Controller.safe_limits` promises: a step that keeps to them is applied without a word,
whatever else it holds.
"""

import copy
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.findings import Observation
from guardrail.core.records.signals import (
    EMBED_GRAD_NORM,
    EMBED_SHARE,
    GRAD_NORM,
    LOSS,
    UPDATE_NORM,
)
from guardrail.core.records.verdicts import Action, Mode
from guardrail.decide.controller import Controller
from tests.support.feed import BATCH, healthy_loss, noisy

SIGNALS = (LOSS, GRAD_NORM, EMBED_GRAD_NORM, EMBED_SHARE, UPDATE_NORM, "router")


def observation(step: int, values: dict[str, float]) -> Observation:
    return Observation(step=step, first=(step - 1) * BATCH, last=step * BATCH, signals=values)


def step_of(dice: random.Random, step: int) -> Observation:
    """A healthy run with now and then something odd: notes, level shifts, climbs, the same number
    again.
    """
    norm, share = noisy(0.5, seed=1, noise=0.2)(step), 0.1 * math.exp(dice.gauss(0.0, 0.3))
    values = {
        LOSS: healthy_loss(step),
        GRAD_NORM: norm * math.exp(0.08 * max(0, step % 90 - 60)),
        EMBED_GRAD_NORM: norm * math.sqrt(share),
        EMBED_SHARE: share,
        UPDATE_NORM: 0.01 * norm,
        "router": 0.0 if step % 50 < 3 else dice.random(),
    }
    if dice.random() < 0.05:
        values[dice.choice(SIGNALS)] *= math.exp(dice.uniform(0.5, 3.0))
    values[EMBED_SHARE] = min(values[EMBED_SHARE], 1.0)
    return observation(step, values)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_step_below_the_ceilings_is_applied_without_a_word(seed: int) -> None:
    dice = random.Random(seed)
    controller = Controller(
        GuardOptions(window=32, warmup=12, steps_until_good=4, extra_signals=("router",))
    )
    given_ = 0
    for step in range(1, 120):
        like = observation(step, dict.fromkeys(SIGNALS, math.nan))
        most = controller.safe_limits(like)
        if most is not None:
            given_ += 1
            assert most.keys() == set(SIGNALS)
            low = {
                name: high * dice.choice((1.0, 1.0, dice.random(), 1e-6))
                for name, high in most.items()
            }
            before = controller.state_dict()
            verdict = copy.deepcopy(controller).observe(observation(step, low))
            assert (verdict.action, verdict.findings, verdict.incident) == (
                Action.APPLY,
                (),
                None,
            ), (low, most)
            assert controller.state_dict() == before, "asking changes nothing"
        controller.observe(step_of(dice, step))
    assert given_ > 30, "most steps of a run without an incident can be told"


def healthy(controller: Controller, steps: int) -> None:
    for step in range(1, steps + 1):
        values = {LOSS: healthy_loss(step), GRAD_NORM: noisy(0.5, seed=1, noise=0.2)(step)}
        assert controller.observe(observation(step, values)).action is Action.APPLY


def safe_limits(controller: Controller, step: int, *names: str) -> dict[str, float] | None:
    return controller.safe_limits(
        observation(step, dict.fromkeys(names or (LOSS, GRAD_NORM), math.nan))
    )


def test_every_healthy_step_but_the_first_has_ceilings_and_they_lie_above_it() -> None:
    controller = Controller(GuardOptions())
    for step in range(1, 300):
        values = {LOSS: healthy_loss(step), GRAD_NORM: noisy(0.5, seed=1, noise=0.2)(step)}
        most = safe_limits(controller, step)
        assert (most is None) == (step == 1)
        assert most is None or all(values[name] <= most[name] for name in values)
        assert controller.observe(observation(step, values)).action is Action.APPLY


def test_beyond_a_ceiling_there_is_something_to_say() -> None:
    controller = Controller(GuardOptions())
    healthy(controller, 200)
    most = safe_limits(controller, 201)
    assert most is not None
    for name in most:
        above = most | {name: most[name] * 1.001}
        assert copy.deepcopy(controller).observe(observation(201, above)).findings


@pytest.mark.parametrize("mode", [Mode.ADVISE, Mode.OFF])
def test_no_ceilings_where_everything_is_applied(mode: Mode) -> None:
    controller = Controller(GuardOptions(), mode=mode)
    healthy(controller, 100)
    assert safe_limits(controller, 101) is None


def test_no_ceilings_for_a_signal_that_nobody_has_seen_nor_in_an_incident_nor_behind_a_resume() -> (
    None
):
    controller = Controller(GuardOptions(steps_until_good=3))
    healthy(controller, 100)
    assert safe_limits(controller, 101) and safe_limits(controller, 101, LOSS) is not None
    resumed = copy.deepcopy(controller)
    resumed.note_resume()
    assert safe_limits(resumed, 101) is None
    spike = observation(101, {LOSS: 1e3, GRAD_NORM: 0.5})
    assert controller.observe(spike).action is Action.SKIP
    assert safe_limits(controller, 101) is None, "an incident is open"


def test_no_ceilings_while_a_number_that_repeats_is_about_to_be_told() -> None:
    controller = Controller(GuardOptions())
    healthy(controller, 200)
    given_ = []
    for step in range(201, 216):
        given_.append(safe_limits(controller, step) is not None)
        verdict = controller.observe(
            observation(step, {LOSS: 2.0, GRAD_NORM: noisy(0.5, seed=1, noise=0.2)(step)})
        )
        assert not (given_[-1] and verdict.findings)
    assert not all(given_) and given_[0] and given_[-1]
