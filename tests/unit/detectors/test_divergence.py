from __future__ import annotations

import math

from guardrail.core.records.findings import Finding, FindingKind, Severity
from guardrail.detectors.baseline import Baseline
from guardrail.detectors.divergence import Divergence, DivergenceSettings
from tests.support.feed import healthy_loss, noisy, obs, through_json


class Watch:
    """The loss baseline and the divergence detector over it, as the controller runs them."""

    def __init__(self) -> None:
        self.baseline = Baseline(history=128, floor=0.01)
        self.detector = Divergence(self.baseline, DivergenceSettings(), history=128)

    def step(self, step: int, value: float) -> list[Finding]:
        findings = self.detector.observe(obs(step, value))
        self.baseline.learn(math.log(value))
        self.detector.update(obs(step, value))
        return findings

    def first_alarm(self, values: list[float], start: int = 1) -> Finding | None:
        for step, value in enumerate(values, start):
            if findings := self.step(step, value):
                return findings[0]
        return None


HEALTHY = [noisy(2.0)(step) for step in range(1, 301)]


def test_a_step_that_stays_is_found_within_divergence_steps_and_dated() -> None:
    finding = Watch().first_alarm([*HEALTHY, *(noisy(2.3)(step) for step in range(301, 400))])
    assert finding is not None
    assert finding.kind is FindingKind.DIVERGENCE and finding.severity is Severity.WEIGHTS_DAMAGED
    assert finding.step <= 320 and abs(finding.onset - 301) <= 1
    assert abs(finding.baseline - 2.0) < 0.05 and abs(finding.value - 2.3) < 0.1


# A young run on 420 short documents, of which four with noise come at the end: steps 1 to 44.
YOUNG = [
    5.545, 5.472, 5.267, 5.037, 4.770, 4.447, 4.171, 3.957, 3.796, 3.690, 3.620, 3.580, 3.549, 3.527, 3.510,
    3.499, 3.468, 3.432, 3.433, 3.363, 3.337, 3.294, 3.333, 3.253, 3.207, 3.175, 3.158, 3.110, 3.077, 3.052,
    3.045, 3.004, 2.997, 2.996, 3.458, 2.953, 2.909, 3.391, 3.353, 3.373, 2.887, 2.882, 3.332, 3.323,
]  # fmt: skip


def test_a_rise_behind_a_falling_loss_is_not_dated_back_into_the_fall() -> None:
    """What lay above the present level while the loss still fell is no part of the rise: whoever
    took it for one went back 30 steps and left all of the data out."""
    watch = Watch()
    watch.baseline = Baseline(history=32, floor=0.01)
    watch.detector = Divergence(watch.baseline, DivergenceSettings(steps=10), history=32)
    finding = watch.first_alarm(YOUNG)
    assert finding is not None and finding.kind is FindingKind.DIVERGENCE
    assert (finding.step, finding.onset) == (44, 38)


def test_a_slow_rise_is_found_although_every_single_value_looks_ordinary() -> None:
    watch = Watch()
    # 0.3 % a step, 2 % noise
    rise = [noisy(2.0 * 1.003**step)(300 + step) for step in range(1, 100)]
    finding = watch.first_alarm([*HEALTHY, *rise])
    assert finding is not None and 301 <= finding.onset <= finding.step <= 370


def test_the_reference_does_not_follow_the_rise() -> None:
    watch = Watch()
    watch.first_alarm([*HEALTHY, *(noisy(2.3)(step) for step in range(301, 312))])
    before = watch.detector._lowest[0][1]
    for step in range(312, 340):
        watch.step(step, noisy(2.3)(step))
    assert watch.detector._lowest[0][1] == before


def test_falling_flat_noisy_and_dropping_losses_are_healthy() -> None:
    for values in (
        [healthy_loss(step) for step in range(1, 800)],
        [noisy(2.0, noise=0.3, seed=5)(step) for step in range(1, 2000)],
        [*HEALTHY, *(noisy(1.2)(step) for step in range(301, 600))],
        [2.0] * 500,
    ):
        assert Watch().first_alarm(values) is None


def test_an_excursion_that_is_over_is_no_divergence() -> None:
    bump = [noisy(2.3)(step) for step in range(301, 309)]
    after = [noisy(2.0)(step) for step in range(309, 500)]
    assert Watch().first_alarm([*HEALTHY, *bump, *after]) is None


def test_a_single_good_step_is_not_held_against_the_run() -> None:
    """The finding needs the present value to be high as well."""
    watch = Watch()
    for step, value in enumerate([*HEALTHY, *(noisy(2.3)(s) for s in range(301, 330))], 1):
        watch.step(step, value)
    assert watch.detector.observe(obs(330, 2.3)) and not watch.detector.observe(obs(330, 1.99))


def test_a_rise_makes_states_suspect_before_it_is_sure() -> None:
    watch = Watch()
    for step, value in enumerate(HEALTHY, 1):
        watch.step(step, value)
    assert watch.detector.first_suspect_step() is None
    suspected = None
    for step in range(301, 340):
        if watch.step(step, noisy(2.3)(step)):
            break
        suspected = suspected or watch.detector.first_suspect_step()
    assert suspected is not None and abs(suspected - 301) <= 2


def test_a_small_step_that_stays_and_does_not_grow_is_noted_once_as_a_level_shift() -> None:
    watch = Watch()
    # five sigmas of a single value
    level = [noisy(2.0 * math.exp(0.02 * 5))(step) for step in range(301, 420)]
    findings = [
        f for step, value in enumerate([*HEALTHY, *level], 1) for f in watch.step(step, value)
    ]
    assert [(f.kind, f.severity) for f in findings] == [(FindingKind.LEVEL_SHIFT, Severity.NOTE)]
    assert 320 < findings[0].step < 350 and abs(findings[0].onset - 301) <= 3


def test_a_small_step_that_is_back_in_time_is_not_noted() -> None:
    bump = [noisy(2.0 * math.exp(0.02 * 5))(step) for step in range(301, 316)]
    assert (
        Watch().first_alarm([*HEALTHY, *bump, *(noisy(2.0)(step) for step in range(316, 500))])
        is None
    )


def test_state_goes_through_json_at_any_step() -> None:
    shift = [noisy(2.2)(step) for step in range(301, 340)]
    whole = Watch()
    for step, value in enumerate(
        [*HEALTHY, *shift, *(noisy(2.3)(step) for step in range(340, 380))], 1
    ):
        copy = Watch()
        copy.baseline.load_state_dict(through_json(whole.baseline.state_dict()))
        copy.detector.load_state_dict(through_json(whole.detector.state_dict()))
        assert copy.detector.observe(obs(step, value)) == whole.detector.observe(obs(step, value))
        assert copy.detector.first_suspect_step() == whole.detector.first_suspect_step()
        whole.step(step, value)


def test_a_state_of_other_settings_can_be_loaded() -> None:
    whole = Watch()
    for step, value in enumerate(HEALTHY[:25], 1):
        whole.step(step, value)
    for steps in (5, 60):
        other = Divergence(whole.baseline, DivergenceSettings(steps=steps), history=64)
        other.load_state_dict(through_json(whole.detector.state_dict()))
        for step in range(26, 60):
            assert other.observe(obs(step, noisy(2.0)(step))) == []
            other.update(obs(step, noisy(2.0)(step)))
