"""All keys of the screen. Bindings, footer, the `?` page and docs/keys.md are made from this table.

The keys of commands come from the classes of `guardrail.decide.control_commands`.

`python -m guardrail.tui.screens.keys` prints the table of docs/keys.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from guardrail.decide.control_commands import registry
from guardrail.decide.control_commands.answer import Answer
from guardrail.decide.control_commands.base import ControlCommand
from guardrail.tui.draw.lines import Row, fit_row, row_width, wrap_text
from guardrail.tui.panes.table import CURVES, PANES

LISTS = "lists"


@dataclass(frozen=True)
class Key:
    """One row of the table.

    Attributes:
        keys: their names in textual, comma-separated; all do the same.
        shown: how the key is written on the screen.
        action: the dashboard's method `action_...`, with arguments in brackets if any.
        label: one or two words for the footer; "": the footer does not have it.
        help: what it does, as a sentence.
        control: it sends something to the run (not with --read-only or after the end).
        pane: the footer has it only while this pane is focused: "curves", or "lists" for all
            others; "": always.
        rank: the footer drops the highest first where the terminal is narrow.
    """

    keys: str
    shown: str
    action: str
    label: str
    help: str
    control: bool = False
    pane: str = ""
    rank: int = 5


def command_action(kind: type[ControlCommand]) -> str:
    """Return the action of the dashboard that sends a command."""
    return f"command('{kind.name}')"


def command_keys() -> list[Key]:
    """Return the keys of all commands, in the order of `COMMANDS`."""
    found = []
    for kind in registry.COMMANDS:
        if kind.key is None:
            continue
        found.append(
            Key(
                kind.key.key,
                kind.key.key,
                command_action(kind),
                kind.key.label,
                kind.key.help,
                control=True,
                rank=kind.key.rank,
            )
        )
    return found


KEYS = (
    *command_keys(),
    Key("n", "n", "note", "note", "Write a note into the journal.", control=True, rank=7),
    Key("tab", "Tab", "next_pane(1)", "pane", "Go to the next pane.", rank=4),
    Key("shift+tab", "Shift+Tab", "next_pane(-1)", "", "Go to the previous pane."),
    Key("1", "1", "pane('curves')", "", "Go to the curves."),
    *(Key(pane.number, pane.number, f"pane('{pane.name}')", "", f"Go to pane {pane.name}: {pane.about}.")
      for pane in PANES),
    Key("f", "f", "full", "full", "Show the focused pane on the full screen, or all panes again.", rank=7),
    Key("up", "↑", "move(-1)", "", "Curves: enlarge the previous chart. Lists: select the previous entry."),
    Key("down", "↓", "move(1)", "", "Curves: enlarge the next chart. Lists: select the next entry."),
    Key("left", "←", "cursor(-1)", "", "Curves: move the cursor back; the titles show the values at its step."),
    Key("right", "→", "cursor(1)", "", "Curves: move the cursor forward."),
    Key("plus,equals_sign", "+", "zoom(0.5)", "zoom", "Curves: zoom in to half of the steps, around the cursor.",
        pane=CURVES, rank=6),
    Key("minus", "-", "zoom(2)", "", "Curves: zoom out to twice as many steps."),
    Key("less_than_sign", "<", "pan(-0.25)", "", "Curves: move back by a quarter of the range."),
    Key("greater_than_sign", ">", "pan(0.25)", "", "Curves: move forward by a quarter of the range."),
    Key("left_square_bracket", "[", "event(-1)", "", "Curves: move the cursor to the previous event."),
    Key("right_square_bracket", "]", "event(1)", "", "Curves: move the cursor to the next event."),
    Key("full_stop", ".", "follow", "", "Curves: follow the newest step again, without a cursor."),
    Key("pageup", "PgUp", "move(-10)", "", "Lists: ten entries up."),
    Key("pagedown", "PgDn", "move(10)", "", "Lists: ten entries down."),
    Key("home", "Home", "move(-1000000)", "", "Lists: the first entry."),
    Key("end", "End", "move(1000000)", "", "Lists: the last entry."),
    Key("enter", "Enter", "open", "open", "Lists: show the entry's step on the curves, and open its evidence.",
        pane=LISTS, rank=4),
    Key("slash", "/", "filter", "filter", "Lists: show only entries with a text in them.", pane=LISTS, rank=4),
    Key("escape", "Esc", "back", "", "Clear the selection, the cursor and the filter; leave the full screen."),
    Key("x", "x", "logarithm", "log", "Switch the enlarged chart between a linear and a logarithmic axis.",
        pane=CURVES, rank=6),
    Key("w", "w", "smooth", "smooth", "Curves: draw a smoothed line over the raw one: off, light, strong.",
        pane=CURVES, rank=6),
    Key("b", "b", "axis", "", "Curves: draw over steps, trained tokens, or time."),
    Key("v", "v", "signals", "curves", "Choose which of the recorded signals have curves.", rank=6),
    Key("t", "t", "theme", "", "Next theme: dark, light, colour-blind, the terminal's colours."),
    Key("j", "j", "journal", "journal", "Read the journal: what happened, when, and who did it.", rank=5),
    Key("ctrl+p", "Ctrl+P", "commands", "", "Find any of these commands by its words."),
    Key("q,ctrl+c,ctrl+q", "q", "leave", "leave", "Leave the screen (so does Ctrl-C). Training continues.", rank=0),
    Key("question_mark,f1", "?", "help", "help", "Show all keys and symbols.", rank=0),
)  # fmt: skip
# Keys in a dialog, for the `?` page. Each dialog binds those that it needs.
DIALOG_KEYS = (
    ("↑ ↓ k j", "Move the choice, or scroll (also Home, End, PgUp, PgDn, Space)."),
    (
        "Enter",
        "Take the marked entry, or switch it on and off (so does Space); close a text (so does ?).",
    ),
    ("y n", "Answer a yes-or-no question at once."),
    ("v", "In the guard's question: show the evidence, and return to the question."),
    ("Esc q", "Close the dialog; nothing is sent (so does Ctrl+P in the list of commands)."),
)
SYMBOLS = (
    ("● ▲ ◆ ‖", "healthy; unstable, rolling back or recovering; needs an answer; paused"),
    ("✓ ■ ✗ ?", "finished, stopped, halted or failed, not responding"),
    (
        "R S ! C",
        "on a curve: rollback and skipped update with the incident's number, command, checkpoint",
    ),
    ("#", "on a curve: an incident in which the guard only reported what it would have done"),
    ("▲ × ┈", "on a curve: value above the axis, NaN or Inf, threshold of the detector"),
    ("⠂⠂ ┊", "an abandoned timeline, and where it ended"),
)


@lru_cache(maxsize=16)
def footer_keys(
    width: int, *, controls: bool = True, asking: bool = False, focus: str = CURVES
) -> Row:
    """Return as many keys as fit, in the order of the table.

    Args:
        controls: the run accepts commands.
        asking: the guard waits for an answer.
        focus: name of the focused pane; its keys are dropped last.
    """
    chosen = [key for key in KEYS if key.label]
    if not controls:
        chosen = [key for key in chosen if not key.control]
    if not asking:
        chosen = [key for key in chosen if key.action != command_action(Answer)]
    pane = LISTS
    if focus == CURVES:
        pane = CURVES
    chosen = [key for key in chosen if key.pane in ("", pane)]
    while chosen:
        line = _footer_line(chosen)
        if row_width(line) <= width:
            return fit_row(line, width)
        worst = max(key.rank for key in chosen)
        chosen.remove(next(key for key in reversed(chosen) if key.rank == worst))
    return ()


def _footer_line(keys: Sequence[Key]) -> Row:
    pieces: list[tuple[str, str]] = []
    gap = " "
    for key in keys:
        pieces += [(gap, "plain"), (key.shown, "key"), (f" {key.label}", "dim")]
        gap = "  "
    return tuple(pieces)


def help_rows(width: int) -> list[Row]:
    """Return all keys and symbols, for the `?` page."""
    parts: tuple[tuple[str, str, Sequence[tuple[str, str]]], ...] = (
        ("", "key", [(key.shown, key.help) for key in KEYS]),
        ("in a dialog", "key", DIALOG_KEYS),
        ("symbols", "strong", SYMBOLS),
    )
    rows: list[Row] = []
    for name, tone, lines in parts:
        if name:
            rows += [(), ((f"   {name}", "dim"),)]
        for shown, sentence in lines:
            for text in wrap_text(sentence, width - 13):
                rows.append(((f"{shown:>10}  ", tone), (text, "plain")))
                shown = ""  # only the first line has the key
    return rows


def keys_as_markdown() -> str:
    """Return the table of docs/keys.md."""
    lines = ["| key | what it does |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{key.shown}` | {key.help} |" for key in KEYS)]) + "\n"


if __name__ == "__main__":
    print(keys_as_markdown(), end="")
