"""The list of runs: state, progress, and the loss as a curve of one row. Enter watches a run."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.events import Click, Key
from textual.message import Message

from guardrail.core.format import clean_and_shorten, format_age, format_count, format_plural
from guardrail.operate.run_summary import RunSummary, read_losses
from guardrail.rundir.run_directory import RunDirectory
from guardrail.tui.draw.lines import Lines, Piece, Row, fit_row, make_row, row_width, spread_row
from guardrail.tui.model.failures import format_reason
from guardrail.tui.model.view import Snapshot, View
from guardrail.tui.numerics.scales import format_short
from guardrail.tui.terminal import hangup as terminal
from guardrail.tui.terminal.themed_app import ThemedApp

LOOK_SECONDS = 2.0  # between two reads of the list
# state -> symbol, word, tone; a state of a newer version is shown by its name.
STATES = {
    "new": ("○", "no status", "calm"),
    "starting": ("○", "starting", "calm"),
    "setup": ("○", "setting up", "calm"),
    "step": ("●", "training", "good"),
    "eval": ("●", "evaluating", "good"),
    "save": ("●", "saving", "good"),
    "rollback": ("▲", "rolling back", "warn"),
    "asking": ("◆", "asking", "warn"),
    "paused": ("‖", "paused", "warn"),
    "finished": ("✓", "finished", "good"),
    "stopped": ("■", "stopped", "calm"),
    "halted": ("✗", "halted", "bad"),
    "failed": ("✗", "failed", "bad"),
    "lost": ("?", "lost", "bad"),
}
# States in which the processes of a run train, or wait for an answer.
_ALIVE = ("step", "eval", "save", "rollback", "paused", "asking")
_BLOCKS = "▁▂▃▄▅▆▇█"
_NAME, _SPARK = 44, 40  # most cells of a name, and of a curve
_WHEN = 12  # cells of the age of the last heartbeat
_HINT = (("↑ ↓", "move"), ("Enter", "watch"), ("/", "filter"), ("q", "leave"))


def draw_curve(points: Sequence[float], width: int) -> str:
    """Return losses as at most `width` blocks, the newest at the right.

    `×` stands for NaN and Inf. The scale ends at the ninth decile; `▲` stands for a value that is
    twice as far above the least one.
    """
    count = min(width, len(points))
    shown = [points[(index + 1) * len(points) // count - 1] for index in range(count)]
    finite = sorted(value for value in shown if math.isfinite(value))
    if not finite:
        return "×" * len(shown)
    low, high = finite[0], finite[min(len(finite) - 1, len(finite) * 9 // 10)]
    cells = []
    for value in shown:
        if not math.isfinite(value):
            cells.append("×")
        elif value > high + (high - low):
            cells.append("▲")
        else:
            share = 0.0
            if high > low:
                share = (min(value, high) - low) / (high - low)
            cells.append(_BLOCKS[min(7, int(8 * share))])
    return "".join(cells)


def matching_runs(runs: Sequence[RunSummary], words: str) -> list[RunSummary]:
    """Return the runs with all words in their name, host or state."""
    wanted = words.lower().split()

    def text(one: RunSummary) -> str:
        return f"{one.run} {one.host} {one.state} {STATES.get(one.state, ('', '', ''))[1]}".lower()

    def matches(one: RunSummary) -> bool:
        return all(word in text(one) for word in wanted)

    return [one for one in runs if matches(one)]


def draw_run(
    one: RunSummary, points: Sequence[float], *, name: int, width: int, now: float, marked: bool
) -> Row:
    """Return one run in one row of `width` cells.

    A narrow row drops the curve first, then the loss, then the progress.

    Args:
        points: losses of the curve.
        name: cells of the name.
    """
    label = fit_row(((clean_and_shorten(one.run), "strong" if marked else "plain"),), name)
    line: Row = (
        (" ▸ " if marked else "   ", "key"),
        *label,
        (" " * (name - row_width(label) + 1), "plain"),
    )
    for part in _progress_pieces(one):
        if row_width(line) + row_width((part,)) > width:
            return fit_row(line, width)
        line = (*line, part)
    cells = min(_SPARK, width - row_width(line) - _WHEN)
    if cells >= 8:
        line = (*line, (f"{draw_curve(points, cells):<{cells}}", "loss"))
    if not one.heartbeat:
        return line
    age = f"{format_age(max(0.0, now - one.heartbeat))} ago "
    return spread_row(line, ((age, "dim"),), width)


def _progress_pieces(one: RunSummary) -> tuple[Piece, ...]:
    """Return state, step, share of the run and loss, in fixed columns."""
    symbol, word, tone = STATES.get(one.state, ("·", clean_and_shorten(one.state, 12), "calm"))
    step, share = format_count(one.step), ""
    if one.total_steps:
        step += f" / {format_count(one.total_steps)}"
        share = f"{min(100, 100 * one.step // one.total_steps)} %"
    loss = "–" if one.loss is None else format_short(one.loss)
    return (
        (f"{symbol} {word:<12}", tone),
        (f"{step:>15} ", "plain"),
        (f"{share:>5} ", "dim"),
        (f" loss {loss:<7}", "plain"),
    )


class RunList(ThemedApp[str]):
    """An app that returns the path of the chosen run, or None.

    Args:
        look: lists the runs, newest first. It is called in a thread, so that keys work also while a
            disk is slow.
        points: returns the losses of one run for its curve; called for runs in view, in a thread.
        marked: path of the run that is selected at first.

    Attributes:
        marked: path of the selected run; it stays selected while the list changes around it.
        words: the filter.
    """

    CSS = "Screen { background: $background; } #head, #foot { height: 1; background: $panel; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "move(-1)", "up", show=False),
        Binding("down", "move(1)", "down", show=False),
        Binding("pageup", "move(-10)", "page up", show=False),
        Binding("pagedown", "move(10)", "page down", show=False),
        Binding("home", "move(-1000000)", "first", show=False),
        Binding("end", "move(1000000)", "last", show=False),
        Binding("enter", "take", "watch", show=False),
        Binding("escape", "clear", "clear the filter", show=False),
        Binding("ctrl+c,ctrl+q", "leave", "leave", show=False, priority=True),
    ]

    class Fresh(Message):
        pass

    def __init__(
        self,
        look: Callable[[], list[RunSummary]],
        *,
        root: str,
        points: Callable[[str], list[float]] | None = None,
        marked: str = "",
        clock: Callable[[], float] = time.time,
        theme: str | None = None,
    ) -> None:
        super().__init__(theme)
        self._look, self._root, self._clock = look, clean_and_shorten(root, 80), clock
        self._points = points or (lambda path: read_losses(RunDirectory(path), _SPARK))
        self._known: dict[str, tuple[int, list[float]]] = {}  # path -> (step, its curve)
        # (path, step) of curves to read
        self._wanted: queue.SimpleQueue[tuple[str, int] | None] = queue.SimpleQueue()
        self._asked: dict[str, int] = {}  # path -> the step for which its curve was asked last
        self.runs: list[RunSummary] = []
        self.marked = marked
        self.words = ""
        self._typing, self._loaded, self._problem = False, False, ""
        self._leaving = threading.Event()

    def compose(self) -> ComposeResult:
        yield Lines(lambda view, width, height: self._head(width), id="head")
        yield Lines(lambda view, width, height: self._body(width, height), id="body")
        yield Lines(lambda view, width, height: self._foot(width), id="foot")

    def on_mount(self) -> None:
        self.set_interval(1.0, self._draw)
        threading.Thread(target=self._keep_looking, name="guardrail-runs", daemon=True).start()
        threading.Thread(target=self._read_curves, name="guardrail-curves", daemon=True).start()
        self._draw()

    def on_unmount(self) -> None:
        self._leaving.set()
        self._wanted.put(None)

    def _keep_looking(self) -> None:
        while not self._leaving.is_set():
            try:
                self.runs, self._problem = self._look(), ""
            # Every kind: a thread that dies without a message looks like runs that do not move.
            except Exception as error:
                self._problem = clean_and_shorten(format_reason(error), 200)
            self._loaded = True
            self.post_message(self.Fresh())
            self._leaving.wait(LOOK_SECONDS)

    def _read_curves(self) -> None:
        while (wanted := self._wanted.get()) is not None:
            path, step = wanted
            try:
                self._known[path] = (step, self._points(path))
            except Exception as error:
                self._problem = clean_and_shorten(f"{path}: {format_reason(error)}", 200)
            self.post_message(self.Fresh())

    def on_run_list_fresh(self) -> None:
        self._draw()

    # -- drawing

    @property
    def shown(self) -> list[RunSummary]:
        return matching_runs(self.runs, self.words)

    def _at(self, shown: Sequence[RunSummary]) -> int:
        for index, one in enumerate(shown):
            if one.path == self.marked:
                return index
        return 0

    def _draw(self) -> None:
        view = View(Snapshot(self._root), self._clock())
        for lines in self.query(Lines):
            lines.show(view)

    def _head(self, width: int) -> list[Row]:
        text = "reading …"
        if self._loaded:
            alive = sum(one.state in _ALIVE for one in self.runs)
            text = f"{format_plural(len(self.runs), 'run')} in {self._root}, {alive} running"
        right = ((f"✗ {self._problem} ", "bad"),) if self._problem else ()
        left = make_row((" guardrail ", "strong"), (f" {text}", "plain"))
        return [spread_row(left, right, width)]

    def _body(self, width: int, height: int) -> list[Row]:
        shown = self.shown
        if not shown:
            return [(), make_row((f"   {self._why_empty()}", "dim"))]
        at = self._at(shown)
        self.first = max(0, min(at - height // 2, len(shown) - height))
        name = min(_NAME, max(row_width(((clean_and_shorten(one.run), "plain"),)) for one in shown))
        now = self._clock()
        rows = []
        for index, one in enumerate(shown[self.first : self.first + height], self.first):
            points, marked = self._curve(one), index == at
            rows.append(draw_run(one, points, name=name, width=width, now=now, marked=marked))
        return rows

    def _why_empty(self) -> str:
        if self.runs:
            return "no run matches the filter"
        return "no runs here yet" if self._loaded else ""

    def _curve(self, one: RunSummary) -> list[float]:
        """Return the curve that was read last; ask for a newer one where the run has moved on."""
        step, points = self._known.get(one.path, (-1, []))
        if step != one.step and self._asked.get(one.path) != one.step:
            self._asked[one.path] = one.step
            self._wanted.put((one.path, one.step))
        return points

    def _foot(self, width: int) -> list[Row]:
        if self._typing:
            text = make_row((" / ", "key"), (self.words, "strong"), ("▏", "key"))
            return [spread_row(text, (("Enter keep   Esc clear ", "dim"),), width)]
        line: list[Piece] = []
        for key, what in _HINT:
            line += [(f" {key} ", "key"), (f"{what} ", "dim")]
        words: Row = ((f"/ {self.words} ", "accent"),) if self.words else ()
        return [spread_row(tuple(line), words, width)]

    # -- keys

    def on_key(self, event: Key) -> None:
        if self._typing:
            if event.key == "enter":
                self._typing = False
            elif event.key == "backspace":
                self.words = self.words[:-1]
            elif event.is_printable and event.character:
                self.words = clean_and_shorten(self.words + event.character, 80)
            else:
                return  # arrows move, Esc clears
            event.stop()
            event.prevent_default()
            self._draw()
            return
        plain = {
            "q": self.action_leave,
            "j": lambda: self.action_move(1),
            "k": lambda: self.action_move(-1),
        }
        if event.key == "slash":
            self._typing = True
            self._draw()
        elif event.key in plain:
            plain[event.key]()

    def action_move(self, by: int) -> None:
        shown = self.shown
        if shown:
            self.marked = shown[max(0, min(len(shown) - 1, self._at(shown) + by))].path
            self._draw()

    def action_take(self) -> None:
        if self._typing:
            self._typing = False
            self._draw()
        elif shown := self.shown:
            self.exit(shown[self._at(shown)].path)

    def action_clear(self) -> None:
        self.words, self._typing = "", False
        self._draw()

    def action_leave(self) -> None:
        self.exit(None)

    def on_click(self, event: Click) -> None:
        """Select the run that was clicked; Enter watches it."""
        body = self.query_one("#body", Lines)
        index = event.screen_y - body.region.y + self.first
        shown = self.shown
        if body.region.contains(event.screen_x, event.screen_y) and index < len(shown):
            self.marked = shown[index].path
            self._draw()


def choose_and_watch(
    look: Callable[[], list[RunSummary]],
    *,
    root: str,
    read_only: bool,
    theme: str | None = None,
    mouse: bool = True,
) -> int:
    """Show the list, then the chosen run, then the list again, until the user leaves the list.

    Returns:
        0.
    """
    from guardrail.core.errors import RunDirectoryError
    from guardrail.tui.app.app import run_screen

    marked: str | None = ""
    while marked is not None:
        app = RunList(look, root=root, marked=marked, theme=theme)
        with terminal.guarded():
            marked = app.run(mouse=mouse)
        if marked is not None:
            try:
                run_screen(Path(marked), read_only=read_only, theme=theme, mouse=mouse)
            except RunDirectoryError:
                continue  # the run was deleted meanwhile; the next list does not have it
    return 0
