"""A pyramid against the points themselves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guardrail.tui.numerics import pyramid
from guardrail.tui.numerics.decimated_series import DecimatedSeries
from guardrail.tui.numerics.pyramid import BLOCK, Level, levels_above, reduce_ranges
from guardrail.tui.numerics.raster import Curve, dot_columns
from guardrail.tui.numerics.scales import XScale
from guardrail.tui.numerics.series import BANDS, SIGNALS

COLUMNS = ("step", "timeline", *SIGNALS, *BANDS)


def plain(
    y: np.ndarray, bad: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> list[tuple[float, float, bool]]:
    """Point by point."""
    found = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        values = [value for value in y[start:end].tolist() if value == value]
        found.append(
            (min(values, default=np.nan), max(values, default=np.nan), any(bad[start:end]))
        )
    return found


def noise(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    y = rng.normal(size=n).astype(np.float32)
    y[rng.random(n) < 0.1] = np.nan
    begin = int(rng.integers(0, n + 1))
    y[begin : begin + 3 * BLOCK] = np.nan  # complete blocks of nothing
    return y, np.isnan(y) & (rng.random(n) < 0.5)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(0, 3 * BLOCK**2 + 50), count=st.integers(0, 40))
def test_any_ranges_are_as_the_points_say(seed: int, n: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    y, bad = noise(rng, n)
    above = levels_above(Level(y, y, bad).folded())
    starts, ends = np.sort(rng.integers(0, n + 1, (2, count)), axis=0)
    found = list(
        zip(
            *(part.tolist() for part in reduce_ranges(Level(y, y, bad), above, starts, ends)),
            strict=True,
        )
    )
    assert repr(found) == repr(plain(y, bad, starts, ends)), (
        "repr, since a NaN is not equal to itself"
    )


def test_a_level_may_be_older_than_the_points() -> None:
    """Blocks are summed up when they are complete; what is newer is looked at by itself."""
    y, bad = noise(np.random.default_rng(1), 2 * BLOCK**2)
    above = levels_above(Level(y[: 5 * BLOCK], y[: 5 * BLOCK], bad[: 5 * BLOCK]).folded())
    starts, ends = np.array([0, 7, 100]), np.array([len(y), 6 * BLOCK, 1500])
    found = list(
        zip(
            *(part.tolist() for part in reduce_ranges(Level(y, y, bad), above, starts, ends)),
            strict=True,
        )
    )
    assert repr(found) == repr(plain(y, bad, starts, ends))


def test_a_track_that_grows_and_goes_back_draws_what_its_points_say() -> None:
    rng, track, at = np.random.default_rng(2), DecimatedSeries(), 0
    for timeline in range(4):
        for length in rng.integers(1, 4 * BLOCK**2, 5).tolist():
            table = rng.normal(size=(length, len(COLUMNS)))
            table[rng.random(table.shape) < 0.05] = np.nan
            table[:, 0], table[:, 1] = np.arange(at + 1, at + length + 1), timeline
            track.add(COLUMNS, table)
            at += length
            series, scale = track.series(), XScale.fit(at, 150, first=0.5)
            assert len(series) == at
            for signal in SIGNALS:
                (curve,) = series.curves(signal)
                seen, expected = (
                    dot_columns(curve, scale),
                    dot_columns(Curve(curve.x, curve.y, curve.bad), scale),
                )
                for one, other in (
                    (seen.low, expected.low),
                    (seen.high, expected.high),
                    (seen.bad, expected.bad),
                ):
                    np.testing.assert_array_equal(one, other)
        at = int(rng.integers(1, at))


def test_a_million_points_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a matter of time: the values that are read are counted."""
    n = 1_000_000
    y = np.zeros(n, dtype=np.float32)
    y[567_890] = 9.0
    above = levels_above(Level(y, y, y > 0).folded())
    looked = []
    take = pyramid._take

    def counted(level: Level, begin: np.ndarray, end: np.ndarray, *results: np.ndarray) -> None:
        looked.append(int(np.maximum(0, end - begin).sum()))
        take(level, begin, end, *results)

    monkeypatch.setattr(pyramid, "_take", counted)
    edges = np.linspace(0, n, 201).astype(np.int64)
    _, high, _ = reduce_ranges(Level(y, y, y > 0), above, edges[:-1], edges[1:])
    assert np.flatnonzero(high == 9.0).tolist() == [113], "one spike in a million is not lost"
    assert sum(looked) < 200 * 6 * BLOCK


def test_an_abandoned_timeline_keeps_no_more_than_itself() -> None:
    track = DecimatedSeries()
    table = np.ones((100_000, len(COLUMNS)))
    table[:, 0], table[:, 1] = np.arange(1, 100_001), 0
    track.add(COLUMNS, table)
    track.abandon(after=99_990)
    abandoned = track.series().abandoned[0]
    assert len(abandoned) == 10 and all(
        array.base is None for array in (abandoned.step, *abandoned.values.values())
    )
