"""Private parts of textual that the screen uses: they exist, and without each the screen draws."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from textual import _compositor
from textual.app import App
from textual.drivers import linux_driver

import guardrail.tui
from tests.support.fake_run import example
from tests.support.terminal import Terminal

# What to remove, as a statement. After a change of textual's version look at each of these.
REMOVED = {
    "ChopsUpdate": "hide_from(cell_diff, 'ChopsUpdate')",
    "chops": "hide('chops')",
    "spans": "hide('spans')",
    "chop_ends": "hide('chop_ends')",
    "_filters": "os.environ['NO_COLOR'] = '1'; hide_from(themed_app, '_filters')",
    "_display": "from guardrail.tui.terminal.themed_app import ThemedApp; del ThemedApp._display",
    "_key_thread": "hide_from(themed_app, '_key_thread')",
}
_SCREEN = """
import builtins, os, sys
from textual import _compositor
from textual.app import App
from textual.drivers.linux_driver import LinuxDriver
import guardrail.tui.terminal.cell_diff as cell_diff
import guardrail.tui.terminal.themed_app as themed_app

def hide(name):
    # guardrail cannot see the attribute; textual, which needs it to draw, can
    cell_diff.hasattr = lambda thing, asked: asked != name and builtins.hasattr(thing, asked)

def hide_from(module, name):
    module.getattr = lambda thing, asked, *default: (
        default[0] if asked == name else builtins.getattr(thing, asked, *default)
    )

exec(sys.argv[2])
from guardrail.tui.app.app import run_screen
sys.exit(run_screen(sys.argv[1]))
"""


def test_each_private_part_is_there() -> None:
    update = _compositor.ChopsUpdate([], [], [])
    for name in ("chops", "spans", "chop_ends", "render_segments"):
        assert hasattr(update, name), name
    assert callable(App._display) and isinstance(App()._filters, list)
    source = Path(linux_driver.__file__).read_text(encoding="utf-8")
    assert "self._key_thread" in source and "self.exit_event" in source


def test_no_other_private_part_is_used() -> None:
    """Every access to a private attribute of something else than an object of guardrail's own."""
    own: set[str] = set()
    used: set[str] = set()
    for path in Path(next(iter(guardrail.tui.__path__))).rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert "._" not in node.module, f"{path.name} imports {node.module}"
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_"):
                continue
            if isinstance(node.ctx, ast.Store):
                own.add(node.attr)
            elif not node.attr.startswith("__"):
                used.add(node.attr)
        functions = (ast.FunctionDef, ast.AsyncFunctionDef)
        own |= {node.name for node in ast.walk(tree) if isinstance(node, functions)}
    # `App._driver` is only passed to a function; `os._exit` is documented.
    assert used - own <= {"_driver", "_exit"}, used - own


@pytest.mark.parametrize("name", REMOVED)
def test_the_screen_draws_without_it(name: str, tmp_path: Path) -> None:
    run = example().write(tmp_path)
    terminal = Terminal(
        [sys.executable, "-c", _SCREEN, str(run.path), REMOVED[name]], columns=120, rows=32
    )
    try:
        terminal.shows("loss", "help", "step 1,207")  # an incident that a dialog can open
        terminal.press("2\r")  # a dialog: partial updates, and then the frame under it again
        terminal.shows("outcome")
        terminal.press("q")
        terminal.shows("Tab pane")
        terminal.press("q")
        assert terminal.ends() == 0
    finally:
        terminal.end()
