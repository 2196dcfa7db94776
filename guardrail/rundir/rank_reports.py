"""The reports of one node's ranks: one small file per rank, in a folder on a local disk.

The run directory, which may be on a shared file system, gets one file per node
(ranks/node-NAME.json). The process that holds the folder's lock writes it. That is the node's
supervisor. Without one (a custom loop, a killed supervisor) it is one of the ranks.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from guardrail.core.files import FILE_MODE, FOLDER_MODE, encode_json, read_file
from guardrail.core.records.status import NodeStatus, RankStatus
from guardrail.rundir.run_directory import RunDirectory

RUN_VARIABLE = "GUARDRAIL_RUN"
# the folder, in the environment of every rank that has a supervisor
FOLDER_VARIABLE = "GUARDRAIL_REPORTS"
NODE_VARIABLE = "GUARDRAIL_NODE"  # the name of the node's file
NODES_A_SECOND = 16  # files of nodes that may be replaced each second, over all nodes of the run
LEAST_FREE_BYTES = 1 << 20  # of the disk on which ranks report
SIZE = 1024  # bytes of a report, or a multiple of it
LONGEST_INTERVAL = 10.0  # seconds; a viewer calls a rank silent after 15


def seconds_between(nodes: int) -> float:
    """Return the seconds between two writes of a node's file; more nodes, more seconds."""
    return min(LONGEST_INTERVAL, max(1.0, nodes / NODES_A_SECOND))


