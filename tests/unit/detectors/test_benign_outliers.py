from __future__ import annotations

import math
import random

import pytest

from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.verdicts import Action, Mode
from guardrail.decide.controller import Controller
from guardrail.detectors.benign_outliers import KEEP, LEAST, RATE, BenignOutliers
from tests.support.feed import noisy, obs, through_json


def pareto(rng: random.Random, exponent: float) -> float:
    return rng.random() ** (-1.0 / exponent)


def test_a_few_outliers_make_no_tail() -> None:
    tail = BenignOutliers()
    for index in range(LEAST - 1):
        tail.learn(100 * index, 1.0)
    assert tail.limit(1000) == 0.0
    tail.learn(1000, 1.0)
    assert tail.limit(1000) > 1.0


@pytest.mark.parametrize("exponent", [3.0, 6.0, 12.0])
def test_the_limit_is_where_outliers_get_as_rare_as_the_rate(exponent: float) -> None:
    """Outliers above 0.2 once in 100 steps, with a power-law tail: the limit that would be exact is
    known.
    """
    rng, limits = random.Random(3), []
    for _ in range(200):
        tail = BenignOutliers()
        for index in range(1, KEEP + 1):
            tail.learn(100 * index, 0.2 * pareto(rng, exponent))
        limits.append(math.log(tail.limit(100 * KEEP)))
    exact = math.log(0.2 * (0.01 / RATE) ** (1.0 / exponent))
    # The prior pulls towards a light tail, so heavier ones are met a little below.
    assert abs(sorted(limits)[100] - exact) < 0.25 * (exact - math.log(0.2)) + 0.05


def test_rare_outliers_raise_nothing() -> None:
    tail = BenignOutliers()
    for index in range(KEEP):
        tail.learn(20_000 * index, 1.0)
    assert tail.limit(20_000 * KEEP) == 0.0


def test_the_tail_follows_the_run() -> None:
    tail = BenignOutliers()
    for index in range(KEEP):
        tail.learn(100 * index, 2.0)
    loud = tail.limit(100 * KEEP)
    for index in range(KEEP):
        tail.learn(100 * (KEEP + index), 0.2)
    assert tail.limit(200 * KEEP) == pytest.approx(loud / 10)
    # And without new outliers it is forgotten.
    assert tail.limit(10_000_000) == 0.0


def test_state_goes_through_json() -> None:
    rng, tail = random.Random(1), BenignOutliers()
    for index in range(40):
        tail.learn(100 * index, pareto(rng, 4.0))
        copy = BenignOutliers()
        copy.load_state_dict(through_json(tail.state_dict()))
        assert copy.limit(100 * index + 7) == tail.limit(100 * index + 7)


# -- in the controller -----------------------------------------------------------------------------


def micro_batch_loss(step: int) -> float:
    """Loss 3 with 1 % noise and, once in 100 steps, an outlier as one micro-batch of one rank shows
    them.
    """
    rng = random.Random(step)
    rng.random()  # the first draw of neighbouring seeds is alike
    outlier = 1.06 * pareto(rng, 8.0) if rng.random() < 0.01 else 1.0
    return noisy(3.0, noise=0.01)(step) * outlier


def test_outliers_that_come_back_by_themselves_are_noted_and_no_longer_rejected() -> None:
    controller = Controller(GuardOptions(mode=Mode.ADVISE))
    verdicts = [controller.observe(obs(step, micro_batch_loss(step))) for step in range(1, 8001)]
    early = sum(v.would is Action.SKIP for v in verdicts[:2000])
    late = sum(v.would is Action.SKIP for v in verdicts[2000:])
    assert all(v.would in (None, Action.SKIP) for v in verdicts)
    assert early >= 3 and late <= early / 2, (early, late)
    assert sum(bool(v.findings) for v in verdicts[2000:]) > 30  # they are still worth a line


