"""Starts, watches and restarts the ranks of one run: `python -m guardrail.supervisor RUN_DIR`.

    launch -> supervisor (own session, no torch) -> torch elastic -> ranks

torch elastic starts the ranks and starts them again when one fails. What it does not know is done here: a rank that
lives but does not get ahead, an elastic agent that is killed, a stop that needs longer than 30 seconds, the last word.
The supervisor is the reaper of all its descendants, so that none survives it when it ends by itself.

SIGTERM, SIGUSR1   ask the ranks to save and stop; after launch.stop_seconds they are killed
second SIGTERM     kill everything at once (so does SIGQUIT)
SIGHUP             ignored
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import psutil

from guardrail import processes, stacks
from guardrail.config import LaunchSection, TensorboardSection, parse
from guardrail.elastic import Agent, Failure
from guardrail.errors import ExitCode, GuardrailError
from guardrail.records import Mode, Phase, RankStatus, Status
from guardrail.rundir import RunDirectory
from guardrail.runlock import RunLock
from guardrail.text import clean
from guardrail.watch import Hung, Watch

POLL_SECONDS = 0.2
SURVIVOR_SECONDS = 10.0  # peers of a failed rank that still live after this are killed: they wait for the dead
DEBOUNCE_SECONDS = 0.25  # `timeout` and some batch systems deliver one SIGTERM twice
TAIL_LINES = 12  # of the failing rank's log, in the journal

EXIT_CODES = {
    Phase.FINISHED: ExitCode.FINISHED,
    Phase.STOPPED: ExitCode.INTERRUPTED,
    Phase.HALTED: ExitCode.HALTED,
    Phase.FAILED: ExitCode.WORKERS_FAILED,
}


class Signals:
    """What the supervisor was asked by signal. A byte in the pipe ends its wait early."""

    def __init__(self) -> None:
        self.stop = ""  # name of the signal that asked first
        self.kill = False
        self._last_term = 0.0
        self._reading, writing = os.pipe()
        for descriptor in (self._reading, writing):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGQUIT, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGTERM:
            now = time.monotonic()
            self.kill |= bool(self._last_term) and now - self._last_term > DEBOUNCE_SECONDS
            self._last_term = now
        self.kill |= signum == signal.SIGQUIT
        self.stop = self.stop or signal.Signals(signum).name

    def wait(self, seconds: float) -> None:
        if select.select([self._reading], [], [], seconds)[0]:
            with contextlib.suppress(BlockingIOError):
                os.read(self._reading, 64)


class Supervisor:
    """One run, from the first process to the last word. `run()` returns the exit code."""

    def __init__(self, run: RunDirectory, signals: Signals) -> None:
        tree = parse(run.path / "config.toml")
        self.run_directory = run
        self.launch = msgspec.convert(tree.get("launch", {}), LaunchSection)
        self.tensorboard = msgspec.convert(tree.get("tensorboard", {}), TensorboardSection)
        self.mode = Mode(tree.get("guard", {}).get("mode", Mode.AUTO))
        self.signals = signals
        self.host = socket.gethostname()
        self.leads = self.launch.node_rank == 0  # writes status.json and the journal's last line
        self.started = time.time()
        self.restarts = 0
        self.failures: list[str] = []  # one sentence each, newest last
        self.ranks: dict[int, RankStatus | None] = {}  # pid -> what it reported, of the present incarnation
        self.killed = ""  # why everything was killed
        self._status_time = 0.0
        self._told: set[int] = set()
        self._stop_since: float | None = None
        self._failed_at: float | None = None

    # -- life

    def run(self) -> ExitCode:
        self._write_status(Phase.STARTING, progress=f"starting {self.launch.processes} processes")
        with self._exporter():
            code = self._agents()
            self._bury()
        phase, exit_code, reason = self._outcome(code)
        self._last_word(phase, exit_code, reason)
        return exit_code

    def _agents(self) -> int:
        """One elastic agent after another until one ends by itself; returns its exit status."""
        while True:
            left = self.launch.max_restarts - self.restarts
            logs = self.run_directory.logs
            agent = Agent(
                self.launch, self.run_directory.path, logs / "elastic.log", incarnation=self.restarts, restarts=left
            )
            try:
                code = self._watch(agent)
            finally:
                self._bury(agent)
            if code >= 0 or self.killed or self.signals.stop:
                return code
            self._restart(f"the elastic agent was killed by signal {-code}")
            if self.restarts > self.launch.max_restarts:
                return 1

    def _watch(self, agent: Agent) -> int:
        watch = Watch(self.launch)
        before = time.monotonic()
        while True:
            code = agent.process.poll()
            self._look_at_ranks(agent)
            self._note_failures(agent)
            if code is not None:
                return code
            self._kill_survivors()
            self._stop()
            now = time.monotonic()
            for hung in watch.look(self.ranks, now - before)[:1]:
                self._end_hung(hung)
            before = now
            if self.killed:
                agent.process.kill()
                agent.process.wait()
                continue
            self._write_status_while_no_rank_does()
            self.signals.wait(POLL_SECONDS)

    # -- ranks

    def _look_at_ranks(self, agent: Agent) -> None:
        """Children of the agent, and their reports. A report of an earlier incarnation has another pid."""
        try:
            pids = {child.pid for child in psutil.Process(agent.process.pid).children() if processes.alive(child)}
        except psutil.Error:
            return  # the agent is gone; what it started is still listed
        if not pids:
            return  # between two incarnations: keep the last one for the words about it
        reports = {status.pid: status for status in self.run_directory.read_ranks() if status.host == self.host}
        if not pids & self.ranks.keys():
            self._failed_at = None
        self.ranks = {pid: reports.get(pid) for pid in pids}

    def _note_failures(self, agent: Agent) -> None:
        for failure in agent.failures():
            rank = self._rank_of(failure)
            sentence = f"rank {rank} {failure}"
            self.failures.append(sentence)
            self._record(
                "ranks_failed",
                f"{sentence} on {self.host}",
                rank=rank,
                exit=failure.exit,
                host=self.host,
                log=str(self._log_of(rank).relative_to(self.run_directory.path)),
            )
            self._failed_at = time.monotonic()
            if self.signals.stop:
                self.killed = f"{sentence} while it was stopping"
            else:
                self._restart(sentence)

    def _restart(self, reason: str) -> None:
        self.restarts += 1
        print(f"{time.strftime('%F %T')} restart {self.restarts} of {self.launch.max_restarts}: {reason}", flush=True)

    def _rank_of(self, failure: Failure) -> int:
        report = self.ranks.get(failure.pid)
        return report.rank if report else self.launch.node_rank * self.launch.processes + failure.local_rank

    def _log_of(self, rank: int) -> Path:
        return self.run_directory.logs / f"rank-{rank}.log"

    def _kill_survivors(self) -> None:
        if self._failed_at is not None and time.monotonic() - self._failed_at > SURVIVOR_SECONDS:
            self._failed_at = None
            self._kill_ranks()

    def _kill_ranks(self) -> None:
        """SIGKILL to the local ranks and whatever they started; elastic sees them fail."""
        victims = []
        for pid in self.ranks:
            with contextlib.suppress(psutil.Error):
                rank = psutil.Process(pid)
                victims += [rank, *rank.children(recursive=True)]
        processes.kill(victims)

    def _end_hung(self, hung: Hung) -> None:
        """Write down where every local rank stands, then kill them all: one hung rank stops the others too."""
        culprit = self._culprit(hung)
        name = f"rank {culprit.rank}" if culprit.rank is not None else f"process {culprit.pid}"
        files, where = stacks.capture(self.run_directory.logs, self.ranks, culprit.pid)
        message = f"{name} has not got ahead for {culprit.seconds:.0f} s in phase {culprit.phase.value}{where}"
        recorded = self._record(
            "hung",
            message,
            rank=culprit.rank,
            phase=culprit.phase.value,
            seconds=round(culprit.seconds, 1),
            host=self.host,
            stacks=[str(file.relative_to(self.run_directory.path)) for file in files],
        )
        # On a full disk the heartbeats stand still, not the ranks; then this could not be recorded either.
        if recorded:
            self._kill_ranks()

    def _culprit(self, hung: Hung) -> Hung:
        """Of ranks that stand still together, the one whose whole process stands still (SIGSTOP, swap, D state)."""
        reports = [report for report in self.ranks.values() if report is not None]
        if not reports:
            return hung
        silent = min(reports, key=lambda report: report.heartbeat)
        if time.time() - silent.heartbeat < 10.0:
            silent = min(reports, key=lambda report: (report.step, report.progress, report.pid != hung.pid))
        return Hung(pid=silent.pid, rank=silent.rank, phase=silent.phase, seconds=hung.seconds)

    # -- stopping

    def _stop(self) -> None:
        if not self.signals.stop or self.killed:
            return
        if self._stop_since is None:
            self._stop_since = time.monotonic()
            self._record("note", f"stop asked for by {self.signals.stop}", text=f"stop: {self.signals.stop}")
        registered = [report for report in self.ranks.values() if report is not None]
        if self.signals.kill:
            self.killed = "a second signal asked to end at once"
        elif not registered:
            self.killed = "the ranks had not begun"
        elif time.monotonic() - self._stop_since > self.launch.stop_seconds:
            self.killed = f"the ranks did not stop within {self.launch.stop_seconds:.0f} s"
        for report in registered:
            if report.pid not in self._told and not self.killed:
                self._told.add(report.pid)
                with contextlib.suppress(psutil.Error):
                    processes.tell(psutil.Process(report.pid), signal.SIGUSR1)

    def _bury(self, agent: Agent | None = None) -> None:
        """End and reap every descendant. The agent goes first, so that it starts nothing again."""
        if agent is not None:
            agent.process.kill()
            agent.process.wait()
            agent.close()
        while left := psutil.Process().children(recursive=True):
            stuck = processes.kill(left)
            if stuck:
                pids = ", ".join(str(process.pid) for process in stuck)
                self._record("note", f"the kernel does not end {pids} (uninterruptible sleep?)", text="stuck")
                return

    # -- words

    def _outcome(self, code: int) -> tuple[Phase, ExitCode, str]:
        """How the run ended, from what rank 0 said last, if it was a rank of the present incarnation."""
        status = self.run_directory.read_status()
        if status is not None and status.phase.ended and status.supervisor_pid == self._supervisor_pid(status):
            if code == 0 and (status.host != self.host or status.pid in self.ranks):
                given = status.exit_code
                return status.phase, ExitCode(given) if given is not None else EXIT_CODES[status.phase], ""
        if self.signals.stop:
            return Phase.STOPPED, ExitCode.INTERRUPTED, f"killed: {self.killed}" if self.killed else "stopped"
        if code == 0:
            return Phase.FAILED, ExitCode.WORKERS_FAILED, "the ranks ended without saying how"
        if not self.failures:
            log = self.run_directory.logs / "elastic.log"
            return Phase.FAILED, ExitCode.WORKERS_FAILED, f"torch elastic ended with {code}\n{_tail(log)}"
        tries = f"{self.restarts} failures, launch.max_restarts = {self.launch.max_restarts}"
        return Phase.FAILED, ExitCode.WORKERS_FAILED, f"{self.failures[-1]} ({tries})"

    def _supervisor_pid(self, status: Status) -> int:
        return os.getpid() if self.leads else status.supervisor_pid

    def _last_word(self, phase: Phase, exit_code: ExitCode, reason: str) -> None:
        print(f"{time.strftime('%F %T')} {phase.value}, exit code {exit_code.value} {reason}", flush=True)
        if not self.leads:
            return
        said = [event for event in self.run_directory.events() if event.kind in ("started", "restarted", "ended")]
        if reason or not said or said[-1].kind != "ended":
            self._record(
                "ended", f"{phase.value}: {reason}", phase=phase.value, exit_code=exit_code.value, reason=reason
            )
        self._write_status(phase, exit_code=exit_code.value)

    def _record(self, kind: str, message: str, **data: Any) -> bool:
        """Append to the journal; False when the disk does not take it (then it stands in supervisor.log only)."""
        status = self.run_directory.read_status()
        print(f"{time.strftime('%F %T')} {kind}: {message}", flush=True)
        try:
            self.run_directory.append(
                kind, message, step=status.step if status else 0, timeline=status.timeline if status else 0, **data
            )
        except OSError as error:
            print(f"the journal cannot be written: {error}", flush=True)
            return False
        return True

    def _write_status_while_no_rank_does(self) -> None:
        if any(report is not None for report in self.ranks.values()) or time.monotonic() - self._status_time < 1.0:
            return
        again = f" again ({self.restarts} of {self.launch.max_restarts} restarts)" if self.restarts else ""
        self._write_status(Phase.STARTING, progress=f"starting {self.launch.processes} processes{again}")

    def _write_status(self, phase: Phase, *, progress: str = "", exit_code: int | None = None) -> None:
        if not self.leads:
            return
        last = self.run_directory.read_status() or Status(run="", phase=phase, started=self.started, mode=self.mode)
        self._status_time = time.monotonic()
        with contextlib.suppress(OSError):  # a full disk: the status is old for a while, training goes on
            self.run_directory.write_status(
                msgspec.structs.replace(
                    last,
                    run=self.run_directory.name,
                    phase=phase,
                    progress=progress,
                    heartbeat=time.time(),
                    host=self.host,
                    supervisor_pid=os.getpid(),
                    restarts=self.restarts,
                    world=self.launch.processes * self.launch.nodes,
                    exit_code=exit_code,
                )
            )

    @contextlib.contextmanager
    def _exporter(self) -> Any:
        """The TensorBoard exporter beside the run; it may fail, and training does not notice."""
        if not (self.tensorboard.enabled and self.leads):
            yield
            return
        stop = threading.Event()
        thread = threading.Thread(target=self._export, args=(stop,), name="tensorboard", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(timeout=60)

    def _export(self, stop: threading.Event) -> None:
        try:
            from guardrail import tensorboard

            tensorboard.export(self.run_directory, stop=stop)
        except Exception as error:
            traceback.print_exc()
            self._record("note", f"TensorBoard files are not written: {error}", text="tensorboard")


def _tail(log: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log, cleaned for the journal."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 16 * 1024))
            text = file.read()
    except OSError:
        return ""
    return "\n".join(clean(line, 300) for line in text.splitlines()[-lines:])


def _become_reaper() -> None:
    """Descendants whose parent dies become our children (prctl PR_SET_CHILD_SUBREAPER, Linux 3.4)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def main(arguments: Iterable[str] | None = None) -> int:
    (path,) = arguments if arguments is not None else sys.argv[1:]
    signals = Signals()
    _become_reaper()
    try:
        run = RunDirectory.open(Path(path))
        node = msgspec.convert(parse(run.path / "config.toml").get("launch", {}), LaunchSection).node_rank
        with RunLock(run.path / f"supervisor-{node}.lock", "the supervisor"):
            return Supervisor(run, signals).run()
    except GuardrailError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
