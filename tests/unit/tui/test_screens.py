"""Pictures of the screen in every state and size. `pytest --snapshot-update` takes them anew: look
at them.

All states of one size are shown by one screen, one after the other, as the same run would bring
them.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.cells import cell_len
from textual.pilot import Pilot

from guardrail.core.records.status import Phase, RankStatus, Status
from guardrail.core.records.verdicts import Mode
from guardrail.tui.app.app import GuardrailApp
from guardrail.tui.model.background_facts import Background
from guardrail.tui.model.config_lines import read_config_lines
from guardrail.tui.model.logtail import PrintedLine
from guardrail.tui.model.rank_health import Rank
from guardrail.tui.model.view import Snapshot, View
from guardrail.tui.panes import snapshots
from guardrail.tui.screens.dashboard import VIEWER_CHOICES, Dashboard
from guardrail.tui.screens.question_keys import OpenQuestion
from tests.support.fake_run import START, FakeReader, FakeRun, example, snapshot_of
from tests.support.places import ROOT

PICTURES = Path(__file__).parent / "__snapshots__" / "test_screens"
SIZES = {"120x32": (120, 32), "80x24": (80, 24), "60x15": (60, 15), "200x60": (200, 60)}
Scene = tuple[Snapshot, float]
QUESTION = (
    "loss 11.5 (normal 2.39), score 41.2 (limit 8). "
    "Roll back to step 1,200 and skip 3 batches (48 samples)?"
)


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same colours and the same time zone everywhere."""
    for name, value in {"TZ": "UTC", "TERM": "xterm-256color", "COLORTERM": "truecolor"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


# -- the states


def with_around(fake: FakeRun, *, world: int = 2, slow: int = -1, silent: float = 0.5) -> Scene:
    """The run, its ranks and what they print, `silent` seconds after its last word."""
    now = fake.time + silent
    ranks = tuple(
        Rank(
            RankStatus(rank=at, pid=4000 + at, host=f"node-{at // 8 + 1}", phase=fake.phase, step=fake.step,
                       step_seconds=0.31 if at == slow else 0.118 + 0.004 * (at * 7 % 5) / 5,
                       memory_bytes=3_100_000_000 + at % 7 * 10_000_000,
                       gpu_percent=88.0 + at % 9 if world > 8 else -1.0,
                       gpu_memory_bytes=61_000_000_000 if world > 8 else 0),
            fake.time, fake.time,
        )
        for at in range(world)
    )  # fmt: skip
    printed = tuple(PrintedLine(str(at % 2), f"step {at * 10}: loss 2.4") for at in range(1, 40))
    slowest = ((slow, 96), (3, 4)) if slow >= 0 else ((1, 54), (0, 46))
    text = (ROOT / "configs" / "quickstart.toml").read_text(encoding="utf-8")
    around = Background(ranks, slowest, printed, read_config_lines(text), 1, now)
    snapshot = replace(snapshot_of(fake), around=around)
    if snapshot.status is not None:
        snapshot = replace(snapshot, status=msgspec.structs.replace(snapshot.status, world=world))
    return snapshot, now


def empty() -> Scene:
    """Long before the first step: the set-up says how far it is."""
    status = Status(
        run="quickstart/2026-11-25-01",
        phase=Phase.SETUP,
        progress="tokenizing 43 %",
        total_steps=6000,
        heartbeat=START,
        world=2,
        host="node-1",
    )
    return Snapshot("quickstart/2026-11-25-01", status=status, heard=START), START + 0.5


def healthy() -> Scene:
    return with_around(FakeRun().begin().advance(1284))


def spike() -> Scene:
    """Under way: two batches are skipped, and the loss is still up."""
    return with_around(FakeRun().begin().advance(1206).spike(length=2, under_way=True))


def rolled_back() -> Scene:
    """The spike is over; its steps stay as an abandoned timeline."""
    return with_around(example())


def not_a_number() -> Scene:
    """NaN in this very step."""
    return with_around(FakeRun().begin().advance(800).not_a_number())


def asking(fake: FakeRun | None = None) -> Scene:
    fake = fake or FakeRun().begin().advance(1206).spike(length=2, under_way=True)
    fake.mode = Mode.ASK
    snapshot, now = with_around(fake.ask(QUESTION))
    assert snapshot.status is not None
    patient = msgspec.structs.replace(snapshot.status, deadline=now + 272, default="proposed")
    return replace(snapshot, status=patient), now


def degraded() -> Scene:
    fake = FakeRun().begin().advance(1284)
    fake.disk = "failing: checkpoint: No space left on device"
    fake.event("disk", "disk failing: checkpoint: No space left on device", state="failing")
    return with_around(fake)


def finished() -> Scene:
    return with_around(example(6000).end(Phase.FINISHED, 0), silent=7200)


def lost() -> Scene:
    return with_around(example(), silent=95)


def many_ranks() -> Scene:
    """1,024 ranks, one of which is slow."""
    return with_around(example(), world=1024, slow=500)


SCENES: dict[str, Callable[[], Scene]] = {
    scene.__name__: scene
    for scene in (
        empty,
        healthy,
        spike,
        rolled_back,
        not_a_number,
        asking,
        degraded,
        finished,
        lost,
        many_ranks,
    )
}
# What the viewer chose for a picture, besides the size.
LOOKS: dict[str, dict[str, Any]] = {"many_ranks": {"focus": "ranks"}}
WAYS: dict[str, dict[str, Any]] = {
    "smoothed": {"smooth": 2},
    "tokens": {"axis": "tokens"},
    "zoomed": {"span": 120.0, "at": 1207.0},
    "logarithmic": {"logarithmic": frozenset(("loss", "grad_norm", "embed_grad_norm"))},
    "one_chart": {"full": True, "charts": ("loss",)},
    "ranks": {"focus": "ranks"},
    "data": {"focus": "data"},
    "config": {"focus": "config"},
    "output": {"focus": "output"},
}


# -- taking pictures


class Studio:
    """One screen on which scenes are shown one after the other."""

    def __init__(self, pilot: Pilot[None], reader: FakeReader, clock: list[float]) -> None:
        self.pilot, self.reader, self.clock = pilot, reader, clock
        dashboard = pilot.app.screen_stack[0]
        assert isinstance(dashboard, Dashboard)
        self.dashboard = dashboard

    async def show(self, scene: Callable[[], Scene], **look: Any) -> None:
        """The scene as a user sees it first, but for what `look` chooses."""
        app = self.pilot.app
        while len(app.screen_stack) > 1:
            await app.pop_screen()
        snapshot, self.clock[0] = scene()
        self.reader.snapshot = snapshot
        self.dashboard.commands.show_notice("")
        view = View(snapshot, self.clock[0])
        self.dashboard._asked = OpenQuestion()
        self.dashboard.change_view(**{name: getattr(view, name) for name in VIEWER_CHOICES} | look)
        assert isinstance(app, GuardrailApp)
        app._draw()
        await self.pilot.pause()

    def picture(self) -> str:
        for blinking in self.pilot.app.screen.query("Input"):
            blinking.cursor_blink = False  # type: ignore[attr-defined]
        picture = re.sub(r"\bterminal-\d+-", "terminal-", self.pilot.app.export_screenshot())
        return _GROUND.sub(_joined, picture)


# Of which pieces a row of one colour is made depends on what was there before, and cannot be seen.
_RECT = r'<rect fill="([^"]*)" x="([^"]*)" y="([^"]*)" width="([^"]*)" height="[^"]*" shape-rendering="crispEdges"/>'
_GROUND = re.compile(f"(?:{_RECT})+")


def _joined(grounds: re.Match[str]) -> str:
    """Rectangles side by side of one colour as one."""
    kept: list[list[str]] = []
    for fill, x, y, width in re.findall(_RECT, grounds[0]):
        last = kept[-1] if kept else None
        if (
            last
            and last[0] == fill
            and last[2] == y
            and abs(float(last[1]) + float(last[3]) - float(x)) < 0.2
        ):
            last[3] = f"{float(last[3]) + float(width):.1f}"
        else:
            kept.append([fill, x, y, width])
    shape = '<rect fill="{}" x="{}" y="{}" width="{}" height="24.65" shape-rendering="crispEdges"/>'
    return "".join(shape.format(*one) for one in kept)


@asynccontextmanager
async def studio(size: tuple[int, int], **options: bool) -> AsyncIterator[Studio]:
    snapshot, now = healthy()
    reader, clock = FakeReader(snapshot), [now]
    reader.foresees = False
    app = GuardrailApp(reader, clock=lambda: clock[0], **options)
    async with app.run_test(size=size) as pilot:
        await pilot.pause()
        yield Studio(pilot, reader, clock)


@pytest.fixture
def same(request: pytest.FixtureRequest) -> Iterator[Callable[[str, str], None]]:
    """Compare a picture with the one that is kept; all that differ are named at once."""
    update = request.config.getoption("update_snapshots", default=False)
    differ: list[str] = []

    def compare(name: str, picture: str) -> None:
        kept = PICTURES / f"{name}.svg"
        if update:
            PICTURES.mkdir(parents=True, exist_ok=True)
            kept.write_text(picture, encoding="utf-8")
        elif not kept.is_file() or kept.read_text(encoding="utf-8") != picture:
            (request.config.cache.mkdir("pictures") / f"{name}.svg").write_text(
                picture, encoding="utf-8"
            )
            differ.append(name)

    yield compare
    advice = "see .pytest_cache/d/pictures, and take them anew with --snapshot-update where that is how it should look"
    assert not differ, f"these pictures are others than those kept: {', '.join(differ)}; {advice}"


@pytest.mark.parametrize("size", SIZES)
async def test_scenes(size: str, same: Callable[[str, str], None]) -> None:
    async with studio(SIZES[size]) as at:
        for name, scene in SCENES.items():
            await at.show(scene, **LOOKS.get(name, {}))
            same(f"{name}-{size}", at.picture())


async def test_ways_of_looking(same: Callable[[str, str], None]) -> None:
    async with studio(SIZES["120x32"]) as at:
        for name, look in WAYS.items():
            await at.show(rolled_back, **look)
            same(f"look-{name}", at.picture())


async def test_dialogs(same: Callable[[str, str], None]) -> None:
    async with studio((100, 30)) as at:
        for keys in ("r", "r enter", "s", "m", "S", "v", "question_mark", "j", "2 enter", "ctrl+p"):
            await at.show(rolled_back)
            for key in keys.split():
                await at.pilot.press(key)
                await at.pilot.pause()
            same(f"dialog-{keys.replace(' ', '-')}", at.picture())


@pytest.mark.parametrize("size", ["120x32", "80x24", "60x15"])
async def test_the_evidence_of_a_question(size: str, same: Callable[[str, str], None]) -> None:
    async with studio(SIZES[size]) as at:
        await at.show(
            lambda: asking(FakeRun().begin().advance(1206).spike(length=2, under_way=True).weigh())
        )
        await at.pilot.press("v")
        await at.pilot.pause()
        same(f"dialog-evidence-{size}", at.picture())


async def test_read_only(same: Callable[[str, str], None]) -> None:
    async with studio(SIZES["120x32"], read_only=True) as at:
        await at.show(rolled_back)
        await at.pilot.press("p")
        same("read_only", at.picture())


@pytest.mark.parametrize("size", ["120x32", "60x15"])
async def test_without_colour(
    size: str, monkeypatch: pytest.MonkeyPatch, same: Callable[[str, str], None]
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    async with studio(SIZES[size]) as at:
        await at.show(rolled_back)
        same(f"no_color-{size}", at.picture())


async def test_a_problem_with_the_directory(same: Callable[[str, str], None]) -> None:
    def scene() -> Scene:
        snapshot, now = healthy()
        return replace(snapshot, problem="cannot read the run: Stale file handle"), now

    async with studio(SIZES["120x32"]) as at:
        await at.show(scene)
        same("trouble", at.picture())


def test_every_picture_that_is_kept_is_taken() -> None:
    taken = {f"{name}-{size}" for name in SCENES for size in SIZES} | {
        f"look-{name}" for name in WAYS
    }
    kept = {picture.stem for picture in PICTURES.glob("*.svg")}
    assert taken <= kept
    assert all(
        name.startswith(("dialog-", "no_color-", "read_only", "trouble", "theme-"))
        for name in kept - taken
    )


async def test_the_straggler_of_a_thousand_is_named_at_every_size() -> None:
    for size in SIZES.values():
        async with studio(size) as at:
            await at.show(many_ranks, focus="ranks")
            shown = "\n".join(
                strip.text for strip in at.pilot.app.screen._compositor.render_strips()
            )
            assert re.search(r"\b500\b.*2\.6 × median", shown), f"{size}: {shown}"


async def test_resizing_to_anything_and_back() -> None:
    """The big chart and the health are there at every size that has room for them."""
    async with studio((120, 32)) as at:
        await at.show(rolled_back)
        for width, height in [
            (1, 1),
            (10, 3),
            (20, 8),
            (60, 15),
            (99, 40),
            (100, 25),
            (100, 26),
            (300, 100),
            (80, 24),
        ]:
            await at.pilot.resize_terminal(width, height)
            await at.pilot.pause()
            shown = [strip.text for strip in at.pilot.app.screen._compositor.render_strips()]
            assert len(shown) == height and all(cell_len(line) == width for line in shown)
            if width >= 20:
                assert "HEALTHY" in shown[0]
                assert any("┤" in line for line in shown)
            side = width >= 100 and height >= 26
            assert any(snapshots.TITLE in line for line in shown) == side
            if width >= 60:
                assert any("#2" in line and "step 1,207" in line for line in shown)
