"""Colours: every tone in every theme, readable; the mouse: it looks, and never sends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.color import ColorTriplet
from textual.events import MouseScrollDown, MouseScrollUp
from textual.pilot import Pilot
from textual.theme import Theme

from guardrail.cli import theme_names as themes
from guardrail.cli.main import main
from guardrail.tui.app.app import GuardrailApp
from guardrail.tui.chart.axis import GUTTER
from guardrail.tui.chart.chart import Chart
from guardrail.tui.draw import palette
from guardrail.tui.draw.lines import Lines
from guardrail.tui.model.view import CHARTS
from guardrail.tui.screens.dashboard import Dashboard
from guardrail.tui.screens.pager import Pager
from guardrail.tui.screens.pane_keys import PaneLines
from tests.support.fake_run import FakeReader, FakeRun, example, snapshot_of

MEANING = (
    "plain",
    "strong",
    "dim",
    "good",
    "warn",
    "bad",
    "calm",
    "accent",
    "key",
    "threshold",
    *CHARTS,
)


def luminance(colour: ColorTriplet) -> float:
    """Relative luminance of WCAG 2.2."""
    parts = [
        x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4
        for x in (v / 255 for v in colour)
    ]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize("theme", palette.OURS, ids=lambda theme: theme.name)
def test_what_means_something_stands_out_from_the_ground(theme: Theme) -> None:
    """At least 3 : 1, which WCAG 2.2 asks of signs; running text has 4.5 : 1."""
    ground = luminance(ColorTriplet(*bytes.fromhex((theme.background or "")[1:])))
    for tone in MEANING:
        colour = palette.theme_styles(theme.name)[tone].color
        assert colour is not None and colour.triplet is not None
        light, dark = sorted((luminance(colour.triplet), ground), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= (
            4.5 if tone in ("plain", "strong", "dim") else 3.0
        ), tone


def test_themes_have_the_same_tones_and_the_names_of_the_command_line() -> None:
    tones = {frozenset(palette.theme_styles(name)) for name in palette.THEMES.values()}
    assert len(tones) == 1 and tuple(palette.THEMES) == themes.THEMES


async def at(
    script: Any, *, theme: str | None = None, size: tuple[int, int] = (120, 32)
) -> FakeReader:
    fake: FakeRun = example()
    reader = FakeReader(snapshot_of(fake))
    app = GuardrailApp(reader, clock=lambda: fake.time + 0.4, theme=theme)
    async with app.run_test(size=size) as pilot:
        await pilot.pause()
        await script(pilot)
    return reader


def ground(pilot: Pilot[None]) -> str:
    """Colour of the first letter of the health."""
    strip = pilot.app.screen.query_one("#header", Lines).render_line(0)
    return next(
        str(segment.style.color) for segment in strip if segment.style and "HEALTHY" in segment.text
    )


async def test_a_theme_is_chosen_and_changed_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    seen: list[str] = []

    async def look(pilot: Pilot[None]) -> None:
        for _ in palette.THEMES:
            seen.append(ground(pilot))
            await pilot.press("t")
            await pilot.pause()
        assert ground(pilot) == seen[0], "round and round"

    await at(look, theme="light")
    assert len(set(seen)) == len(palette.THEMES) and "0a7d54" in seen[0]


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "xterm")])
async def test_few_colours_are_the_terminals_own(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLORTERM", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv(name, value)

    async def look(pilot: Pilot[None]) -> None:
        assert pilot.app.theme == palette.TERMINAL
        await pilot.press("t")
        assert pilot.app.theme == palette.TERMINAL

    await at(look, theme="light")


async def test_a_click_on_an_incident_jumps_there_and_the_wheel_zooms() -> None:
    async def use(pilot: Pilot[None]) -> None:
        dashboard = pilot.app.screen
        assert isinstance(dashboard, Dashboard)
        pane = dashboard.query_one("#pane-incidents", PaneLines)
        row = next(
            y for y, line in enumerate(pane.rows) if "#1" in "".join(text for text, _ in line)
        )
        await pilot.click(pane, offset=(6, row))
        await pilot.pause()
        assert dashboard.view.focus == "incidents" and dashboard.view.at == 403
        assert dashboard.view.state("incidents").cursor == 1

        chart = next(chart for chart in dashboard.query(Chart) if chart.signal == "loss")
        await pilot.click(chart, offset=(20, 4))
        await pilot.pause()
        assert dashboard.view.focus == "curves" and dashboard.view.at is not None
        cell = dashboard.x_scale().cell(dashboard.view.at)
        assert cell == 20 - GUTTER, "the value cursor stands under the mouse"
        await pilot._post_mouse_events([MouseScrollUp], chart, offset=(20, 4), button=0)
        await pilot.pause()
        assert dashboard.view.span is not None and dashboard.view.span < 1284
        scale = dashboard.x_scale()
        assert scale.first <= dashboard.view.at <= scale.last, "it zooms about the mouse"
        for _ in range(9):
            await pilot._post_mouse_events([MouseScrollDown], chart, offset=(20, 4), button=0)
        await pilot.pause()
        assert dashboard.view.span is None, "and back to the full run"
        await pilot._post_mouse_events([MouseScrollDown], pane, offset=(6, 2), button=0)
        await pilot.pause()
        assert dashboard.view.focus == "incidents"

        await pilot.press("question_mark")
        await pilot.pause()
        help_page = pilot.app.screen
        assert isinstance(help_page, Pager)
        await pilot._post_mouse_events(
            [MouseScrollDown], help_page.query_one(".body"), offset=(6, 2), button=0
        )
        await pilot.pause()
        assert help_page._top == 3

    assert not (await at(use)).sent


def test_the_command_line_hands_theme_and_mouse_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = example(1210).write(tmp_path)
    given: list[dict[str, object]] = []
    monkeypatch.setattr(
        "guardrail.tui.app.app.run_screen", lambda path, **look: given.append(look) or 0
    )
    monkeypatch.setenv("GUARDRAIL_THEME", "colour-blind")
    assert main(["attach", str(run.path), "--in-browser", "--no-mouse"]) == 0
    assert main(["attach", str(run.path), "--in-browser", "--theme", "light"]) == 0
    assert [(look["theme"], look["mouse"]) for look in given] == [
        ("colour-blind", False),
        ("light", True),
    ]
    assert main(["attach", str(run.path), "--theme", "pink"]) == 2
