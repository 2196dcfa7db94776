"""A run as lines on stderr, for logs and for terminals without a screen."""

from __future__ import annotations

import contextlib
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

from guardrail.core.errors import ExitCode
from guardrail.core.events.event import Event
from guardrail.core.events.run_state import Paused
from guardrail.core.format import format_elapsed
from guardrail.core.records.signals import EMBED_GRAD_NORM, GRAD_NORM, LOSS
from guardrail.core.records.status import Phase, Status
from guardrail.core.records.verdicts import Action
from guardrail.core.text import clean_text
from guardrail.decide.advised_incidents import AdvisedIncidents
from guardrail.decide.questions import CHOICES
from guardrail.decide.timelines import LARGEST, valid_rows
from guardrail.launch.supervisor_process import find_exit_code, format_way_back
from guardrail.rundir.follow import Follower
from guardrail.rundir.liveness import HeartbeatObserver
from guardrail.rundir.metrics import MetricsView
from guardrail.rundir.run_directory import RunDirectory
from guardrail.rundir.stop_signals import TermRequests

POLL_SECONDS = 0.3
SETUP_SECONDS = 5.0  # at least, between two lines about the progress of the set-up
ATTACH_LINES = 10  # of the past, at most, that `attach` prints
LONGEST_STEP_SECONDS = 1e7  # a larger number is a damaged one
PACE_ROWS = 20  # rows over which speed and remaining time are measured


class LogLines:
    """Turns what is new in a run directory into lines.

    Args:
        every: applied steps between two lines. A step with an evaluation always has one.
    """

    def __init__(self, run: RunDirectory, *, every: int = 20) -> None:
        self._run, self._every = run, every
        self._follower = Follower(run)
        self._setup = ("", 0.0)
        self._advised = AdvisedIncidents()

    def read_new_lines(self) -> list[str]:
        """Return the lines since the last call: events and steps by their time of day.

        Where there are none, a line about the set-up.
        """
        status = self._run.read_status()
        update = self._follower.poll()
        found: list[tuple[float, str]] = []
        for event in update.events:
            if self._advised.is_repeated(event):
                continue
            if line := format_event(event):
                found.append((event.time, line))
        found += self._format_steps(*update.rows, status)
        if not found and status is not None:
            found = [(time.time(), line) for line in self._format_set_up(status)]
        found.sort(key=lambda pair: pair[0])
        return [f"{format_moment(at)} {line}" for at, line in found]

    def _format_steps(
        self, first: int, last: int, status: Status | None
    ) -> list[tuple[float, str]]:
        view = self._follower.view
        if view is None or first == last:
            return []
        part = slice(first, last)
        step, evaluated = view.column("step")[part], view.column("eval_loss")[part]
        is_applied = view.column("verdict")[part] == list(Action).index(Action.APPLY)
        is_applied &= valid_rows(step, view.column("timeline")[part])
        rows = is_applied.nonzero()[0]
        has_evaluation = evaluated[rows] == evaluated[rows]  # NaN: none
        chosen = (step[rows] % self._every == 0) | has_evaluation
        found = []
        for row in rows[chosen].tolist():
            values = dict(zip(view.columns, view.array[first + row].tolist(), strict=True))
            line = format_step(values, status, _measure_pace(view, first + row))
            found.append((values.get("time", math.nan), line))
        return found

    def _format_set_up(self, status: Status) -> list[str]:
        """Return a line about the set-up, unless it is the last one again or too soon after it."""
        if status.phase not in (Phase.STARTING, Phase.SETUP):
            return []
        text: str = status.phase.value
        if status.progress:
            text = f"{text}: {clean_text(status.progress, 200)}"
        before, at = self._setup
        if text == before or time.monotonic() - at < SETUP_SECONDS:
            return []
        self._setup = (text, time.monotonic())
        return [text]


class Pace(NamedTuple):
    """Speed of a run at one of its rows. NaN: unknown."""

    tokens_per_second: float
    step_seconds: float


def _measure_pace(view: MetricsView, row: int) -> Pace:
    """Return the speed over the applied steps of the PACE_ROWS rows up to this one."""
    part = slice(max(0, row + 1 - PACE_ROWS), row + 1)
    seconds, tokens = view.column("step_time")[part], view.column("tokens")[part]
    used = (
        (view.column("verdict")[part] == list(Action).index(Action.APPLY))
        & (seconds > 0)
        & (seconds < LONGEST_STEP_SECONDS)
        & (tokens < LARGEST)
    )
    total = float(seconds[used].sum())
    if not total > 0:
        return Pace(math.nan, math.nan)
    return Pace(float(tokens[used].sum()) / total, total / int(used.sum()))


def format_step(values: dict[str, float], status: Status | None, pace: Pace | None = None) -> str:
    """Return one step in fixed columns.

    Such as "step   120/600  loss 2.3456  grad 0.913  embed 0.214  lr 1.00e-03".

    Args:
        values: the row, by the names of its columns.
        status: of the run now, for its length and for an open incident.
        pace: at this row, for tokens per second and the remaining time.
    """
    number, total, unresolved = f"{values['step']:.0f}", 0, None
    if status is not None:
        total, unresolved = status.total_steps, status.unresolved
    if total:
        number += f"/{total}"

    def value(name: str) -> float:
        return values.get(name, math.nan)

    line = f"step {number:>11}  loss {_format_loss(value(LOSS))}  grad {value(GRAD_NORM):.3g}"
    line += f"  embed {value(EMBED_GRAD_NORM):.3g}  lr {value('lr'):.2e}"
    if not math.isnan(value("eval_loss")):
        line += f"  eval {_format_loss(value('eval_loss'))}"
    if unresolved is not None and values["step"] >= unresolved.since and unresolved.headline():
        line += f"  {unresolved.headline()}"
    if pace is not None and pace.tokens_per_second > 0:
        line += f"  {pace.tokens_per_second:,.0f} tok/s"
    if pace is not None and pace.step_seconds > 0 and total > values["step"]:
        line += f"  ETA {format_elapsed((total - values['step']) * pace.step_seconds)}"
    return line


