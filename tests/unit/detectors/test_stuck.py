from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import pytest

from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.findings import Finding, FindingKind, Severity
from guardrail.core.records.verdicts import Action
from guardrail.decide.controller import Controller
from guardrail.detectors.stuck import LEAST, StuckLoss
from tests.support.feed import noisy, obs, through_json
from tests.support.texts import numbers_in


def findings(values: Iterable[float]) -> list[Finding]:
    detector, found = StuckLoss(), []
    for step, value in enumerate(values, 1):
        found += detector.observe(obs(step, value))
        detector.update(obs(step, value))
    return found


def exact(step: int) -> float:
    return noisy(2.0)(step)


def two_digits(step: int) -> float:
    return round(noisy(2.0, noise=0.005)(step), 2)


def every_tenth(step: int) -> float:
    return exact(step // 10)


def test_a_loss_that_stops_changing_is_noted_and_again_when_the_stretch_has_doubled() -> None:
    found = findings([*map(exact, range(1, 101)), *[2.125] * 40])
    assert [f.step for f in found] == [101 + LEAST, 101 + 2 * LEAST, 101 + 4 * LEAST]
    assert {(f.kind, f.severity) for f in found} == {(FindingKind.STUCK, Severity.NOTE)}
    assert numbers_in(found[0].sentence()) == [2.125, LEAST + 1]


@pytest.mark.parametrize("printed", [exact, two_digits, every_tenth])
def test_the_runs_own_repeats_are_no_finding(printed: Callable[[int], float]) -> None:
    assert findings(map(printed, range(1, 6000))) == []


@pytest.mark.parametrize("printed", [two_digits, every_tenth])
def test_a_log_that_repeats_by_nature_gets_stuck_too(printed: Callable[[int], float]) -> None:
    found = findings([*map(printed, range(1, 601)), *[2.0] * 1000])
    assert found and found[0].step > 601 + LEAST


def test_constant_from_the_first_step_is_how_the_run_is() -> None:
    assert findings([2.0] * 1000) == []
    assert findings([2.0, 3.0] * 500) == []


def test_a_short_stretch_is_nothing_and_is_remembered() -> None:
    values = [*map(exact, range(1, 101)), *[2.125] * LEAST]
    assert findings(values) == []
    rng = random.Random(2)
    often = [value for step in range(1, 200) for value in [exact(step)] * rng.choice([1, 2, LEAST])]
    assert findings(often) == []


def test_state_goes_through_json_at_any_step() -> None:
    whole = StuckLoss()
    for step, value in enumerate(
        [*map(exact, range(1, 60)), *[2.0] * 20, *map(exact, range(60, 80))], 1
    ):
        copy = StuckLoss()
        copy.load_state_dict(through_json(whole.state_dict()))
        assert copy.observe(obs(step, value)) == whole.observe(obs(step, value))
        whole.update(obs(step, value))
        copy.update(obs(step, value))
        assert copy.state_dict() == whole.state_dict()


def test_the_controller_applies_such_steps_and_calls_no_state_suspect() -> None:
    controller = Controller(GuardOptions())
    told = []
    for step in range(1, 140):
        verdict = controller.observe(obs(step, exact(step), noisy(0.5, seed=1)(min(step, 100))))
        assert verdict.action is Action.APPLY
        told += [f.signal for f in verdict.findings]
    assert told == ["grad_norm"] * 3 and controller.healthy_through == 139
