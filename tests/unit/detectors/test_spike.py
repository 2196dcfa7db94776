from __future__ import annotations

import math
import random
import statistics

import pytest

from guardrail.core.records.findings import FindingKind, Severity
from guardrail.detectors.baseline import FOLLOW, LAG, MAD_TO_SIGMA, Baseline, SortedWindow
from guardrail.detectors.spike import NEW_LEVEL, Spike
from guardrail.detectors.spike_settings import SpikeSettings
from guardrail.detectors.spikes import GradNormSpike, LossSpike
from tests.support.feed import healthy_loss, noisy, obs, through_json


def loss_spike(history: int = 128) -> LossSpike:
    return LossSpike(SpikeSettings(history=history), threshold=8.0)


def fed(detector: Spike, values: list[float], start: int = 1) -> Spike:
    for step, value in enumerate(values, start):
        detector.update(obs(step, value))
    return detector


def severity(detector: Spike, value: float, step: int = 1000) -> Severity | None:
    findings = detector.observe(obs(step, value))
    return findings[0].severity if findings else None


def at(detector: Spike, share: float) -> float:
    """The value at this share of the way from the baseline to the threshold, in logarithms."""
    band = detector.band()
    assert band is not None
    return band[0] * (band[1] / band[0]) ** share


def test_a_sorted_window_is_the_last_values_sorted() -> None:
    window, values, rng = SortedWindow(9), [], random.Random(4)
    for _ in range(500):
        value = rng.choice([rng.random(), 0.5, 1.0])  # ties on purpose
        window.push(value)
        values.append(value)
        assert window.sorted == sorted(values[-9:])
        assert window.median() == sorted(values[-9:])[len(values[-9:]) // 2]


def test_centre_and_scale_are_those_of_the_definition() -> None:
    rng = random.Random(7)
    ys = [rng.gauss(0.0, 0.1) for _ in range(400)]
    baseline = Baseline(history=128, floor=1e-6)
    differences: list[float] = []
    deviations: list[float] = []
    for index, y in enumerate(ys):
        if index:
            lag = statistics.median_high(differences[-LAG:]) if differences else 0.0
            differences.append(y - statistics.median_high(ys[max(0, index - FOLLOW) : index]))
            deviations.append(abs(differences[-1] - lag))
        baseline.learn(y)
    assert baseline.centre == statistics.median_high(ys[-FOLLOW:])
    assert baseline.scale == MAD_TO_SIGMA * statistics.median_high(deviations[-128:])
    assert baseline.scale == pytest.approx(0.1, rel=0.2)  # the sigma of the noise that was put in


def test_the_score_counts_sigmas_of_the_noise() -> None:
    detector = fed(loss_spike(), [noisy(2.0, noise=0.05)(step) for step in range(300)])
    assert severity(detector, 2.0 * math.exp(0.05 * 3)) is None
    assert severity(detector, 2.0 * math.exp(0.05 * 7.5)) is Severity.NOTE
    assert severity(detector, 2.0 * math.exp(0.05 * 12)) is Severity.REJECT
    (finding,) = detector.observe(obs(301, 2.0 * math.exp(0.05 * 12)))
    assert finding.kind is FindingKind.LOSS_SPIKE and finding.threshold == 8.0
    assert finding.score == pytest.approx(12, rel=0.25) and finding.baseline == pytest.approx(
        2.0, rel=0.05
    )


def test_downwards_is_never_a_spike() -> None:
    detector = fed(loss_spike(), [2.0] * 200)
    assert severity(detector, 0.01) is None


def test_the_baseline_follows_a_fast_fall_and_still_sees_a_spike_in_it() -> None:
    detector = loss_spike()
    for step in range(1, 150):
        value = healthy_loss(step)
        assert severity(detector, value, step) is None, step
        detector.update(obs(step, value))
        if step in (60, 149):  # in the middle of the fall from 11 to 2, and at its end
            assert severity(detector, (4.0 if step == 60 else 1.5) * value, step) is Severity.REJECT


def test_quiet_numbers_do_not_make_a_hair_trigger() -> None:
    detector = fed(loss_spike(), [2.0] * 500)
    assert severity(detector, 2.0 * 1.04) is None  # 4 % is less than 5 sigmas of the floor
    assert severity(detector, 2.0 * 1.2) is Severity.REJECT


def test_a_stretch_of_repeated_numbers_does_not_forget_how_noisy_the_run_is() -> None:
    noise = [noisy(2.0, noise=0.05)(step) for step in range(1500)]
    detector = fed(loss_spike(), [*noise, *[2.0] * 140])
    assert severity(detector, 2.0 * math.exp(0.05 * 3)) is not Severity.REJECT
    assert severity(fed(loss_spike(), [2.0] * 1640), 2.0 * math.exp(0.05 * 3)) is Severity.REJECT


def test_cold_start_is_neither_blind_nor_trigger_happy() -> None:
    detector = fed(loss_spike(), [9.3])
    assert severity(detector, 16.7) is None  # doubling at step 2 happens in healthy runs
    assert severity(detector, 144.0) is Severity.REJECT
    detector = fed(loss_spike(), [noisy(5.0)(step) for step in range(16)])
    assert severity(detector, 5.5) is None
    # half warmed up, and already better than a factor of 3
    assert severity(detector, 9.0) is Severity.REJECT


def test_the_first_value_and_values_without_a_logarithm_are_passed_over() -> None:
    detector = loss_spike()
    assert severity(detector, 1e9) is None
    assert detector.band() is None
    for value in (None, 0.0, -1.0, math.nan, math.inf):
        observation = obs(1, value)
        assert detector.observe(observation) == []
        detector.update(observation)
    assert detector.band() is None


def test_outliers_that_were_let_through_do_not_raise_the_bar_but_a_new_level_does() -> None:
    detector = fed(loss_spike(), [noisy(2.0)(step) for step in range(300)])
    band = detector.band()
    high = at(detector, 0.8)
    for step in range(NEW_LEVEL - 1):
        (finding,) = detector.observe(obs(300 + step, high))
        assert finding.severity is Severity.NOTE and finding.kind is FindingKind.LOSS_SPIKE
        detector.update(obs(300 + step, high))
    assert detector.band() == band
    (finding,) = detector.observe(obs(400, high))
    assert finding.severity is Severity.NOTE and finding.kind is FindingKind.LEVEL_SHIFT
    detector.update(obs(400, high))
    assert severity(detector, high) is None
    assert severity(detector, high * 1.4) is Severity.REJECT


def test_state_goes_through_json_at_any_step() -> None:
    """Also in the middle of high values that were let through, where counts stand between notes and
    a new level.
    """
    whole = fed(loss_spike(), [noisy(2.0)(step) for step in range(300)])
    values = [at(whole, 0.8)] * (NEW_LEVEL + 3) + [2.0] * 20
    for step, value in enumerate(values, 301):
        copy = loss_spike()
        copy.load_state_dict(through_json(whole.state_dict()))
        for twin in (whole, copy):
            twin.update(obs(step, value))
        assert copy.state_dict() == whole.state_dict() and copy.band() == whole.band()
        assert copy.first_suspect_step() == whole.first_suspect_step()
        assert copy.observe(obs(999, 3.0)) == whole.observe(obs(999, 3.0))


def test_the_onset_goes_back_over_high_accepted_values() -> None:
    detector = fed(loss_spike(), [noisy(2.0)(step) for step in range(1, 301)])
    for step, share in ((301, 0.5), (302, 0.55), (303, 0.6)):
        detector.update(obs(step, at(detector, share)))
    (finding,) = detector.observe(obs(304, 6.0))
    assert finding.onset == 301
    assert detector.first_suspect_step() == 301
    detector.update(obs(304, 2.0))
    assert detector.first_suspect_step() is None
    (finding,) = detector.observe(obs(305, 6.0))
    assert finding.onset == 305


def test_the_band_is_where_the_verdict_changes() -> None:
    detector = fed(loss_spike(), [noisy(2.0)(step) for step in range(300)])
    band = detector.band()
    assert band is not None
    assert severity(detector, band[1] * 1.0001) is Severity.REJECT
    assert severity(detector, band[1] * 0.9999) is Severity.NOTE
    assert band[0] == pytest.approx(2.0, rel=0.03)


def test_a_state_of_another_window_length_can_be_loaded() -> None:
    state = through_json(fed(loss_spike(), [noisy(2.0)(step) for step in range(300)]).state_dict())
    for window in (64, 256):
        other = loss_spike(history=window)
        other.load_state_dict(state)
        fed(other, [noisy(2.0)(step) for step in range(300, 600)], start=301)
        assert severity(other, 6.0) is Severity.REJECT
        assert severity(other, 2.05) is None


def test_megatron_like_rows_of_bloom_are_caught_before_the_loss_peaks() -> None:
    """BLOOM-176B, published log, iterations 31214-31222: the norm leads the loss by four steps."""
    norm = GradNormSpike(SpikeSettings(), threshold=10.0)
    for step in range(300):
        norm.update(obs(step + 1, grad=noisy(0.2, noise=0.15)(step)))
    rows = [0.24, 0.95, 2.39, 15.9, 145.0, 960.0]
    seen: list[Severity | None] = []
    for index, value in enumerate(rows):
        findings = norm.observe(obs(31214 + index, grad=value))
        seen.append(findings[0].severity if findings else None)
    assert seen[:3] == [None, Severity.NOTE, Severity.REJECT]
