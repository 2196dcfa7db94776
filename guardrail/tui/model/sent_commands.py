"""Commands of this viewer: sent, answered in the journal, refused, or not answered yet. Pure, but for
the name of the user.
"""

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
from guardrail.core.records.commands import Command, Shown
from guardrail.core.records.status import SnapshotInfo, Status
from guardrail.decide.control_commands.base import ControlCommand
from guardrail.operate.identity import sender_name
from guardrail.tui.model.health import HEARTBEAT_SECONDS
from guardrail.tui.model.reader import Reader
from guardrail.tui.model.run_story import CommandAnswer
from guardrail.tui.model.view import View

if TYPE_CHECKING:
    from guardrail.operate.preview import Preview

SHOWN_SECONDS = 60.0  # how long an answer is shown
NOTICE_SECONDS = 10.0  # how long a notice is shown: it may not be true any more after that
RENEW_SECONDS = 1.0  # between two previews of a command while a dialog shows it
ENDED_BEFORE = "the run ended before it answered"


@dataclass(frozen=True)
class SentCommand:
    id: str
    kind: str
    label: str
    time: float


class LivePreview:
    """What a command would do now: asked for at once, and each second while a dialog shows it.

    Args:
        ask: starts a preview; the result comes in `Snapshot.previews` under the command's id.

    Attributes:
        last: the preview that was shown last.
    """

    def __init__(self, command: Command, ask: Callable[[Command], None]) -> None:
        self._command, self._ask = command, ask
        self._asked = command.time
        self.last: Preview | None = None
        ask(command)

    def newest(self, view: View) -> Preview | None:
        """Return the newest preview; None until there is one."""
        found = view.snapshot.previews.get(self._command.id)
        if found is not None and view.now - self._asked >= RENEW_SECONDS:
            self._asked = view.now
            self._ask(self._command)
        self.last = found or self.last
        return self.last


