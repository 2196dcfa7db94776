"""Every key of the screen, once. Bindings, footer, the `?` page and docs/keys.md are made from it.

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
    """One line of the table.

    Attributes:
        keys: names as textual knows them, comma-separated; all do the same.
        shown: how the key is written for a person.
        action: the dashboard's method `action_...`, with arguments in brackets if any.
        label: one or two words for the footer; "" keeps it out of there.
        help: what it does, as a sentence.
        control: it asks the run for something (refused by --read-only and by a run that has ended).
        pane: the footer has it only while this pane has the keys: "curves", or "lists" for all
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
    Key("shift+tab", "Shift+Tab", "next_pane(-1)", "", "Go to the pane before."),
    Key("1", "1", "pane('curves')", "", "Go to the curves."),
    *(Key(pane.number, pane.number, f"pane('{pane.name}')", "", f"Go to pane {pane.name}: {pane.about}.")
      for pane in PANES),
    Key("f", "f", "full", "full", "Give the focused pane the whole screen, or take it back.", rank=7),
    Key("up", "↑", "move(-1)", "", "Curves: enlarge the chart before. Lists: mark the entry before."),
    Key("down", "↓", "move(1)", "", "Curves: enlarge the next chart. Lists: mark the next entry."),
    Key("left", "←", "cursor(-1)", "", "Curves: move the value cursor back; all titles say the values at its step."),
    Key("right", "→", "cursor(1)", "", "Curves: move the value cursor on."),
    Key("plus,equals_sign", "+", "zoom(0.5)", "zoom", "Curves: show half of the stretch, about the value cursor.",
        pane=CURVES, rank=6),
    Key("minus", "-", "zoom(2)", "", "Curves: show twice the stretch."),
    Key("less_than_sign", "<", "pan(-0.25)", "", "Curves: a quarter of the stretch back."),
    Key("greater_than_sign", ">", "pan(0.25)", "", "Curves: a quarter of the stretch on."),
    Key("left_square_bracket", "[", "event(-1)", "", "Curves: the value cursor to the mark before."),
    Key("right_square_bracket", "]", "event(1)", "", "Curves: the value cursor to the next mark."),
    Key("full_stop", ".", "follow", "", "Curves: follow the newest step again, without a value cursor."),
    Key("pageup", "PgUp", "move(-10)", "", "Lists: ten entries up."),
    Key("pagedown", "PgDn", "move(10)", "", "Lists: ten entries down."),
    Key("home", "Home", "move(-1000000)", "", "Lists: the first entry."),
    Key("end", "End", "move(1000000)", "", "Lists: the last entry."),
    Key("enter", "Enter", "open", "open", "Lists: jump to the entry's step on the curves, and open its evidence.",
        pane=LISTS, rank=4),
    Key("slash", "/", "filter", "filter", "Lists: show only entries with a text in them.", pane=LISTS, rank=4),
    Key("escape", "Esc", "back", "", "Take back the mark, the value cursor, the filter, the whole screen."),
    Key("x", "x", "logarithm", "log", "Switch the enlarged chart between a linear and a logarithmic axis.",
        pane=CURVES, rank=6),
    Key("w", "w", "smooth", "smooth", "Curves: a smoothed line on top of the raw one: off, light, strong.",
        pane=CURVES, rank=6),
    Key("b", "b", "axis", "", "Curves: stand by steps, by tokens learnt from, or by time."),
    Key("v", "v", "signals", "curves", "Choose which signals have curves, of all that the run records.", rank=6),
    Key("t", "t", "theme", "", "The next theme: dark, light, colour-blind, the terminal's own."),
    Key("j", "j", "journal", "journal", "Read the journal: everything that happened, who did it, and when.", rank=5),
    Key("ctrl+p", "Ctrl+P", "commands", "", "Find any of these commands by its words."),
    Key("q,ctrl+c,ctrl+q", "q", "leave", "leave", "Leave the screen (so does Ctrl-C). Training goes on.", rank=0),
    Key("question_mark,f1", "?", "help", "help", "Show all keys and signs.", rank=0),
)  # fmt: skip
# Keys inside of a dialog, for the `?` page; each dialog binds those it needs.
DIALOG_KEYS = (
    ("↑ ↓ k j", "Move the choice, or scroll (also Home, End, PgUp, PgDn, Space)."),
    (
        "Enter",
        "Take what is marked, or switch it on and off (so does Space); in a text, close it (so does ?).",
    ),
    ("y n", "Answer a yes-or-no question at once."),
    ("v", "Of the guard's question: show its evidence, and go back to it."),
    ("Esc q", "Close the dialog; nothing is sent (so does Ctrl+P in the list of commands)."),
)
SYMBOLS = (
    ("● ▲ ◆ ‖", "healthy; unstable, rolling back or recovering; needs an answer; paused"),
    ("✓ ■ ✗ ?", "finished, stopped, halted or failed, not responding"),
    (
        "R S ! C",
        "on a curve: rollback and left-out update with the incident's number, command, checkpoint",
    ),
    ("#", "on a curve: an incident in which the guard only says what it would have done"),
    ("▲ × ┈", "on a curve: value above the axis, NaN or Inf, threshold of the detector"),
    ("⠂⠂ ┊", "an abandoned timeline, and where it was left"),
)


@lru_cache(maxsize=16)
def footer_keys(
    width: int, *, controls: bool = True, asking: bool = False, focus: str = CURVES
) -> Row:
    """As many keys as fit, always in the order of the table; those of the focused pane stay
    longest.

    Args:
        focus: name of the pane that has the keys.
        controls: the run can be asked for something.
        asking: the guard waits for an answer.
    """
    chosen = [key for key in KEYS if key.label and (controls or not key.control)]
    if not asking:
        chosen = [key for key in chosen if key.action != command_action(Answer)]
    mine = CURVES if focus == CURVES else LISTS
    chosen = [key for key in chosen if key.pane in ("", mine)]
    while chosen:
        line: list[tuple[str, str]] = []
        for key in chosen:
            line += [("  " if line else " ", "plain"), (key.shown, "key"), (f" {key.label}", "dim")]
        if row_width(tuple(line)) <= width:
            return fit_row(tuple(line), width)
        worst = max(key.rank for key in chosen)
        chosen.remove(next(key for key in reversed(chosen) if key.rank == worst))
    return ()


def help_rows(width: int) -> list[Row]:
    """All keys and signs, for the `?` page."""
    parts: tuple[tuple[str, str, Sequence[tuple[str, str]]], ...] = (
        ("", "key", [(key.shown, key.help) for key in KEYS]),
        ("in a dialog", "key", DIALOG_KEYS),
        ("signs", "strong", SYMBOLS),
    )
    rows: list[Row] = []
    for name, tone, lines in parts:
        if name:
            rows += [(), ((f"   {name}", "dim"),)]
        for shown, told in lines:
            for index, text in enumerate(wrap_text(told, width - 13)):
                rows.append(((f"{'' if index else shown:>10}  ", tone), (text, "plain")))
    return rows


def keys_as_markdown() -> str:
    """Return the table of docs/keys.md."""
    lines = ["| key | what it does |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{key.shown}` | {key.help} |" for key in KEYS)]) + "\n"


if __name__ == "__main__":
    print(keys_as_markdown(), end="")