def test_a_spike_that_stays_is_rejected_from_its_second_step_on_even_so() -> None:
    controller = Controller(GuardOptions(mode=Mode.ADVISE))
    for step in range(1, 8001):
        controller.observe(obs(step, micro_batch_loss(step)))
    baseline, threshold = controller.bands()["loss"]
    assert threshold / baseline > 1.15  # the plain score alone would put it near 1.08
    spike = baseline * 1.12
    told = [controller.observe(obs(step, spike)).would for step in range(8001, 8005)]
    assert told == [None, Action.SKIP, Action.SKIP, Action.ROLLBACK]


def test_what_was_left_out_teaches_nothing() -> None:
    """Nobody knows whether its update would have done harm: the same corrupted data is rejected
    every time.
    """
    controller = Controller(GuardOptions())
    step = 1
    for _ in range(40):
        for _ in range(50):
            assert controller.observe(obs(step, noisy(2.0)(step), 0.5)).action is Action.APPLY
            step += 1
        if step > 60:
            assert controller.observe(obs(step, 6.0, 0.5)).action is Action.SKIP
            controller.observe(obs(step, noisy(2.0)(step), 0.5, streak=1))
            step += 1


def test_a_cluster_teaches_nothing() -> None:
    controller = Controller(GuardOptions(mode=Mode.ADVISE))
    step = 1
    for _ in range(40):
        for _ in range(50):
            controller.observe(obs(step, noisy(2.0)(step), 0.5))
            step += 1
        for _ in range(2):
            verdict = controller.observe(obs(step, 6.0, 0.5))
            assert step < 60 or verdict.would is Action.SKIP
            step += 1


def learnt(controller: Controller) -> int:
    return len(controller.state_dict()["detectors"]["loss"]["tail"])


def watching(mode: Mode = Mode.ADVISE) -> tuple[Controller, float, float]:
    """(Controller after 300 healthy steps, a loss worth a note, a loss to be rejected)."""
    controller = Controller(GuardOptions(mode=mode))
    for step in range(1, 301):
        controller.observe(obs(step, noisy(2.0)(step), 0.5))
    low, high = controller.bands()["loss"]
    return controller, low * (high / low) ** 0.9, low * (high / low) ** 1.2


@pytest.mark.parametrize(
    ("highs", "outliers"),
    [
        ("n", 1),
        ("r", 1),
        ("nn", 0),
        ("rr", 0),
        ("nr", 0),
        ("rn", 0),
        ("nnr", 0),
        ("rnn", 0),
        ("n.r.n", 3),
        ("nn.n", 1),
    ],
)
def test_only_outliers_that_stand_alone_are_learnt(highs: str, outliers: int) -> None:
    """n: high enough for a note, r: rejected, a point: an ordinary step."""
    controller, note, reject = watching()
    for step, kind in enumerate(highs + ".", 301):
        verdict = controller.observe(obs(step, {"n": note, "r": reject, ".": 2.0}[kind], 0.5))
        assert verdict.accepted is (kind != "r")
    assert learnt(controller) == outliers


def test_after_a_rejection_the_plain_score_decides_in_a_heavy_tail_too() -> None:
    controller = Controller(GuardOptions(mode=Mode.ADVISE))
    for step in range(1, 8001):
        controller.observe(obs(step, micro_batch_loss(step)))
    baseline, threshold = controller.bands()["loss"]
    assert controller.observe(obs(8001, threshold * 1.1)).would is Action.SKIP
    assert controller.observe(obs(8002, baseline * 1.12)).would is Action.SKIP


def test_an_outlier_before_something_that_was_left_out_teaches_nothing() -> None:
    """What came between is unseen, so nobody can say that it came back by itself."""
    for streak, outliers in ((0, 1), (1, 0)):
        controller, note, _ = watching(Mode.AUTO)
        controller.observe(obs(301, note, 0.5))
        controller.observe(obs(302, 2.0, 0.5, streak=streak))
        assert learnt(controller) == outliers
