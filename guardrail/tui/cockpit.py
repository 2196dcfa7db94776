"""The one screen: charts, panels, and the keys that ask the run for something."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import Screen

from guardrail.records import CommandKind, Mode, Phase, SnapshotInfo
from guardrail.tui import controls, keys, panels
from guardrail.tui.chart import Chart
from guardrail.tui.controls import Desk
from guardrail.tui.dialogs import Choose, Confirm, Dialog, Number, Pager
from guardrail.tui.format import brief, count, plural
from guardrail.tui.lines import Lines, Row
from guardrail.tui.view import CHARTS, View

MODES = {
    Mode.AUTO: "acts by itself",
    Mode.ASK: "parks training before a rollback and asks",
    Mode.ADVISE: "says what it would do and changes nothing",
    Mode.OFF: "detects nothing",
}
WIDE, HIGH = 100, 26  # from this size on there are three charts and a side
ROOMY = 18  # rows from which on the hidden charts have a line each
PROPOSALS = {"rollback": ": roll back, and leave that data out", "halt": ": save and end", "skip": ": leave it out"}
ANSWERS = ("Do as proposed", "Go on as if nothing had happened", "Stop here with a checkpoint")


class Cockpit(Screen[None]):
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding(key.keys, key.action, key.label or key.help, show=False) for key in keys.KEYS
    ]

    def __init__(self, view: View, desk: Desk) -> None:
        super().__init__()
        self.view, self._desk = view, desk
        self._asked = ""  # the question that has been put on the screen

    def compose(self) -> ComposeResult:
        yield Lines(panels.header, id="header")
        with Horizontal(id="body"):
            with Vertical(id="charts"):
                for signal in CHARTS:
                    yield Chart(signal)
                yield Lines(panels.sparks, id="sparks")
            with Vertical(id="side"):
                yield Lines(panels.incidents, id="incidents")
                yield Lines(panels.checkpoints, id="checkpoints")
                yield Lines(panels.log, id="log")
        yield Lines(panels.newest, id="newest")
        yield Lines(panels.facts, id="facts")
        yield Lines(panels.message, id="message")
        yield Lines(panels.footer, id="footer")

    def on_mount(self) -> None:
        self._enlarge()
        self.show(self.view)

    def on_resize(self) -> None:
        width, height = self.size
        self.set_class(width < WIDE or height < HIGH, "-one-chart")
        self.set_class(height < ROOMY, "-tiny")

    # -- drawing

    def show(self, view: View) -> None:
        """Draw a new view; only what differs reaches the terminal."""
        self.view = replace(view, big=self.view.big, logarithmic=self.view.logarithmic)
        self._redraw()
        self._put_question()

    def _redraw(self) -> None:
        self.view = replace(self.view, message=self._desk.message(self.view))
        for lines in self.query(Lines):
            lines.show(self.view)
        top = self.app.screen
        if isinstance(top, Dialog):
            top.show(self.view)

    def _enlarge(self) -> None:
        for chart in self.query(Chart):
            chart.set_class(chart.signal == self.view.big, "big")

    # -- looking

    def action_next_chart(self) -> None:
        self.action_chart(CHARTS[(CHARTS.index(self.view.big) + 1) % len(CHARTS)])

    def action_chart(self, signal: str) -> None:
        self.view = replace(self.view, big=signal)
        self._enlarge()
        self._redraw()

    def action_logarithm(self) -> None:
        self.view = replace(self.view, logarithmic=self.view.logarithmic ^ {self.view.big})
        self._redraw()

    def action_help(self) -> None:
        self.app.push_screen(Pager("keys and signs", self.view, lambda view, width, height: keys.help_rows()))

    def action_journal(self) -> None:
        def rows(view: View, width: int, height: int) -> Sequence[Row]:
            lines = view.snapshot.story.lines
            return [line for event in lines for line in panels.log_rows(event, width)] or [((" nothing yet", "dim"),)]

        self.app.push_screen(Pager("journal", self.view, rows, tail=True))

    def action_leave(self) -> None:
        self.app.exit(return_code=0)

    # -- asking the run for something

    def _may(self) -> bool:
        """Whether control keys do anything now; says why not."""
        reason = controls.refusal(self.view.status, read_only=self.view.read_only)
        if reason:
            self._say(reason)
        return reason is None

    def _say(self, text: str) -> None:
        self._desk.notice(text)
        self._redraw()

    def _command(self, kind: CommandKind, value: float, label: str) -> None:
        self._desk.command(kind, value, label)
        self._redraw()

    def action_pause(self) -> None:
        if not self._may():
            return
        status = self.view.status
        if status is not None and status.question:
            self.action_answer()
            return
        # A pause that is still on its way counts: pressed again, the key takes it back.
        waiting = self._desk.waiting(CommandKind.PAUSE, CommandKind.RESUME)
        paused = status is not None and status.phase is Phase.PAUSED
        if waiting is CommandKind.PAUSE or (waiting is None and paused):
            self._command(CommandKind.RESUME, 0.0, "go on")
        else:
            self._command(CommandKind.PAUSE, 0.0, "pause")

    def action_checkpoint(self) -> None:
        if self._may():
            self._command(CommandKind.CHECKPOINT, 0.0, "checkpoint")

    def action_skip(self) -> None:
        text = ["How many of the next batches are left out? Their samples are never used in this run."]
        self._ask_number("skip batches", text, "1", CommandKind.SKIP)

    def action_rate(self) -> None:
        now = self.view.status.lr_factor if self.view.status else 1.0
        text = [f"Factor on the scheduled learning rate (now ×{now:g}; 1 is the schedule itself)."]
        self._ask_number("learning rate", text, "0.5", CommandKind.LR)

    def _ask_number(self, name: str, text: list[str], default: str, kind: CommandKind) -> None:
        if not self._may():
            return

        def send(value: float | None) -> None:
            if value is not None:
                skip = kind is CommandKind.SKIP
                label = f"skip {plural(int(value), 'batch')}" if skip else f"rate ×{value:g}"
                self._command(kind, value, label)

        dialog = Number(name, self.view, text=text, default=default, parse=lambda t: controls.number(t, kind))
        self.app.push_screen(dialog, send)

    def action_mode(self) -> None:
        if not self._may():
            return
        modes = list(Mode)
        now = self.view.status.mode if self.view.status else Mode.AUTO

        def send(index: int | None) -> None:
            if index is not None and modes[index] is not now:
                self._command(CommandKind.POLICY, float(index), f"mode {modes[index].value}")

        options = [(f"{mode.value:<8}{MODES[mode]}{' (now)' if mode is now else ''}", "") for mode in modes]
        dialog = Choose("who decides", self.view, text=[], options=options, cursor=modes.index(now))
        self.app.push_screen(dialog, send)

    def action_stop(self) -> None:
        if not self._may():
            return
        step = self.view.status.step if self.view.status else 0
        text = [f"Training saves a checkpoint at step {count(step)} and ends. It can be continued later."]
        self._confirm("stop training?", text, "stop", lambda: self._command(CommandKind.STOP, 0.0, "stop"))

    def _confirm(self, name: str, text: list[str], yes: str, then: Callable[[], None]) -> None:
        def done(answer: int | None) -> None:
            if answer == 1:
                then()

        self.app.push_screen(Confirm(name, self.view, text=text, yes=yes), done)

    def action_rollback(self) -> None:
        if not self._may():
            return
        known = panels.restorable(self.view.status)
        status = self.view.status
        if not known or status is None:
            self._say("there is no snapshot or checkpoint to go back to yet")
            return
        options = [
            (panels.snapshot(info, self.view.now), " ".join(controls.rollback_cost(info, status))) for info in known
        ]
        good = next((index for index, info in enumerate(known) if info.state == "good"), 0)

        def chosen(index: int | None) -> None:
            if index is not None:
                self._confirm_rollback(known[index])

        dialog = Choose("roll back to", self.view, text=[], options=options, cursor=good)
        self.app.push_screen(dialog, chosen)

    def _confirm_rollback(self, info: SnapshotInfo) -> None:
        status = self.view.status
        cost = controls.rollback_cost(info, status) if status is not None else []
        target = count(info.step)
        self._confirm(
            f"roll back to step {target}?",
            cost,
            f"roll back to {target}",
            lambda: self._command(CommandKind.ROLLBACK, float(info.step), f"roll back to {target}"),
        )

    # -- the guard asks

    def _put_question(self) -> None:
        """Put a new question on the screen by itself, once, when no other dialog is open."""
        question = self.view.status.question if self.view.status and not self.view.status.phase.ended else ""
        if not question:
            self._asked = ""
        elif question != self._asked and self.app.screen is self and not self.view.read_only:
            self._asked = question
            self.action_answer()

    def action_answer(self) -> None:
        if not self._may():
            return
        status = self.view.status
        if status is None or not status.question:
            self._say("the guard asks nothing now")
            return
        question = status.question
        proposed = PROPOSALS.get(next(iter(self.view.snapshot.story.proposals), ""), "")
        names = (ANSWERS[0] + proposed, *ANSWERS[1:])

        def send(index: int | None) -> None:
            if index is not None:
                self._command(CommandKind.ANSWER, float(index), f"answer: {names[index]}")

        dialog = Choose(
            f"step {count(status.step)}: the guard asks",
            self.view,
            text=[question, "", *_evidence(self.view), "Training is parked; nothing is lost by thinking."],
            options=[(name, "") for name in names],
            alive=lambda view: view.status is None or view.status.question == question,
        )
        self.app.push_screen(dialog, send)


def _evidence(view: View) -> list[str]:
    """The findings of the newest incident, when it is open."""
    found = view.snapshot.story.incidents
    if not found or not found[0].open:
        return []
    return [*(brief(finding.sentence(), 200) for finding in found[0].findings[:3]), ""]
