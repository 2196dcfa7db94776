"""The run directory: what a crash, a full disk, a second writer and a stranger can do to it, and
what they cannot.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from guardrail.core.errors import ConfigError, RunDirectoryError
from guardrail.core.events.decisions import Skipped, VerdictGiven
from guardrail.core.records.signals import METRIC_COLUMNS
from guardrail.core.records.spans import Span
from guardrail.core.records.status import NodeStatus, Phase, RankStatus, Status
from guardrail.core.records.verdicts import Mode
from guardrail.core.toml_file import read_toml
from guardrail.decide.timelines import TimelineIndex
from guardrail.launch.supervisor_journal import read_last_lines
from guardrail.operate.run_summary import read_losses
from guardrail.rundir import journal
from guardrail.rundir.checkpoint_folders import checkpoint_dirs
from guardrail.rundir.follow import Follower
from guardrail.rundir.run_directory import RunDirectory
from guardrail.rundir.run_search import find_run, list_runs
from tests.support.findings import make_nan_finding
from tests.support.lab import without_waiting


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "runs", "demo", "[run]\nname = 'demo'\n")


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """What a full disk does: a write is cut short at `size` bytes, the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def row(step: int, timeline: int = 0, **values: float) -> dict[str, float]:
    return {"step": step, "timeline": timeline, "loss": 2.0, **values}


# -- creating, opening, finding


def test_a_new_run_is_complete_private_and_numbered(tmp_path: Path) -> None:
    first = RunDirectory.create(tmp_path, "demo", "a = 1\n")
    second = RunDirectory.create(tmp_path, "demo", "a = 2\n")
    assert (
        first.name.startswith("demo/")
        and first.name.endswith("-01")
        and second.name.endswith("-02")
    )
    assert first.config_text() == "a = 1\n"
    assert stat.S_IMODE(first.path.stat().st_mode) == 0o700
    for path in first.path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert not [name for name in os.listdir(tmp_path / "demo") if name.startswith(".")]


def test_creators_at_once_never_share_a_directory(tmp_path: Path) -> None:
    made: list[RunDirectory] = []
    threads = [
        threading.Thread(
            target=lambda n=n: made.append(RunDirectory.create(tmp_path, "demo", f"n = {n}\n"))
        )
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({run.path for run in made}) == 8
    assert {run.config_text() for run in made} == {f"n = {n}\n" for n in range(8)}


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "-x", ".hidden", "a\nb", "a" * 200, "\x1b[31m"]
)
def test_names_that_would_leave_the_root_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunDirectoryError) as caught:
        RunDirectory.create(tmp_path, name, "")
    assert caught.value.kind == "wrong_name"


@pytest.mark.parametrize(("folder", "kind"), [("nothing", "no_such_run"), (".", "not_a_run")])
def test_opening_says_what_is_wrong(tmp_path: Path, folder: str, kind: str) -> None:
    path = tmp_path / folder
    with pytest.raises(RunDirectoryError, match=re.escape(str(path))) as caught:
        RunDirectory.open(path)
    assert caught.value.kind == kind


def test_a_run_is_found_by_every_name_a_user_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [
        RunDirectory.create(tmp_path, name, "") for name in ("alpha", "alpha", "beta", "alphabet")
    ]
    for age, run in enumerate(reversed(runs)):
        os.utime(run.path / "config.toml", (1000 - age, 1000 - age))
    (tmp_path / "not-a-run" / "x").mkdir(parents=True)
    assert [r.path for r in list_runs(tmp_path)] == [r.path for r in reversed(runs)]
    day = runs[0].path.name[:-3]
    for spec, index in [
        (None, 3),
        ("alpha", 1),
        ("beta", 2),
        ("be", 2),
        (f"alpha/{day}-01", 0),
        (f"alpha/{day}-02", 1),
        (str(runs[0].path), 0),
        (f"{day}-02", 1),
        ("beta/", 2),
    ]:
        assert find_run(spec, tmp_path).path == runs[index].path, spec
    both, beta = (runs[1].name, runs[3].name), (runs[2].name, runs[3].name)
    for spec, root, kind, names in (
        ("al", tmp_path, "several_runs", both),
        (f"{day}-01", tmp_path, "several_runs", beta),
        ("beta2", tmp_path, "no_such_run", ("beta",)),
        (None, tmp_path / "empty", "no_runs", (str(tmp_path / "empty"),)),
    ):
        with pytest.raises(RunDirectoryError) as caught:
            find_run(spec, root)
        assert caught.value.kind == kind
        said = str(caught.value).replace("beta2", "")
        assert all(name in said for name in names), said
    monkeypatch.chdir(runs[2].path.parent)
    assert find_run(runs[2].path.name, tmp_path / "empty").path == runs[2].path


