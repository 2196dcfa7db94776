"""A run as lines on stderr, for logs and for terminals without a screen."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from types import FrameType

from guardrail.errors import ExitCode
from guardrail.launching import exit_code_of, way_back
from guardrail.records import EMBED_GRAD_NORM, GRAD_NORM, LOSS, Action, Event, Phase, Status
from guardrail.rundir import RunDirectory
from guardrail.text import clean

POLL_SECONDS = 0.3
SETUP_SECONDS = 5.0  # between two lines of a set-up that gets ahead
DEBOUNCE_SECONDS = 0.25  # `timeout` signals its child and then its group: one request
COLUMNS = ("step", LOSS, GRAD_NORM, EMBED_GRAD_NORM, "lr", "verdict", "eval_loss")

# Journal lines that a person at a log wants to read. Findings are told again by their verdict, a checkpoint that
# became good is routine.
SPOKEN = frozenset(
    "started restarted resume_check verdict left_out rollback incident command durability paused resumed note hung "
    "ranks_failed ended".split()
)
SPOKEN_CHECKPOINTS = frozenset(("failed", "invalid", "suspect"))


class Lines:
    """Turns what is new in a run directory into lines."""

    def __init__(self, run: RunDirectory, *, every: int = 20, history: bool = True) -> None:
        """`every`: steps between two lines. `history`: begin with what the run has already said."""
        self._run = run
        self._every = every
        self._seq = 0
        self._rows = 0
        self._journal_size = -1
        self._setup = ("", 0.0)
        if not history:
            self._seq = max((event.seq for event in run.events()), default=0)
            self._rows = len(run.metrics())

    def new(self) -> Iterator[str]:
        """Lines since the last call: events and steps in the order of their time."""
        status = self._run.read_status()
        told = [(event.time, line) for event in self._events() if (line := event_line(event))]
        told += self._steps(status)
        for _, line in sorted(told, key=lambda pair: pair[0]):
            yield line
        if not told and status is not None:
            yield from self._set_up(status)

    def _events(self) -> list[Event]:
        with contextlib.suppress(OSError):
            size = self._run.journal_path.stat().st_size
            if size == self._journal_size:
                return []
            self._journal_size = size
        events = self._run.events(after=self._seq)
        if events:
            self._seq = events[-1].seq
        return events

    def _steps(self, status: Status | None) -> list[tuple[float, str]]:
        view = self._run.metrics()
        new = view.array[self._rows :]
        self._rows = len(view)
        told = []
        for row in new:
            values = dict(zip(view.columns, row.tolist(), strict=True))
            applied = values.get("verdict") == list(Action).index(Action.APPLY)
            if applied and (values["step"] % self._every == 0 or values["eval_loss"] == values["eval_loss"]):
                told.append((values["time"], step_line(values, status)))
        return told

    def _set_up(self, status: Status) -> Iterator[str]:
        if status.phase not in (Phase.STARTING, Phase.SETUP):
            return
        text = f"{status.phase.value}: {clean(status.progress, 200)}" if status.progress else status.phase.value
        before, at = self._setup
        if text != before and time.monotonic() - at > SETUP_SECONDS:
            self._setup = (text, time.monotonic())
            yield text


def step_line(values: dict[str, float], status: Status | None) -> str:
    """One step in fixed columns: "step   120/600  loss 2.3456  grad 0.913  embed 0.214  lr 1.00e-03"."""
    number = f"{values['step']:.0f}" + (f"/{status.total_steps}" if status and status.total_steps else "")
    line = f"step {number:>11}  loss {values[LOSS]:.4f}  grad {values[GRAD_NORM]:.3g}"
    line += f"  embed {values[EMBED_GRAD_NORM]:.3g}  lr {values['lr']:.2e}"
    if values["eval_loss"] == values["eval_loss"]:
        line += f"  eval {values['eval_loss']:.4f}"
    if status and status.tokens_per_second:
        line += f"  {status.tokens_per_second:,.0f} tok/s"
    if status and status.eta_seconds > 0:
        line += f"  ETA {clock(status.eta_seconds)}"
    return line


def event_line(event: Event) -> str:
    """The journal's sentence, or "" for an event that is routine."""
    if event.kind == "checkpoint" and event.data.get("state") not in SPOKEN_CHECKPOINTS:
        return ""
    if event.kind not in SPOKEN and event.kind != "checkpoint":
        return ""
    where = f"step {event.step}: " if event.step else ""
    return f"{event.kind:<12} {where}{clean(event.message, 2000)}"


def clock(seconds: float) -> str:
    """Seconds as H:MM:SS."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


class _Asked(Exception):
    """A signal that means to leave."""


class Watcher:
    """Prints lines until the run has ended; signals decide whether we leave it or stop it.

    Ctrl-C and SIGHUP leave. SIGTERM and SIGUSR1, which batch systems and containers send before they kill, are
    handed on as a stop, and the end is waited for; a second SIGTERM kills.
    """

    def __init__(self, run: RunDirectory, supervisor: subprocess.Popen[bytes]) -> None:
        self._run, self._supervisor = run, supervisor
        self._term = 0.0
        self._silent = False

    def follow(self) -> int:
        handlers = {signal.SIGTERM: self._hand_on, signal.SIGUSR1: self._hand_on, signal.SIGINT: self._leave}
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            handlers[signal.SIGHUP] = self._leave
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            return self._follow()
        except _Asked:
            self._say(f"training goes on\n{way_back(self._run)}")
            return ExitCode.INTERRUPTED
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _follow(self) -> int:
        lines = Lines(self._run)
        while True:
            code = exit_code_of(self._run, self._supervisor)
            for line in lines.new():
                self._say(line)
            if code is not None:
                return code
            time.sleep(POLL_SECONDS)

    def _say(self, line: str) -> None:
        """A reader that has gone must not end the wait: a batch job lives as long as this process."""
        if not self._silent:
            try:
                print(line, file=sys.stderr, flush=True)
            except OSError:
                self._silent = True

    def _leave(self, signum: int, frame: FrameType | None) -> None:
        raise _Asked

    def _hand_on(self, signum: int, frame: FrameType | None) -> None:
        # SIGUSR1, because a batch system may have sent SIGTERM to the supervisor as well and its second one kills.
        number = signal.SIGUSR1
        if signum == signal.SIGTERM:
            now = time.monotonic()
            if self._term and now - self._term > DEBOUNCE_SECONDS:
                number = signal.SIGQUIT
            self._term = self._term or now
        self._supervisor.send_signal(number)


def follow(run: RunDirectory, supervisor: subprocess.Popen[bytes]) -> int:
    """Print lines until the run has ended; returns its exit code, or 130 when left."""
    return Watcher(run, supervisor).follow()
