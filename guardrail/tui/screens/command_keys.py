"""The keys that ask the run for something: each says first what it would do, and the default is
No.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from guardrail.core.format import (
    clean_and_shorten,
    format_count,
    format_plural,
    format_seconds_in_words,
)
from guardrail.core.records import CommandKind, Mode, Phase, Shown, SnapshotInfo, Status
from guardrail.tui.draw.lines import Row
from guardrail.tui.model import sent_commands as controls
from guardrail.tui.model.sent_commands import SentCommands
from guardrail.tui.model.view import View
from guardrail.tui.panes.incidents import evidence
from guardrail.tui.panes.snapshots import restorable, snapshot
from guardrail.tui.screens.dialogs import Choose, Confirm, Dialog, Number, Question, Text

if TYPE_CHECKING:
    from textual.screen import Screen

    Base = Screen[None]
else:
    Base = object

T = TypeVar("T")

MODES = {
    Mode.AUTO: "acts by itself",
    Mode.ASK: "parks training before a rollback and asks",
    Mode.ADVISE: "says what it would do and changes nothing",
    Mode.OFF: "detects nothing",
}
PROPOSALS = {
    "rollback": ": roll back, leave that data out",
    "back": ": roll back, leave nothing out",
    "halt": ": save and end",
    "skip": ": leave it out",
}
ANSWERS = ("Do as proposed", "Go on as if nothing had happened", "Stop here with a checkpoint")
DEFAULTS = {
    "proposal": "what is proposed is done",
    "continue": "it goes on",
    # as versions before 0.2 wrote them
    "proposed": "what is proposed is done",
    "go_on": "it goes on",
    "stop": "it stops with a checkpoint",
}


class CommandKeys(Base):
    """Part of the dashboard."""

    view: View
    commands: SentCommands
    _asked: tuple[str, int] = ("", 0)  # the question that has been put on the screen

    def redraw(self) -> None:
        raise NotImplementedError

    def say(self, text: str, tone: str = "warn") -> None:
        self.commands.show_notice(text, tone)
        self.redraw()

    def _may(self) -> bool:
        """Whether control keys do anything now; says why not."""
        view = self.view
        reason = controls.why_refused(
            view.status, read_only=view.read_only, lost=view.lost, name=view.snapshot.name
        )
        if reason:
            self.say(reason)
        return reason is None

    def _open(self, dialog: Dialog[T], done: Callable[[T | None], None]) -> None:
        """Put a dialog on the screen that can only be of use while the run can be controlled.

        Args:
            done: what follows its result; None: it was closed.
        """
        still_open = dialog.alive
        dialog.alive = lambda view: _is_controllable(view) and still_open(view)

        def closed(result: T | None) -> None:
            if dialog.lapsed:
                self._may()  # says why, where it is the run that has ended
            else:
                done(result)

        self.app.push_screen(dialog, closed)

    def _command(
        self,
        kind: CommandKind,
        value: float,
        label: str,
        *,
        question: int | None = None,
        shown: Shown | None = None,
    ) -> None:
        if not self._may():
            return
        self.commands.send(kind, value, label, question=question, shown=shown)
        self.redraw()

    def action_pause(self) -> None:
        if not self._may():
            return
        status = self.view.status
        if status is not None and status.question:
            self.action_answer()
            return
        # A pause that is still on its way counts: pressed again, the key takes it back.
        waiting = self.commands.newest_waiting(CommandKind.PAUSE, CommandKind.RESUME)
        paused = status is not None and status.phase is Phase.PAUSED
        if waiting is CommandKind.PAUSE or (waiting is None and paused):
            self._command(CommandKind.RESUME, 0.0, "go on")
        else:
            self._command(CommandKind.PAUSE, 0.0, "pause")

    def action_checkpoint(self) -> None:
        self._command(CommandKind.CHECKPOINT, 0.0, "checkpoint")

    def action_note(self) -> None:
        if not self._may():
            return

        def send(text: str | None) -> None:
            if text and text.strip():
                self.commands.write_note(text.strip())
                self.redraw()

        self.app.push_screen(
            Text("note", self.view, text=["It goes into the journal, with your name."]), send
        )

    # -- numbers

    def action_skip(self) -> None:
        text = [
            "How many of the next batches are left out? Their samples are never used in this run."
        ]
        self._ask_number(
            "skip batches",
            text,
            "1",
            CommandKind.SKIP,
            lambda v: f"skip {format_plural(int(v), 'batch')}",
        )

    def action_rate(self) -> None:
        now = self.view.status.lr_factor if self.view.status else 1.0
        text = [f"Factor on the scheduled learning rate (now ×{now:g}; 1 is the schedule itself)."]
        self._ask_number("learning rate", text, "0.5", CommandKind.LR, lambda v: f"rate ×{v:g}")

    def action_alpha(self) -> None:
        text = ["Factor on the gradients of the embedding, in (0, 1]; 1 leaves them as they are."]
        self._ask_number(
            "embedding",
            text,
            "0.1",
            CommandKind.SHRINK_EMBEDDING,
            lambda v: f"embedding gradients ×{v:g}",
        )

    def _ask_number(
        self,
        name: str,
        text: list[str],
        default: str,
        kind: CommandKind,
        label: Callable[[float], str],
    ) -> None:
        if not self._may():
            return

        def ask(value: float | None) -> None:
            if value is not None:
                self._consider(kind, value, label(value))

        dialog = Number(
            name,
            self.view,
            text=text,
            default=default,
            parse=lambda t: controls.parse_value(t, kind),
        )
        self._open(dialog, ask)

    # -- what asks before it is sent

    def _consider(
        self, kind: CommandKind, value: float, label: str, costs: Sequence[str] = ()
    ) -> None:
        """Show what the command would do, and send it on Yes. `costs` stand there until the preview
        is made.
        """
        if not self._may():
            return
        foreseen = self.commands.preview(kind, value)

        def describe(view: View) -> Sequence[str]:
            preview = foreseen.newest(view)
            return (
                [*controls.preview_lines(preview)]
                if preview is not None
                else [*costs, "(working out the rest …)"]
            )

        def done(answer: int | None) -> None:
            preview = foreseen.last
            if answer == 1 and preview is None:
                self._command(kind, value, label)
            elif answer == 1 and preview is not None:
                # Undo without a line means the newest decision: what is sent names the line that
                # was shown.
                line = preview.value if kind is CommandKind.UNDO and preview.possible else value
                known = preview.worked_out
                self._command(
                    kind,
                    line,
                    label,
                    question=preview.question if known else None,
                    shown=preview.shown() if known else None,
                )

        def ready(view: View) -> bool:
            # A stop saves and ends whatever has changed: it waits for nothing.
            return foreseen.last is not None or kind is CommandKind.STOP

        self._open(Confirm(f"{label}?", self.view, text=describe, yes=label, ready=ready), done)

    def action_stop(self) -> None:
        step = self.view.status.step if self.view.status else 0
        text = f"Training saves a checkpoint at step {format_count(step)} and ends. It can be continued later."
        self._consider(CommandKind.STOP, 0.0, "stop", [text])

    def action_undo(self) -> None:
        text = "The guard's newest decision is taken back: its samples may be used again."
        self._consider(CommandKind.UNDO, math.nan, "undo", [text])

    def action_accept(self) -> None:
        text = "The incident that is not over counts as over, and later states may become good."
        self._consider(CommandKind.ACCEPT, 0.0, "accept the run as it is", [text])

    def action_rollback(self) -> None:
        if not self._may():
            return
        known = restorable(self.view.status)
        status = self.view.status
        if not known or status is None:
            self.say("there is no snapshot or checkpoint to go back to yet")
            return
        options: list[tuple[str | Row, str]] = [
            (snapshot(info, self.view.now), " ".join(controls.rollback_cost(info, status)))
            for info in known
        ]
        good = next((index for index, info in enumerate(known) if info.state == "good"), 0)

        def chosen(index: int | None) -> None:
            if index is not None:
                self._confirm_rollback(known[index])

        self._open(Choose("roll back to", self.view, text=[], options=options, cursor=good), chosen)

    def _confirm_rollback(self, info: SnapshotInfo) -> None:
        status = self.view.status
        cost = controls.rollback_cost(info, status) if status is not None else []
        self._consider(
            CommandKind.ROLLBACK,
            float(info.step),
            f"roll back to step {format_count(info.step)}",
            cost,
        )

    def action_mode(self) -> None:
        if not self._may():
            return
        modes = list(Mode)
        now = self.view.status.mode if self.view.status else Mode.AUTO

        def send(index: int | None) -> None:
            if index is not None and modes[index] is not now:
                shown = Shown(instead_of=float(modes.index(now)))
                self._command(
                    CommandKind.MODE, float(index), f"mode {modes[index].value}", shown=shown
                )

        options = [
            (f"{mode.value:<8}{MODES[mode]}{' (now)' if mode is now else ''}", "") for mode in modes
        ]
        dialog = Choose("who decides", self.view, text=[], options=options, cursor=modes.index(now))
        self._open(dialog, send)

    # -- the guard asks

    def put_question(self) -> None:
        """Put a new question on the screen by itself, once, when no other dialog is open."""
        status = self.view.status
        if status is None or not status.question or status.phase.ended:
            self._asked = ("", 0)
        elif (
            not _is_open(self.view, *self._asked)
            and self.app.screen is self
            and not self.view.read_only
        ):
            self.action_answer(by_itself=True)
        elif status.question_number:
            self._asked = (status.question, status.question_number)

    def action_answer(self, by_itself: bool = False) -> None:
        if not self._may():
            return
        status = self.view.status
        if status is None or not status.question:
            self.say("the guard asks nothing now")
            return
        self._asked = (status.question, status.question_number)
        question = status.question
        asked = Asked(question, status.question_number)

        def send(index: int | None) -> None:
            if index is not None and asked.line:
                story = self.view.snapshot.story
                same = asked.line == story.question
                name = _choices(self.view, asked)[index][0] if same else ""
                shown = story.shown[index] if same and index < len(story.shown) else None
                label = f"answer: {name or ANSWERS[index]}"
                self._command(
                    CommandKind.ANSWER, float(index), label, question=asked.line, shown=shown
                )

        dialog = Question(
            f"step {format_count(status.step)}: the guard asks",
            self.view,
            text=lambda view: [question, "", *_patience(view), "", *_findings(view)],
            options=lambda view: _choices(view, asked),
            alive=lambda view: view.status is None or _is_open(view, asked.text, asked.line),
            evidence=evidence,
            left=_left,
        )
        dialog.by_itself = by_itself
        self._open(dialog, send)


def _is_controllable(view: View) -> bool:
    return controls.why_refused(view.status, read_only=view.read_only, lost=view.lost) is None


@dataclass
class Asked:
    """A question that stands on the screen.

    Attributes:
        line: number of its journal line; 0: it is not known yet.
    """

    text: str
    line: int


def _is_open(view: View, text: str, line: int) -> bool:
    """Whether this question is the one that is open. One whose number is not known yet is known by
    its text.
    """
    status = view.status
    if status is None or status.question != text or not text:
        return False
    return not line or not status.question_number or line == status.question_number


def _choices(view: View, asked: Asked) -> list[tuple[str | Row, str]]:
    """What can be answered to this question, with the cost of each; nothing until its journal line
    is read.
    """
    story, status = view.snapshot.story, view.status
    if not story.question or story.asked != asked.text or status is None:
        return []
    if status.question_number and status.question_number != story.question:
        return []
    asked.line = asked.line or story.question
    if asked.line != story.question:
        return []
    proposed = PROPOSALS.get(next(iter(story.proposals), ""), "")
    names = (ANSWERS[0] + proposed, *ANSWERS[1:])
    costs = story.costs
    return [(name, costs[index] if index < len(costs) else "") for index, name in enumerate(names)]


def _findings(view: View) -> list[str]:
    """The findings of the newest incident, when it is open."""
    found = view.snapshot.story.incidents
    if not found or not found[0].open:
        return []
    return [clean_and_shorten(finding.sentence(), 200) for finding in found[0].findings[:3]]


def _patience(view: View) -> list[str]:
    """How long the guard waits and what it does then; then that there is no hurry."""
    status = view.status
    calm = "Training is parked; nothing is lost by thinking."
    if status is None or not status.deadline:
        return [calm]
    then = DEFAULTS.get(status.default, "it decides by itself")
    return [
        f"Without an answer in {format_seconds_in_words(_seconds_left(status, view.now))} {then}.",
        calm,
    ]


def _left(view: View) -> str:
    status = view.status
    return (
        f"{format_seconds_in_words(_seconds_left(status, view.now))} left"
        if status is not None and status.deadline
        else ""
    )


def _seconds_left(status: Status, now: float) -> float:
    return max(0.0, status.deadline - now)
