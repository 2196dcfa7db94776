"""The published rules that the detection bench compares with: each fires where its formula says,
and nowhere before.
"""

from __future__ import annotations

import itertools
import random

import pytest

from tests.bench.rules import RULES

# BLOOM-176B, published log, iterations 31214-31222.
BLOOM_LOSS = [2.20, 2.22, 2.60, 2.24, 2.35, 5.10, 3.49, 3.21, 2.80]
BLOOM_NORM = [0.24, 0.95, 2.39, 15.9, 145.0, 960.0, 353.0, 379.0, 650.0]
HEALTHY = 400


def said(name: str, losses: list[float], norms: list[float]) -> list[str | None]:
    """Of rows that follow a healthy stretch, in which nothing may be said."""
    draw = random.Random(0)
    rule = RULES[name](HEALTHY)
    stretch = [(2.2 + draw.gauss(0, 0.01), 0.2 + draw.uniform(-0.01, 0.01)) for _ in range(HEALTHY)]
    assert {rule.observe(*pair) for pair in stretch} == {None}
    return [rule.observe(*pair) for pair in zip(losses, norms, strict=True)]


@pytest.mark.parametrize(
    ("name", "factor", "verdict"),
    [
        ("OLMo skip-step", 1.05, "skip"),
        ("FlagScale", 1.3, "skip"),
        ("InternEvo", 1.6, "skip"),
        ("Lightning SpikeDetection", 3.1, "rollback"),
        ("ARC thresholds", 11.0, "rollback"),
        ("Megatron spiky", 10.5, "rollback"),
        ("plain robust z", 1.1, "skip"),
    ],
)
def test_a_loss_just_beyond_the_threshold(name: str, factor: float, verdict: str) -> None:
    assert said(name, [2.2 * factor], [0.2]) == [verdict]


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("OLMo skip-step", 1.015),
        ("FlagScale", 1.15),
        ("InternEvo", 1.45),
        ("Lightning SpikeDetection", 2.9),
        ("ARC thresholds", 4.0),
        ("Megatron spiky", 9.0),
        ("plain robust z", 1.02),
    ],
)
def test_a_loss_just_below_the_threshold(name: str, factor: float) -> None:
    assert said(name, [2.2 * factor], [0.2]) == [None]


def test_zclip_judges_the_norm_and_nan_ends_it() -> None:
    assert said("ZClip", [9.9, 2.2], [0.2, 0.3]) == [None, "skip"]
    assert said("ZClip", [2.2, 2.2], [float("nan"), 100.0]) == [None, None]


def test_a_nan_blocks_olmo_until_it_has_left_the_window() -> None:
    verdicts = said("OLMo skip-step", [float("nan"), *[2.2] * 130], [0.2] * 131)
    assert [key for key, _ in itertools.groupby(verdicts)] == ["skip", None]
    assert verdicts.count("skip") == 129


def test_five_in_a_row_kill() -> None:
    assert said("KillLossSpike", [5.0] * 6, [0.2] * 6) == [None] * 4 + ["rollback"] * 2
    assert set(said("KillLossSpike", [5.0, 5.0, 5.0, 5.0, 2.2] * 3, [0.2] * 15)) == {None}


@pytest.mark.parametrize(
    "name", ["InternEvo", "Lightning SpikeDetection", "Megatron spiky", "KillLossSpike"]
)
def test_rules_on_the_loss_miss_the_climb_of_blooms_norm(name: str) -> None:
    assert said(name, BLOOM_LOSS, BLOOM_NORM)[:5] == [None] * 5
