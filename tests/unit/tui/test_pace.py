"""How often the screen draws: counted, by a clock that the test turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest

from guardrail.core.records.verdicts import Mode
from guardrail.tui.app.app import GuardrailApp
from guardrail.tui.model.log_lines import LogLine
from tests.support.fake_run import FakeReader, FakeRun, snapshot_of

TURN = 1 / 64  # sums of it are exact


class Turned(GuardrailApp):
    """An app whose timers go by `now`, and which only counts its frames."""

    def __init__(self, reader: FakeReader) -> None:
        super().__init__(reader, clock=lambda: 0.0)
        self.now, self.frames = 100.0, 0
        self._monotonic = lambda: self.now
        self._due: list[tuple[float, Callable[[], None]]] = []
        self.set_timer = lambda delay, then: self._due.append((self.now + delay, then))  # type: ignore[method-assign,assignment,return-value]
        self.post_message = lambda message: self.on_guardrail_app_fresh() or True  # type: ignore[method-assign]
        reader.start(self._notify)

    def _show(self) -> None:
        self.frames += 1

    def run_for(self, seconds: float, happens: Callable[[], None] = lambda: None) -> int:
        """Frames that are drawn while something happens 64 times a second."""
        before = self.frames
        for turn in range(round(seconds / TURN)):
            happens()
            self.now += TURN
            due = [then for at, then in self._due if at <= self.now]
            self._due = [one for one in self._due if one[0] > self.now]
            for then in due:
                then()
            if turn % 32 == 31:
                self._tick()  # as an interval of half a second would
        return self.frames - before


@pytest.fixture
def fake() -> FakeRun:
    return FakeRun().begin().advance(300)


@pytest.fixture
def reader(fake: FakeRun) -> FakeReader:
    return FakeReader(snapshot_of(fake))


@pytest.fixture
def app(reader: FakeReader) -> Turned:
    return Turned(reader)


def rows_come(reader: FakeReader) -> Callable[[], None]:
    """And a heartbeat: more often than any run writes."""

    def come() -> None:
        old = reader.snapshot
        assert old.status is not None
        status = msgspec.structs.replace(
            old.status, step=old.status.step + 1, heartbeat=old.status.heartbeat + TURN
        )
        reader.put(replace(old, status=status, series=replace(old.series), heard=old.heard + TURN))

    return come


def test_a_quiet_run_is_drawn_twice_a_second(app: Turned, reader: FakeReader) -> None:
    app.run_for(6.0, rows_come(reader))
    assert 18 <= app.run_for(10.0, rows_come(reader)) <= 20


def test_a_screen_with_nothing_new_is_drawn_once_a_second(app: Turned) -> None:
    """Ages and silence grow."""
    app.run_for(6.0)
    assert 9 <= app.run_for(10.0) <= 10


async def test_whoever_uses_it_sees_five_frames_a_second(app: Turned, reader: FakeReader) -> None:
    app.run_for(6.0, rows_come(reader))
    app._happened = app.now
    assert 18 <= app.run_for(4.0, rows_come(reader)) <= 20
    app.run_for(2.0, rows_come(reader))
    assert app.run_for(4.0, rows_come(reader)) <= 8


async def test_a_key_is_something_that_happens(reader: FakeReader) -> None:
    app = GuardrailApp(reader, clock=lambda: 0.0)
    async with app.run_test() as pilot:
        app._happened = -1000.0
        await pilot.press("z")
        assert app._happened > 0.0


@pytest.mark.parametrize(
    "what", ["an event", "another mode", "a question", "trouble", "rows read again"]
)
def test_news_are_drawn_at_once_and_watched(what: str, app: Turned, reader: FakeReader) -> None:
    app.run_for(6.0, rows_come(reader))
    old = reader.snapshot
    assert old.status is not None
    line = LogLine(time=0.0, step=1, mark="·", tone="plain", text="a note")
    new = {
        "an event": replace(old, story=replace(old.story, lines=(*old.story.lines, line))),
        "another mode": replace(old, status=msgspec.structs.replace(old.status, mode=Mode.ASK)),
        "a question": replace(
            old, status=msgspec.structs.replace(old.status, question="what now?")
        ),
        "trouble": replace(old, problem="cannot read the run"),
        "rows read again": replace(old, looking_up=1.0),
    }[what]
    reader.put(new)
    app.run_for(0.5)
    assert app._shown is new, "half a second at most"
    app.run_for(0.5, rows_come(reader))
    assert app.run_for(3.0, rows_come(reader)) >= 12
