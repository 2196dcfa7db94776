"""Commands on their way: sent, answered by the journal with the step of their effect, refused with
the reason, or not answered yet, and said so. Pure but for the name of who gives them."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guardrail.core.errors import UsageError
from guardrail.core.format import (
    clean_and_shorten,
    format_count,
    format_plural,
    format_seconds_in_words,
)
from guardrail.core.records import Command, Shown, SnapshotInfo, Status
from guardrail.decide.control_commands.base import ControlCommand
from guardrail.operate.identity import sender_name
from guardrail.tui.model.health import HEARTBEAT_SECONDS
from guardrail.tui.model.reader import Reader
from guardrail.tui.model.view import View

if TYPE_CHECKING:
    from guardrail.operate.preview import Preview

SHOWN_SECONDS = 60.0  # an answer stays this long
NOTICE_SECONDS = 10.0  # why a key did nothing, so long: it may not be true any more after that
RENEW_SECONDS = 1.0  # between two previews of a command that somebody looks at


@dataclass(frozen=True)
class SentCommand:
    id: str
    kind: str
    label: str
    time: float


class LivePreview:
    """What a command would do now: asked for at once, and again each second that somebody looks.

    Args:
        ask: has it worked out; the answer comes as `Snapshot.previews` under the command's id.
    """

    def __init__(self, command: Command, ask: Callable[[Command], None]) -> None:
        self._command, self._ask = command, ask
        self._asked = command.time
        self.last: Preview | None = None  # the one that was looked at last
        ask(command)

    def newest(self, view: View) -> Preview | None:
        """The newest one; None until there is one."""
        found = view.snapshot.previews.get(self._command.id)
        if found is not None and view.now - self._asked >= RENEW_SECONDS:
            self._asked = view.now
            self._ask(self._command)
        self.last = found or self.last
        return self.last


class SentCommands:
    """The commands of this viewer.

    Args:
        reader: hands a command in (its failure comes back as `Snapshot.unsent`), works out
        previews, writes notes.
        clock: wall time.
    """

    def __init__(self, reader: Reader, clock: Callable[[], float]) -> None:
        self._send, self._preview, self._note = reader.send, reader.preview, reader.write_note
        self.choose_signals, self.request_rows = reader.choose_signals, reader.request_rows
        self._clock = clock
        self._sent: list[SentCommand] = []
        self._answered: dict[str, float] = {}
        self._notice: tuple[str, str, float] | None = None

    def send(
        self,
        kind: str,
        value: float,
        label: str,
        *,
        question: int | None = None,
        shown: Shown | None = None,
    ) -> None:
        """Send a command.

        Args:
            question: journal line of the question that was open for the viewer, 0: none was; None:
            that is not known.
            shown: what the viewer was shown that it does.
        """
        now = self._clock()
        sent = SentCommand(f"screen-{secrets.token_hex(8)}", kind, label, now)
        self._sent.append(sent)
        self._notice = None
        self._send(
            Command(
                id=sent.id,
                kind=kind,
                value=value,
                who=sender_name(),
                time=now,
                question=question,
                shown=shown,
            )
        )

    def preview(self, kind: str, value: float) -> LivePreview:
        """Ask what a command would do, again and again while somebody looks."""
        command = Command(
            id=f"preview-{secrets.token_hex(8)}",
            kind=kind,
            value=value,
            who=sender_name(),
            time=self._clock(),
        )
        return LivePreview(command, self._preview)

    def write_note(self, text: str) -> None:
        """Write a note into the journal; it is seen there."""
        self._notice = None
        self._note(f"{text} ({sender_name()})")

    def newest_waiting(self, *kinds: str) -> str | None:
        """The newest command of these kinds that has no answer yet."""
        waiting = (sent.kind for sent in reversed(self._sent) if sent.id not in self._answered)
        return next((kind for kind in waiting if kind in kinds), None)

    def show_notice(self, text: str, tone: str = "warn") -> None:
        """Something for the viewer alone."""
        self._notice = (text, tone, self._clock())

    def message(self, view: View) -> tuple[str, str]:
        """(text, tone) of the message line."""
        for sent in self._sent:
            if sent.id in view.snapshot.story.answers or sent.id in view.snapshot.unsent:
                self._answered.setdefault(sent.id, view.now)
        # Answers leave after a while; what waits for one never does.
        self._sent = [
            s for s in self._sent if view.now - self._answered.get(s.id, view.now) < SHOWN_SECONDS
        ]
        if self._notice and view.now - self._notice[2] < NOTICE_SECONDS:
            return self._notice[0], self._notice[1]
        if not self._sent:
            return "", "plain"
        waiting = [sent for sent in self._sent if sent.id not in self._answered]
        text, tone = self._state(self._sent[-1], view)
        others = len(waiting) - (bool(waiting) and waiting[-1] is self._sent[-1])
        return text + (
            f"  (and {format_plural(others, 'command')} without an answer yet)" if others else ""
        ), tone

    def _state(self, sent: SentCommand, view: View) -> tuple[str, str]:
        reason = view.snapshot.unsent.get(sent.id)
        if reason is not None:
            return f"✗ {sent.label}: could not be sent: {reason}", "bad"
        answer = view.snapshot.story.answers.get(sent.id)
        if answer is None and view.status is not None and view.status.phase.ended:
            return f"✗ {sent.label}: the run ended before it answered", "bad"
        if answer is None:
            silent = ", and no sign of life of the run" if view.silence > HEARTBEAT_SECONDS else ""
            return (
                f"… {sent.label}: sent, no answer yet ({format_seconds_in_words(view.now - sent.time)}{silent})",
                "accent",
            )
        why = f": {answer.reason}" if answer.reason else ""
        if answer.applied:
            return f"✓ {sent.label}: took effect at step {format_count(answer.step)}{why}", "good"
        # The reason first: a narrow line is cut at its end, and what was asked for is known to who
        # has asked.
        return f"✗ refused{why} ({sent.label}, step {format_count(answer.step)})", "bad"


def why_refused(
    status: Status | None, *, read_only: bool, lost: bool = False, name: str = "RUN"
) -> str | None:
    """Why no control key can do anything now, or None.

    Args:
        lost: no process of the run has written anything for long.
        name: of the run.
    """
    if read_only:
        return "read-only: this screen controls nothing (attach without --read-only to control)"
    if status is not None and status.phase.ended:
        return f"the run has ended ({status.phase.value}); there is nothing to control"
    if lost:
        return f"the run does not respond: no process reads commands. Start it again: guardrail launch --resume {name}"
    return None


def parse_value(text: str, kind: type[ControlCommand]) -> float | str:
    """Return the value of a command, or what is wrong with the text."""
    try:
        return kind.argument.parse(kind.name, text)
    except UsageError as error:
        return str(error)


def preview_lines(preview: Preview) -> list[str]:
    """What a command would do, one fact a line, the gravest first."""
    if not preview.possible:
        return [f"✗ It would be refused: {preview.refusal}."]
    lines = []
    if preview.to_step is not None:
        took = (
            f", {format_seconds_in_words(preview.seconds_lost)} of training"
            if preview.seconds_lost >= 0.5
            else ""
        )
        lines.append(
            f"Goes back to step {format_count(preview.to_step)} ({preview.tier}, {preview.state})."
        )
        lines.append(f"Loses {format_plural(preview.steps_lost, 'step')}{took}.")
    if preview.samples:
        lines.append(
            f"Leaves out {format_plural(preview.samples, 'sample')} for the rest of the run."
        )
    if preview.returned:
        lines.append(f"Brings {format_plural(preview.returned, 'sample')} back.")
    if math.isfinite(preview.lr):
        rate, now = f"{preview.lr:.3g}", f"{preview.lr_before:.3g}"
        before = f", now {now}" if math.isfinite(preview.lr_before) and now != rate else ""
        lines.append(f"Learning rate afterwards {rate}{before}.")
    if preview.state == "suspect":
        lines.append(
            "▲ This state is suspect: it was taken after the trouble is thought to have begun."
        )
    elif preview.state == "candidate":
        lines.append("It is a candidate: too few healthy steps have followed it to call it good.")
    if preview.remark:
        lines.append(clean_and_shorten(preview.remark[:1].upper() + preview.remark[1:], 300) + ".")
    return lines or ["Nothing is lost by it."]


def rollback_cost(info: SnapshotInfo, status: Status) -> list[str]:
    """What going back to a state costs, one fact a line."""
    steps, samples = max(0, status.step - info.step), max(0, status.cursor - info.cursor)
    lines = [f"Loses {format_plural(steps, 'step')}" + _since(info, status) + "."]
    if samples:
        lines.append(
            f"Leaves out the data that came after it: up to {format_plural(samples, 'sample')}."
        )
    if info.state == "suspect":
        lines.append(
            "▲ This state is suspect: it was taken after the trouble is thought to have begun."
        )
    elif info.state == "candidate":
        lines.append("It is a candidate: too few healthy steps have followed it to call it good.")
    return lines


def _since(info: SnapshotInfo, status: Status) -> str:
    seconds = status.heartbeat - info.time
    return (
        f", made in the last {format_seconds_in_words(seconds)}"
        if info.time > 0 and seconds >= 1
        else ""
    )
