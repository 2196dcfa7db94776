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
from typing import NamedTuple

from guardrail.core.errors import ExitCode
from guardrail.core.events.event import Event
from guardrail.core.format import format_elapsed
from guardrail.core.records import EMBED_GRAD_NORM, GRAD_NORM, LOSS, Action, Phase, Status
from guardrail.core.text import clean_text
from guardrail.decide.advised_incidents import AdvisedIncidents
from guardrail.decide.questions import CHOICES
from guardrail.decide.timelines import LARGEST, sensible
from guardrail.launch.launcher import find_exit_code, format_way_back
from guardrail.rundir.follow import Follower
from guardrail.rundir.liveness import HeartbeatObserver
from guardrail.rundir.run_directory import MetricsView, RunDirectory
from guardrail.rundir.stop_signals import TermRequests

POLL_SECONDS = 0.3
SETUP_SECONDS = 5.0  # between two lines of a set-up that gets ahead
ATTACH_LINES = 10  # of the past, when one comes to a run
LONGEST = 1e7  # seconds that one step may take; more is damage
PACE_ROWS = 20  # rows over which speed and the time that is left are taken

# Journal lines that a person at a log wants to read. Findings are told again by their verdict, a
# checkpoint that became good is routine.
SPOKEN = frozenset(
    "started restarted resume_check verdict skipped rollback undo diagnosis remedy incident command disk paused "
    "resumed note rank_hung rank_failed ended".split()
)
SPOKEN_CHECKPOINTS = frozenset(("failed", "invalid", "suspect", "foreign"))


class LogLines:
    """Turns what is new in a run directory into lines.

    Args:
        every: applied steps between two lines; a step with an evaluation has one in any case.
    """

    def __init__(self, run: RunDirectory, *, every: int = 20) -> None:
        self._run, self._every = run, every
        self._follower = Follower(run)
        self._setup = ("", 0.0)
        self._advised = AdvisedIncidents()

    def new(self) -> list[str]:
        """Lines since the last call, each with its time of day: events and steps in the order of
        their time.
        """
        status = self._run.read_status()
        update = self._follower.poll()
        events = [event for event in update.events if not self._advised.is_repeated(event)]
        found = [(event.time, line) for event in events if (line := format_event(event))]
        found += self._steps(*update.rows, status)
        if found:
            return [
                f"{format_moment(at)} {line}"
                for at, line in sorted(found, key=lambda pair: pair[0])
            ]
        return (
            [f"{format_moment(time.time())} {line}" for line in self._set_up(status)]
            if status is not None
            else []
        )

    def _steps(self, first: int, last: int, status: Status | None) -> list[tuple[float, str]]:
        view = self._follower.view
        if view is None or first == last:
            return []
        step, verdict, evaluated = (
            view.column(name)[first:last] for name in ("step", "verdict", "eval_loss")
        )
        applied = (verdict == list(Action).index(Action.APPLY)) & sensible(
            step, view.column("timeline")[first:last]
        )
        rows = applied.nonzero()[0]
        chosen = (step[rows] % self._every == 0) | (evaluated[rows] == evaluated[rows])
        found = []
        for row in rows[chosen].tolist():
            values = dict(zip(view.columns, view.array[first + row].tolist(), strict=True))
            line = format_step(values, status, _pace(view, first + row))
            found.append((values.get("time", math.nan), line))
        return found

    def _set_up(self, status: Status) -> list[str]:
        if status.phase not in (Phase.STARTING, Phase.SETUP):
            return []
        text = (
            f"{status.phase.value}: {clean_text(status.progress, 200)}"
            if status.progress
            else status.phase.value
        )
        before, at = self._setup
        if text == before or time.monotonic() - at < SETUP_SECONDS:
            return []
        self._setup = (text, time.monotonic())
        return [text]


class Pace(NamedTuple):
    """How fast a run was at one of its rows; NaN: unknown."""

    tokens_per_second: float
    step_seconds: float


def _pace(view: MetricsView, row: int) -> Pace:
    """Over the applied steps of the newest rows up to this one."""
    part = slice(max(0, row + 1 - PACE_ROWS), row + 1)
    seconds, tokens, verdict = (
        view.column(name)[part] for name in ("step_time", "tokens", "verdict")
    )
    used = (
        (verdict == list(Action).index(Action.APPLY))
        & (seconds > 0)
        & (seconds < LONGEST)
        & (tokens < LARGEST)
    )
    total = float(seconds[used].sum())
    if not total > 0:
        return Pace(math.nan, math.nan)
    return Pace(float(tokens[used].sum()) / total, total / int(used.sum()))


def format_step(values: dict[str, float], status: Status | None, pace: Pace | None = None) -> str:
    """One step in fixed columns: "step   120/600  loss 2.3456  grad 0.913  embed 0.214  lr 1.00e-03".

    Args:
        values: the row, by the names of its columns.
        status: of the run now, for its length and for an incident that is not over.
        pace: at this row, for tokens a second and the time that is left.
    """
    total = status.total_steps if status else 0
    number = f"{values['step']:.0f}" + (f"/{total}" if total else "")
    value = {
        name: values.get(name, math.nan)
        for name in (LOSS, GRAD_NORM, EMBED_GRAD_NORM, "lr", "eval_loss")
    }
    line = f"step {number:>11}  loss {_four_places(value[LOSS])}  grad {value[GRAD_NORM]:.3g}"
    line += f"  embed {value[EMBED_GRAD_NORM]:.3g}  lr {value['lr']:.2e}"
    if value["eval_loss"] == value["eval_loss"]:
        line += f"  eval {_four_places(value['eval_loss'])}"
    unresolved = status.unresolved if status else None
    if unresolved is not None and values["step"] >= unresolved.since and unresolved.headline():
        line += f"  {unresolved.headline()}"
    if pace is not None and pace.tokens_per_second > 0:
        line += f"  {pace.tokens_per_second:,.0f} tok/s"
    if pace is not None and pace.step_seconds > 0 and total > values["step"]:
        line += f"  ETA {format_elapsed((total - values['step']) * pace.step_seconds)}"
    return line


