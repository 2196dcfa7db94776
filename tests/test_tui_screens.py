"""Pictures of the screen in every state, at three sizes. `pytest --snapshot-update` takes them anew: look at them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from rich.cells import cell_len
from textual.pilot import Pilot

from guardrail.records import Mode, Phase, Status
from guardrail.tui.app import GuardrailApp
from guardrail.tui.view import Snapshot
from tests.fake_run import START, FakeReader, FakeRun, example, snapshot_of

SIZES = {"120x32": (120, 32), "80x24": (80, 24), "60x15": (60, 15)}


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


def empty() -> tuple[Snapshot, float]:
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


def healthy() -> tuple[Snapshot, float]:
    fake = FakeRun().begin().advance(1284)
    return snapshot_of(fake), fake.time + 0.4


def rolled_back() -> tuple[Snapshot, float]:
    """The spike is over; its stretch stays as a ghost."""
    fake = example()
    return snapshot_of(fake), fake.time + 0.4


def not_a_number() -> tuple[Snapshot, float]:
    """NaN in this very step."""
    fake = FakeRun().begin().advance(800).not_a_number()
    return snapshot_of(fake), fake.time + 0.4


def asking() -> tuple[Snapshot, float]:
    fake = FakeRun().begin().advance(1206).spike()
    fake.mode = Mode.ASK
    fake.ask(
        "loss 11.5 against 2.387, score 41.2 over 8. Roll back to step 1,200 and leave out 3 batches (48 samples)?"
    )
    return snapshot_of(fake), fake.time + 0.4


def degraded() -> tuple[Snapshot, float]:
    fake = FakeRun().begin().advance(1284)
    fake.durability = "degraded: checkpoint: No space left on device"
    fake.event("durability", "durability degraded: checkpoint: No space left on device", state="degraded")
    return snapshot_of(fake), fake.time + 0.4


def finished() -> tuple[Snapshot, float]:
    fake = example(6000).end(Phase.FINISHED, 0)
    return snapshot_of(fake), fake.time + 7200


def lost() -> tuple[Snapshot, float]:
    fake = example()
    return snapshot_of(fake), fake.time + 95


SCENES: dict[str, Callable[[], tuple[Snapshot, float]]] = {
    scene.__name__: scene for scene in (empty, healthy, rolled_back, not_a_number, asking, degraded, finished, lost)
}


def screen(scene: Callable[[], tuple[Snapshot, float]], **options: bool) -> GuardrailApp:
    snapshot, now = scene()
    return GuardrailApp(FakeReader(snapshot), clock=lambda: now, **options)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scene", SCENES)
def test_scene(scene: str, size: str, snap_compare: Callable[..., bool]) -> None:
    assert snap_compare(screen(SCENES[scene]), terminal_size=SIZES[size])


@pytest.mark.parametrize("size", SIZES)
def test_without_colour(size: str, monkeypatch: pytest.MonkeyPatch, snap_compare: Callable[..., bool]) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert snap_compare(screen(rolled_back), terminal_size=SIZES[size])


@pytest.mark.parametrize("keys", [["r"], ["r", "enter"], ["s"], ["m"], ["S"], ["question_mark"], ["j"]], ids="-".join)
def test_dialog(keys: list[str], snap_compare: Callable[..., bool]) -> None:
    async def press(pilot: Pilot[None]) -> None:
        await pilot.press(*keys)
        for blinking in pilot.app.screen.query("Input"):
            blinking.cursor_blink = False  # type: ignore[attr-defined]
        await pilot.pause()

    assert snap_compare(screen(rolled_back), terminal_size=(100, 30), run_before=press)


@pytest.mark.parametrize("keys", [["tab"], ["3"], ["x"]], ids="-".join)
def test_chart_keys(keys: list[str], snap_compare: Callable[..., bool]) -> None:
    assert snap_compare(screen(rolled_back), press=keys, terminal_size=(120, 32))


def test_read_only(snap_compare: Callable[..., bool]) -> None:
    assert snap_compare(screen(rolled_back, read_only=True), press=["p"], terminal_size=(120, 32))


def test_trouble_with_the_directory(snap_compare: Callable[..., bool]) -> None:
    def scene() -> tuple[Snapshot, float]:
        snapshot, now = healthy()
        return replace(snapshot, trouble="cannot read the run: Stale file handle"), now

    assert snap_compare(screen(scene), terminal_size=(120, 32))


async def test_resizing_to_anything_and_back() -> None:
    """The big chart and the health are there at every size that has room for them."""
    app = screen(rolled_back)
    async with app.run_test(size=(120, 32)) as pilot:
        for width, height in [(1, 1), (10, 3), (20, 8), (60, 15), (99, 40), (100, 25), (100, 26), (300, 100), (80, 24)]:
            await pilot.resize_terminal(width, height)
            await pilot.pause()
            shown = [strip.text for strip in app.screen._compositor.render_strips()]
            assert len(shown) == height and all(cell_len(line) == width for line in shown)
            if width >= 20:
                assert "HEALTHY" in shown[0]
                assert any("┤" in line for line in shown)
            side = width >= 100 and height >= 26
            assert any("snapshots and checkpoints" in line for line in shown) == side
            if width >= 60:
                assert any("#2" in line and "step 1,207" in line for line in shown)
