"""Starts, watches and restarts the ranks of one run: `python -m guardrail.launch.supervisor RUN_DIR
[NODE_RANK]`.

    launch -> supervisor (own session, no torch) -> torch elastic -> ranks

torch elastic starts the ranks. On one node each start has an elastic agent of its own, so that
nothing of an earlier start reaches it; on several nodes the agents, which have met, start their
ranks again together. What elastic does not know is done here: a rank that lives but does not get
ahead, ranks that wait for one that has died, an elastic agent that is killed, a stop that needs
longer than 30 seconds, the last word. The signals are told in `guardrail.rundir.stop_signals`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from guardrail.core import secret
from guardrail.core.config import read_run_tables
from guardrail.core.errors import DiskRefuses, ExitCode, GuardrailError
from guardrail.core.records import Mode, Phase
from guardrail.core.sections import LaunchSection, NotifySection
from guardrail.launch import rank_stacks as stacks
from guardrail.launch.hang_detector import HangDetector, Hung
from guardrail.launch.notify import Notifier
from guardrail.launch.supervisor_journal import SupervisorJournal, flush_log, log, tail
from guardrail.launch.torchrun import Agent, Failure
from guardrail.rundir import processes
from guardrail.rundir.local_ranks import LocalRanks, become_reaper
from guardrail.rundir.run_directory import RunDirectory
from guardrail.rundir.run_lock import RunLock
from guardrail.rundir.stop_signals import SupervisorSignals
from guardrail.trackers.base import Tracker
from guardrail.trackers.registry import enabled_trackers
from guardrail.trackers.sink import follow_run

POLL_SECONDS = 0.4
# peers of a failed rank that still live after this are killed: they wait for it in vain
SURVIVOR_SECONDS = 10.0
SETUP_SURVIVOR_SECONDS = 1.0  # the same of a peer in set-up, which has nothing to save
ROOM_SECONDS = 30.0  # that the ranks wait for a full disk before they are started again
# of ranks over their deadline, one whose process has done nothing for this long is the cause
SILENT_SECONDS = 5.0


class Supervisor:
    """One run, from the first process to the last word. `run()` returns the exit code."""

    def __init__(
        self,
        run: RunDirectory,
        signals: SupervisorSignals,
        *,
        node_rank: int = 0,
        secrets: dict[str, Any] | None = None,
    ) -> None:
        tree = read_run_tables(run.path / "config.toml")
        self.run_directory = run
        # The nodes share one config.toml; which of them this is, only the one who started us knows.
        self.launch = msgspec.convert(
            {**tree.get("launch", {}), "node_rank": node_rank}, LaunchSection
        )
        self.trackers: list[type[Tracker]] = []
        if node_rank == 0:
            self.trackers = enabled_trackers(tree)
        notify = tree.get("notify", {})
        self.notify = msgspec.convert(secret.restore_secrets(notify, secrets or {}), NotifySection)
        self._missing = secret.find_missing_secrets({**notify, **(secrets or {})})
        self.signals = signals
        self.host = socket.gethostname()
        self.ranks = LocalRanks(run, node_rank=node_rank, nodes=self.launch.nodes)
        self.chronicle = SupervisorJournal(
            run, self.launch, self.host, Mode(tree.get("guard", {}).get("mode", Mode.AUTO))
        )
        # a sentence each, newest last; all count against launch.max_restarts
        self.failures: list[str] = []
        self.killed = ""  # why everything was killed
        # that the run directory refuses what a start of the ranks needs, and why
        self.unwritable = ""
        node = f"-{node_rank}" if node_rank else ""
        # read for failures, so each node has its own
        self._elastic_log = run.logs / f"elastic{node}.log"
        self._last_log: Path | None = None  # of the rank that failed last
        # pid of a peer of a failed rank -> when it was asked to end
        self._survivors: dict[int, float] = {}
        # pids of this agent's starts whose failure has been counted
        self._counted: set[int] = set()
        self._is_over = False  # the rank that failed had ended the run before
        self._between = False  # two starts: the next one may have to wait for another node
        self._told: set[int] = set()  # pids that were asked to stop
        self._stop_since: float | None = None

    # -- life

    def run(self) -> ExitCode:
        with self._notifier():  # told of the last word as well
            return self._run()

    def _run(self) -> ExitCode:
        if self.launch.node_rank == 0:
            self.run_directory.remove_ranks()
        self.chronicle.starting(restarts=0)
        phase, exit_code = Phase.FAILED, ExitCode.WORKERS_FAILED
        try:
            with self._feed_trackers(), _beside("reports", self._publish_reports, seconds=5):
                phase, exit_code, reason, last_lines = self._outcome(self._agents())
                self.chronicle.ended(phase, exit_code, reason, last_lines)
        except BaseException as error:
            self._bury()
            self.chronicle.ended(phase, exit_code, f"the supervisor failed: {error!r}", [])
            raise
        finally:
            self.ranks.end()
            self.chronicle.final_status(
                phase, exit_code, restarts=self._restarts, unwritable=self.unwritable
            )
        return exit_code

    @property
    def _restarts(self) -> int:
        return min(len(self.failures), self.launch.max_restarts)

    def _agents(self) -> int:
        """One elastic agent after another until one ends by itself or on demand; returns its exit
        status.
        """
        while True:
            if not self._has_room(ROOM_SECONDS if self.failures else 0.0):
                return 1
            before = len(self.failures)
            code = self._run_agent()
            if self.killed or self.signals.stop or code == 0:
                return code
            if (
                self._is_over
                and self.chronicle.last_word_of_ranks(self.ranks.last_pids) is not None
            ):
                return code  # a rank that dies after the run has ended changes nothing
            failed = len(self.failures) > before
            if code < 0 and not failed:
                self._fail(f"the elastic agent was killed by {signal.Signals(-code).name}")
            elif code > 0 and self._first_node_is_gone():
                if not failed:
                    self._fail("the first node has gone")
                if not self._first_node_is_back():
                    return code
            elif code > 0 and (self.launch.nodes > 1 or not failed):
                return code
            if len(self.failures) > self.launch.max_restarts:
                return 1

    def _has_room(self, seconds: float) -> bool:
        """Whether the run directory takes a file within so many seconds: ranks that start on a full
        disk fail at once.

        Asked before a start and at an end only. Ranks that train continue without a disk.
        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.run_directory.check_writable()
                return True
            except DiskRefuses as error:
                refusal = str(error)
            if self.signals.stop or time.monotonic() >= deadline:
                self.killed = self.unwritable = refusal
                return False
            log(f"the ranks wait for room to start again: {refusal}")
            self.signals.wait(1.0)

    def _run_agent(self) -> int:
        """Run one agent and its ranks to their end; returns its exit status."""
        left = self.launch.max_restarts - self._restarts
        further = self.ranks.begin()
        self._survivors.clear()
        self._counted.clear()  # pids are used again
        self._is_over = False
        agent = Agent(
            self.launch,
            self.run_directory.path,
            self._elastic_log,
            incarnation=self._restarts,
            restarts=left if self.launch.nodes > 1 else 0,
            further=further,
        )
        try:
            return self._watch(agent)
        finally:
            agent.end()
            self._bury()

    def _first_node_is_gone(self) -> bool:
        """Whether the agent has ended because the place where the nodes meet, which is that node's
        agent, is lost.
        """
        if not self.launch.node_rank or len(self.failures) > self.launch.max_restarts:
            return False
        status = self.run_directory.read_status()
        return status is not None and not status.phase.ended

    def _first_node_is_back(self) -> bool:
        """Wait until it listens again; False when it does not within launch.node_timeout, or a stop
        is asked for.
        """
        host, _, port = self.launch.rendezvous_endpoint.rpartition(":")
        message = f"the first node has gone; node {self.launch.node_rank} waits for {host}:{port} to answer again"
        self.chronicle.record("note", message, text=message)
        deadline = time.monotonic() + self.launch.node_timeout
        while time.monotonic() < deadline and not self.signals.stop:
            with (
                contextlib.suppress(OSError),
                socket.create_connection((host, int(port)), timeout=1.0),
            ):
                return True
            self.signals.wait(POLL_SECONDS)
        return False

    def _watch(self, agent: Agent) -> int:
        """Look after one agent and its ranks until it has ended; returns its exit status."""
        watch = HangDetector(self.launch)
        before = time.monotonic()
        while True:
            code = agent.process.poll()
            self._look(agent)
            if code is not None:
                return code
            self._stop_if_asked()
            now = time.monotonic()
            cpu, stopped = self.ranks.activity()
            hung = watch.look(self.ranks.reports, now - before, cpu=cpu, stopped=stopped)
            before = now
            if hung and not self.killed:
                self._end_hung(hung)
            if self.killed:
                agent.end()
                continue
            if not self.ranks.registered and (self._between or not self.ranks.heard):
                self.chronicle.starting(restarts=self._restarts)
            self.signals.wait(POLL_SECONDS)

    def _look(self, agent: Agent) -> None:
        """See which ranks have failed, which live, and what they report."""
        flush_log()
        output = agent.read()
        if output.failures:
            self.ranks.read()
        for failure in output.failures:
            self._count(failure)
        known = self.ranks.last_pids
        self.ranks.look(agent.process.pid)
        if self.ranks.last_pids.isdisjoint(known) and self.ranks.last_pids:
            self._between = False  # the ranks of another start
        self._end_survivors(output.closing)
        self.ranks.sweep(kill=self._between or bool(self._survivors))

    def _end_survivors(self, closing: Sequence[int]) -> None:
        """Kill peers of a failed rank that do not end: those pids that lived when it failed, and no
        later ones.

        The agent would give them 30 seconds. In a collective they wait for the dead one, in set-up
        for the whole of launch.collective_timeout.
        """
        now = time.monotonic()
        for pid in closing:
            if pid not in self._survivors:
                log(f"process {pid} is asked to end, because a rank of its start has failed")
                self._survivors[pid] = now
        alive = self.ranks.reports
        self._survivors = {
            pid: since for pid, since in self._survivors.items() if pid in alive or since == now
        }
        for pid, since in self._survivors.items():
            report = alive.get(pid)
            in_setup = report is None or report.phase in (Phase.STARTING, Phase.SETUP)
            if now - since > (SETUP_SURVIVOR_SECONDS if in_setup else SURVIVOR_SECONDS):
                self.ranks.kill([pid])

    def _count(self, failure: Failure) -> None:
        """Count and record a failure, once for each start of the ranks."""
        if failure.pid in self._counted:
            return
        self._count_start(failure.pid)
        rank = self.ranks.number(failure.pid)
        if rank is None:
            rank = self.launch.node_rank * self.launch.processes + failure.local_rank
        sentence = f"rank {rank} {failure}"
        self._last_log = self.run_directory.logs / f"rank-{rank}.log"
        self._fail(sentence)
        self.chronicle.record(
            "rank_failed",
            f"{sentence} on {self.host}",
            rank=rank,
            exit=failure.exit,
            error=failure.error,
            host=self.host,
            log=f"logs/rank-{rank}.log",
        )

    def _count_start(self, pid: int) -> None:
        """The start of the ranks to which `pid` belongs has failed; what else is reported of it
        counts no more.
        """
        peers = self.ranks.last_pids
        report = self.ranks.last_report(pid)
        self._is_over = report is not None and report.phase.ended
        self._counted |= {pid, *(peers if pid in peers else ())}
        self._between = pid in peers or not self.ranks.reports

    def _fail(self, sentence: str) -> None:
        if self.signals.stop:
            self.killed = f"{sentence} while it was stopping"
        self.failures.append(sentence)
        log(
            f"failure {len(self.failures)}, launch.max_restarts = {self.launch.max_restarts}: {sentence}"
        )

    # -- hung ranks

    def _end_hung(self, hung: Sequence[Hung]) -> None:
        """Write down where every local rank stands, and kill them all: one hung rank stops the
        others too.

        They are killed before the journal is written, since a rank that is stopped may hold the
        journal's lock.
        """
        culprit = self._culprit(hung)
        rank = self.ranks.number(culprit.pid)
        name = f"rank {rank}" if rank is not None else f"process {culprit.pid}"
        files, where = stacks.capture(self.run_directory.logs, self.ranks, culprit.pid)
        why = f"has not got ahead for {culprit.seconds:.0f} s"
        if culprit.stopped:
            why = f"is suspended: its process has not run for {culprit.silent:.0f} s"
        self._last_log = self.run_directory.logs / f"rank-{rank}.log"
        self._count_start(culprit.pid)
        self.ranks.kill()
        self.chronicle.record(
            "rank_hung",
            f"{name} {why}, in phase {culprit.phase.value}{where}",
            rank=rank,
            phase=culprit.phase.value,
            seconds=round(max(culprit.seconds, culprit.silent), 1),
            host=self.host,
            stacks=[f"logs/{file.name}" for file in files],
        )
        self._fail(
            f"{name} {'was suspended' if culprit.stopped else 'hung'} in phase {culprit.phase.value}"
        )

    def _culprit(self, hung: Sequence[Hung]) -> Hung:
        """Of ranks that stand still together, most of them waiting, the one they wait for.

        That is one that never reported; else one whose whole process stands still (SIGSTOP, swapped
        out); else the one that got least far.
        """
        silent = next((one for one in hung if self.ranks.reports.get(one.pid) is None), None)
        if silent is not None:
            return silent
        reports = self.ranks.registered
        stillest = max(hung, key=lambda one: one.silent)
        if stillest.stopped or stillest.silent > SILENT_SECONDS:
            return stillest
        return min(hung, key=lambda one: (reports[one.pid].step, reports[one.pid].progress))

    # -- stopping

    def _stop_if_asked(self) -> None:
        if not self.signals.stop or self.killed:
            return
        if self._stop_since is None:
            self._stop_since = time.monotonic()
            self.chronicle.record(
                "note", f"asked to stop by {self.signals.stop}", text=f"stop: {self.signals.stop}"
            )
        registered = self.ranks.registered
        if self.signals.kill:
            self.killed = "asked to end at once"
        elif not registered and self._told.isdisjoint(self.ranks.last_pids):
            self.killed = "the ranks had not begun"
        elif time.monotonic() - self._stop_since > self.launch.stop_timeout:
            self.killed = (
                f"the ranks did not stop within launch.stop_timeout = {self.launch.stop_timeout:g}"
            )
        else:
            for pid in registered.keys() - self._told:
                self._told.add(pid)
                self.ranks.tell(pid, signal.SIGUSR1)

    def _bury(self) -> None:
        if stuck := self.ranks.bury():
            pids = ", ".join(str(process.pid) for process in stuck)
            self.chronicle.record(
                "note", f"the kernel does not end {pids} (in uninterruptible sleep?)", text="stuck"
            )

    def _outcome(self, code: int) -> tuple[Phase, ExitCode, str, list[str]]:
        """How the run ended: phase, exit code, reason ("" if rank 0 has said it), last lines that
        explain it.
        """
        asked = code == 0 or self.killed or self._is_over
        if asked and (said := self.chronicle.last_word_of_ranks(self.ranks.last_pids)) is not None:
            return *said, "", []
        if self.unwritable or (not self.signals.stop and not self._has_room(0.0)):
            return Phase.FAILED, ExitCode.WORKERS_FAILED, self.unwritable, []
        if self.signals.stop:
            return (
                Phase.STOPPED,
                ExitCode.INTERRUPTED,
                self.killed or "no rank said how it ended",
                [],
            )
        if code == 0:
            reason, explained = (
                "the ranks ended without saying how",
                self.run_directory.logs / "rank-0.log",
            )
        elif self.launch.nodes > 1 and len(self.failures) <= self.launch.max_restarts:
            waited = f"not all {self.launch.nodes} nodes met within launch.node_timeout = {self.launch.node_timeout:g}"
            reason, explained = (
                f"{waited}; on fewer: launch --resume RUN --set launch.nodes=N",
                self._elastic_log,
            )
        elif not self.failures:
            reason, explained = f"torch elastic ended with {code}", self._elastic_log
        else:
            count = (
                f"failure {len(self.failures)}, launch.max_restarts = {self.launch.max_restarts}"
            )
            reason, explained = f"{self.failures[-1]}; {count}", self._last_log or self._elastic_log
        return Phase.FAILED, ExitCode.WORKERS_FAILED, reason, tail(explained)

    # -- telling somebody

    @contextlib.contextmanager
    def _notifier(self) -> Iterator[None]:
        """A thread beside the run that tells of its events; it may fail, and training does not
        notice.
        """
        settings = self.notify
        if self._missing and not self.launch.node_rank:
            message = f"no notification by {', '.join(self._missing)}: masked in the run directory, not given again"
            self.chronicle.record("note", message, text=message)
        if self.launch.node_rank or not (settings.command or settings.webhook or settings.apprise):
            yield
            return
        notifier = Notifier(
            settings,
            self.run_directory,
            say=self.chronicle.record,
            spawn=self.ranks.spared,
            since=time.time(),
        )
        with _beside("notifier", notifier.work, seconds=4 * settings.seconds):
            yield

    def _publish_reports(self, stop: threading.Event) -> None:
        """Keep ranks/node-NAME.json fresh. On a thread: a file system that hangs must not keep us
        from the ranks.
        """
        while not stop.wait(POLL_SECONDS):
            self.ranks.publish()

    # -- trackers

    @contextlib.contextmanager
    def _feed_trackers(self) -> Iterator[None]:
        """Feed each tracker on its own thread while the ranks run."""
        with contextlib.ExitStack() as threads:
            for tracker in self.trackers:
                feed = functools.partial(self._feed, tracker)
                threads.enter_context(_beside(tracker.name, feed, seconds=60))
            yield

    def _feed(self, tracker: type[Tracker], stop: threading.Event) -> None:
        """Feed one tracker until `stop`. If it fails, the journal notes it and training goes on."""
        try:
            follow_run(tracker(self.run_directory), stop=stop)
        except Exception as error:
            self.chronicle.record(
                "note", f"{tracker.output} are no longer written: {error!r}", text=tracker.name
            )


@contextlib.contextmanager
def _beside(
    name: str, work: Callable[[threading.Event], None], *, seconds: float
) -> Iterator[None]:
    """Do `work` on a thread until the block is left; then it is told to stop, and waited for so
    many seconds.
    """
    stop = threading.Event()
    thread = threading.Thread(target=work, args=(stop,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=seconds)


def _read_secrets() -> dict[str, Any]:
    """What `launching.start` sends through the pipe; nothing where it has not said so. No child is
    told of it.
    """
    if os.environ.pop(processes.SECRETS_VARIABLE, "") != "stdin":
        return {}
    try:
        return msgspec.json.decode(sys.stdin.buffer.read(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError):
        log("the secrets of [notify] could not be read: nobody is notified by them")
        return {}


def main(arguments: Sequence[str]) -> int:
    path, node_rank = arguments[0], int(arguments[1]) if len(arguments) > 1 else 0
    signals = SupervisorSignals()
    become_reaper()
    secrets = _read_secrets()
    try:
        run = RunDirectory.open(Path(path))
        with RunLock(run.path / f"supervisor-{node_rank}.lock", "the supervisor"):
            return Supervisor(run, signals, node_rank=node_rank, secrets=secrets).run()
    except GuardrailError as error:
        log(str(error))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
