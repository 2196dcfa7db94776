from __future__ import annotations

import math

import pytest

from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.findings import Finding, FindingKind, Severity
from guardrail.core.records.signals import GRAD_NORM
from guardrail.core.records.verdicts import Action, Mode, Verdict
from guardrail.decide.controller import Controller
from guardrail.detectors.baseline import Baseline
from guardrail.detectors.growth import CLIMB, SURE, GradNormGrowth
from tests.support.feed import BATCH, noisy, obs, through_json

NOISE = noisy(0.2, seed=1, noise=0.15)


class Watch:
    """The norm's baseline and the growth detector over it, as the controller runs them."""

    def __init__(self) -> None:
        self.baseline = Baseline(history=128, floor=0.2)
        self.detector = GradNormGrowth(self.baseline, min_history=32)

    def step(self, step: int, value: float) -> list[Finding]:
        seen = obs(step, grad=value)
        findings = self.detector.observe(seen)
        self.baseline.learn(math.log(value))
        self.detector.update(seen)
        return findings

    def findings(self, values: list[float]) -> list[Finding]:
        return [
            finding for step, value in enumerate(values, 1) for finding in self.step(step, value)
        ]


def climb(factor: float, *, steps: int, start: int = 201) -> list[float]:
    """A steady norm up to `start`, then one that grows by `factor` a step."""
    return [NOISE(step) * factor ** max(0, step - start) for step in range(1, start + steps)]


@pytest.mark.parametrize("factor", [1.08, 1.1, 1.15, 1.2])
def test_growth_at_a_constant_factor_is_noted_once_and_dated(factor: float) -> None:
    notes = [f for f in Watch().findings(climb(factor, steps=34)) if f.severity is Severity.NOTE]
    assert [f.kind for f in notes] == [FindingKind.GROWTH]
    assert notes[0].step <= 230 and abs(notes[0].onset - 204) <= 8
    assert notes[0].baseline == pytest.approx(0.2, rel=0.5) and notes[0].score > notes[0].threshold


def test_a_climb_without_a_pause_is_damage() -> None:
    findings = Watch().findings(climb(1.1, steps=60))
    sure = [f for f in findings if f.severity is Severity.WEIGHTS_DAMAGED]
    assert 201 + SURE / math.log(1.1) < sure[0].step <= 201 + CLIMB
    assert {f.onset for f in findings} == {findings[0].onset}
    assert sure[0].value > 20 * sure[0].baseline


def test_a_step_that_does_not_show_it_is_not_held_against_the_run() -> None:
    watch = Watch()
    watch.findings(climb(1.1, steps=48))
    assert watch.detector.observe(obs(250, grad=20.0)) and not watch.detector.observe(
        obs(250, grad=0.2)
    )


def test_drift_jumps_noise_and_falls_are_no_growth() -> None:
    steady = climb(1.0, steps=1)
    for values in (
        [NOISE(step) * 1.005**step for step in range(1, 1500)],
        [*steady, *(4.0 * NOISE(step) for step in range(202, 300))],
        [*steady, *(NOISE(step) * (5.0 if step % 3 else 1.0) for step in range(202, 300))],
        [noisy(0.2, noise=0.8)(step) for step in range(1, 3000)],
        [NOISE(step) * 0.9 ** (step % 40) for step in range(1, 600)],
        [0.2] * 300,
    ):
        assert Watch().findings(values) == []


def test_the_first_steps_may_climb() -> None:
    assert Watch().findings([NOISE(step) * 1.1**step for step in range(1, 33)]) == []


def test_states_are_suspect_from_the_beginning_of_the_climb() -> None:
    watch = Watch()
    watch.findings(climb(1.0, steps=1))
    assert watch.detector.first_suspect_step() is None
    watch.findings(climb(1.1, steps=30))
    assert watch.detector.first_suspect_step() is not None
    watch.findings([40.0] * 30)
    assert watch.detector.first_suspect_step() is None