class NodeReports:
    """The reports of one node's ranks.

    Args:
        run: the run directory.
        folder: on a local disk; made at the first write.
        name: of the node's file in the run directory; "": the host's name and the lowest rank.
        nodes: number of nodes of the run.
        shared: no supervisor reads the folder; the ranks of the node do it themselves.
    """

    def __init__(
        self,
        run: RunDirectory,
        folder: Path,
        *,
        name: str = "",
        nodes: int = 1,
        shared: bool = False,
    ) -> None:
        self.folder, self.shared = folder, shared
        self._run, self._name, self._seconds = run, name, seconds_between(nodes)
        self._host = socket.gethostname()
        self._lock: int | None = None
        self._file: int | None = None  # of the one rank that writes by this object
        self._known: dict[str, RankStatus] = {}  # file -> its last content
        self._published: tuple[float, object] = (-LONGEST_INTERVAL, None)
        self._reading, self._publishing = threading.Lock(), threading.Lock()

    # -- constructors

    @classmethod
    def of_supervisor(
        cls, run: RunDirectory, *, node_rank: int, nodes: int, start: int
    ) -> NodeReports:
        """Return the reports of one start of the ranks, with an empty folder.

        The folders of earlier starts of this node are removed.
        """
        prefix = f"{_digest(run)}-{node_rank}-"
        base = _base(run)
        for name in _names(base):
            if name.startswith(prefix):
                shutil.rmtree(base / name, ignore_errors=True)
        reports = cls(run, base / f"{prefix}{start}", name=str(node_rank), nodes=nodes)
        reports.try_lock()
        return reports

    @classmethod
    def of_rank(cls, run: RunDirectory, *, start: str) -> NodeReports:
        """Return the reports for a rank, in the folder that the supervisor names.

        Without a supervisor, all ranks of `start` on this host use the same folder.
        """
        nodes = count_nodes(os.environ)
        folder, started = os.environ.get(FOLDER_VARIABLE, ""), os.environ.get(RUN_VARIABLE, "")
        if folder and started and os.path.realpath(started) == os.path.realpath(run.path):
            return cls(run, Path(folder), name=os.environ.get(NODE_VARIABLE, ""), nodes=nodes)
        name = hashlib.sha256(start.encode()).hexdigest()[:16]
        return cls(
            run,
            _base(run) / f"{_digest(run)}-loop-{name}",
            nodes=nodes,
            shared=_ranks(os.environ) > 1,
        )

    # -- the folder

    def write(self, status: RankStatus) -> None:
        """Overwrite the report of a rank in place. Raises OSError.

        An existing file needs no more room, so a full disk does not make a rank look dead.
        """
        data = encode_json(status)
        data += b" " * (-len(data) % SIZE)
        os.pwrite(self._opened(f"rank-{status.rank:05d}.json"), data, 0)

    def _opened(self, name: str) -> int:
        if self._file is not None and os.fstat(self._file).st_nlink:
            return self._file
        if self._file is not None:
            os.close(self._file)  # the folder has been removed
            self._file = None
        self._make_folder()
        self._file = os.open(
            self.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE
        )
        return self._file

    def _make_folder(self) -> None:
        with contextlib.suppress(FileExistsError):
            self.folder.mkdir(mode=FOLDER_MODE, parents=True)

    def read(self) -> list[RankStatus]:
        """Return the last report of each rank of this node, by rank. Thread-safe."""
        with self._reading:
            return self._read()

    def _read(self) -> list[RankStatus]:
        names = [name for name in _names(self.folder) if name.startswith("rank-")]
        self._known = {name: status for name, status in self._known.items() if name in names}
        for name in names:
            # A report that is just being overwritten cannot be read. The one before it stays.
            with contextlib.suppress(OSError, msgspec.DecodeError, UnicodeDecodeError):
                data = read_file(self.folder / name)
                self._known[name] = msgspec.json.decode(data, type=RankStatus, strict=False)
        return [self._known[name] for name in names if name in self._known]

    # -- the node's file

    def try_lock(self) -> bool:
        """Become the process that writes the node's file; return False while another one is."""
        if self._lock is not None:
            return True
        try:
            self._make_folder()
            lock = os.open(
                self.folder / "lock",
                os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW,
                FILE_MODE,
            )
        except OSError:
            return False
        try:
            # of this process: a forked child does not hold it
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            return False
        self._lock = lock
        return True

    def publish(self, *, now: bool = False) -> None:
        """Replace the node's file if it is time. Raises OSError.

        It is also replaced when a rank changes its phase, if the run has few nodes.

        Args:
            now: replace it in any case.
        """
        with self._publishing:
            ranks = self.read()
            when, before = self._published
            phases = [(status.rank, status.pid, status.phase) for status in ranks]
            waited = time.monotonic() - when
            if not ranks or not (
                now or waited >= self._seconds or (self._seconds <= 1.0 and phases != before)
            ):
                return
            name = self._name or f"{self._host.replace('/', '_')}-{ranks[0].rank}"
            self._run.write_node(
                NodeStatus(
                    node=name,
                    host=self._host,
                    time=time.time(),
                    seconds=self._seconds,
                    ranks=tuple(ranks),
                )
            )
            self._published = (time.monotonic(), phases)

    def close(self) -> None:
        """Let another process write the node's file. The last rank removes the folder."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._lock is None:
            return
        over = all(status.closed or not _lives(status.pid) for status in self.read())
        if over:
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)
        self._lock = None


def _base(run: RunDirectory) -> Path:
    """Return a folder of this user on a local disk, in memory if possible.

    If there is none, it is in the run directory.
    """
    for place in ("/dev/shm", os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir()):
        folder = Path(place) / f"guardrail-{os.getuid()}"
        with contextlib.suppress(OSError):
            if place and os.path.isdir(place) and _is_usable(folder):
                return folder
    return run.path / "ranks" / "local"


def _is_usable(folder: Path) -> bool:
    """Return whether the folder belongs to this user alone and its disk has room.

    A missing folder is made. Raises OSError.
    """
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=FOLDER_MODE)
    found, disk = os.lstat(folder), os.statvfs(folder)
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return (
        ours
        and os.access(folder, os.W_OK | os.X_OK)
        and disk.f_bavail * disk.f_frsize > LEAST_FREE_BYTES
    )


def _digest(run: RunDirectory) -> str:
    return hashlib.sha256(os.fsencode(os.path.realpath(run.path))).hexdigest()[:16]


def _names(folder: Path) -> Iterator[str]:
    with contextlib.suppress(OSError):
        yield from sorted(os.listdir(folder))


def count_nodes(variables: Mapping[str, str]) -> int:
    """Return the number of nodes, from the variables of torchrun; 1 without them."""
    try:
        return max(1, int(variables["WORLD_SIZE"]) // max(1, int(variables["LOCAL_WORLD_SIZE"])))
    except (KeyError, ValueError):
        return 1


def _ranks(variables: Mapping[str, str]) -> int:
    """Return the number of ranks, from the variables of torchrun; 1 without them."""
    try:
        return int(variables["WORLD_SIZE"])
    except (KeyError, ValueError):
        return 1


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