# -- journal


def test_events_come_back_as_they_were_written(run: RunDirectory) -> None:
    finding = make_nan_finding(7, threshold=8.0, ranks=(1,))
    span = Span(first=10, last=20, origin="rejected", step=7, reason="because")
    first = run.append(
        "verdict",
        "loss nan",
        step=7,
        timeline=2,
        findings=[finding],
        value=-math.inf,
        n=np.float64(1.5),
    )
    run.append(
        "skipped", step=7, timeline=2, span=span, path=Path("/x"), name=os.fsdecode(b"\xff.txt")
    )
    events = run.events()
    assert [e.seq for e in events] == [1, 2]
    verdict, skipped = events
    assert isinstance(verdict, VerdictGiven) and isinstance(skipped, Skipped)
    assert (verdict.kind, verdict.message, verdict.timeline) == ("verdict", "loss nan", 2)
    assert verdict.time == first.time
    (back,) = verdict.findings
    assert math.isnan(back.value) and back.score == math.inf and back.ranks == (1,)
    assert msgspec.structs.replace(back, value=0.0) == msgspec.structs.replace(finding, value=0.0)
    assert verdict.data["value"] == "-inf" and verdict.data["n"] == 1.5
    assert skipped.span == span
    assert skipped.data["path"] == "/x" and skipped.data["name"] == "\\udcff.txt"
    assert run.events(after=1) == events[1:]
    for line in run.journal_path.read_text().splitlines():
        assert {"seq", "time", "step", "timeline", "kind"} <= json.loads(line).keys()


def test_fixed_fields_are_not_data(run: RunDirectory) -> None:
    with pytest.raises(ValueError, match="seq"):
        run.append("note", seq=3)
    assert run.events() == []


def test_unknown_fields_and_broken_lines_of_others_do_no_harm(run: RunDirectory) -> None:
    run.append("note", "one")
    with run.journal_path.open("ab") as file:
        file.write(b"\0\0\0\0\n[1]\nnot json\n\xff\xfe\n")
        file.write(b'{"seq": 2, "time": 1.0, "kind": "new-kind", "colour": "red", "message": ""}\n')
    run.append("note", "three")
    assert [(e.seq, e.kind) for e in run.events()] == [(1, "note"), (2, "new-kind"), (3, "note")]
    assert run.events()[1].data == {"colour": "red"}


@pytest.mark.parametrize("keep", [1, 20, -2])
def test_a_torn_last_line_is_cut_off_and_the_journal_says_so(run: RunDirectory, keep: int) -> None:
    run.append("note", "first")
    before = run.journal_path.read_bytes()
    run.append("note", "torn")
    torn = run.journal_path.read_bytes()[len(before) :][:keep]
    run.journal_path.write_bytes(before + torn)
    assert [e.message for e in run.events()] == ["first"]
    run.append("note", "next")
    first, cut, last = run.events()
    assert [first.message, last.message] == ["first", "next"]
    assert cut.kind == "note" and re.findall(r"\d+", cut.message) == [str(len(torn))]
    assert [e.seq for e in run.events()] == [1, 2, 3]


def test_a_line_that_lacks_only_its_newline_is_kept(run: RunDirectory) -> None:
    run.append("note", "first")
    run.append("note", "second")
    run.journal_path.write_bytes(run.journal_path.read_bytes()[:-1])
    run.append("note", "third")
    assert [(e.seq, e.message) for e in run.events()] == [(1, "first"), (2, "second"), (3, "third")]


def test_seq_goes_on_after_lines_longer_than_the_tail_that_is_read(run: RunDirectory) -> None:
    run.append("note", "x" * 300_000)
    run.append("note", "y" * 70_000)
    assert run.append("note", "z").seq == 3
    run.journal_path.write_bytes(run.journal_path.read_bytes() + b'{"torn' + b"t" * 200_000)
    assert run.append("note", "after").seq == 5
    assert [e.seq for e in run.events()] == [1, 2, 3, 4, 5]


