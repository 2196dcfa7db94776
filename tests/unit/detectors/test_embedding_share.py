from __future__ import annotations

import math
import random
from typing import Any

import pytest

from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.findings import FindingKind, Observation
from guardrail.core.records.signals import EMBED_GRAD_NORM, EMBED_SHARE, GRAD_NORM, LOSS
from guardrail.core.records.verdicts import Action, Mode, Verdict
from guardrail.decide.controller import Controller
from tests.support.feed import BATCH, noisy, through_json


def seen(
    step: int, *, rest: float = 0.4, embed: float = 0.2, loss: float | None = None
) -> Observation:
    """A step whose norms are made of the embedding's and of the rest's."""
    share = embed**2 / (embed**2 + rest**2)
    signals = {
        LOSS: noisy(2.0)(step) if loss is None else loss,
        GRAD_NORM: math.hypot(embed, rest),
        EMBED_GRAD_NORM: embed,
        EMBED_SHARE: share,
    }
    return Observation(step=step, first=(step - 1) * BATCH, last=step * BATCH, signals=signals)


def ordinary(step: int) -> dict[str, float]:
    return {
        "rest": noisy(0.4, seed=2, noise=0.1)(step),
        "embed": noisy(0.2, seed=3, noise=0.15)(step),
    }


def healthy(controller: Controller, steps: int = 200) -> int:
    for step in range(1, steps + 1):
        verdict = controller.observe(seen(step, **ordinary(step)))
        assert not verdict.findings, verdict
    return steps + 1


def of_share(verdict: Verdict) -> list[Any]:
    return [(f.kind, f.severity.value) for f in verdict.findings if f.signal == EMBED_SHARE]


def test_a_share_that_runs_away_with_the_embeddings_norm_is_rejected_and_named() -> None:
    """One token id through a whole batch: the embedding's gradient grows and the rest does not."""
    controller = Controller(GuardOptions())
    step = healthy(controller)
    # 6.5-fold: no spike by itself
    verdict = controller.observe(seen(step, **ordinary(step) | {"embed": 1.3}))
    assert verdict.action is Action.SKIP
    assert of_share(verdict) == [(FindingKind.EMBED_SPIKE, "reject")]
    assert verdict.reason.startswith("embed_share 0.89") and verdict.incident_state == "open"


def test_a_share_that_grows_because_the_rest_shrinks_hurts_nobody_and_is_noted_once() -> None:
    controller = Controller(GuardOptions())
    step = healthy(controller)
    verdicts = [
        controller.observe(seen(at, **ordinary(at) | {"rest": 0.05}))
        for at in range(step, step + 30)
    ]
    assert all(v.action is Action.APPLY for v in verdicts)
    assert [of_share(v) for v in verdicts if of_share(v)] == [[(FindingKind.EMBED_SPIKE, "note")]]


def test_a_slow_runaway_does_not_drag_the_baseline_along() -> None:
    controller = Controller(GuardOptions(mode=Mode.ADVISE))
    step = healthy(controller)
    verdicts = [
        controller.observe(
            seen(at, **ordinary(at) | {"rest": ordinary(at)["rest"] * 0.95 ** (at - step)})
        )
        for at in range(step, step + 60)
    ]
    told = [v.step - step for v in verdicts if of_share(v)]
    assert told and 20 < told[0] < 50  # the odds rise by 11 % a step


def test_small_shares_noise_and_large_stable_shares_are_nothing() -> None:
    for values in (
        # 20-fold, and still 6 %
        [{"rest": 0.4, "embed": 0.01 if step % 50 else 0.1} for step in range(1, 400)],
        [{"rest": 0.1, "embed": noisy(0.8, noise=0.2)(step)} for step in range(1, 400)],
        [ordinary(step) | {"embed": noisy(0.4, noise=0.4)(step)} for step in range(1, 400)],
    ):
        controller = Controller(GuardOptions())
        assert not any(
            of_share(controller.observe(seen(step, **row))) for step, row in enumerate(values, 1)
        )


@pytest.mark.parametrize("junk", [math.nan, math.inf, -0.1, 1.5])
def test_a_share_that_is_none_changes_nothing(junk: float) -> None:
    controller = Controller(GuardOptions())
    step = healthy(controller)
    state = through_json(controller.state_dict()["detectors"][EMBED_SHARE])
    one = seen(step, **ordinary(step))
    one.signals[EMBED_SHARE] = junk
    assert not of_share(controller.observe(one))
    assert controller.state_dict()["detectors"][EMBED_SHARE] == state


def test_exactly_none_and_exactly_all_can_be_compared() -> None:
    controller = Controller(GuardOptions())
    for step in range(1, 101):
        controller.observe(seen(step, rest=0.4, embed=0.0))
    verdict = controller.observe(seen(101, rest=0.0, embed=0.4))
    assert of_share(verdict) and verdict.findings[0].value == pytest.approx(1.0)


def test_state_goes_through_json_at_any_step() -> None:
    rng = random.Random(5)
    rows = [
        ordinary(step) | ({"embed": rng.choice([1.0, 3.0])} if step % 40 < 6 else {})
        for step in range(1, 250)
    ]
    whole = Controller(GuardOptions(mode=Mode.ADVISE))
    for step, row in enumerate(rows, 1):
        copy = Controller(GuardOptions(mode=Mode.ADVISE))
        copy.load_state_dict(through_json(whole.state_dict()))
        assert copy.observe(seen(step, **row)).findings == whole.observe(seen(step, **row)).findings
        assert copy.state_dict() == whole.state_dict()
