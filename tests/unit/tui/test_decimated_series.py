"""A day of rows in bounded memory: what is kept of old ones, and what is read of them again."""

from __future__ import annotations

import errno
import math
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from guardrail.core.records.signals import METRIC_COLUMNS
from guardrail.rundir.run_directory import RunDirectory
from guardrail.tui.app.app import GuardrailApp
from guardrail.tui.chart import axis
from guardrail.tui.chart.chart import READING_FILE, draw_chart
from guardrail.tui.model import run_reader
from guardrail.tui.model.run_reader import RunReader
from guardrail.tui.model.view import View
from guardrail.tui.numerics.decimated_series import DecimatedSeries
from guardrail.tui.numerics.raster import Columns, merged_dot_columns
from guardrail.tui.numerics.scales import XScale
from guardrail.tui.numerics.series import SIGNALS, Series
from tests.support.fake_run import FakeReader, FakeRun, snapshot_of
from tests.support.feed import going_back
from tests.support.lab import wait_for

EXACT = 64
COLUMNS = ("step", "timeline", *SIGNALS, "eval_loss", "tokens")


def bounded(table: np.ndarray) -> DecimatedSeries:
    """A track that reads its table again where it has to."""
    return DecimatedSeries(
        ("eval_loss",),
        ("tokens",),
        exact=EXACT,
        again=lambda first, end: (COLUMNS, table[first:end]),
    )


def noise(steps: list[float], timelines: list[float]) -> np.ndarray:
    rng = np.random.default_rng(len(steps))
    table = rng.normal(size=(len(steps), len(COLUMNS)))
    table[rng.random(table.shape) < 0.03] = np.nan
    table[rng.random(len(table)) < 0.95, COLUMNS.index("eval_loss")] = np.nan
    table[:, 0], table[:, 1], table[:, -1] = steps, timelines, 10.0
    return table


def held(value: object) -> int:
    """Bytes of all arrays that an object holds, each once; a view counts as all that it keeps."""
    found: dict[int, int] = {}

    def look(one: object) -> None:
        if isinstance(one, np.ndarray):
            root = one
            while isinstance(root.base, np.ndarray):
                root = root.base
            found[id(root)] = root.nbytes
        elif isinstance(one, dict):
            for part in one.values():
                look(part)
        elif isinstance(one, tuple | list):
            for part in one:
                look(part)
        elif hasattr(one, "low") and not isinstance(one, Series):
            look([getattr(one, name, None) for name in ("low", "high", "bad", "series")])
        elif isinstance(one, Series | DecimatedSeries):
            look(vars(one))

    look(value)
    return sum(found.values())


def extremes(series: Series, signal: str) -> tuple[float, float, bool]:
    """Least and greatest value of everything, and whether something is marked as no number."""
    parts = list(series.curves(signal))
    low, high = (
        np.concatenate([getattr(part.points, name) for part in parts]) for name in ("low", "high")
    )
    if not np.isfinite(low).any():
        return math.nan, math.nan, any(part.bad.any() for part in parts)
    return (
        float(np.nanmin(low)),
        float(np.nanmax(high)),
        any(bool(part.bad.any()) for part in parts),
    )