def test_a_full_disk_raises_and_leaves_no_half_line(run: RunDirectory) -> None:
    run.append("note", "before")
    before = run.journal_path.read_bytes()
    with file_size_limit(len(before) + 40), pytest.raises(OSError):
        run.append("note", "x" * 200)
    assert run.journal_path.read_bytes() == before
    assert run.append("note", "after").seq == 2


def test_an_event_is_on_disk_before_it_counts_and_a_row_costs_no_sync(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, write, replace = os.fsync, os.write, os.replace
    monkeypatch.setattr(os, "fsync", lambda d: (done.append("sync"), fsync(d))[1])
    monkeypatch.setattr(os, "write", lambda d, data: (done.append("write"), write(d, data))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b))[1])
    run.append("note", "first")
    assert done == ["sync", "write", "sync"], "the folder that names the new file, then the line"
    done.clear()
    run.append("note", "second")
    assert done == ["write", "sync"]
    with run.metrics_writer() as writer:
        done.clear()
        writer.append(row(1))
    assert done == ["write"]
    done.clear()
    run.write_config("a = 1")
    assert done == ["write", "sync", "rename", "sync"]
    done.clear()
    run.write_status(Status(run="demo", phase=Phase.STEP))
    assert done == ["write", "rename"]


def test_a_writer_that_never_lets_go_does_not_hold_the_others_for_ever(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.append("note")
    monkeypatch.setattr(journal, "LOCK_SECONDS", 0.05)
    with run.journal_path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OSError) as caught:
            run.append("note")
        assert caught.value.errno == errno.EDEADLK
    assert run.append("note").seq == 2


WRITER = """
import sys
from guardrail.rundir.run_directory import RunDirectory
run = RunDirectory.open(sys.argv[1])
for n in range(int(sys.argv[2])):
    run.append("note", "x" * (n * 37 % 500), who=sys.argv[3], n=n)
    if n == 3:
        print("going", flush=True)
"""


def writer(run: RunDirectory, count: int, who: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(run.path), str(count), who], stdout=subprocess.PIPE
    )


def test_writers_at_once_number_their_events_without_gap_or_repeat(run: RunDirectory) -> None:
    processes = [writer(run, 40, str(n)) for n in range(3)]
    threads = [
        threading.Thread(target=lambda: [run.append("note", who="t") for _ in range(20)])
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    events = run.events()
    assert [e.seq for e in events] == list(range(1, 161))
    for who in "012":
        assert [e.data["n"] for e in events if e.data["who"] == who] == list(range(40))


def test_a_killed_writer_leaves_a_journal_that_goes_on(run: RunDirectory) -> None:
    for trial in range(4):
        process = writer(run, 100_000, str(trial))
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.013 * trial)
        process.kill()
        process.communicate()
        run.append("note", "after")
    events = run.events()
    assert [e.seq for e in events] == list(range(1, len(events) + 1))
    assert sum(e.message == "after" for e in events) == 4 and len(events) >= 20


