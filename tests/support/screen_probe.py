"""The screen with a stopwatch in it, for tests/bench/screen.py; and a day of steps in one process.

Without a stopwatch's file (GUARDRAIL_PROBE) it only says when its imports are done.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def stopwatch(path: str) -> None:
    """Write (monotonic seconds, CPU seconds of the screen's thread) for every frame: building its
    rows and drawing.
    """
    from textual.screen import Screen

    from guardrail.tui.app.app import GuardrailApp

    spent = [0.0]
    file = open(path, "w", buffering=1)

    def timed(function: Callable[..., Any], *, ends: bool) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*arguments)
            finally:
                spent[0] += time.thread_time() - began
                if ends and spent[0]:
                    file.write(f"{time.monotonic()} {spent[0]}\n")
                    spent[0] = 0.0

        return call

    GuardrailApp._draw = timed(GuardrailApp._draw, ends=False)  # type: ignore[method-assign]
    Screen._on_timer_update = timed(Screen._on_timer_update, ends=True)  # type: ignore[method-assign]


def day() -> None:
    """24 hours in steps of half a minute, through files, reader and a whole screen without a
    terminal.
    """
    import asyncio

    from guardrail.rundir.run_directory import RunDirectory
    from guardrail.tui.app.app import GuardrailApp
    from guardrail.tui.model.run_reader import RunReader
    from tests.support.fake_run import FakeRun

    async def live(folder: Path) -> None:
        fake = FakeRun(total=2_000_000).begin().advance(300)
        run = RunDirectory.open(fake.write(folder).path)
        reader = RunReader(run)
        reader.start = lambda notify: None  # type: ignore[method-assign]
        app, told = GuardrailApp(reader), []
        async with app.run_test(size=(120, 32)) as pilot:
            for half_minute in range(1, 24 * 120 + 1):
                fake.advance(fake.step + 300, checkpoints=9000, ring=30)
                with run.metrics_path.open("ab") as file:
                    fake.chunks[-1].astype("<f8").tofile(file)
                del fake.chunks[:], fake.events[:]
                run.write_status(fake.status)
                reader.look()
                app._draw()
                await pilot.pause(0)
                if half_minute in (120, 720, 1440, 2880):
                    told.append(resident())
        print(", ".join(f"{size:.0f}" for size in told), "MB")

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(live(Path(folder)))


def resident() -> float:
    """MB of this process's own memory, files that it maps not counted."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def main() -> None:
    if sys.argv[1:] == ["day"]:
        return day()
    import guardrail.cli.attach
    import guardrail.tui.app.app
    import guardrail.tui.model.config_lines  # noqa: F401
    from guardrail.cli.main import main as guardrail_main

    if path := os.environ.get("GUARDRAIL_PROBE"):
        stopwatch(path)
    else:
        os.write(1, b"@imported@")
    sys.exit(guardrail_main())


if __name__ == "__main__":
    main()