def _format_loss(loss: float) -> str:
    """Return a loss to four places; one of a million or more, from a damaged file, is shorter."""
    return f"{loss:.4f}" if abs(loss) < 1e6 else f"{loss:.5g}"


def format_moment(when: float) -> str:
    """Return the local time of day, with the date if it is not today; dashes if unknown."""
    try:
        at = time.localtime(when)
    except (OverflowError, ValueError, OSError):
        return "--:--:--"
    today = time.localtime()
    if (at.tm_year, at.tm_yday) == (today.tm_year, today.tm_yday):
        return time.strftime("%H:%M:%S", at)
    return time.strftime("%Y-%m-%d %H:%M:%S", at)


def format_event(event: Event) -> str:
    """Return the kind and the message of a journal line, "" for a kind that is not printed.

    Further lines hold the rest of the message and the possible answers to a question.
    """
    if not event.is_printed:
        return ""
    where = f"step {event.step}: " if event.step else ""
    first, *more = [clean_text(line, 1000) for line in event.message.splitlines()] or [""]
    if isinstance(event, Paused):
        more += [_format_proposal(one) for one in event.proposals if isinstance(one, dict)]
    indented = [f"    {line}" for line in more if line]
    return "\n".join([f"{event.kind:<12} {where}{first}", *indented])


def _format_proposal(proposal: dict[str, Any]) -> str:
    """Return a possible answer to a question: "answer accept: roll back to 60"; "" for none."""
    if "choice" not in proposal:
        return ""
    choice = proposal["choice"]
    word = clean_text(str(choice), 20)
    if isinstance(choice, int) and 0 <= choice < len(CHOICES):
        word = CHOICES[choice]  # as `ctl RUN answer` takes it
    text = str(proposal.get("text") or proposal.get("action") or "")
    return f"answer {word}: {clean_text(text, 400)}"


class _Left(Exception):
    """Raised by a signal that ends the printing, but not the run."""


class Printer:
    """Prints lines to stderr until the run has ended.

    A closed stderr does not end the wait: a batch job lives as long as this process.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._lines = LogLines(run)
        self._is_closed = False

    def print_lines(self, *lines: str) -> None:
        try:
            for line in lines:
                if not self._is_closed:
                    print(line, file=sys.stderr, flush=True)
        except OSError:
            self._is_closed = True

    def print_until_end(
        self, find_exit_code: Callable[[], int | None], *, past: int | None = None
    ) -> int:
        """Print until `find_exit_code` returns a number; return it.

        Args:
            past: at most so many lines from before this call; None: all.
        """
        code = find_exit_code()
        lines = self._lines.read_new_lines()
        if past is not None:
            lines = lines[max(0, len(lines) - past) :]
        self.print_lines(*lines)
        while code is None:
            time.sleep(POLL_SECONDS)
            code = find_exit_code()  # before the lines are read, so all up to the end are printed
            self.print_lines(*self._lines.read_new_lines())
        return code


def follow_run(
    run: RunDirectory, supervisor: subprocess.Popen[bytes], *, past: int | None = None
) -> int:
    """Print until the run has ended, for `launch`; return its exit code, or 130 after Ctrl-C.

    Ctrl-C and SIGHUP end the printing, not the run. SIGTERM and SIGUSR1, which batch systems and
    containers send before they kill, are passed on as a stop, and the printing continues to the
    end. A second SIGTERM kills.

    Args:
        past: at most so many lines from before this call; None: all.
    """
    terms = TermRequests()

    def pass_on(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGTERM and terms.is_second():
            supervisor.send_signal(signal.SIGQUIT)
        else:
            # Not SIGTERM: a batch system may have sent it to the supervisor as well, and a second
            # one kills.
            supervisor.send_signal(signal.SIGUSR1)

    with _signal_handlers(
        {
            signal.SIGTERM: pass_on,
            signal.SIGUSR1: pass_on,
            signal.SIGINT: _leave,
            signal.SIGHUP: _leave,
        }
    ):
        printer = Printer(run)
        try:
            return printer.print_until_end(lambda: find_exit_code(supervisor), past=past)
        except _Left:
            printer.print_lines("training continues", format_way_back(run))
            return ExitCode.INTERRUPTED


def attach_run(run: RunDirectory) -> int:
    """Print the last lines and new ones until the run has ended, for `attach` without a terminal.

    Returns:
        The exit code of the run, or 130 after Ctrl-C.
    """
    observer = HeartbeatObserver()

    def read_exit_code() -> int | None:
        status = run.known_status()
        if status is None:
            return None
        if status.exit_code is not None:
            return status.exit_code
        return None if observer(run, status) else ExitCode.WORKERS_FAILED

    with _signal_handlers({signal.SIGINT: _leave, signal.SIGHUP: _leave}):
        printer = Printer(run)
        try:
            code = printer.print_until_end(read_exit_code, past=ATTACH_LINES)
        except _Left:
            return ExitCode.INTERRUPTED
        status = run.known_status()
        if status is not None and status.exit_code is None:
            printer.print_lines(
                f"the run does not respond. Continue it with: guardrail launch --resume {run.path}"
            )
        return code


def _leave(signum: int, frame: FrameType | None) -> None:
    raise _Left


@contextlib.contextmanager
def _signal_handlers(
    handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]],
) -> Iterator[None]:
    """Install signal handlers for the time of the block; an ignored SIGHUP (nohup) stays so."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        handlers.pop(signal.SIGHUP, None)
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
