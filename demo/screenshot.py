"""Draws the present screen of a run as SVG. The picture in the README shows a run of `make demo`.

python -m demo.screenshot runs/quickstart/2026-11-25-01 demo/screen.svg
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from guardrail.rundir.run_search import find_run


async def draw_screen(path: Path, size: tuple[int, int]) -> str:
    from guardrail.rundir.run_directory import RunDirectory
    from guardrail.tui.app.app import GuardrailApp
    from guardrail.tui.model.run_reader import RunReader

    app = GuardrailApp(RunReader(RunDirectory.open(path), present=False), read_only=True)
    async with app.run_test(size=size) as pilot:
        await pilot.pause(2.0)
        return app.export_screenshot(title="guardrail")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a run directory, or its name")
    parser.add_argument("out", type=Path)
    parser.add_argument("--root", default="runs", help="folder of the runs")
    parser.add_argument("--columns", type=int, default=120)
    parser.add_argument("--rows", type=int, default=32)
    arguments = parser.parse_args()
    run = find_run(arguments.run, arguments.root)
    picture = asyncio.run(draw_screen(run.path, (arguments.columns, arguments.rows)))
    arguments.out.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
