"""Nothing that happened may be invisible: every extreme is on the plot, clipped ones with their
value.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guardrail.tui.numerics.raster import BRAILLE, Curve, Ink, Plot, dot_columns, sample_last
from guardrail.tui.numerics.scales import (
    XScale,
    YScale,
    fit_y_scale,
    format_labels,
    format_short,
    place_ticks,
    round_up,
)
from tests.support.plots import plot

_BIT = [[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]]
_ALARMS = (Ink.CLIP, Ink.BAD, Ink.ABANDONED_CLIP, Ink.ABANDONED_BAD)


def curve(y: Sequence[float] | np.ndarray, x: np.ndarray | None = None) -> Curve:
    values = np.asarray(y, dtype=float)
    return Curve.of(np.arange(1.0, len(values) + 1) if x is None else x, values)


def picture(result: Plot) -> str:
    return "\n".join(result.text(row) for row in range(len(result.codes)))


def dot(result: Plot, row: int, column: int, alarms: int) -> bool:
    """Whether the dot of the curve is on the plot, counting rows below the alarms."""
    code = int(result.codes[row // 4 + alarms, column // 2])
    return BRAILLE <= code < BRAILLE + 256 and bool((code - BRAILLE) & _BIT[row % 4][column % 2])


def assert_extremes_visible(result: Plot, drawn: Curve, scale: XScale) -> None:
    """The greatest and least value of each dot column has its dot, or an alarm at the edge in its
    cell.
    """
    height, width = result.codes.shape
    alarms = int(height >= 4)
    dots = 4 * (height - alarms)
    extremes = dot_columns(drawn, scale)
    for column in np.flatnonzero(extremes.filled):
        cell = column // 2
        if cell >= width:
            continue
        for value in (extremes.high[column], extremes.low[column]):
            row = float(result.scale.rows(np.array([value]), dots)[0])
            if not -1e-3 <= row <= dots - 1 + 1e-3:  # a thousandth of a dot is no distance
                edge = 0 if row < 0 else height - 1
                assert result.inks[edge, cell] in _ALARMS, f"column {column}: {value} left no mark"
                continue
            row = min(max(row, 0.0), dots - 1.0)
            seen = dot(result, round(row), column, alarms)
            covered = result.inks[round(row) // 4 + alarms, cell] in _ALARMS
            assert seen or covered, (
                f"column {column}: {value} is not on the plot\n{picture(result)}"
            )
    for column in np.flatnonzero(extremes.bad):
        if column // 2 < width:
            assert result.codes[0, column // 2] == ord("×")


anything = st.floats(allow_nan=True, allow_infinity=True, width=64)
plausible = st.floats(min_value=-1e6, max_value=1e6, allow_nan=False)


@settings(max_examples=300, deadline=None)
@given(
    y=st.lists(anything | plausible, max_size=200),
    abandoned=st.lists(anything, max_size=20),
    width=st.integers(1, 60),
    height=st.integers(1, 14),
    log=st.booleans(),
    per_dot=st.sampled_from([0.1, 0.5, 1.0, 1.5, 3.0]),
    rules=st.lists(st.integers(-5, 70), max_size=3),
)
def test_nothing_raises_and_nothing_is_lost(
    y: list[float],
    abandoned: list[float],
    width: int,
    height: int,
    log: bool,
    per_dot: float,
    rules: list[int],
) -> None:
    drawn, scale = curve(y), XScale(0.5, per_dot, 2 * width)
    with np.errstate(over="ignore"):
        threshold = sample_last(drawn.x, drawn.y * 2, scale)
    result = plot(drawn, scale, height=height, log=log, abandoned=[curve(abandoned)],
                  baseline=sample_last(drawn.x, drawn.y, scale), threshold=threshold, rules=rules)  # fmt: skip
    assert result.codes.shape == (height, width)
    assert all(len(result.text(row)) == width for row in range(height))
    assert all(0 <= row < height and label for row, label in result.ticks)
    assert_extremes_visible(result, drawn, scale)


@settings(max_examples=100, deadline=None)
@given(y=st.lists(anything, min_size=1, max_size=500), dots=st.integers(2, 120))
def test_columns_keep_extremes(y: list[float], dots: int) -> None:
    """The envelope over all columns is the envelope of the curve."""
    drawn = curve(y)
    found = dot_columns(drawn, XScale.fit(len(y), dots, first=0.5))
    finite = np.asarray(y)[np.isfinite(y)]
    assert found.bad.any() == (len(finite) < len(y))
    if len(finite):
        assert np.nanmax(found.high) == finite.max() and np.nanmin(found.low) == finite.min()


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("points", [0, 1, 2, 3, 50])
def test_few_points(points: int, log: bool) -> None:
    drawn, scale = curve(np.linspace(1, 2, points)), XScale.fit(points, 80, first=0.5)
    result = plot(drawn, scale, height=8, log=log)
    assert (result.inks == Ink.LINE).any() == (points > 0)
    assert_extremes_visible(result, drawn, scale)


@pytest.mark.parametrize("log", [False, True])
def test_a_million_points_keep_their_one_spike(log: bool) -> None:
    y = np.random.default_rng(0).normal(2.2, 0.01, 1_000_000)
    y[637_123] = 11.5
    result = plot(curve(y), XScale.fit(1e6, 200, first=0.5), height=12, log=log)
    assert "▲11.5" in result.text(0)
    low, high = (10**v if log else v for v in (result.scale.bottom, result.scale.top))
    assert 1.8 < low < 2.2 < high < 2.6, "the spike must not set the axis"


@pytest.mark.parametrize("where", [0, 1, 70, 98, 99])
def test_a_spike_does_not_flatten_the_curve_wherever_it_is(where: int) -> None:
    y = np.linspace(3, 2, 100)
    y[where] = 400.0
    result = plot(curve(y), XScale(0.5, 1.0, 100), height=10)
    assert result.scale.top < 4
    assert "400" in result.text(0)


def test_a_jump_that_stays_sets_the_axis() -> None:
    y = np.concatenate([np.full(60, 2.0), np.full(40, 9.0)]) + 0.01 * np.arange(100) % 0.05
    result = plot(curve(y), XScale(0.5, 1.0, 100), height=10)
    assert result.scale.top > 9 and Ink.CLIP not in result.inks


def test_a_spike_that_barely_sticks_out_is_shown_completely() -> None:
    y = np.linspace(3, 2, 100)
    y[50] = 3.3
    result = plot(curve(y), XScale(0.5, 1.0, 100), height=10)
    assert result.scale.top >= 3.3 and Ink.CLIP not in result.inks


def test_nan_and_inf_are_marked_and_break_the_line() -> None:
    y = np.full(40, 2.0)
    y[10:14], y[30] = math.nan, math.inf
    result = plot(curve(y), XScale(0.5, 1.0, 40), height=6)
    marked = np.flatnonzero(result.inks[0] == Ink.BAD)
    assert marked.tolist() == [5, 6, 15] and set(result.text(0).replace(" ", "")) == {"×"}
    line = (result.inks == Ink.LINE).any(axis=0)
    assert not line[5] and not line[6] and line[4] and line[7]


def test_all_nan_is_marked_everywhere() -> None:
    result = plot(curve(np.full(40, math.nan)), XScale(0.5, 1.0, 40), height=6)
    assert result.text(0) == "×" * 20 and not (result.inks == Ink.LINE).any()


def test_a_constant_is_a_level_line() -> None:
    result = plot(curve(np.full(40, 2.2)), XScale(0.5, 1.0, 40), height=7)
    rows = np.flatnonzero((result.inks == Ink.LINE).any(axis=1))
    assert len(rows) == 1 and 1 < rows[0] < 6


def test_what_a_logarithm_does_not_have_is_marked_at_the_bottom() -> None:
    y = np.full(40, 1.0)
    y[10], y[20] = 0.0, -3.0
    result = plot(curve(y), XScale(0.5, 1.0, 40), height=6, log=True)
    assert [result.text(5)[cell] for cell in (5, 10)] == ["▼", "▼"]


def test_steep_lines_have_no_holes() -> None:
    result = plot(curve([1.0, 9.0, 1.0, 9.0]), XScale(0.5, 0.25, 16), height=8)
    for before, after in zip(range(15), range(1, 16), strict=True):
        rows = [{r for r in range(28) if dot(result, r, c, 1)} for c in (before, after)]
        if rows[0] and rows[1]:
            assert min(abs(a - b) for a in rows[0] for b in rows[1]) <= 1


def test_a_gap_of_steps_is_bridged() -> None:
    """Few steps on a wide plot are points that stand apart."""
    result = plot(curve([1.0, 2.0]), XScale(0.5, 0.05, 40), height=8)
    assert (result.inks == Ink.LINE).any(axis=0)[5:15].all()


def test_an_abandoned_timeline_is_dotted_and_gives_way_to_the_present() -> None:
    x = np.arange(1.0, 41)
    abandoned = Curve.of(x[20:30], np.full(10, 5.0))
    result = plot(
        curve(np.linspace(2, 6, 40)), XScale(0.5, 1.0, 40), height=9, abandoned=[abandoned]
    )
    assert (result.inks == Ink.ABANDONED).any() and (result.inks[:, :9] != Ink.ABANDONED).all()


def test_a_clipped_abandoned_timeline_says_its_value() -> None:
    abandoned = Curve.of(np.arange(21.0, 25), np.array([2.0, 3.0, 11.5, 9.0]))
    result = plot(curve(np.full(40, 2.0)), XScale(0.5, 1.0, 40), height=9, abandoned=[abandoned])
    assert "▲11.5" in result.text(0).replace("▲▲", "▲")
    assert (result.inks[0] == Ink.ABANDONED_CLIP).any()


def test_an_abandoned_timeline_below_the_present_is_shown_completely() -> None:
    """A user rolled back a healthy run: the discarded steps had come further down."""
    abandoned = Curve.of(np.arange(21.0, 41), np.linspace(2.0, 1.0, 20))
    result = plot(
        curve(np.linspace(2.2, 2.0, 20)), XScale(0.5, 1.0, 40), height=9, abandoned=[abandoned]
    )
    assert result.scale.bottom <= 1.0 and "▼" not in picture(result)


def test_threshold_and_band() -> None:
    scale = XScale(0.5, 1.0, 40)
    full = np.ones(40)
    result = plot(
        curve(np.linspace(2, 3, 40)), scale, height=9, baseline=full * 2.5, threshold=full * 3.2
    )
    rows = np.flatnonzero((result.inks == Ink.THRESHOLD).any(axis=1))
    assert len(rows) == 1
    band = np.flatnonzero(result.band.any(axis=1))
    assert band[0] == rows[0] and len(band) > 2


def test_far_threshold_does_not_squeeze_the_curve() -> None:
    result = plot(curve(np.linspace(2, 3, 40)), XScale(0.5, 1.0, 40), height=9, baseline=np.full(40, 2.0),
                  threshold=np.full(40, 80.0))  # fmt: skip
    assert result.scale.top < 4


def test_labels_of_spikes_do_not_run_together() -> None:
    y = np.full(60, 2.0) + np.arange(60) % 2 * 0.1
    y[20], y[24], y[58] = 100.0, 200.0, 300.0
    row = plot(curve(y), XScale(0.5, 1.0, 60), height=8).text(0)
    assert "▲200" in row and "300▲" in row and "▲100" not in row.replace("▲ 100", "")


@pytest.mark.parametrize(
    "last", [1, 49, 50, 51, 99, 100, 1284, 5999, 6000, 6001, 123_456, 10**6, 10**9]
)
@pytest.mark.parametrize("dots", [1, 2, 20, 120, 333])
def test_the_last_step_is_on_the_axis(last: int, dots: int) -> None:
    scale = XScale.fit(last, dots, first=0.5)
    assert 0 <= (last - scale.first) / scale.per_dot < dots
    if last > 50:
        assert (last - scale.first) / scale.per_dot >= dots * 0.45, (
            "at least half of the plot is used"
        )


def test_a_growing_curve_stands_still_most_of_the_time() -> None:
    scales = [XScale.fit(step, 120, first=0.5).per_dot for step in range(1000, 10_000)]
    assert scales == sorted(scales) and len(set(scales)) <= 12


@settings(max_examples=200, deadline=None)
@given(
    bottom=st.floats(-1e9, 1e9), span=st.floats(1e-6, 1e9), rows=st.integers(1, 40), log=st.booleans()
)  # fmt: skip
def test_ticks_are_inside_and_apart(bottom: float, span: float, rows: int, log: bool) -> None:
    scale = YScale(max(-90, min(90, bottom)), max(-90, min(90, bottom)) + min(span, 90), True) if log else YScale(
        bottom, bottom + max(span, abs(bottom) * 1e-3), False)  # fmt: skip
    found = [row for row, _ in place_ticks(scale, rows)]
    assert all(0 <= row < rows for row in found)
    assert all(b - a >= 2 for a, b in itertools.pairwise(found))


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_short_numbers_are_short(value: float) -> None:
    assert 1 <= len(format_short(value)) <= 7 + (value < 0)


@pytest.mark.parametrize(
    ("value", "text"),
    [(11.5, "11.5"), (0.0312, "0.0312"), (1234.0, "1.23k"), (5e5, "500k"), (0.0, "0"), (3e12, "3e12"),
     (2e-7, "2e-7"), (math.nan, "NaN"), (-math.inf, "-Inf"), (999.7, "1k"), (-2.5, "-2.5")],
)  # fmt: skip
def test_short(value: float, text: str) -> None:
    assert format_short(value) == text


def test_no_two_ticks_say_the_same() -> None:
    labels = [label for _, label in place_ticks(YScale(0.00099, 0.00101, False), 18)]
    assert len(labels) >= 2 and len(set(labels)) == len(labels)
    assert format_labels([34000.0, 34200.0, 34400.0]) == ["34k", "34.2k", "34.4k"]


def test_a_value_at_the_end_of_its_axis_is_not_above_it() -> None:
    y = np.full(60, np.float32(0.002))
    y[:30] = np.linspace(0, 0.002, 30, dtype=np.float32)
    result = plot(curve(y), XScale(0.5, 1.0, 60), height=12)
    assert "▲" not in picture(result) and result.scale.top == pytest.approx(0.002)


def test_labels_have_the_same_decimals() -> None:
    assert format_labels([0.0, 0.5, 1.0]) == ["0.0", "0.5", "1.0"]
    assert format_labels([2.0, 4.0, 6.0]) == ["2", "4", "6"]
    assert format_labels([]) == []


def test_nice() -> None:
    assert [round_up(v) for v in (0.9, 1.0, 1.1, 2.2, 3.0, 7.0)] == [1.0, 1.0, 2.0, 2.5, 5.0, 10.0]
    assert round_up(math.nan) == round_up(0.0) == round_up(math.inf) == 1.0


def test_y_range_of_nothing() -> None:
    nothing = np.full(4, np.nan)
    assert fit_y_scale([(nothing, nothing)], log=False) == YScale(0.0, 1.0, False)
    assert fit_y_scale([(nothing, nothing), (nothing, nothing)], log=True) == YScale(0.0, 1.0, True)
