"""Cases 12 to 15 of other tools' public reports, in numbers: what a guard should have said to
them.
"""

from __future__ import annotations

import math
import random

import pytest

from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.findings import FindingKind
from guardrail.core.records.signals import EMBED_GRAD_NORM, EMBED_SHARE, GRAD_NORM, LOSS, LOSS_SCALE
from guardrail.core.records.verdicts import Action, Verdict
from guardrail.decide.controller import Controller
from tests.support.feed import JudgedSteps, noisy


class Run(JudgedSteps):
    """A run in `auto`. A rollback is told and not done."""

    def __init__(self) -> None:
        super().__init__(Controller(GuardOptions()))

    def attempt(self, **changes: float) -> Verdict:
        embed, rest = (
            noisy(0.2, seed=3, noise=0.1)(self.cursor),
            noisy(0.4, seed=2, noise=0.1)(self.cursor),
        )
        embed = changes.pop(EMBED_GRAD_NORM, embed)
        signals = {
            LOSS: noisy(3.0, noise=0.007)(self.cursor),
            GRAD_NORM: math.hypot(embed, rest),
            EMBED_GRAD_NORM: embed,
            EMBED_SHARE: embed**2 / (embed**2 + rest**2),
            **changes,
        }
        return self.judge(signals)

    def healthy(self, steps: int = 150) -> list[Verdict]:
        verdicts = [self.attempt() for _ in range(steps)]
        assert all(v.action is Action.APPLY and not v.findings for v in verdicts)
        return verdicts


def kinds(verdict: Verdict) -> set[FindingKind]:
    return {finding.kind for finding in verdict.findings}


def test_case_12_single_overflows_are_normal_and_one_after_the_other_is_a_collapse() -> None:
    run, scale = Run(), 65536.0
    for _ in range(6):
        verdict = run.attempt(
            grad_norm=math.inf, embed_grad_norm=math.inf, embed_share=math.nan, loss_scale=scale
        )
        assert (
            verdict.action is Action.FP16_OVERFLOW
            and verdict.incident is None
            and not verdict.findings
        )
        scale /= 2
    for index in range(300):
        overflow = {"grad_norm": math.inf} if index % 100 == 70 else {}
        verdict = run.attempt(loss_scale=scale, **overflow)
        assert verdict.incident is None and (verdict.action is Action.FP16_OVERFLOW) == bool(
            overflow
        )
    actions = []
    while Action.ROLLBACK not in actions and len(actions) < 20:
        verdict = run.attempt(grad_norm=math.inf, loss_scale=scale)
        actions.append(verdict.action)
        scale /= 2
    assert actions == [Action.FP16_OVERFLOW] * 7 + [Action.ROLLBACK]
    assert (
        verdict.findings[0].kind is FindingKind.SCALE_COLLAPSE
        and verdict.findings[0].signal == LOSS_SCALE
    )


@pytest.mark.parametrize("height", [92.0, 11_140.0])
def test_case_13_one_outlier_of_the_norm_costs_one_update(height: float) -> None:
    run = Run()
    run.healthy()
    verdict = run.attempt(grad_norm=0.06 * height)  # 92 and 11,140 against 7
    assert verdict.action is Action.SKIP and kinds(verdict) == {FindingKind.GRAD_SPIKE}
    assert verdict.findings[0].sentence() in verdict.reason
    after = [run.attempt() for _ in range(60)]
    assert {v.action for v in after} == {Action.APPLY} and after[-1].incident is None


@pytest.mark.parametrize("rows", [1, 2])
def test_case_13_a_loss_that_is_back_within_three_steps_is_no_rollback(rows: int) -> None:
    run = Run()
    run.healthy()
    verdicts = [run.attempt(loss=4.5) for _ in range(rows)] + [run.attempt() for _ in range(60)]
    assert [v.action for v in verdicts] == [Action.SKIP] * rows + [Action.APPLY] * 60


def test_case_13_a_new_level_that_stays_is_a_level_shift() -> None:
    run = Run()
    run.healthy()
    # Below what is rejected: it is applied, and it does not go away.
    low, high = run.controller.bands()[GRAD_NORM]
    level = noisy(low * (high / low) ** 0.8, seed=5, noise=0.05)
    verdicts = [run.attempt(grad_norm=level(number)) for number in range(40)]
    assert {v.action for v in verdicts} == {Action.APPLY}
    shifts = [v for v in verdicts if FindingKind.LEVEL_SHIFT in kinds(v)]
    assert len(shifts) == 1 and shifts[0].reason.startswith("noted: grad_norm")
    assert not any(v.findings for v in verdicts[8:])


def test_case_13_a_loss_that_jumps_and_stays_is_rolled_back() -> None:
    run = Run()
    run.healthy()
    verdicts = [run.attempt(loss=4.5) for _ in range(3)]
    assert [v.action for v in verdicts] == [Action.SKIP, Action.SKIP, Action.ROLLBACK]


def test_case_14_the_embedding_is_named_as_the_source() -> None:
    """One token id through a whole batch with a large loss: its row takes nearly all of the
    gradient.
    """
    run = Run()
    run.healthy()
    verdict = run.attempt(loss=4.2, embed_grad_norm=1.2)
    assert verdict.action is Action.SKIP
    named = {f.signal: f for f in verdict.findings}
    assert (
        EMBED_SHARE in named
        and named[EMBED_SHARE].value > 0.85
        and named[EMBED_SHARE].baseline < 0.3
    )
    # A spike that has its source elsewhere does not name it.
    run.healthy(60)
    verdict = run.attempt(loss=4.2, grad_norm=8.0, embed_share=0.03)
    assert verdict.action is Action.SKIP and EMBED_SHARE not in {f.signal for f in verdict.findings}


def test_case_15_a_healthy_loss_with_little_noise_loses_no_step() -> None:
    """Compared with 8 sigma alone, not with mean + 8 sigma, each of these would be left out."""
    run = Run()
    assert len(run.healthy(1000)) == 1000


def test_case_15_after_a_nan_the_detector_still_works() -> None:
    rng = random.Random(0)
    run = Run()
    run.healthy()
    for signal in (LOSS, GRAD_NORM, EMBED_GRAD_NORM, LOSS):
        verdict = run.attempt(**{signal: rng.choice([math.nan, math.inf])})
        assert verdict.action is Action.SKIP and FindingKind.NONFINITE in kinds(verdict)
        run.healthy(10)
        verdict = run.attempt(loss=6.0)
        assert verdict.action is Action.SKIP and kinds(verdict) == {FindingKind.LOSS_SPIKE}
        run.healthy(10)