def test_the_journal_does_not_follow_a_link(run: RunDirectory, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    run.journal_path.symlink_to(target)
    with pytest.raises(OSError):
        run.append("note")
    assert target.read_text() == "precious"


# -- metrics


def test_rows_come_back_by_name(run: RunDirectory) -> None:
    assert len(run.metrics()) == 0 and run.metrics().columns == METRIC_COLUMNS
    assert run.metrics().current().tolist() == []
    with run.metrics_writer() as writer:
        writer.append(row(1, loss=math.nan, unknown=4.0))
        writer.append(row(2, loss=math.inf))
        view = run.metrics()
        assert view.array.shape == (2, len(METRIC_COLUMNS)) and view.array.dtype == "<f8"
        writer.append(row(3))
        assert len(view) == 2 and len(run.metrics()) == 3 == writer.rows
    assert view.column("step").tolist() == [1, 2]
    assert math.isnan(view.column("loss")[0]) and view.column("loss")[1] == math.inf
    assert np.isnan(view.column("lr")).all() and np.isnan(view.column("not-there")).all()
    picked = run.metrics(["loss", "step"])
    assert picked.columns == ("loss", "step") and picked.array[:, 1].tolist() == [1, 2, 3]
    assert picked.current().tolist() == [True] * 3


def test_a_torn_row_is_not_read_and_cut_at_the_next_open(run: RunDirectory) -> None:
    with run.metrics_writer() as writer:
        writer.append(row(1))
        writer.append(row(2))
    data = run.metrics_path.read_bytes()
    run.metrics_path.write_bytes(data[:-5])
    assert run.metrics().column("step").tolist() == [1]
    with run.metrics_writer() as writer:
        writer.append(row(2, loss=7.0))
    assert (
        run.metrics().column("step").tolist() == [1, 2] and run.metrics().column("loss")[1] == 7.0
    )


def test_a_full_disk_raises_and_the_next_row_starts_clean(run: RunDirectory) -> None:
    with run.metrics_writer() as writer:
        writer.append(row(1))
        size = run.metrics_path.stat().st_size
        with file_size_limit(size + 30), pytest.raises(OSError):
            writer.append(row(2))
        assert run.metrics_path.stat().st_size == size
        with file_size_limit(size), pytest.raises(OSError):
            writer.append(row(3))
        writer.append(row(4))
    assert run.metrics().column("step").tolist() == [1, 4]


def test_a_newer_file_keeps_its_own_columns(run: RunDirectory) -> None:
    columns = ["step", "timeline", "temperature", "loss"]
    (run.path / "metrics.json").write_text(
        json.dumps({"version": 9, "columns": columns, "unit": {"loss": "nat"}})
    )
    with run.metrics_writer() as writer:
        writer.append({"step": 1, "timeline": 0, "loss": 2.0, "lr": 0.1})
    view = run.metrics()
    assert view.columns == tuple(columns) and view.column("loss").tolist() == [2.0]
    (run.path / "metrics.json").write_text("{")
    with pytest.raises(RunDirectoryError, match="columns"):
        run.metrics()


def test_a_million_rows_are_mapped_not_read(run: RunDirectory) -> None:
    with run.metrics_writer() as writer:
        writer.append(row(1))
    rows = 1_000_000
    with run.metrics_path.open("r+b") as file:
        file.truncate(rows * 8 * len(METRIC_COLUMNS))
    view = run.metrics()
    assert isinstance(view.array, np.memmap) and len(view) == rows
    assert view.current().sum() == 1, "the zeros that a power failure leaves are no steps"


def write_rows(run: RunDirectory, *rows: tuple[int, int]) -> None:
    with run.metrics_writer() as writer:
        for step, timeline in rows:
            writer.append(row(step, timeline))


def present(run: RunDirectory) -> list[tuple[int, int]]:
    view = run.metrics()
    mask = view.current()
    return list(
        zip(view.column("step")[mask].tolist(), view.column("timeline")[mask].tolist(), strict=True)
    )


def test_the_present_is_without_what_a_rollback_abandoned(run: RunDirectory) -> None:
    write_rows(run, *[(s, 0) for s in range(1, 8)])
    run.append("rollback", step=7, timeline=0, to_step=4, new_timeline=1)
    assert present(run) == [(s, 0) for s in (1, 2, 3, 4)], "the journal says so before a row does"
    write_rows(run, (5, 1), (6, 1))
    run.append("restarted", step=2, timeline=2)
    write_rows(run, (3, 2), (4, 2), (4, 2))
    assert present(run) == [(1, 0), (2, 0), (3, 2), (4, 2), (4, 2)]
    assert len(run.metrics()) == 12, "abandoned timelines stay readable"


def test_rows_alone_show_the_present_when_the_journal_was_lost(run: RunDirectory) -> None:
    write_rows(run, (1, 0), (2, 0), (3, 0), (2, 1), (3, 1), (2, 2))
    assert present(run) == [(1, 0), (2, 2)]


def test_the_mask_equals_its_definition() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        timelines = np.sort(generator.integers(0, 6, 40)).astype(float)
        steps = generator.integers(1, 30, 40).astype(float)
        known = TimelineIndex()
        for timeline in generator.permutation(6)[:4].tolist():
            known.begin(timeline, int(generator.integers(0, 30)))
        expected = [
            all(step <= begin for other, begin in known.begins.items() if other > timeline)
            for step, timeline in zip(steps, timelines, strict=True)
        ]
        assert known.current(steps, timelines).tolist() == expected


# -- status and ranks


def test_status_survives_odd_numbers_and_a_newer_version(run: RunDirectory) -> None:
    assert run.read_status() is None
    status = Status(
        run="demo",
        phase=Phase.STEP,
        step=3,
        eta_seconds=math.inf,
        mode=Mode.ASK,
        versions={"torch": "2"},
    )
    run.write_status(status)
    assert run.read_status() == status
    raw = json.loads((run.path / "status.json").read_text())
    (run.path / "status.json").write_text(json.dumps({**raw, "colour": {"a": 1}}))
    assert run.read_status() == status
    (run.path / "status.json").write_text(json.dumps({**raw, "phase": "dreaming"}))
    assert run.read_status() is None
    (run.path / "status.json").write_text('{"run": ')
    assert run.read_status() is None


def test_a_failed_replacement_keeps_the_old_status_and_no_rubbish(run: RunDirectory) -> None:
    run.write_status(Status(run="demo", phase=Phase.STEP))
    names = sorted(os.listdir(run.path))
    with file_size_limit(10), pytest.raises(OSError):
        run.write_status(Status(run="demo", phase=Phase.FAILED))
    assert sorted(os.listdir(run.path)) == names
    status = run.read_status()
    assert status is not None and status.phase is Phase.STEP


def test_ranks_are_read_in_order(run: RunDirectory) -> None:
    for rank in (10, 2, 0):
        run.write_rank(RankStatus(rank=rank, pid=rank, host="h", phase=Phase.SETUP))
    (run.path / "ranks" / "rank-00005.json").write_text("half")
    assert [status.rank for status in run.read_ranks()] == [0, 2, 10], (
        "as older versions wrote them"
    )
    node = (
        RankStatus(rank=rank, pid=1, host="h", phase=Phase.STEP, heartbeat=1.0) for rank in (9, 2)
    )
    run.write_node(NodeStatus(node="h-2", ranks=tuple(node)))
    (run.path / "ranks" / "node-x.json").write_text("half")
    assert [(status.rank, status.phase.value) for status in run.read_ranks()] == [
        *((0, "setup"), (2, "step"), (9, "step"), (10, "setup")),
    ], "a rank that stands in two files: what it said last"
    (run.path / "ranks" / "folder").mkdir()
    run.remove_ranks()
    assert run.read_ranks() == []


# -- the lock


LOCKER = """
import os, sys, time
from guardrail.rundir.run_directory import RunDirectory
RunDirectory.open(sys.argv[1]).lock("rank 0")
forks = len(sys.argv) > 2
if forks and os.fork() == 0:  # a worker that outlives the trainer; it speaks when what a fork runs in it has run
    print(os.getpid(), flush=True)
    time.sleep(30)
    os._exit(0)
if not forks:
    print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_one_trainer_a_run_and_the_other_learns_who(run: RunDirectory) -> None:
    assert run.lock_holder() is None
    with subprocess.Popen(
        [sys.executable, "-c", LOCKER, str(run.path)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        holder = run.lock_holder()
        assert holder is not None and holder.pid == pid
        with pytest.raises(RunDirectoryError, match=re.escape(holder.sentence())) as caught:
            run.lock("second")
        assert caught.value.kind == "running" and holder.who == "rank 0"
        process.kill()
    assert run.lock_holder() is None
    with run.lock("second"):
        assert run.lock_holder() is not None
        assert run.lock_holder() is not None, "asking does not take the lock away"
    assert run.lock_holder() is None


def test_a_forked_worker_does_not_keep_the_lock(run: RunDirectory) -> None:
    command = [sys.executable, "-c", LOCKER, str(run.path), "fork"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert run.lock_holder() is not None
        process.kill()
        process.wait()
        try:
            assert run.lock_holder() is None
            run.lock("next").release()
        finally:
            os.killpg(process.pid, signal.SIGKILL)


# -- screens, and what an import costs


def test_screens_count_while_they_are_seen(run: RunDirectory) -> None:
    assert run.screens() == 0
    run.screen_seen()
    (other := run.path / "screens" / "elsewhere-77").touch()
    assert run.screens() == 2
    os.utime(other, (time.time() - 60, time.time() - 60))
    assert run.screens() == 1
    run.screen_gone()
    assert run.screens() == 0


def test_importing_the_run_directory_loads_nothing_heavy() -> None:
    code = (
        "import sys, guardrail.rundir.run_directory, guardrail.rundir.follow, guardrail.rundir.heartbeat\n"
        "import guardrail.trackers.registry, guardrail.report.render_text\n"
        "heavy = {'numpy', 'torch', 'textual', 'tensorboard', 'rich', 'watchdog', 'psutil'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def as_pipe(path: Path) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)


PIPES: dict[str, Callable[[RunDirectory], object]] = {
    "status.json": lambda run: run.read_status(),
    "notified": lambda run: run.notified(),
    "run.lock": lambda run: run.lock_holder(),
    "ranks/node-0.json": lambda run: run.read_ranks() or None,
    "checkpoints/step-00000001/manifest.json": lambda run: (
        checkpoint_dirs(run.checkpoints) and None
    ),
    "logs/rank-0.log": lambda run: read_last_lines(run.logs / "rank-0.log") or None,
}


@pytest.mark.parametrize("name", PIPES)
def test_a_pipe_is_not_waited_for_and_counts_as_unreadable(run: RunDirectory, name: str) -> None:
    as_pipe(run.path / name)
    with without_waiting():
        assert PIPES[name](run) is None


REFUSED: dict[str, Callable[[RunDirectory], object]] = {
    "config.toml": lambda run: run.config_text(),
    "config.toml ": lambda run: read_toml(run.path / "config.toml", of_run=True),
    "journal.jsonl": lambda run: run.events(),
    "journal.jsonl ": lambda run: journal.end_of(run.journal_path),
    "journal.jsonl  ": lambda run: run.append("note"),
    "metrics.json": lambda run: run.metrics(),
    "metrics.bin": lambda run: run.metrics(),
    "metrics.bin ": lambda run: run.rows(0, 1),
    "metrics.bin  ": lambda run: run.metrics_writer(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_pipe_is_refused_at_once(run: RunDirectory, name: str) -> None:
    run.metrics_writer().close()
    as_pipe(run.path / name.strip())
    with (
        without_waiting(),
        pytest.raises((OSError, RunDirectoryError, ConfigError), match=name.strip()) as caught,
    ):
        REFUSED[name](run)
    cause = caught.value
    if not isinstance(cause, OSError):
        cause = cause.__cause__
    assert isinstance(cause, OSError) and cause.errno == errno.EINVAL


def test_a_follower_of_a_pipe_does_not_wait(run: RunDirectory) -> None:
    as_pipe(run.journal_path)
    with without_waiting():
        assert not Follower(run).poll()
    as_pipe(run.metrics_path)
    with without_waiting():
        assert read_losses(run, 3) == []


def test_a_configuration_that_is_of_no_run_may_be_a_pipe(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.write(write, b"[run]\nname = 'piped'\n")
    os.close(write)
    try:
        assert read_toml(Path(f"/dev/fd/{read}")) == {"run": {"name": "piped"}}
    finally:
        os.close(read)


def test_the_journal_says_how_a_run_has_ended_where_there_is_no_status(run: RunDirectory) -> None:
    assert run.known_status() is None
    run.append("started", step=0)
    assert run.known_status() is None
    run.append("ended", "halted: no budget left", step=7, phase="halted")
    status = run.known_status()
    assert status is not None and (status.phase, status.step, status.exit_code) == (
        Phase.HALTED,
        7,
        3,
    )
    run.append("note", "read again")
    assert run.known_status() == status
    run.append("restarted", step=4)
    assert run.known_status() is None, "it goes on"
    run.append("ended", "words of another version", step=9, phase="dreaming")
    assert run.known_status() is None
    run.write_status(Status(run=run.name, phase=Phase.STEP, step=5))
    assert run.known_status() == run.read_status()


def test_numbers_that_64_bits_do_not_hold_make_a_status_and_a_line_unreadable(
    run: RunDirectory,
) -> None:
    run.write_status(Status(run=run.name, phase=Phase.STEP, total_steps=77))
    path = run.path / "status.json"
    path.write_bytes(path.read_bytes().replace(b'"total_steps":77', b'"total_steps":' + b"9" * 400))
    assert run.read_status() is None
    run.append("note", step=77)
    run.append("note", step=78)
    damaged = run.journal_path.read_bytes().replace(b'"step":77', b'"step":' + b"9" * 400)
    run.journal_path.write_bytes(damaged)
    assert [event.step for event in run.events()] == [78]