def _four_places(loss: float) -> str:
    """A loss to four places. One of a million or more, as a damaged file has them, in fewer
    characters.
    """
    return f"{loss:.4f}" if abs(loss) < 1e6 else f"{loss:.5g}"


def format_moment(when: float) -> str:
    """The time of day, with the date where it is not today's; dashes for one that is unknown."""
    try:
        at = time.localtime(when)
    except (OverflowError, ValueError, OSError):
        return "--:--:--"
    today = time.localtime()
    same = (at.tm_year, at.tm_yday) == (today.tm_year, today.tm_yday)
    return time.strftime("%H:%M:%S" if same else "%Y-%m-%d %H:%M:%S", at)


def format_event(event: Event) -> str:
    """The journal's sentence, or "" for an event that is routine."""
    if event.kind == "checkpoint" and event.data.get("state") not in SPOKEN_CHECKPOINTS:
        return ""
    if event.kind not in SPOKEN and event.kind != "checkpoint":
        return ""
    where = f"step {event.step}: " if event.step else ""
    first, *more = [clean_text(line, 1000) for line in event.message.splitlines()] or [""]
    proposals = event.data.get("proposals")
    for one in proposals if isinstance(proposals, list) else []:
        if isinstance(one, dict) and "choice" in one:
            more.append(
                f"answer {_choice(one['choice'])}: {clean_text(str(one.get('text') or one.get('action') or ''), 400)}"
            )
    return "\n".join([f"{event.kind:<12} {where}{first}", *(f"    {line}" for line in more)])


def _choice(value: object) -> str:
    """The word of an answer, as `ctl RUN answer` takes it."""
    return (
        CHOICES[value]
        if isinstance(value, int) and 0 <= value < len(CHOICES)
        else clean_text(str(value), 20)
    )


class _Left(Exception):
    """A signal that means to leave."""


class Printer:
    """Prints lines to stderr until the run has ended.

    A reader that has gone must not end the wait: a batch job lives as long as this process.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._lines = LogLines(run)
        self._silent = False

    def say(self, *lines: str) -> None:
        try:
            for line in lines:
                if not self._silent:
                    print(line, file=sys.stderr, flush=True)
        except OSError:
            self._silent = True

    def until(self, ended: Callable[[], int | None], *, past: int | None = None) -> int:
        """Print until `ended` returns an exit code. `past`: at most so many lines of what was
        before.
        """
        code = ended()
        before = self._lines.new()
        self.say(*(before if past is None else before[max(0, len(before) - past) :]))
        while code is None:
            time.sleep(POLL_SECONDS)
            code = ended()  # asked first, so that what came before the end is printed
            self.say(*self._lines.new())
        return code


def follow_run(
    run: RunDirectory, supervisor: subprocess.Popen[bytes], *, past: int | None = None
) -> int:
    """For `launch`: print until the run has ended; returns its exit code, or 130 when left.

    `past`: at most so many lines of what was before; None: all.

    Ctrl-C and SIGHUP leave. SIGTERM and SIGUSR1, which batch systems and containers send before
    they kill, are handed on as a stop, and the end is waited for; a second SIGTERM kills.
    """
    terms = TermRequests()

    def hand_on(signum: int, frame: FrameType | None) -> None:
        # SIGUSR1, because a batch system may have sent SIGTERM to the supervisor as well, and its
        # second one kills.
        again = signum == signal.SIGTERM and terms.is_second()
        supervisor.send_signal(signal.SIGQUIT if again else signal.SIGUSR1)

    with _handlers(
        {
            signal.SIGTERM: hand_on,
            signal.SIGUSR1: hand_on,
            signal.SIGINT: _leave,
            signal.SIGHUP: _leave,
        }
    ):
        printer = Printer(run)
        try:
            return printer.until(lambda: find_exit_code(supervisor), past=past)
        except _Left:
            printer.say("training goes on", format_way_back(run))
            return ExitCode.INTERRUPTED


def attach_run(run: RunDirectory) -> int:
    """For `attach` without a terminal: the last lines, then new ones until the run has ended; its
    exit code.
    """

    observer = HeartbeatObserver()

    def ended() -> int | None:
        status = run.known_status()
        if status is None:
            return None
        if status.exit_code is not None:
            return status.exit_code
        return None if observer(run, status) else ExitCode.WORKERS_FAILED

    with _handlers({signal.SIGINT: _leave, signal.SIGHUP: _leave}):
        printer = Printer(run)
        try:
            code = printer.until(ended, past=ATTACH_LINES)
        except _Left:
            return ExitCode.INTERRUPTED
        status = run.known_status()
        if status is not None and status.exit_code is None:
            printer.say(f"no sign of life; go on with: guardrail launch --resume {run.path}")
        return code


def _leave(signum: int, frame: FrameType | None) -> None:
    raise _Left


@contextlib.contextmanager
def _handlers(
    handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]],
) -> Iterator[None]:
    """Install signal handlers for a while; an ignored SIGHUP (nohup) stays ignored."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        handlers.pop(signal.SIGHUP, None)
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
