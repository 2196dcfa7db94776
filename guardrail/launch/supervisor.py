"""Starts, watches and restarts the ranks of one run: `python -m guardrail.launch.supervisor RUN_DIR
[NODE_RANK]`.

    launch -> supervisor (own session, no torch) -> torch elastic -> ranks

torch elastic starts the ranks. On one node each start has a new elastic agent, so nothing of an
earlier start reaches it. On several nodes the agents stay, and start their ranks again together.

The supervisor does what elastic does not:
- it kills a rank that makes no progress (`hang_detector`);
- it kills ranks that wait for a failed one (`survivors`);
- it replaces an elastic agent that was killed;
- it waits longer than 30 seconds for a stop;
- it writes the last journal line and the last status (`supervisor_journal`).

`guardrail.rundir.stop_signals` lists its signals.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from guardrail.core.errors import DiskRefuses, ExitCode, GuardrailError
from guardrail.core.events.run_state import Note
from guardrail.core.records.status import Phase
from guardrail.launch.hang_detector import HangDetector
from guardrail.launch.rank_failures import RankFailures
from guardrail.launch.side_threads import SideThreads
from guardrail.launch.supervisor_journal import SupervisorJournal, flush_log, log, read_last_lines
from guardrail.launch.supervisor_settings import SupervisorSettings, read_settings
from guardrail.launch.survivors import Survivors
from guardrail.launch.torchrun import Agent
from guardrail.rundir import processes
from guardrail.rundir.local_ranks import LocalRanks, become_reaper
from guardrail.rundir.run_directory import RunDirectory
from guardrail.rundir.run_lock import RunLock
from guardrail.rundir.stop_signals import SupervisorSignals

POLL_SECONDS = 0.4
ROOM_SECONDS = 30.0  # that the ranks wait for a full disk before they are started again


class Outcome(NamedTuple):
    """How a run ended.

    `reason` is "" where a rank has recorded it. `last_lines` are those of a log that explain it.
    """

    phase: Phase
    exit_code: ExitCode
    reason: str = ""
    last_lines: Sequence[str] = ()


class Supervisor:
    """Runs one run on one node, from the first process to the last journal line."""

    def __init__(
        self, run: RunDirectory, settings: SupervisorSettings, signals: SupervisorSignals
    ) -> None:
        launch = settings.launch
        self._run_directory, self._launch, self._signals = run, launch, signals
        self._is_first_node = settings.is_first_node
        host = socket.gethostname()
        self._ranks = LocalRanks(run, node_rank=launch.node_rank, nodes=launch.nodes)
        self._journal = SupervisorJournal(run, launch, host, settings.mode)
        self._threads = SideThreads(settings, run, self._ranks, self._journal)
        self._failures = RankFailures(run, launch, self._ranks, self._journal)
        self._survivors = Survivors(self._ranks)
        self._kill_reason = ""  # why everything was killed; "": it was not
        self._disk_refusal = ""  # why the run directory takes no file; "": it does
        self._asked_to_stop: set[int] = set()  # pids
        self._stop_since: float | None = None
        # The agents' output is read for failures, so each node has its own log.
        node = "" if settings.is_first_node else f"-{launch.node_rank}"
        self._elastic_log = run.logs / f"elastic{node}.log"

    # -- from the first process to the last

    def run(self) -> ExitCode:
        """Run the ranks to their end, and return the exit code of the run."""
        with self._threads.send_notifications():  # the last journal line is sent too
            return self._run()

    def _run(self) -> ExitCode:
        if self._is_first_node:
            self._run_directory.remove_ranks()
        self._journal.write_starting_status(restarts=0)
        outcome = Outcome(Phase.FAILED, ExitCode.WORKERS_FAILED)
        try:
            with self._threads.feed_trackers(), self._threads.publish_reports():
                outcome = self._find_outcome(self._run_agents())
                self._journal.record_end(*outcome)
        except BaseException as error:
            self._end_descendants()
            reason = f"the supervisor failed: {error!r}"
            self._journal.record_end(outcome.phase, outcome.exit_code, reason, [])
            raise
        finally:
            self._ranks.end()
            self._journal.write_final_status(
                outcome.phase,
                outcome.exit_code,
                restarts=self._failures.restarts,
                disk_refusal=self._disk_refusal,
            )
        return outcome.exit_code

    def _run_agents(self) -> int:
        """Run elastic agents one after another; return the exit status of the last one.

        The last one is the one that ends by itself, that a user stops, or that exceeds
        launch.max_restarts.
        """
        failures = self._failures
        while True:
            wait_seconds = ROOM_SECONDS if failures.sentences else 0.0
            if not self._wait_for_room(wait_seconds):
                return 1
            before = len(failures.sentences)
            code = self._run_agent()
            if self._kill_reason or self._signals.stop or code == 0:
                return code
            if failures.had_ended and self._read_outcome_of_ranks() is not None:
                return code  # a rank that fails after the end of the run changes nothing
            has_failed = len(failures.sentences) > before
            if code < 0 and not has_failed:
                self._add_failure(f"the elastic agent was killed by {signal.Signals(-code).name}")
            elif code > 0 and self._has_lost_first_node():
                if not has_failed:
                    self._add_failure("the first node has ended")
                if not self._wait_for_first_node():
                    return code
            elif code > 0 and (self._launch.nodes > 1 or not has_failed):
                return code
            if failures.is_limit_exceeded:
                return 1

    def _run_agent(self) -> int:
        """Run one agent and its ranks to their end; return its exit status."""
        restarts_left = self._launch.max_restarts - self._failures.restarts
        variables = self._ranks.begin()
        self._survivors.clear()
        self._failures.begin_agent()
        agent = Agent(
            self._launch,
            self._run_directory.path,
            self._elastic_log,
            incarnation=self._failures.restarts,
            restarts=restarts_left if self._launch.nodes > 1 else 0,
            variables=variables,
        )
        try:
            return self._watch_agent(agent)
        finally:
            agent.end()
            self._end_descendants()

    def _wait_for_room(self, seconds: float) -> bool:
        """Return whether the run directory takes a file within `seconds`.

        Asked before a start and at the end only: ranks that start on a full disk fail at once,
        ranks that train continue without a disk.
        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                self._run_directory.check_writable()
                return True
            except DiskRefuses as error:
                refusal = str(error)
            if self._signals.stop or time.monotonic() >= deadline:
                self._kill_reason = self._disk_refusal = refusal
                return False
            log(f"the ranks wait for free disk space to start again: {refusal}")
            self._signals.wait(1.0)

    # -- several nodes

    def _has_lost_first_node(self) -> bool:
        """Return whether the agent ended because the first node's agent, where the nodes meet, has
        ended.
        """
        if self._is_first_node or self._failures.is_limit_exceeded:
            return False
        status = self._run_directory.read_status()
        return status is not None and not status.phase.ended

    def _wait_for_first_node(self) -> bool:
        """Wait until the first node listens again.

        Returns:
            False if it does not within launch.node_timeout, or if a stop is asked for.
        """
        host, _, port = self._launch.rendezvous_endpoint.rpartition(":")
        node = self._launch.node_rank
        message = f"the first node has ended; node {node} waits until {host}:{port} answers again"
        self._journal.record(Note(message=message, data={"text": message}))
        deadline = time.monotonic() + self._launch.node_timeout
        while time.monotonic() < deadline and not self._signals.stop:
            with (
                contextlib.suppress(OSError),
                socket.create_connection((host, int(port)), timeout=1.0),
            ):
                return True
            self._signals.wait(POLL_SECONDS)
        return False

    # -- watching one agent

    def _watch_agent(self, agent: Agent) -> int:
        """Watch one agent and its ranks until the agent has ended; return its exit status."""
        detector = HangDetector(self._launch)
        before = time.monotonic()
        while True:
            code = agent.process.poll()
            self._update_ranks(agent)
            if code is not None:
                return code
            self._stop_if_asked()
            now = time.monotonic()
            cpu, stopped = self._ranks.activity()
            hung = detector.find_hung(
                self._ranks.reports, now - before, cpu_seconds=cpu, stopped=stopped
            )
            before = now
            if hung and not self._kill_reason:
                self._failures.end_hung(hung)
                self._note_failure_while_stopping()
            if self._kill_reason:
                agent.end()
                continue
            if self._is_starting():
                self._journal.write_starting_status(restarts=self._failures.restarts)
            self._signals.wait(POLL_SECONDS)

    def _is_starting(self) -> bool:
        """Return whether no rank writes the status yet."""
        if self._ranks.registered:
            return False
        return self._failures.is_between_starts or not self._ranks.heard

    def _update_ranks(self, agent: Agent) -> None:
        """Read which ranks have failed, which run, and what they report."""
        flush_log()
        output = agent.read_output()
        if output.failures:
            self._ranks.read()
        for failure in output.failures:
            if self._failures.record_exit(failure):
                self._note_failure_while_stopping()
        known = self._ranks.last_pids
        self._ranks.look(agent.process.pid)
        if self._ranks.last_pids.isdisjoint(known) and self._ranks.last_pids:
            self._failures.note_new_ranks()
        self._survivors.end(output.closing)
        self._ranks.sweep(kill=self._failures.is_between_starts or bool(self._survivors))

    def _add_failure(self, sentence: str) -> None:
        self._failures.add(sentence)
        self._note_failure_while_stopping()

    def _note_failure_while_stopping(self) -> None:
        """Kill the rest where a rank fails during a stop: no start follows."""
        if self._signals.stop:
            self._kill_reason = f"{self._failures.sentences[-1]} during the stop"

    # -- stopping

    def _stop_if_asked(self) -> None:
        """Ask the ranks to save and stop, or decide to kill them."""
        if not self._signals.stop or self._kill_reason:
            return
        if self._stop_since is None:
            self._stop_since = time.monotonic()
            reason = self._signals.stop
            note = Note(message=f"stop requested by {reason}", data={"text": f"stop: {reason}"})
            self._journal.record(note)
        registered = self._ranks.registered
        if self._signals.kill:
            self._kill_reason = "a second signal ended it at once"
        elif not registered and self._asked_to_stop.isdisjoint(self._ranks.last_pids):
            self._kill_reason = "stopped before the first rank reported"
        elif time.monotonic() - self._stop_since > self._launch.stop_timeout:
            limit = f"launch.stop_timeout = {self._launch.stop_timeout:g}"
            self._kill_reason = f"the ranks did not stop within {limit} s"
        else:
            for pid in registered.keys() - self._asked_to_stop:
                self._asked_to_stop.add(pid)
                self._ranks.send_signal(pid, signal.SIGUSR1)

    def _end_descendants(self) -> None:
        """Kill and reap every process below this one."""
        if stuck := self._ranks.bury():
            pids = ", ".join(str(process.pid) for process in stuck)
            message = f"the kernel does not end {pids} (in uninterruptible sleep?)"
            self._journal.record(Note(message=message, data={"text": "stuck"}))

    # -- how it ended

    def _read_outcome_of_ranks(self) -> tuple[Phase, ExitCode] | None:
        return self._journal.read_outcome_of_ranks(self._ranks.last_pids)

    def _find_outcome(self, code: int) -> Outcome:
        """Return how the run ended.

        Args:
            code: exit status of the last agent.
        """
        failures = self._failures
        if code == 0 or self._kill_reason or failures.had_ended:
            recorded = self._read_outcome_of_ranks()
            if recorded is not None:
                return Outcome(*recorded)
        if self._disk_refusal or (not self._signals.stop and not self._wait_for_room(0.0)):
            return Outcome(Phase.FAILED, ExitCode.WORKERS_FAILED, self._disk_refusal)
        if self._signals.stop:
            reason = self._kill_reason or "no rank recorded how it ended"
            return Outcome(Phase.STOPPED, ExitCode.INTERRUPTED, reason)
        reason, explained_by = self._explain_failure(code)
        return Outcome(Phase.FAILED, ExitCode.WORKERS_FAILED, reason, read_last_lines(explained_by))

    def _explain_failure(self, code: int) -> tuple[str, Path]:
        """Return why the run failed, and the log whose last lines explain it."""
        failures, launch = self._failures, self._launch
        if code == 0:
            log_of_rank_0 = self._run_directory.logs / "rank-0.log"
            return "the ranks ended without recording how", log_of_rank_0
        if launch.nodes > 1 and not failures.is_limit_exceeded:
            limit = f"launch.node_timeout = {launch.node_timeout:g}"
            reason = (
                f"not all {launch.nodes} nodes met within {limit} s. "
                "To use fewer nodes: guardrail launch --resume RUN --set launch.nodes=N"
            )
            return reason, self._elastic_log
        if not failures.sentences:
            return f"torch elastic ended with {code}", self._elastic_log
        reason = f"{failures.sentences[-1]}; {failures.count_sentence}"
        return reason, failures.last_log or self._elastic_log


def _read_secrets() -> dict[str, Any]:
    """Return what `supervisor_process.start_supervisor` sends through the pipe; {} where it has announced nothing.

    The announcement is removed from the environment, so no child process sees it.
    """
    if os.environ.pop(processes.SECRETS_VARIABLE, "") != "stdin":
        return {}
    try:
        return msgspec.json.decode(sys.stdin.buffer.read(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError):
        log("the secrets of [notify] could not be read: no notification is sent by their ways")
        return {}


def main(arguments: Sequence[str]) -> int:
    """Run the supervisor of `RUN_DIR [NODE_RANK]`; return its exit code."""
    path, *others = arguments
    node_rank = int(others[0]) if others else 0
    signals = SupervisorSignals()
    become_reaper()
    secrets = _read_secrets()
    try:
        run = RunDirectory.open(Path(path))
        with RunLock(run.path / f"supervisor-{node_rank}.lock", "the supervisor"):
            settings = read_settings(run, node_rank=node_rank, secrets=secrets)
            return Supervisor(run, settings, signals).run()
    except GuardrailError as error:
        log(str(error))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
