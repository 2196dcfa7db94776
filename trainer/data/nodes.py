"""How nodes wait for each other's corpus before their ranks join a process group.

Each node prepares its own text, and one may need hours longer than another. A process group cannot
wait that long: its timeout is that of a step. So the first rank of each node writes a small file
into the run directory. All ranks wait until the files of all nodes report a corpus.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable

import msgspec

from guardrail.core.errors import DataError, GuardrailError, Interrupted
from guardrail.core.files import FOLDER_MODE, encode_json, read_file, replace_file
from guardrail.core.records.record import Record
from guardrail.rundir.heartbeat import this_start
from guardrail.rundir.run_directory import RunDirectory

POLL_SECONDS = 0.2
# Between two progress reports of a node. Each is a file that all nodes read.
REPORT_SECONDS = 5.0


class NodeReport(Record, frozen=True, kw_only=True):
    """The state of a node's set-up.

    Attributes:
        ready: whether its corpus exists.
        text: what it does; changes as long as there is progress.
        stopped: whether it was asked to stop; there will be no corpus.
        failed: why there will be no corpus; "": nothing has failed.
    """

    ready: bool = False
    text: str = ""
    stopped: bool = False
    failed: str = ""


class NodesReady:
    """Waits for the corpus of all nodes, once for each start of the ranks.

    Args:
        run: the run directory, on a file system that all nodes share.
        nodes: number of nodes.
        node: number of this one, from 0.
    """

    def __init__(self, run: RunDirectory, *, nodes: int, node: int) -> None:
        start = hashlib.sha256(this_start().encode()).hexdigest()[:16]
        self._folder = run.path / "setup" / start
        self._nodes, self._node = nodes, node
        self._reported = 0.0

    def report_progress(self, text: str) -> None:
        """Report the progress of this node. For its first rank; written every 5 s at most."""
        if time.monotonic() - self._reported >= REPORT_SECONDS:
            self._reported = time.monotonic()
            self._write(NodeReport(text=text))

    def read_progress(self) -> str:
        """Return the last report of this node's first rank; for its other ranks."""
        return self._read(self._node).text

    def set_ready(self) -> None:
        """Report that the corpus of this node exists; for its first rank."""
        self._write(NodeReport(ready=True))
        if self._node == 0:
            for older in self._folder.parent.iterdir():
                if older != self._folder:
                    shutil.rmtree(older, ignore_errors=True)

    def set_failed(self, error: GuardrailError) -> None:
        """Report that there will be no corpus on this node; for its first rank."""
        if isinstance(error, Interrupted):
            self._write(NodeReport(stopped=True))
        else:
            self._write(NodeReport(failed=str(error)))

    def wait_for_all(
        self, *, stop: Callable[[], bool], seconds: float, alive: Callable[[str], None]
    ) -> None:
        """Wait until every node has its corpus.

        Args:
            stop: returns whether to stop waiting.
            seconds: the longest time without any progress.
            alive: called with what is waited for, after each change.

        Raises:
            Interrupted: `stop` returned true, or a node was stopped.
            DataError: a node cannot make its corpus, or nothing has changed for `seconds`.
        """
        known: dict[int, NodeReport] = {}
        changed = time.monotonic()
        while True:
            reports = {node: self._read(node) for node in range(self._nodes)}
            missing = [node for node, report in reports.items() if not report.ready]
            if not missing:
                return
            if reports != known:
                known, changed = reports, time.monotonic()
                alive(f"waiting for the text of node {missing[0]}: {reports[missing[0]].text}")
            for node, report in reports.items():
                if report.failed:
                    raise DataError(f"node {node}: {report.failed}")
            if stop() or any(report.stopped for report in reports.values()):
                raise Interrupted(
                    "asked to stop while another node prepares its text; nothing was trained"
                )
            if time.monotonic() - changed > seconds:
                raise DataError(
                    f"node {missing[0]} has no corpus and made no progress for {seconds:.0f} s\n"
                    "  hint: see the log of its first rank, or raise launch.setup_timeout"
                )
            time.sleep(POLL_SECONDS)

    def _write(self, report: NodeReport) -> None:
        self._folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        replace_file(self._folder / f"node-{self._node}.json", encode_json(report), sync=False)

    def _read(self, node: int) -> NodeReport:
        try:
            return msgspec.json.decode(
                read_file(self._folder / f"node-{node}.json"), type=NodeReport
            )
        except (OSError, msgspec.DecodeError):
            return NodeReport()


def node_of_this_rank() -> int:
    """Return the number of this rank's node, as torch elastic counts them."""
    return int(os.environ.get("GROUP_RANK", "0"))
