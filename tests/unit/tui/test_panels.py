"""Rows and panels: states with glyph and word, fixed columns, rows cut to the cell, hostile text
made harmless.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from textual.strip import Strip

from guardrail.core.format import (
    format_count,
    format_elapsed,
    format_plural,
    format_seconds_in_words,
    format_short_count,
    format_size,
    format_time_of_day,
)
from guardrail.core.records.status import Phase, SnapshotInfo, Status
from guardrail.core.records.verdicts import Mode
from guardrail.tui.app.app import GuardrailApp
from guardrail.tui.chart.axis import GUTTER, make_x_scale, marks_in_view, next_marked_step
from guardrail.tui.chart.chart import (
    NO_STEPS,
    NOT_RECORDED,
    READING,
    PlotCache,
    Sparklines,
    draw_chart,
    draw_sparkline,
)
from guardrail.tui.draw import palette
from guardrail.tui.draw.lines import (
    Lines,
    Row,
    changed_cells,
    fit_row,
    make_row,
    row_width,
    spread_row,
    title_row,
    wrap_text,
)
from guardrail.tui.draw.palette import BAND
from guardrail.tui.model.health import assess_health
from guardrail.tui.model.incident_list import format_skipped
from guardrail.tui.model.pane_state import PaneState
from guardrail.tui.model.view import CHARTS, Snapshot, View
from guardrail.tui.numerics import raster
from guardrail.tui.numerics.series import AXES, Series
from guardrail.tui.panes import incidents, log, snapshots
from guardrail.tui.panes.table import PANES
from guardrail.tui.screens import header_footer as panels
from guardrail.tui.screens.dashboard import Dashboard
from tests.support.fake_run import FakeReader, FakeRun, example, snapshot_of

HOSTILE = {
    "cursor": "a\x1b[2Jb\x1b[10;10Hc",
    "clipboard": "a\x1b]52;c;ZXZpbA==\x07b\x1b]52;c;ZXZpbA==\x1b\\c",
    "c1": "a\x9b31mb\x9d52;c;eA==\x9cc\x90q\x9c",
    "unterminated": "a\x1b]0;title",
    "controls": "a\x00\x07\x08\r\n\tb\x7f",
    "bidi": "a\u202egnp.exe\u2066b\u2069\u200f",
    "markup": "[red]a[/red] [/] [link=x]b \\[",
    "surrogate": "a\ud800b",
    "wide": "語の本文" * 10,
    "hebrew": "שלום עולם " * 5,
    "combining": "e\u0301" * 40,
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈" * 5,
    "long": "x" * 100_000,
}
_RAW = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200e\u200f\ud800-\udfff]")
BUILDERS: dict[str, Callable[[View, int, int], Sequence[Row]]] = {
    builder.__name__: builder
    for builder in (
        panels.header_rows,
        panels.status_rows,
        panels.message_rows,
        panels.footer_rows,
        incidents.newest_incident_rows,
        Sparklines()._sparks,
    )
} | {
    pane.name: lambda view, width, height, pane=pane: pane.build(
        view, width, height, view.state(pane.name)
    )  # type: ignore[misc]
    for pane in PANES
}


def text(rows: Sequence[Row]) -> str:
    return "\n".join("".join(piece for piece, _ in line) for line in rows)


def status(**changes: object) -> Status:
    return msgspec.structs.replace(example().status, **changes)


def view(**changes: object) -> View:
    fake = example()
    return View(replace(snapshot_of(fake), status=status(**changes)), fake.time + 0.4)


# -- health


@pytest.mark.parametrize(
    ("changes", "options", "shown"),
    [
        ({}, {}, "● HEALTHY"),
        ({"phase": Phase.EVAL}, {}, "● HEALTHY"),
        ({"phase": Phase.SAVE}, {}, "● HEALTHY"),
        ({"disk": "failing: no space left"}, {}, "▲ DISK FAILING"),
        ({"disk": "failing: no space left"}, {"recovering": True}, "▲ RECOVERING"),
        ({}, {"recovering": True}, "▲ RECOVERING"),
        ({"phase": Phase.ROLLBACK}, {}, "▲ ROLLING BACK"),
        ({"phase": Phase.PAUSED}, {}, "‖ PAUSED"),
        ({"phase": Phase.PAUSED, "question": "?"}, {"recovering": True}, "◆ NEEDS ANSWER"),
        ({"phase": Phase.STARTING}, {}, "○ STARTING"),
        ({"phase": Phase.SETUP}, {}, "○ STARTING"),
        ({"phase": Phase.HALTED}, {"silence": 99.0}, "✗ HALTED"),
        ({"phase": Phase.FAILED}, {"silence": 99.0}, "✗ FAILED"),
        ({"phase": Phase.STOPPED}, {"silence": 99.0}, "■ STOPPED"),
        ({"phase": Phase.FINISHED}, {"silence": 99.0}, "✓ FINISHED"),
        ({}, {"silence": 9.9}, "● HEALTHY"),
        ({"phase": Phase.PAUSED, "question": "?"}, {"silence": 10.1}, "? NOT RESPONDING for 10 s"),
    ],
)
def test_every_state_has_a_glyph_and_a_word(
    changes: dict[str, object], options: dict[str, object], shown: str
) -> None:
    given_options: dict[str, object] = {"recovering": False, "silence": 0.0} | options
    assert str(assess_health(status(**changes), **given_options)).startswith(shown)  # type: ignore[arg-type]


def test_every_phase_has_a_health_and_words() -> None:
    for phase in Phase:
        assert (
            assess_health(status(phase=phase), recovering=False, silence=0).word
            and panels.PHASES[phase]
        )
    assert assess_health(None, recovering=False, silence=0).word


# -- header and facts


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 200])
@pytest.mark.parametrize("mode", Mode)
def test_header_shows_health_and_step_at_every_width(width: int, mode: Mode) -> None:
    shown = text(panels.header_rows(view(mode=mode), width, 1))
    assert cell_len(shown) <= width and shown.startswith(" ● HEALTHY")
    assert ("step 1,284 / 6,000" in shown) == (width >= 40)
    assert ("ETA" in shown) == (width >= 80)
    assert ("quickstart/2026" in shown) == (width >= 120)


def test_numbers_of_the_header_stand_in_fixed_columns() -> None:
    """From step 9 to step 5,999, from 9 tokens a second to millions, healthy or paused: nothing
    moves.
    """
    shown = [
        text(
            panels.header_rows(
                view(step=step, tokens_per_second=speed, eta_seconds=eta, phase=phase), 120, 1
            )
        )
        for step, speed, eta, phase in (
            (9, 9.0, 59.0, Phase.STEP),
            (5999, 1.2e6, 36000.0, Phase.PAUSED),
        )
    ]
    for word in ("auto", "/ 6,000", "%", "tok/s", "ETA"):
        assert shown[0].index(word) == shown[1].index(word), word


def test_a_run_without_a_length_has_no_share() -> None:
    shown = text(panels.header_rows(view(total_steps=0), 120, 1))
    assert "step 1,284 " in shown and "%" not in shown


def test_facts_put_problems_first() -> None:
    disk = f"failing: {os.strerror(errno.ENOSPC)}"
    shown = text(panels.status_rows(view(disk=disk, restarts=2, lr_factor=0.5), 120, 1))
    assert shown.startswith(f" ▲ disk {disk}") and "2 restarts" in shown
    assert "rate ×0.5" in shown and "disk ok" not in shown
    setting_up = text(
        panels.status_rows(view(phase=Phase.SETUP, progress="tokenizing 43 %"), 120, 1)
    )
    assert setting_up.startswith(" setting up: tokenizing 43 %")
    ended = text(panels.status_rows(view(phase=Phase.HALTED, exit_code=3), 120, 1))
    assert panels.PHASES[Phase.HALTED] in ended and "exit code 3" in ended


def test_facts_before_the_first_sign_of_life() -> None:
    nothing = View(Snapshot("a/b"), 0.0)
    assert "waiting" in text(panels.status_rows(nothing, 80, 1))
    broken = View(Snapshot("a/b", problem="cannot read the run: Stale file handle"), 0.0)
    assert "Stale file handle" in text(panels.status_rows(broken, 80, 1))


# -- side panels


def test_incidents_newest_first_and_cut_to_the_height() -> None:
    rows = incidents.PANE.build(view(), 60, 12, PaneState())
    shown = text(rows)
    assert shown.index("#2") < shown.index("#1") and len(rows) <= 12
    (spike, _) = view().snapshot.story.incidents
    assert spike.action.endswith(" 1,200") and spike.action in shown
    skipped = format_skipped(spike)
    assert re.findall(r"\d+ \w+", skipped) == ["48 samples", "3 documents"] and skipped in shown
    assert "#1" not in text(incidents.PANE.build(view(), 60, 7, PaneState()))
    assert "none" in text(
        incidents.PANE.build(View(snapshot_of(FakeRun().begin()), 0.0), 60, 5, PaneState())
    )


def test_many_documents_are_counted() -> None:
    story = view().snapshot.story
    many = replace(story.incidents[0], documents=tuple(f"a-rather-long-name-{n:03}.txt" for n in range(16)),
                   documents_total=900)  # fmt: skip
    snapshot = replace(view().snapshot, story=replace(story, incidents=(many,)))
    shown = incidents.PANE.build(View(snapshot, 0.0), 50, 20, PaneState())
    assert len(shown) <= 9 and text(shown).rstrip().endswith("…")


def test_checkpoints_never_squeeze_the_disk_out() -> None:
    infos = tuple(
        SnapshotInfo(step=step, cursor=0, timeline=0, tier=tier, state=state, bytes=10**9)
        for step, tier, state in [(10 * n, "memory", "candidate") for n in range(10, 20)]
        + [(50, "disk", "good")]
    )
    shown = text(snapshots.PANE.build(view(snapshots=infos), 60, 5, PaneState()))
    assert "■        50  disk 1 GB" in shown and "○       190  memory" in shown
    assert len(shown.splitlines()) == 5


def test_glyphs_of_states() -> None:
    info = SnapshotInfo(step=1, cursor=0, timeline=0, tier="memory", state="good")
    shown = {
        (tier, state): snapshots.state_symbol(
            msgspec.structs.replace(info, tier=tier, state=state)
        )[0]
        for tier in ("memory", "disk")
        for state in ("good", "candidate", "suspect")
    }
    assert [shown["memory", s] for s in ("good", "candidate", "suspect")] == ["●", "○", "▲"]
    assert [shown["disk", s] for s in ("good", "candidate", "suspect")] == ["■", "□", "▲"]


def test_the_journal_ends_with_the_newest_line() -> None:
    rows = log.PANE.build(view(), 50, 8, PaneState())
    assert len(rows) == 8 and "recovered" in text(rows[-1:])


# -- charts


@pytest.mark.parametrize("width", [0, 1, 9, 15, 16, 40, 120])
@pytest.mark.parametrize("height", [1, 2, 3, 5, 8, 20])
def test_a_chart_fits_its_place(width: int, height: int) -> None:
    for signal in CHARTS:
        rows = draw_chart(view(), signal, width, height)
        assert len(rows) <= height and all(row_width(line) <= max(width, 0) for line in rows)
        assert row_width(draw_sparkline(view(), signal, width)) <= width


def test_marks_stand_on_the_curve_at_their_step() -> None:
    rows = draw_chart(view(), "loss", 120, 24)
    lines = text(rows).splitlines()
    for mark, step in (("S1", 403), ("R2", 1200), ("C", 800)):
        row, line = next((row, line) for row, line in enumerate(lines[1:-2], 1) if mark in line)
        cell = line.index(mark)
        assert abs(cell - (GUTTER + step // 6 // 2)) <= 1, "six steps a dot, two dots a cell"
        below = [lines[row + at][cell] for at in (1, 2)]
        assert any(0x2800 < ord(char) < 0x2900 for char in below), (
            f"{mark} stands just above the curve: {below}"
        )
    assert text(rows).count("C") == 2, "the checkpoint of step 1,200 gives way to the rollback"
    assert "1,000" in lines[-1]
    small = text(draw_chart(view(), "grad_norm", 120, 24))
    assert "R2" in small and "C" not in small, (
        "what went wrong is on all curves, the rest on the enlarged one"
    )


def test_of_many_marks_the_most_severe_are_seen() -> None:
    fake = FakeRun().begin().advance(600, checkpoints=0)
    for step in range(1, 600):
        fake.step = step
        fake.event("command", "lr applied", id=str(step), command="lr", value=0.5, effect="applied")
    fake.step = 300
    fake.not_a_number()
    seen = View(snapshot_of(fake), fake.time)
    marks = marks_in_view(seen, make_x_scale(seen, 60), all_kinds=True)
    assert len(marks) <= 60 and marks[0].letter == "S"
    shown = text(draw_chart(seen, "loss", 68, 16))
    assert "S1" in shown and "!×0.5" in shown
    assert next_marked_step(seen, 300, 1) == 301 and next_marked_step(seen, 1, -1) is None


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("span", [None, 20.0, 1e6])
def test_marks_and_the_value_cursor_keep_to_their_step_on_every_axis(
    axis: str, span: float | None
) -> None:
    series = view().snapshot.series
    seen = replace(view(), axis=axis, span=span, at=1207.0)
    scale = make_x_scale(seen, 100)
    for mark in marks_in_view(seen, scale, all_kinds=True):
        assert scale.first <= mark.x < scale.last
        assert round(series.step_at(mark.x, axis)) in {403, 800, 1000, 1200}
    assert scale.first <= series.along(axis)[-1] < scale.last, "the newest step is in sight"
    assert "step 1,207" in text(draw_chart(seen, "loss", 100, 16))


def test_axes_count_only_what_was_learnt_and_from_the_first_row() -> None:
    series = view().snapshot.series
    tokens, seconds = series.along("tokens"), series.along("time")
    assert tokens[-1] == view().snapshot.status.tokens, (
        "rejected and rolled back rows taught nothing"
    )
    assert (
        (np.diff(tokens) >= 0).all()
        and (np.diff(seconds) >= 0).all()
        and len(series.abandoned[-1].along("tokens"))
    )
    shown = text(draw_chart(replace(view(), axis="time"), "loss", 100, 16)[-2:])
    assert (
        shown.splitlines()[0].endswith("─ time") and shown.splitlines()[1].split()[0] == "0:00:00"
    )


def test_smoothing_is_a_line_on_a_pale_curve() -> None:
    rows = draw_chart(replace(view(), smooth=1), "grad_norm", 100, 16)
    tones = {tone.removesuffix(BAND) for line in rows for _, tone in line}
    assert {"raw", "grad_norm"} <= tones and "smoothed" in text(rows[:1])
    assert "raw" not in {
        tone.removesuffix(BAND) for line in draw_chart(view(), "loss", 100, 16) for _, tone in line
    }


def test_a_signal_of_any_name_has_a_chart() -> None:
    evil = "grad_norm/\x1b[31mblock [/red]" + "w" * 99
    seen = replace(view(), charts=("loss", evil), big=evil)
    for height in (1, 4, 16):
        assert all(row_width(line) <= 60 for line in draw_chart(seen, evil, 60, height))
    assert NOT_RECORDED in text(draw_chart(seen, evil, 60, 16))
    assert row_width(draw_sparkline(seen, evil, 80)) <= 80


def test_the_title_says_the_value() -> None:
    assert "2.41" in text(draw_chart(view(), "loss", 60, 8)[:1])
    fake = FakeRun().begin().advance(300).not_a_number()
    assert "× NaN" in text(draw_chart(View(snapshot_of(fake), 0.0), "loss", 60, 8)[:1])
    for loaded, said in ((True, NO_STEPS), (False, READING)):
        empty = View(Snapshot("a", loaded=loaded), 0.0)
        assert said in text(draw_chart(empty, "loss", 60, 8))


def test_the_axis_reaches_to_the_end_of_a_run_that_is_nearly_there() -> None:
    near = view(total_steps=1400)
    assert "R2" in text(draw_chart(near, "loss", 120, 16)) and Series().end("step") == 0


def test_a_range_that_follows_stands_still_most_of_the_time() -> None:
    firsts = set()
    for step in range(1000, 1100):
        seen = replace(
            view(),
            span=200.0,
            snapshot=replace(view().snapshot, series=Series(step=np.arange(1.0, step))),
        )
        scale = make_x_scale(seen, 100)
        firsts.add(scale.first)
        assert scale.first <= step - 1 <= scale.last, "the newest step is in sight"
    assert len(firsts) <= 7, "it moves by a tenth of itself, not by a step"


def test_the_value_cursor_reads_what_was_at_its_step() -> None:
    series = Series(
        step=np.array([1.0, 2.0, 2.0, 3.0]), values={"loss": np.array([5.0, 9.0, 4.0, 3.0])}
    )
    values = [series.at("loss", step) for step in (0.5, 1, 2, 2.5, 99)]
    assert values == [None, 5.0, 4.0, 4.0, 3.0] and series.at("lr", 2) is None
    shown = text(draw_chart(replace(view(), at=1000.0), "loss", 80, 12))
    assert "step 1,000" in shown.splitlines()[0]


# -- rows


@given(st.text(max_size=60), st.integers(0, 30))
def test_fit_and_wrap_keep_to_the_width(words: str, width: int) -> None:
    assert row_width(fit_row(make_row((words, "plain"), (words, "dim")), width)) <= width
    assert all(
        cell_len(line) <= max(width, 1) or len(line) == 1 for line in wrap_text(words, width)
    )


def test_wrap_keeps_every_word() -> None:
    words = "restored step 1,200 from memory (6 steps discarded), skipped 48 samples"
    assert " ".join(wrap_text(words, 20)) == words
    assert wrap_text("", 10) == [""] and "".join(wrap_text("x" * 35, 10)) == "x" * 35


def test_title_and_spread() -> None:
    assert text([title_row("loss", 20, right=make_row("2.2"))]) == "─ loss ─────── 2.2 ─"
    assert text([spread_row(make_row("a"), make_row("b"), 6)]) == "a    b"
    assert text([spread_row(make_row("aaaa"), make_row("bbb"), 6)]) == "aaaa"


# -- numbers


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (format_count(1284), "1,284"),
        (format_count(float("nan")), "?"),
        (format_short_count(8123), "8.12k"),
        (format_short_count(131e6), "131M"),
        (format_short_count(0), "0"),
        (format_short_count(float("nan")), "–"),
        (format_short_count(999.9), "1k"),
        (format_elapsed(3492), "0:58:12"),
        (format_elapsed(90_061), "1d 1:01:01"),
        (format_elapsed(float("inf")), "–:--:--"),
        (format_seconds_in_words(4.2), "4 s"),
        (format_seconds_in_words(130), "2 min 10 s"),
        (format_seconds_in_words(3900), "1 h 5 min"),
        (format_seconds_in_words(7200), "2 h"),
        (format_seconds_in_words(float("nan")), "an unknown time"),
        (format_size(0), ""),
        (format_size(41e6), "41 MB"),
        (format_size(2e13), "20 TB"),
        (format_time_of_day(float("nan")), "--:--:--"),
        (format_time_of_day(1e30), "--:--:--"),
        (format_plural(1, "batch"), "1 batch"),
        (format_plural(2, "batch"), "2 batches"),
        (format_plural(1000, "step"), "1,000 steps"),
    ],
)
def test_numbers(shown: str, expected: str) -> None:
    assert shown == expected


# -- hostile text


def hostile_run(evil: str) -> Snapshot:
    """The same text wherever text comes from outside."""
    fake = example()
    fake.event("note", evil)
    fake.event(evil, "", detail=evil)
    fake.event("incident", evil, number=3, state="open", onset=1284)
    fake.event("skipped", "", span={"first": 0, "last": 16, "cause": "rejected", "step": 1284}, samples=16, incident=3,
               documents=[{"path": f"/data/{evil}"}, {"path": evil}], documents_total=2)  # fmt: skip
    snapshot = snapshot_of(fake)
    info = SnapshotInfo(step=1, cursor=0, timeline=0, tier=evil, state=evil, path=evil)
    changed = msgspec.structs.replace(fake.status, run=evil, progress=evil, disk=f"failing: {evil}",
                                      question=evil, host=evil, snapshots=(info,))  # fmt: skip
    return replace(snapshot, name=evil, status=changed, problem=evil, unsent={"x": evil})


@pytest.mark.parametrize("size", [(110, 30), (60, 15)], ids=str)
@pytest.mark.parametrize("kind", HOSTILE)
async def test_hostile_text_never_reaches_the_terminal_raw(
    kind: str, size: tuple[int, int]
) -> None:
    reader = FakeReader(hostile_run(HOSTILE[kind]))
    app = GuardrailApp(reader, clock=lambda: reader.snapshot.heard)
    async with app.run_test(size=size) as pilot:
        await pilot.pause()
        for keys in ((), ("escape",), ("j",), ("escape", "r", "enter")):
            await pilot.press(*keys)
            await pilot.pause()
            for strip in shown(app):
                assert not _RAW.search(strip.text), repr(strip.text)
                assert "52;c" not in strip.text and cell_len(strip.text) == size[0]


def shown(app: GuardrailApp) -> list[Strip]:
    return list(app.screen._compositor.render_strips())


@settings(max_examples=15, deadline=None)
@given(evil=st.text(max_size=80))
def test_any_text_is_drawn(evil: str) -> None:
    seen = View(hostile_run(evil), 0.0, message=(evil, "plain"))
    for builder in BUILDERS.values():
        for width, height in ((60, 10), (30, 3)):
            assert all(row_width(line) <= width for line in builder(seen, width, height))


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize(("width", "height"), [(1, 1), (5, 2), (30, 6), (200, 60)])
def test_panels_fit_their_place(name: str, width: int, height: int) -> None:
    for seen in (
        view(),
        View(Snapshot("a/b"), 0.0),
        view(phase=Phase.FAILED, exit_code=4),
        view(question="?"),
    ):
        rows = BUILDERS[name](seen, width, height)
        assert width < 30 or all(row_width(line) <= width for line in rows)
        tones = {tone for line in rows for text, tone in line if text}
        assert all(tones <= palette.theme_styles(theme).keys() for theme in palette.THEMES.values())


# -- only what changed is drawn again


async def test_a_frame_draws_only_the_rows_that_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = example()
    reader = FakeReader(snapshot_of(fake))
    app = GuardrailApp(reader, clock=lambda: fake.time)
    drawn: list[tuple[str | None, int]] = []
    original = Lines.render_line
    monkeypatch.setattr(
        Lines, "render_line", lambda self, y: drawn.append((self.id, y)) or original(self, y)
    )
    async with app.run_test(size=(120, 32)) as pilot:
        await pilot.pause()
        assert len(drawn) >= 50, "each row is drawn with its text at once, so once only"
        drawn.clear()
        reader.put(replace(reader.snapshot, loaded=True))
        await pilot.pause(0.4)
        assert not drawn, "nothing changed, so nothing is drawn"
        fake.advance(fake.step + 1)
        reader.put(snapshot_of(fake))
        await pilot.pause(0.4)
        assert 0 < len(drawn) < 25, (
            "one more step: the header, three titles and a few rows of the curves"
        )
        assert ("header", 0) in drawn and ("footer", 0) not in drawn


async def test_frames_are_at_most_five_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = example()
    reader = FakeReader(snapshot_of(fake))
    app = GuardrailApp(reader, clock=lambda: fake.time)
    frames: list[int] = []
    original = Dashboard.show
    monkeypatch.setattr(
        Dashboard,
        "show",
        lambda self, view: frames.append(view.snapshot.status.step) or original(self, view),
    )
    async with app.run_test(size=(120, 32)) as pilot:
        await pilot.pause(0.3)
        frames.clear()
        for _ in range(40):
            fake.advance(fake.step + 1)
            reader.put(snapshot_of(fake))
            await pilot.pause(0.01)
        await pilot.pause(0.5)
        assert len(frames) < 30, "forty snapshots in half a second or more are not forty frames"
        assert frames[-1] == fake.step, "the last one is shown"


_rows = st.lists(
    st.tuples(st.text("ab c", max_size=6), st.sampled_from(["plain", "dim"])), max_size=5
)


@given(before=_rows, after=_rows)
def test_a_change_covers_every_cell_that_differs(
    before: list[tuple[str, str]], after: list[tuple[str, str]]
) -> None:
    cells = [[(c, tone) for piece, tone in line for c in piece] for line in (before, after)]
    found = changed_cells(tuple(before), tuple(after), 40)
    covered = {x for first, count in found for x in range(first, first + count)}
    for x in range(40):
        a, b = (line[x] if x < len(line) else (" ", "plain") for line in cells)
        assert a == b or x in covered
    assert len(covered) == sum(count for _, count in found), "no cell is sent twice"


def test_what_did_not_change_is_not_sent() -> None:
    before, after = (
        make_row(("a" * 10 + "x", "dim"), "b" * 10 + "1"),
        make_row(("a" * 10 + "y", "dim"), "b" * 10 + "2"),
    )
    assert changed_cells(before, after, 40) == [(10, 1), (21, 1)]
    assert changed_cells(make_row("abcdef"), make_row("xbcdeY"), 40) == [(0, 6)], (
        "moving the cursor over four cells costs as much"
    )
    assert changed_cells(before, before, 40) == []


def test_a_row_with_wide_characters_is_sent_completely() -> None:
    assert changed_cells(make_row("語"), make_row("文"), 40) == [(0, 40)]


def test_a_chart_that_remembers_shows_what_one_without_memory_does() -> None:
    """Steps that change little, a spike, a rollback, marks, another way to look, another size."""
    memory, fake = PlotCache(), FakeRun().begin().advance(3000)
    ways = [{}, {"at": 2990.0}, {"smooth": 2}, {"logarithmic": frozenset({"loss"})}, {"span": 64.0}]
    for number in range(24):
        if number == 12:
            fake.spike()
        else:
            fake.advance(fake.step + 1 + number % 3)
        seen = View(snapshot_of(fake), fake.time, **ways[number // 4 % len(ways)])  # type: ignore[arg-type]
        width = 90 if number < 20 else 70
        assert draw_chart(seen, "loss", width, 14, memory) == draw_chart(seen, "loss", width, 14)


def test_a_row_more_does_not_draw_a_plot_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[object] = []
    draw = raster.draw_plot
    monkeypatch.setattr(
        raster,
        "draw_plot",
        lambda *given, **options: drawn.append(given) or draw(*given, **options),
    )
    memory, fake = PlotCache(), FakeRun().begin().advance(20_000, checkpoints=0, ring=0)
    for _ in range(40):
        draw_chart(View(snapshot_of(fake), fake.time), "loss", 90, 14, memory)
        fake.advance(fake.step + 1, checkpoints=0, ring=0)
    assert len(drawn) < 15