def test_state_goes_through_json_at_any_step() -> None:
    whole = Watch()
    for step, value in enumerate(climb(1.1, steps=60), 1):
        copy = Watch()
        copy.baseline.load_state_dict(through_json(whole.baseline.state_dict()))
        copy.detector.load_state_dict(through_json(whole.detector.state_dict()))
        assert copy.detector.observe(obs(step, grad=value)) == whole.detector.observe(
            obs(step, grad=value)
        )
        assert copy.detector.first_suspect_step() == whole.detector.first_suspect_step()
        whole.step(step, value)
        copy.step(step, value)
        assert copy.detector.state_dict() == whole.detector.state_dict()


# -- in the controller -----------------------------------------------------------------------------


def test_an_explosion_on_its_way_is_rolled_back_while_the_loss_is_flat() -> None:
    controller = Controller(GuardOptions())
    verdict: Verdict | None = None
    noted = 0
    for step, norm in enumerate(climb(1.1, steps=70), 1):
        verdict = controller.observe(obs(step, noisy(2.2)(step), norm))
        if verdict.action is not Action.APPLY:
            break
        noted += bool(verdict.findings)
        if verdict.findings:
            # No state since then counts as good, so that there is one left to go back to.
            assert controller.healthy_through < 215
    assert verdict is not None and verdict.action is Action.ROLLBACK and noted >= 1
    assert verdict.findings[0].kind is FindingKind.GROWTH and "grad_norm" in verdict.reason
    assert verdict.onset is not None and abs(verdict.onset - 204) <= 8
    assert verdict.window == ((verdict.onset - 2) * BATCH, verdict.step * BATCH)


def test_advise_says_it_once() -> None:
    controller = Controller(GuardOptions(mode=Mode.ADVISE))
    values = [*climb(1.1, steps=52), *(noisy(0.2 * 1.1**51)(step) for step in range(253, 300))]
    verdicts = [
        controller.observe(obs(step, noisy(2.2)(step), norm)) for step, norm in enumerate(values, 1)
    ]
    assert [v.would for v in verdicts if v.would is not None] == [Action.ROLLBACK]


# BLOOM-176B, published log, iterations 31214-31222: the norm leads the loss by four steps.
BLOOM_LOSS = (2.20, 2.22, 2.60, 2.24, 2.35, 5.10, 3.49, 3.21, 2.80)
BLOOM_NORM = (0.24, 0.95, 2.39, 15.9, 145.0, 960.0, 353.0, 379.0, 650.0)


@pytest.mark.parametrize("noise", [0.05, 0.15, 0.3])
@pytest.mark.parametrize("signals", ["both", "norm"])
@pytest.mark.parametrize("seed", range(3))
def test_bloom_176b_is_caught_by_its_norm_before_the_loss_peaks(
    noise: float, signals: str, seed: int
) -> None:
    controller = Controller(GuardOptions(mode=Mode.ADVISE))
    norm, loss = noisy(0.2, seed=seed, noise=noise), noisy(2.2, seed=seed + 9, noise=0.015)
    alarms: list[Verdict] = []
    for step in range(30_714, 31_223):
        row = step - 31_214
        seen_loss = BLOOM_LOSS[row] if row >= 0 else loss(step)
        seen_norm = BLOOM_NORM[row] if row >= 0 else norm(step)
        verdict = controller.observe(obs(step, seen_loss if signals == "both" else None, seen_norm))
        if any(f.signal == GRAD_NORM for f in verdict.findings):
            alarms.append(verdict)
    assert alarms[0].step in (31_215, 31_216), [v.reason for v in alarms]
    acted = [v for v in alarms if v.would is not None]
    assert acted[0].step <= 31_217 and acted[0].onset in (31_215, 31_216)
    assert Action.ROLLBACK in [v.would for v in acted if v.step <= 31_219], (
        "the update of the peak would be applied"
    )
