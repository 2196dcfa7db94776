"""Failures of the ranks of one node, counted against launch.max_restarts."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

from guardrail.core.events.faults import RankFailed, RankHung
from guardrail.core.sections import LaunchSection
from guardrail.launch import rank_stacks
from guardrail.launch.hang_detector import Hung, find_culprit
from guardrail.launch.supervisor_journal import SupervisorJournal, log
from guardrail.launch.torchrun import Failure
from guardrail.rundir.local_ranks import LocalRanks
from guardrail.rundir.run_directory import RunDirectory


class RankFailures:
    """Records each failure once per start of the ranks.

    Attributes:
        sentences: one per failure, newest last. All count against launch.max_restarts.
        last_log: of the rank that failed last.
        had_ended: the rank that failed last had ended the run before it failed.
        is_between_starts: the last start of the ranks has failed, and no rank of the next one runs
            yet. The next one may have to wait for another node.
    """

    def __init__(
        self,
        run: RunDirectory,
        launch: LaunchSection,
        ranks: LocalRanks,
        journal: SupervisorJournal,
    ) -> None:
        self._run, self._launch, self._ranks, self._journal = run, launch, ranks, journal
        self._host = socket.gethostname()
        self._counted: set[int] = set()  # pids of this agent's starts whose failure is counted
        self.sentences: list[str] = []
        self.last_log: Path | None = None
        self.had_ended = False
        self.is_between_starts = False

    @property
    def restarts(self) -> int:
        """How often the ranks were started again."""
        return min(len(self.sentences), self._launch.max_restarts)

    @property
    def is_limit_exceeded(self) -> bool:
        return len(self.sentences) > self._launch.max_restarts

    @property
    def count_sentence(self) -> str:
        """How many failures there are, and how many are allowed."""
        return f"failure {len(self.sentences)}, launch.max_restarts = {self._launch.max_restarts}"

    def begin_agent(self) -> None:
        """Forget the pids of the agent before: the system uses them again."""
        self._counted.clear()
        self.had_ended = False

    def note_new_ranks(self) -> None:
        """Note that the ranks of another start run."""
        self.is_between_starts = False

    def add(self, sentence: str) -> None:
        """Count a failure that has no journal line of its own."""
        self.sentences.append(sentence)
        log(f"{self.count_sentence}: {sentence}")

    def record_exit(self, failure: Failure) -> bool:
        """Count and record a rank that ended badly. False if its start is counted already."""
        if failure.pid in self._counted:
            return False
        self._close_start(failure.pid)
        rank = self._ranks.number(failure.pid)
        if rank is None:
            rank = self._launch.node_rank * self._launch.processes + failure.local_rank
        self.last_log = self._run.logs / f"rank-{rank}.log"
        line = RankFailed(
            rank=rank,
            exit=failure.exit,
            error=failure.error,
            host=self._host,
            log=f"logs/rank-{rank}.log",
        )
        self.add(line.describe_failure())
        self._journal.record(line)
        return True

    def end_hung(self, hung: Sequence[Hung]) -> None:
        """Kill all local ranks, and record the one that hung with the stacks of all.

        One hung rank stops the others too. They are killed before the journal is written: a rank
        that is suspended may hold the journal's lock.
        """
        culprit = find_culprit(hung, self._ranks.reports)
        rank = self._ranks.number(culprit.pid)
        files, where = rank_stacks.capture_stacks(self._run.logs, self._ranks, culprit.pid)
        name = f"process {culprit.pid}" if rank is None else f"rank {rank}"
        if culprit.stopped:
            why = f"is suspended: its process has not run for {culprit.silent:.0f} s"
            what = "was suspended"
        else:
            why = f"has made no progress for {culprit.seconds:.0f} s"
            what = "hung"
        self.last_log = self._run.logs / f"rank-{rank}.log"
        self._close_start(culprit.pid)
        self._ranks.kill()
        self._journal.record(
            RankHung(
                message=f"{name} {why}, in phase {culprit.phase.value}{where}",
                rank=rank,
                phase=culprit.phase.value,
                seconds=round(max(culprit.seconds, culprit.silent), 1),
                host=self._host,
                stacks=tuple(f"logs/{file.name}" for file in files),
            )
        )
        self.add(f"{name} {what} in phase {culprit.phase.value}")

    def _close_start(self, pid: int) -> None:
        """Mark the start of the ranks to which `pid` belongs as failed and counted."""
        peers = self._ranks.last_pids
        report = self._ranks.last_report(pid)
        self.had_ended = report is not None and report.phase.ended
        self._counted.add(pid)
        if pid in peers:
            self._counted |= peers
        self.is_between_starts = pid in peers or not self._ranks.reports