class SentCommands:
    """The commands of this viewer.

    Args:
        reader: sends commands, works out previews, writes notes.
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
        """Start a preview of a command, which is renewed while it is shown."""
        command = Command(
            id=f"preview-{secrets.token_hex(8)}",
            kind=kind,
            value=value,
            who=sender_name(),
            time=self._clock(),
        )
        return LivePreview(command, self._preview)

    def write_note(self, text: str) -> None:
        """Write a note into the journal; the log shows it."""
        self._notice = None
        self._note(f"{text} ({sender_name()})")

    def newest_waiting(self, *kinds: str) -> str | None:
        """Return the newest command of these kinds that has no answer yet."""
        waiting = (sent.kind for sent in reversed(self._sent) if sent.id not in self._answered)
        return next((kind for kind in waiting if kind in kinds), None)

    def show_notice(self, text: str, tone: str = "warn") -> None:
        """Show a text in the message line of this screen."""
        self._notice = (text, tone, self._clock())

    def message(self, view: View) -> tuple[str, str]:
        """Return (text, tone) of the message line."""
        self._forget_old_answers(view)
        if self._notice and view.now - self._notice[2] < NOTICE_SECONDS:
            return self._notice[0], self._notice[1]
        if not self._sent:
            return "", "plain"
        text, tone = self._describe(self._sent[-1], view)
        others = sum(sent.id not in self._answered for sent in self._sent[:-1])
        if others:
            text += f"  (and {format_plural(others, 'command')} without an answer yet)"
        return text, tone

    def _forget_old_answers(self, view: View) -> None:
        """Forget commands 60 s after their answer. One without an answer is never forgotten."""
        for sent in self._sent:
            if sent.id in view.snapshot.story.answers or sent.id in view.snapshot.unsent:
                self._answered.setdefault(sent.id, view.now)
        kept = []
        for sent in self._sent:
            if view.now - self._answered.get(sent.id, view.now) < SHOWN_SECONDS:
                kept.append(sent)
        self._sent = kept

    def _describe(self, sent: SentCommand, view: View) -> tuple[str, str]:
        reason = view.snapshot.unsent.get(sent.id)
        if reason is not None:
            return f"✗ {sent.label}: could not be sent: {reason}", "bad"
        answer = view.snapshot.story.answers.get(sent.id)
        if answer is not None:
            return _describe_answer(sent, answer)
        if view.status is not None and view.status.phase.ended:
            return f"✗ {sent.label}: {ENDED_BEFORE}", "bad"
        waited = format_seconds_in_words(view.now - sent.time)
        if view.silence > HEARTBEAT_SECONDS:
            waited += "; the run does not respond"
        return f"… {sent.label}: sent, no answer yet ({waited})", "accent"


def _describe_answer(sent: SentCommand, answer: CommandAnswer) -> tuple[str, str]:
    why = f": {answer.reason}" if answer.reason else ""
    step = format_count(answer.step)
    if answer.applied:
        return f"✓ {sent.label}: took effect at step {step}{why}", "good"
    # The reason comes first: a narrow line is cut at its end.
    return f"✗ refused{why} ({sent.label}, step {step})", "bad"


def why_refused(
    status: Status | None, *, read_only: bool, lost: bool = False, name: str = "RUN"
) -> str | None:
    """Return why control keys do nothing now; None where they do.

    Args:
        lost: no process of the run has written anything for 60 s.
        name: of the run.
    """
    if read_only:
        return "read-only: attach without --read-only to send commands"
    if status is not None and status.phase.ended:
        return f"the run has ended ({status.phase.value}): it takes no commands"
    if lost:
        again = f"guardrail launch --resume {name}"
        return f"the run does not respond: no process reads commands. Start it again: {again}"
    return None


def parse_value(text: str, kind: type[ControlCommand]) -> float | str:
    """Return the value of a command, or what is wrong with the text."""
    try:
        return kind.argument.parse(kind.name, text)
    except UsageError as error:
        return str(error)


# state of a snapshot -> what the user must know before it is restored
STATE_WARNINGS = {
    "suspect": "▲ This state is suspect: it was saved after the estimated start of the anomaly.",
    "candidate": "Not confirmed yet: too few healthy steps since this snapshot.",
}


def preview_lines(preview: Preview) -> list[str]:
    """Return what a command would do, one sentence for each fact, the most important first."""
    if not preview.possible:
        return [f"✗ It would be refused: {preview.refusal}."]
    lines = []
    if preview.to_step is not None:
        state = f"{preview.tier}, {preview.state}"
        lines.append(f"Restores step {format_count(preview.to_step)} ({state}).")
        lines.append(_discarded(preview))
    if preview.samples:
        samples = format_plural(preview.samples, "sample")
        lines.append(f"Skips {samples} for the rest of the run.")
    if preview.returned:
        lines.append(f"Allows {format_plural(preview.returned, 'skipped sample')} again.")
    if math.isfinite(preview.lr):
        lines.append(_new_rate(preview))
    if preview.state in STATE_WARNINGS:
        lines.append(STATE_WARNINGS[preview.state])
    if preview.remark:
        remark = preview.remark[:1].upper() + preview.remark[1:]
        lines.append(f"{clean_and_shorten(remark, 300)}.")
    return lines or ["No step is discarded."]


def _discarded(preview: Preview) -> str:
    line = f"Discards {format_plural(preview.steps_lost, 'step')}"
    if preview.seconds_lost >= 0.5:
        line += f", {format_seconds_in_words(preview.seconds_lost)} of training"
    return f"{line}."


def _new_rate(preview: Preview) -> str:
    rate, now = f"{preview.lr:.3g}", f"{preview.lr_before:.3g}"
    if not math.isfinite(preview.lr_before) or now == rate:
        return f"Learning rate after this {rate}."
    return f"Learning rate after this {rate}, now {now}."


def rollback_cost(info: SnapshotInfo, status: Status) -> list[str]:
    """Return what a rollback to a state costs, one sentence for each fact."""
    steps, samples = max(0, status.step - info.step), max(0, status.cursor - info.cursor)
    line = f"Discards {format_plural(steps, 'step')}"
    seconds = status.heartbeat - info.time
    if info.time > 0 and seconds >= 1:
        line += f", trained in the last {format_seconds_in_words(seconds)}"
    lines = [f"{line}."]
    if samples:
        lines.append(f"Skips the data after it: up to {format_plural(samples, 'sample')}.")
    if info.state in STATE_WARNINGS:
        lines.append(STATE_WARNINGS[info.state])
    return lines