@settings(max_examples=40, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    st.lists(st.tuples(st.integers(1, 900), st.integers(1, 900)), min_size=1, max_size=6),
    st.integers(1, 400),
)
def test_what_is_summed_up_is_what_the_rows_say(parts: list[tuple[int, int]], cut: int) -> None:
    """For runs that go back to random steps, far back too, and arrive in any chunks: against one
    that keeps all.
    """
    steps, timelines = going_back(parts)
    table = noise(steps, timelines)
    thinned, complete = bounded(table), DecimatedSeries(("eval_loss",), ("tokens",))
    for first in range(0, len(table), cut):
        for track in (thinned, complete):
            track.add(COLUMNS, table[first : first + cut], first=first)
        assert len(thinned.series()) <= 4 * EXACT
    a, b = thinned.series(), complete.series()
    kept = len(a) - a.thin
    assert a.step[a.thin :].tolist() == b.step[len(b) - kept :].tolist()
    assert kept >= min(EXACT * 3 // 4, len(b)) or timelines[-1], "after a return there may be few"
    for name in ("loss", "eval_loss"):
        np.testing.assert_array_equal(a.values[name][a.thin :], b.values[name][len(b) - kept :])
        assert repr(extremes(a, name)) == repr(extremes(b, name))
        assert repr(a.last(name)) == repr(b.last(name))
    assert a.end("tokens") == b.end("tokens") and len(a.abandoned) == len(b.abandoned)
    for mine, other in zip(a.abandoned, b.abandoned, strict=True):
        assert mine.last_step == other.last_step and repr(extremes(mine, "loss")) == repr(
            extremes(other, "loss")
        )
    # Every point stands for the rows from the one before to its own, and for no others.
    bounds = np.searchsorted(b.row, a.row, side="right")
    high = np.fmax.reduceat(b.values["loss"], np.concatenate(([0], bounds[:-1])))
    np.testing.assert_array_equal(
        np.concatenate([part.points.high for part in a.curves("loss")]), high
    )


def test_a_day_holds_no_more_bytes_than_an_hour() -> None:
    """Of everything that grows with rows, abandoned timelines included; counted, whatever a process may have
    left over.
    """
    track, sizes = DecimatedSeries(exact=EXACT), []
    for hour in range(24):
        for at in range(hour * 3600, (hour + 1) * 3600, 300):
            steps = np.arange(at + 1.0, at + 301)
            track.add(COLUMNS, noise(steps.tolist(), [0.0] * 300))
        sizes.append(held((track, track.series())))
    assert max(sizes[4:]) < 1.02 * max(sizes[:4]), "the biggest is reached in the first hours"
    assert len(track.series()) <= 4 * EXACT and track.series().last_step == 24 * 3600
    for _ in range(40):
        track.abandon(after=track.last_step - 5)
    before = held((track, track.series()))
    for timeline in range(1, 60):
        at = track.last_step
        table = noise(np.arange(at - 9, at + 1).tolist(), [float(timeline)] * 10)
        track.add(COLUMNS, table)
    assert held((track, track.series())) < 2 * before, (
        "of abandoned timelines only the newest are kept"
    )


def test_an_abandoned_timeline_of_a_full_day_is_summed_up_too() -> None:
    track = DecimatedSeries()
    track.add(COLUMNS, noise(np.arange(1.0, 100_001).tolist(), [0.0] * 100_000))
    before = extremes(track.series(), "loss")
    track.abandon(after=0)
    (abandoned,) = track.series().abandoned
    assert len(abandoned) <= 2048 and repr(extremes(abandoned, "loss")) == repr(before)


# -- what is looked at closer


@pytest.fixture
def long_run(tmp_path: Path) -> RunDirectory:
    """5,000 steps with a spike, a rollback and a checkpoint now and then."""
    return FakeRun(total=8000).begin().advance(1206).spike().advance(5000).write(tmp_path)


@pytest.fixture
def reader(long_run: RunDirectory) -> Iterator[RunReader]:
    found = RunReader(long_run, exact=EXACT, present=False)
    found.look()
    yield found
    found.close()


def closer(reader: RunReader, *ranges: tuple[float, float]) -> Series:
    """As the reader's thread would, in this one."""
    reader.request_rows(ranges)
    reader._zooming.run_waiting()
    return reader.latest().series


def read_all(run: RunDirectory, signals: tuple[str, ...] = (), axis: str = "step") -> Series:
    track, view = DecimatedSeries(signals, (axis,)), run.metrics()
    track.add(view.columns, np.asarray(view.array))
    return track.series()


def drawn(series: Series, signal: str, scale: XScale, along: str = "step") -> list[list[float]]:
    found: Columns = merged_dot_columns(series.curves(signal, along), scale)
    return [found.low.tolist(), found.high.tolist(), found.bad.tolist()]


def test_a_range_that_is_looked_at_is_drawn_and_read_as_its_rows_are(
    reader: RunReader, long_run: RunDirectory
) -> None:
    expected, series = read_all(long_run), reader.latest().series
    assert 0 < series.thin and len(series) <= 4 * EXACT
    scale = XScale(1100.5, 1.0, 200)
    assert drawn(series, "loss", scale) != drawn(expected, "loss", scale), (
        "or there is nothing to look closer at"
    )
    assert series.at("loss", 1190) is None and not series.exact(1190), (
        "a sum of several rows is no value"
    )
    series = closer(reader, (1050.0, 1350.0))
    for signal in SIGNALS:
        assert repr(drawn(series, signal, scale)) == repr(drawn(expected, signal, scale))
        band = series.sampled(f"{signal}_threshold", "step", scale)
        np.testing.assert_array_equal(band, expected.sampled(f"{signal}_threshold", "step", scale))
        for step in range(1050, 1351):
            assert series.exact(step) and repr(series.at(signal, step)) == repr(
                expected.at(signal, step)
            )
    for per_dot in (1.0, 3.0, 10.0, 25.0):  # across the borders of what was read again
        wide = XScale(900.5, per_dot, 200)
        seen, true = (np.array(drawn(one, "loss", wide)[1]) for one in (series, expected))
        assert np.nanmax(seen) == np.nanmax(true)
    assert extremes(series, "loss") == extremes(expected, "loss")


def test_along_another_axis_and_with_further_signals(
    reader: RunReader, long_run: RunDirectory
) -> None:
    reader.choose_signals(("loss", "lr"), "tokens")
    closer(reader, (1050.0, 1350.0))
    series, expected = reader.latest().series, read_all(long_run, ("lr",), "tokens")
    place = expected.place(1200, "tokens")
    assert series.place(1200, "tokens") == place and series.step_at(place + 1, "tokens") == 1200
    scale = XScale(place - 100_000.0, 2000.0, 100)
    for signal in ("loss", "lr"):
        assert repr(drawn(series, signal, scale, "tokens")) == repr(
            drawn(expected, signal, scale, "tokens")
        )


def test_what_is_at_hand_is_not_read_again_and_what_is_not_looked_at_goes(
    reader: RunReader, long_run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    rows = RunDirectory.rows

    def counted(self: RunDirectory, first: int, end: int) -> tuple[tuple[str, ...], np.ndarray]:
        opened.append(1)
        return rows(self, first, end)

    monkeypatch.setattr(RunDirectory, "rows", counted)
    first = closer(reader, (100.0, 300.0))
    assert len(opened) == 1
    assert closer(reader, (100.0, 300.0)) is first and len(opened) == 1
    second = closer(reader, (100.0, 300.0), (2000.0, 2100.0))
    assert len(opened) == 2 and len(second.details) == 2
    sizes = {held(reader._curves._track) + held(reader.latest().series)}
    for at in range(400, 4000, 50):
        series = closer(reader, (at, at + 200.0))
        sizes.add(held(reader._curves._track) + held(series))
        assert len(series.details) == 1
    assert max(sizes) < 1e6, "however much has been looked at"


def test_a_return_far_back_keeps_the_rows_before_it(
    reader: RunReader, long_run: RunDirectory
) -> None:
    """The journal says it before there is a row: into the middle of a point that stands for
    several.
    """
    closer(reader, (900.0, 1300.0))
    long_run.append(
        "rollback", "rolled back to 1003", to_step=1003, new_timeline=2, timeline=1, step=5000
    )
    reader.look()
    series, expected = reader.latest().series, read_all(long_run)
    assert series.last_step == 1003 and series.details == () and len(series.abandoned) == 2
    count = int(np.searchsorted(expected.step, 1003, side="right"))
    assert series.last("loss") == expected.values["loss"][count - 1]
    seen = np.concatenate([part.points.high for part in series.curves("loss")])
    assert np.nanmax(seen) == np.nanmax(expected.values["loss"][:count])
    assert closer(reader, (900.0, 1300.0)).at("loss", 950) == expected.at("loss", 950), (
        "and it is read again"
    )


def test_a_file_that_cannot_be_read_is_a_problem_and_tried_again(
    reader: RunReader, long_run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(self: RunDirectory, first: int, end: int) -> tuple[tuple[str, ...], np.ndarray]:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as broken:
        broken.setattr(RunDirectory, "rows", stale)
        closer(reader, (100.0, 300.0))
        assert "Stale" in reader.latest().problem and reader.latest().looking_up is None
    assert closer(reader, (100.0, 300.0)).details == (), "not at every frame"
    reader._curves._tried = (reader._curves._tried[0], time.monotonic() - 6.0)
    assert closer(reader, (100.0, 300.0)).exact(200)


def test_a_slow_file_holds_no_command_and_no_row(
    long_run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While rows are looked up on a file system that hangs the screen hears of what is new, and
    commands go out.
    """
    reader, hangs = RunReader(long_run, exact=EXACT, present=False), threading.Event()
    reader.look()
    monkeypatch.setattr(reader._curves, "_detail", lambda *_: hangs.wait(20) and None)
    reader.start(lambda: None)
    try:
        reader.request_rows([(100.0, 300.0)])
        wait_for(lambda: reader.latest().looking_up is not None)
        reader.write_note("still here")
        wait_for(lambda: any("still here" in line.text for line in reader.latest().story.lines))
        assert reader.latest().looking_up is not None
        hangs.set()
        wait_for(lambda: reader.latest().looking_up is None)
    finally:
        hangs.set()
        reader.close()


def test_what_is_free_goes_back_when_old_rows_were_summed_up(
    long_run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    monkeypatch.setattr(run_reader, "give_back", lambda: given.append(1))
    reader, more = RunReader(long_run, exact=EXACT, present=False), FakeRun(seed=1)
    reader.look()
    reader.look()
    assert len(given) == 1, "once, however many rows there were to begin with"
    more.step = 5000
    for _ in range(6):
        more.advance(more.step + 20, checkpoints=0, ring=0)
        rows = more.chunks[-1]
        rows[:, METRIC_COLUMNS.index("timeline")] = 1
        with long_run.metrics_path.open("ab") as file:
            rows.astype("<f8").tofile(file)
        reader.look()
    assert reader.latest().series.last_step == 5120 and 2 <= len(given) <= 4
    run_reader.give_back()


# -- on the screen


def thinned() -> View:
    fake = FakeRun(total=8000).begin().advance(1206).spike().advance(5000)
    track = DecimatedSeries(exact=EXACT)
    track.add(METRIC_COLUMNS, fake.rows)
    return View(replace(snapshot_of(fake), series=track.series()), now=fake.time)


def text_of(view: View) -> str:
    return "\n".join("".join(text for text, _ in row) for row in draw_chart(view, "loss", 120, 16))


def test_a_value_that_is_not_at_hand_is_not_said_and_a_long_wait_is() -> None:
    view = replace(thinned(), at=1190.0)
    assert "…" in text_of(view).splitlines()[0] and READING_FILE not in text_of(view)
    waiting = replace(view, snapshot=replace(view.snapshot, looking_up=view.now - 0.4))
    assert READING_FILE not in text_of(waiting), "what comes at once does not flicker"
    waiting = replace(view, snapshot=replace(view.snapshot, looking_up=view.now - 0.6))
    assert READING_FILE in text_of(waiting).splitlines()[0]
    assert "…" not in text_of(replace(view, at=5000.0)).splitlines()[0]


def test_rows_are_wanted_where_points_are_fewer_than_dots() -> None:
    view, cells = thinned(), 112

    def wanted(**looks: object) -> list[tuple[float, float]]:
        looked = replace(view, **looks)  # type: ignore[arg-type]
        return axis.ranges_to_read(looked, axis.make_x_scale(looked, cells))

    assert wanted(span=30.0) == [], "the newest rows are all there"
    ((low, high),) = wanted(span=400.0, end=2000.0)
    assert low <= 1600 and high >= 2000
    assert wanted(span=30.0, at=1190.0) == [(1190 - 1024, 1190 + 1024)], (
        "the value cursor wants its row"
    )
    assert wanted(at=4999.0)[1:] == []


async def test_the_screen_asks_for_what_it_shows_and_shows_what_comes(
    long_run: RunDirectory,
) -> None:
    """A spike of three steps among five thousand, seen from afar, looked at step by step."""
    reader = RunReader(long_run, exact=EXACT, present=False)
    expected = read_all(long_run)
    app = GuardrailApp(reader, clock=lambda: 0.0)
    async with app.run_test(size=(120, 32)) as pilot:
        wait_for(lambda: reader.latest().loaded)
        app._draw()
        dashboard = app.screen
        dashboard.go_to(1206.0)  # type: ignore[attr-defined]
        for _ in range(8):
            await pilot.press("plus")
        for _ in range(400):
            app._draw()
            await pilot.pause(0.01)
            if dashboard.view.snapshot.series.exact(1206):  # type: ignore[attr-defined]
                break
        shown = axis.make_x_scale(dashboard.view, 50)  # type: ignore[attr-defined]
        series = dashboard.view.snapshot.series  # type: ignore[attr-defined]
        assert repr(drawn(series, "loss", shown)) == repr(drawn(expected, "loss", shown))
        assert series.at("loss", 1206) == expected.at("loss", 1206)


async def test_a_reader_is_asked_for_nothing_by_a_short_run() -> None:
    reader = FakeReader(snapshot_of(FakeRun().begin().advance(300)))
    app = GuardrailApp(reader, clock=lambda: 0.0)
    async with app.run_test(size=(120, 32)) as pilot:
        await pilot.press("plus", "left")
        assert reader.closer == ()
