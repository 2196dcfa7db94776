"""Smoothing and marks on a plot: what they keep of the curve, and what they never hide."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guardrail.tui.chart.overlay import Mark, draw_smoothed, put_marks, smooth_curve
from guardrail.tui.numerics.raster import Curve, Ink, Plot
from guardrail.tui.numerics.scales import XScale
from tests.support.plots import plot


def drawn(
    y: np.ndarray, dots: int = 120, *, height: int = 12, log: bool = False
) -> tuple[Plot, Curve, XScale]:
    curve = Curve.of(np.arange(1.0, len(y) + 1), np.asarray(y, dtype=float))
    scale = XScale(0.5, max(1.0, len(y) / dots), dots)
    return plot(curve, scale, height=height, log=log), curve, scale


@pytest.mark.parametrize("half_life", [1.0, 4.0, 20.0])
def test_a_smoothed_constant_is_the_constant_from_its_first_column_on(half_life: float) -> None:
    result, curve, scale = drawn(np.full(120, 3.0))
    assert np.allclose(smooth_curve([curve], scale, result.scale.log, half_life), 3.0), (
        "the correction: it begins at the curve"
    )


def test_it_is_the_average_that_its_name_says() -> None:
    y = np.random.default_rng(0).normal(5, 1, 120)
    result, curve, scale = drawn(y)
    found = smooth_curve([curve], scale, result.scale.log, 4.0)
    decay, total, weight = 0.5 ** (1 / 4), 0.0, 0.0
    for index, value in enumerate(y):
        total, weight = decay * total + value, decay * weight + 1
        assert found[index] == pytest.approx(total / weight)


def test_one_spike_of_a_long_run_does_not_drag_the_line_along() -> None:
    y = 2 + np.random.default_rng(1).normal(0, 0.01, 120_000)
    y[60_000] = 1e6
    result, curve, scale = drawn(y)
    found = smooth_curve([curve], scale, result.scale.log, 4.0)
    assert np.abs(found - 2).max() < 0.02


@pytest.mark.parametrize("log", [False, True])
def test_nan_and_gaps_stay_gaps_and_nothing_raises(log: bool) -> None:
    y = np.full(60, np.nan)
    y[[10, 11, 40]] = 1.0, -1.0, 4.0
    result, curve, scale = drawn(y, log=log)
    found = smooth_curve([curve], scale, result.scale.log, 4.0)
    assert np.isnan(found[20:30]).all() and np.isfinite(found[40])
    draw_smoothed(result, found)
    assert not np.isfinite(
        smooth_curve([Curve.of(np.zeros(0), np.zeros(0))], scale, result.scale.log, 4.0)
    ).any()


def test_the_smoothed_line_has_its_cells_for_itself() -> None:
    result, curve, scale = drawn(2 + np.random.default_rng(2).normal(0, 1, 4000))
    raw = int((result.inks == Ink.LINE).sum())
    draw_smoothed(result, smooth_curve([curve], scale, result.scale.log, 8.0))
    smooth = int((result.inks == Ink.SMOOTH).sum())
    assert 60 <= smooth <= 180 and int((result.inks == Ink.LINE).sum()) > raw // 3, "both are seen"
    assert not (result.inks[: result.body.start] == Ink.SMOOTH).any(), "alarms keep their row"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(-10, 130), st.sampled_from("RS!C#"), st.sampled_from(["", "2", "×0.5", "123"])), max_size=40
    ),
    st.integers(1, 14),
    st.integers(0, 2**31),
)  # fmt: skip
def test_marks_never_hide_an_alarm_or_each_other(
    marks: list[tuple[float, str, str]], height: int, seed: int
) -> None:
    y = 2 + np.random.default_rng(seed).normal(0, 0.5, 120)
    y[[30, 31]], y[70] = np.nan, 50.0
    result, _, scale = drawn(y, height=height)
    alarms = [result.codes[np.isin(result.inks, (Ink.CLIP, Ink.BAD))].tolist()]
    put_marks(result, scale, [Mark(x, letter, label, Ink.WARN) for x, letter, label in marks])
    alarms.append(result.codes[np.isin(result.inks, (Ink.CLIP, Ink.BAD))].tolist())
    assert alarms[0] == alarms[1]
    for row in range(len(result.codes)):
        for word in "".join(
            chr(code) if ink == Ink.WARN else " "
            for code, ink in zip(result.codes[row], result.inks[row], strict=True)
        ).split():
            assert any(word in (letter, letter + label) for _, letter, label in marks), (
                f"{word} is two marks in one"
            )


def test_the_first_mark_gets_its_place_with_its_label() -> None:
    result, _, scale = drawn(np.full(120, 2.0))
    put_marks(
        result,
        scale,
        [Mark(60, "R", "2", Ink.WARN), Mark(61, "C", "", Ink.GOOD), Mark(119, "S", "31", Ink.WARN)],
    )
    text = "\n".join(result.text(row) for row in range(len(result.codes)))
    assert "R2" in text and "C" in text and "S" in text and "S31" not in text, (
        "no room for the label at the edge"
    )
    line = next(row for row in range(12) if (result.inks[row] == Ink.LINE).sum() > 30)
    assert result.text(line - 1).find("R2") == scale.cell(60)
