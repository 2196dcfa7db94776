"""Rows become the present curve and abandoned timelines; what was handed out never changes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guardrail.core.records.signals import METRIC_COLUMNS
from guardrail.decide.timelines import TimelineIndex
from guardrail.tui.numerics.decimated_series import DecimatedSeries
from guardrail.tui.numerics.series import Series, choosable_signals
from tests.support.fake_run import FakeRun, example
from tests.support.feed import going_back

COLUMNS = ("step", "timeline", "loss", "grad_norm")


def rows(*values: tuple[float, float, float]) -> np.ndarray:
    """(step, timeline, loss) -> rows with grad_norm = 2 loss"""
    return np.array([(*value, 2 * value[2]) for value in values], dtype=float).reshape(-1, 4)


def track_of(*chunks: np.ndarray) -> DecimatedSeries:
    track = DecimatedSeries()
    for chunk in chunks:
        track.add(COLUMNS, chunk)
    return track


def test_rows_become_columns() -> None:
    series = track_of(rows((1, 0, 4.0), (2, 0, 3.5))).series()
    assert series.step.tolist() == [1, 2]
    assert series.values["loss"].tolist() == [4.0, 3.5] and series.values["grad_norm"].tolist() == [
        8.0,
        7.0,
    ]
    assert series.last("loss") == 3.5 and series.last_step == 2
    assert series.last("loss_threshold") is not None and math.isnan(
        series.last("loss_threshold") or 0.0
    )


def test_a_run_without_rows() -> None:
    series = DecimatedSeries().series()
    assert len(series) == 0 and series.last("loss") is None and series.end("step") == 0
    assert not list(Series().curves("loss"))


def test_nan_and_inf_are_bad_and_a_missing_column_is_not() -> None:
    series = track_of(rows((1, 0, math.nan), (2, 0, math.inf), (3, 0, 2.0))).series()
    assert series.bad["loss"].tolist() == [True, True, False]
    assert np.isnan(series.values["loss"][:2]).all()
    assert (
        not series.bad["embed_grad_norm"].any() and np.isnan(series.values["embed_grad_norm"]).all()
    )


def test_a_huge_value_stays_a_number_in_float32() -> None:
    series = track_of(rows((1, 0, 1e300))).series()
    assert not series.bad["loss"][0] and np.isfinite(series.values["loss"][0])


def test_a_new_timeline_abandons_steps() -> None:
    track = track_of(rows(*((s, 0, 2.0) for s in range(1, 8))), rows((5, 1, 1.5), (6, 1, 1.4)))
    series = track.series()
    assert series.step.tolist() == [1, 2, 3, 4, 5, 6] and series.values["loss"].tolist()[4:] == [
        1.5,
        pytest.approx(1.4),
    ]
    assert [one.step.tolist() for one in series.abandoned] == [[5, 6, 7]]
    assert series.end("step") == 7


def test_rejected_attempts_of_one_step_stand_side_by_side() -> None:
    series = track_of(
        rows((1, 0, 2.0), (2, 0, 9.0), (2, 0, 8.0), (2, 0, 2.1), (3, 0, 2.0))
    ).series()
    assert series.step.tolist() == [1, 2, 2, 2, 3] and not series.abandoned


def test_a_rejected_attempt_that_was_rolled_back_is_abandoned_even_at_the_very_next_step() -> None:
    series = track_of(rows((1, 0, 2.0), (2, 0, 9.0)), rows((2, 1, 2.1))).series()
    assert series.values["loss"].tolist() == [2.0, pytest.approx(2.1)]
    assert series.abandoned[0].values["loss"].tolist() == [9.0]


def test_a_step_that_goes_back_without_a_new_timeline_abandons_too() -> None:
    """The journal line of a restart may be lost; the rows say it all the same."""
    series = track_of(rows((1, 0, 2.0), (2, 0, 2.0), (3, 0, 2.0), (2, 0, 1.0))).series()
    assert series.values["loss"].tolist() == [2.0, 1.0] and series.abandoned[0].step.tolist() == [
        2,
        3,
    ]


def test_rows_that_are_none_are_ignored() -> None:
    """A power failure leaves zeros, a torn disk anything."""
    series = track_of(
        rows(
            (1, 0, 2.0),
            (0, 0, 0.0),
            (math.nan, 0, 1.0),
            (-3, 0, 1.0),
            (2.0**60, 0, 1.0),
            (2, 0, 1.9),
        )
    )
    assert series.series().step.tolist() == [1, 2]


def test_abandon_before_any_row_of_the_new_timeline() -> None:
    track = track_of(rows(*((s, 0, 2.0) for s in range(1, 8))))
    track.abandon(after=4)
    assert track.series().step.tolist() == [1, 2, 3, 4] and track.series().abandoned[
        0
    ].step.tolist() == [5, 6, 7]
    track.abandon(after=4)
    assert len(track.series().abandoned) == 1
    track.add(COLUMNS, rows((5, 1, 1.0)))
    assert track.series().step.tolist() == [1, 2, 3, 4, 5] and len(track.series().abandoned) == 1


def test_what_was_handed_out_never_changes() -> None:
    track = track_of(rows(*((s, 0, float(s)) for s in range(1, 900))))
    before = track.series()
    copy = before.values["loss"].copy()
    track.add(COLUMNS, rows(*((s, 0, 1.0) for s in range(900, 5000))))
    track.add(COLUMNS, rows(*((s, 1, -1.0) for s in range(100, 3000))))
    assert len(before) == 899 and (before.values["loss"] == copy).all()
    with pytest.raises(ValueError, match="read-only"):
        before.values["loss"][0] = 7


def test_only_the_newest_abandoned_timelines_are_kept() -> None:
    track = DecimatedSeries()
    for timeline in range(50):
        track.add(COLUMNS, rows((1, timeline, 1.0), (2, timeline, float(timeline))))
    abandoned = track.series().abandoned
    assert len(abandoned) == 32 and abandoned[-1].values["loss"][-1] == 48


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=8),
    st.integers(1, 7),
)
def test_the_present_is_what_the_run_directory_says(parts: list[tuple[int, int]], cut: int) -> None:
    """Against guardrail.decide.timelines, for rows that arrive in any chunks: a run that goes back
    to random steps.
    """
    steps, numbers = going_back(parts)
    known = TimelineIndex()
    known.add_rows(np.array(steps, dtype=float), np.array(numbers, dtype=float))
    present = known.current(np.array(steps, dtype=float), np.array(numbers, dtype=float))
    table = rows(*zip(steps, numbers, np.arange(len(steps), dtype=float), strict=True))
    series = track_of(*(table[first : first + cut] for first in range(0, len(table), cut))).series()
    assert series.values["loss"].tolist() == np.flatnonzero(present).tolist()
    abandoned = sum(len(one) for one in series.abandoned)
    assert abandoned + len(series) == len(steps)


def test_an_example_run_in_one_chunk_and_in_many() -> None:
    complete, pieces = DecimatedSeries(), DecimatedSeries()
    table = example().rows
    complete.add(METRIC_COLUMNS, table)
    for first in range(0, len(table), 37):
        pieces.add(METRIC_COLUMNS, table[first : first + 37])
    a, b = complete.series(), pieces.series()
    assert np.array_equal(a.step, b.step) and np.array_equal(
        a.values["loss"], b.values["loss"], equal_nan=True
    )
    assert len(a.abandoned) == len(b.abandoned) == 1


def test_columns_of_another_version() -> None:
    track = DecimatedSeries()
    track.add(("novel", "step"), np.array([[5.0, 1.0]]))
    track.add(("novel",), np.array([[5.0]]))
    track.add(METRIC_COLUMNS, FakeRun().rows)
    assert track.series().step.tolist() == [1.0]


def test_signals_and_axes_by_choice() -> None:
    columns = (
        "step",
        "timeline",
        "loss",
        "lr",
        "tokens",
        "step_time",
        "time",
        "verdict",
        "grad_norm/block",
    )
    raw = np.array([[1, 0, 4.0, 1e-3, 100, 0.5, 50.0, 0, 2.0], [2, 0, 9.0, 1e-3, 100, 0.5, 51.0, 1, np.nan],
                    [2, 0, 3.0, 1e-3, 100, 0.0, 49.0, 0, np.inf]])  # fmt: skip
    track = DecimatedSeries(choosable_signals(columns), ("tokens", "time"))
    track.add(columns, raw)
    series = track.series()
    assert series.values["throughput"][:2].tolist() == [200.0, 200.0] and np.isnan(
        series.values["throughput"][2]
    )
    assert series.along("tokens").tolist() == [100, 100, 200], "a rejected row has taught nothing"
    assert series.along("time").tolist() == [50, 51, 51], "a clock that was set back"
    assert series.along("step") is series.step and series.along("unknown") is series.step
    assert series.place(2, "tokens") == 200 and series.step_at(150, "tokens") == 2
    assert series.bad["grad_norm/block"].tolist() == [False, False, True], (
        "a NaN may be nothing that was measured"
    )
    assert series.at("grad_norm/block", 1) == 2.0 and math.isnan(
        series.last("grad_norm/block") or 0.0
    )
    assert choosable_signals(columns) == (
        "loss",
        "lr",
        "step_time",
        "grad_norm/block",
        "throughput",
    )
    track.add(columns, np.array([[2, 1, 2.5, 1e-3, 100, 0.5, 60.0, 0, 2.0]]))
    assert (
        track.series().along("tokens").tolist() == [100, 200]
        and track.series().end("tokens") == 200
    )
    assert track.series().abandoned[0].along("time").tolist() == [51, 51]


def test_what_not_every_row_has_is_said_by_its_last_value() -> None:
    columns = ("step", "timeline", "eval_loss")
    values = np.full(20_000, np.nan)
    values[[5, 9]] = 3.0, 2.5
    track = DecimatedSeries(("eval_loss",))
    track.add(columns, np.column_stack([np.arange(1.0, 20_001), np.zeros(20_000), values]))
    series = track.series()
    assert (
        series.last("eval_loss") == 2.5
        and series.at("eval_loss", 8) == 3.0
        and series.at("eval_loss", 3) is None
    )
