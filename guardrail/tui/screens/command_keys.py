"""The keys that send commands to the run.

A command's own class says which dialog it needs: none, a number, a word, or a preview with a Yes.
The default of a preview is No. Only `pause`, `rollback` and `answer` have special dialogs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from guardrail.core.format import format_count
from guardrail.core.records.commands import Shown
from guardrail.core.records.status import Phase, SnapshotInfo
from guardrail.decide.control_commands.answer import Answer
from guardrail.decide.control_commands.arguments import Word
from guardrail.decide.control_commands.base import ControlCommand
from guardrail.decide.control_commands.pause import Pause
from guardrail.decide.control_commands.registry import find_command, shown_in
from guardrail.decide.control_commands.resume import Resume
from guardrail.decide.control_commands.rollback import Rollback
from guardrail.tui.draw.lines import Row
from guardrail.tui.model import sent_commands as controls
from guardrail.tui.model.sent_commands import SentCommands
from guardrail.tui.model.view import View
from guardrail.tui.panes.incidents import newest_evidence_rows
from guardrail.tui.panes.snapshots import restorable_states, snapshot_row
from guardrail.tui.screens.choice_dialogs import Choose, Confirm
from guardrail.tui.screens.dialog import Dialog
from guardrail.tui.screens.input_dialogs import Number, Text
from guardrail.tui.screens.question_dialog import Question
from guardrail.tui.screens.question_keys import (
    ANSWERS,
    OpenQuestion,
    question_lines,
    time_left,
)

if TYPE_CHECKING:
    from textual.screen import Screen

    Base = Screen[None]
else:
    Base = object

T = TypeVar("T")

# What the message line and a preview say.
NO_STATE = "there is no snapshot or checkpoint to restore yet"
NO_QUESTION = "the guard asks nothing now"
WORKING = "(working out the rest …)"


class CommandKeys(Base):
    """The part of the dashboard that sends commands.

    Attributes:
        view: what is on the screen.
        commands: the commands of this viewer.
    """

    view: View
    commands: SentCommands
    _asked = OpenQuestion()  # the question that was on the screen last

    def redraw(self) -> None:
        """Draw the screen again."""
        raise NotImplementedError

    def say(self, text: str, tone: str = "warn") -> None:
        """Show a text in the message line."""
        self.commands.show_notice(text, tone)
        self.redraw()

    def action_command(self, name: str) -> None:
        """Send a command, after the dialog that it needs."""
        kind = find_command(name)
        if kind is None or not self._may_control():
            return
        own_dialogs = {
            Pause.name: self._pause_or_resume,
            Rollback.name: self._choose_state,
            Answer.name: self._answer,
        }
        if name in own_dialogs:
            own_dialogs[name]()
        elif kind.argument.default is not None:
            self._ask_number(kind)
        elif isinstance(kind.argument, Word):
            self._choose_word(kind, kind.argument)
        else:
            command = kind(kind.argument.omitted or 0.0)
            if kind.key is not None and kind.key.asks_first:
                self._confirm(command, kind.dialog_lines(self.view.status))
            else:
                self._send(command)

    def action_note(self) -> None:
        """Ask for a note and write it into the journal."""
        if not self._may_control():
            return

        def write(text: str | None) -> None:
            if text and text.strip():
                self.commands.write_note(text.strip())
                self.redraw()

        lines = ["It goes into the journal, with your name."]
        self.app.push_screen(Text("note", self.view, text=lines), write)

    # -- what all commands share

    def _may_control(self) -> bool:
        """Return whether control keys do anything now; shows why not."""
        view = self.view
        reason = controls.why_refused(
            view.status, read_only=view.read_only, lost=view.lost, name=view.snapshot.name
        )
        if reason:
            self.say(reason)
        return reason is None

    def _open(self, dialog: Dialog[T], done: Callable[[T | None], None]) -> None:
        """Open a dialog that is of use only while the run can be controlled.

        Args:
            done: gets its result; None: it was closed.
        """
        still_open = dialog.alive
        dialog.alive = lambda view: _is_controllable(view) and still_open(view)

        def closed(result: T | None) -> None:
            if dialog.lapsed:
                self._may_control()  # shows why, where the run has ended
            else:
                done(result)

        self.app.push_screen(dialog, closed)

    def _send(
        self,
        command: ControlCommand,
        label: str = "",
        *,
        question: int | None = None,
        shown: Shown | None = None,
    ) -> None:
        if not self._may_control():
            return
        self.commands.send(
            command.name,
            command.value,
            label or command.label(),
            question=question,
            shown=shown,
        )
        self.redraw()

    def _confirm(self, command: ControlCommand, lines: Sequence[str]) -> None:
        """Show what a command would do, and send it on Yes.

        Args:
            lines: shown until the preview is known.
        """
        if not self._may_control():
            return
        label = command.label()
        foreseen = self.commands.preview(command.name, command.value)

        def describe(view: View) -> Sequence[str]:
            preview = foreseen.newest(view)
            if preview is None:
                return [*lines, WORKING]
            return controls.preview_lines(preview)

        def done(answer: int | None) -> None:
            if answer != 1:
                return
            preview = foreseen.last
            if preview is None or not preview.worked_out:
                self._send(command)
                return
            chosen = command
            if math.isnan(command.value) and preview.possible:
                # The newest one was meant: what is sent names the one that was shown.
                chosen = type(command)(preview.value)
            self._send(chosen, label, question=preview.question, shown=shown_in(preview))

        def is_ready(view: View) -> bool:
            return foreseen.last is not None or not command.waits_for_preview

        dialog = Confirm(f"{label}?", self.view, text=describe, yes=label, ready=is_ready)
        self._open(dialog, done)

    # -- dialogs for an argument

    def _ask_number(self, kind: type[ControlCommand]) -> None:
        def ask(value: float | None) -> None:
            if value is not None:
                self._confirm(kind(value), [])

        dialog = Number(
            _title_of(kind),
            self.view,
            text=kind.dialog_lines(self.view.status),
            default=f"{kind.argument.default:g}",
            parse=lambda text: controls.parse_value(text, kind),
        )
        self._open(dialog, ask)

    def _choose_word(self, kind: type[ControlCommand], argument: Word) -> None:
        now = kind.current_value(self.view.status)

        def send(index: int | None) -> None:
            if index is not None and index != now:
                self._send(kind(float(index)), shown=Shown(instead_of=now))

        options = []
        meanings = [*argument.meanings, *[""] * len(argument.words)]
        for index, word in enumerate(argument.words):
            label = f"{word:<8}{meanings[index]}"
            if index == now:
                label += " (now)"
            options.append((label, ""))
        cursor = int(now or 0)
        dialog = Choose(_title_of(kind), self.view, text=[], options=options, cursor=cursor)
        self._open(dialog, send)

    # -- commands with a special dialog

    def _pause_or_resume(self) -> None:
        status = self.view.status
        if status is not None and status.question:
            self._answer()
            return
        # A pause that has no answer yet counts: the key pressed again takes it back.
        waiting = self.commands.newest_waiting(Pause.name, Resume.name)
        is_paused = status is not None and status.phase is Phase.PAUSED
        if waiting is not None:
            is_paused = waiting == Pause.name
        self._send(Resume() if is_paused else Pause())

    def _choose_state(self) -> None:
        known = restorable_states(self.view.status)
        status = self.view.status
        if not known or status is None:
            self.say(NO_STATE)
            return
        options: list[tuple[str | Row, str]] = [
            (snapshot_row(info, self.view.now), " ".join(controls.rollback_cost(info, status)))
            for info in known
        ]
        good = [index for index, info in enumerate(known) if info.state == "good"]
        cursor = next(iter(good), 0)

        def chosen(index: int | None) -> None:
            if index is not None:
                self._confirm_rollback(known[index])

        dialog = Choose("roll back to", self.view, text=[], options=options, cursor=cursor)
        self._open(dialog, chosen)

    def _confirm_rollback(self, info: SnapshotInfo) -> None:
        status = self.view.status
        lines = []
        if status is not None:
            lines = controls.rollback_cost(info, status)
        self._confirm(Rollback(float(info.step)), lines)

    # -- the guard asks

    def put_question(self) -> None:
        """Open the dialog of a new question, once, when no other dialog is open."""
        status = self.view.status
        if status is None or not status.question or status.phase.ended:
            self._asked = OpenQuestion()
        elif self._may_open_by_itself() and not self._asked.is_open(self.view):
            self._answer(by_itself=True)
        elif status.question_number:
            self._asked = OpenQuestion(status.question, status.question_number)

    def _may_open_by_itself(self) -> bool:
        return self.app.screen is self and not self.view.read_only

    def _answer(self, by_itself: bool = False) -> None:
        if not self._may_control():
            return
        status = self.view.status
        if status is None or not status.question:
            self.say(NO_QUESTION)
            return
        self._asked = OpenQuestion(status.question, status.question_number)
        asked = OpenQuestion(status.question, status.question_number)

        def send(index: int | None) -> None:
            if index is not None and asked.line:
                self._send_answer(asked, index)

        dialog = Question(
            f"step {format_count(status.step)}: the guard asks",
            self.view,
            text=lambda view: question_lines(view, asked.text),
            options=asked.choices,
            alive=lambda view: view.status is None or asked.is_open(view),
            evidence=newest_evidence_rows,
            left=time_left,
        )
        dialog.by_itself = by_itself
        self._open(dialog, send)

    def _send_answer(self, asked: OpenQuestion, index: int) -> None:
        story = self.view.snapshot.story
        name: str | Row = ANSWERS[index]
        shown = None
        if asked.line == story.question:
            choices = asked.choices(self.view)
            if index < len(choices):
                name = choices[index][0]
            if index < len(story.shown):
                shown = story.shown[index]
        self._send(Answer(float(index)), f"answer: {name}", question=asked.line, shown=shown)


def _is_controllable(view: View) -> bool:
    return controls.why_refused(view.status, read_only=view.read_only, lost=view.lost) is None


def _title_of(kind: type[ControlCommand]) -> str:
    if kind.key is None or not kind.key.title:
        return kind.name
    return kind.key.title
