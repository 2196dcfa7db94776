"""The command line: what it prints where, and with which code it ends. No process of a run is
started here.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guardrail.cli.main import COMMANDS, main
from guardrail.core.errors import RunDirectoryError
from guardrail.core.events.event import Event
from guardrail.core.records.commands import Command
from guardrail.core.records.status import Phase, Status
from guardrail.core.records.verdicts import Mode
from guardrail.launch import launcher as launching
from guardrail.operate import control
from guardrail.rundir import journal
from guardrail.rundir.run_directory import RunDirectory
from guardrail.tui.model import sent_commands as controls
from tests.support.fake_run import FakeRun
from tests.support.lab import wait_for, without_waiting
from tests.support.texts import numbers_in

CONFIG = '[run]\nname = "words"\n[train]\nsteps = 100\n[optim]\nwarmup_steps = 10\n[launch]\ndevice = "cpu"\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a good configuration in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GUARDRAIL_ROOT", raising=False)
    monkeypatch.setattr(
        "guardrail.rundir.liveness.FIRST_SECONDS", 0.2
    )  # runs on other hosts here write no more heartbeats
    (tmp_path / "good.toml").write_text(CONFIG)
    return tmp_path


def make_run(
    folder: Path, *, phase: Phase = Phase.STEP, heartbeat: float | None = None, **changes: object
) -> RunDirectory:
    run = RunDirectory.create(folder / "runs", "words", CONFIG)
    beat = time.time() if heartbeat is None else heartbeat
    status = Status(
        run=run.name,
        phase=phase,
        step=7,
        total_steps=100,
        heartbeat=beat,
        host="elsewhere",
        **changes,
    )  # type: ignore[arg-type]
    run.write_status(status)
    return run


BAD = [
    # arguments, what stderr must say
    (["lauch"], ["lauch", " launch?"]),
    (["launch"], ["CONFIG.toml", "--resume RUN"]),
    (["launch", "good.toml", "--resume", "x"], ["CONFIG.toml", "--resume RUN"]),
    (["launch", "good.toml", "--bogus"], ["No such option", "--bogus"]),
    (["launch", "missing.toml"], ["missing.toml: "]),
    (["launch", "."], [".: "]),
    (["launch", "broken.toml"], ["broken.toml", "valid TOML"]),
    (
        ["launch", "good.toml", "--set", "train.stepz=3"],
        ["--set: train.stepz = 3", " train.steps?"],
    ),
    (["launch", "good.toml", "--set", "train.steps"], ["--set", "expected SECTION.KEY=VALUE"]),
    (
        ["launch", "good.toml", "--set", "train.batch_size=7", "--set", "launch.processes=2"],
        ["train.batch_size = 7"],
    ),
    (
        ["launch", "good.toml", "--set", "launch.trainer=nowhere"],
        ["launch.trainer = 'nowhere'", "importable package"],
    ),
    (
        ["launch", "good.toml", "--set", "launch.trainer=a b"],
        ["launch.trainer = 'a b'", "importable package"],
    ),
    (
        ["launch", "good.toml", "--set", 'data.sources=["nothing/*.txt"]'],
        ["--set: data.sources", "'nothing/*.txt'"],
    ),
    (
        ["launch", "good.toml", "--set", "launch.device=cuda"],
        ["--set: launch.device = 'cuda'", "CUDA"],
    ),
    (
        ["launch", "good.toml", "--set", "run.root=good.toml/runs"],
        ["--set: run.root = ", "good.toml/runs"],
    ),
    (
        ["launch", "good.toml", "--set", "model.width=65536", "--set", "snapshots.keep=9"],
        ["--set: snapshots.keep = 9", "20739.5 GiB", "of memory"],
    ),
    (["launch", "--resume", "words/1999-01-01-01"], ["words/1999-01-01-01"]),
    (["launch", "--resume", "words", "--run-dir", "x"], ["--run-dir", "--resume"]),
    (["attach", "nobody"], [" nobody"]),
    (["ctl", "nobody", "stop"], [" nobody"]),
    (["report", "nobody"], [" nobody"]),
    (["report", "--json", "--quarantine"], ["--json", "--quarantine"]),
    (["verify", "nobody"], [" nobody"]),
    (["doctor", "missing.toml", "--nope"], ["No such option"]),
]


@pytest.mark.parametrize(
    ("arguments", "said"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD]
)
def test_bad_usage_ends_with_2_before_anything_happens(
    folder: Path,
    arguments: list[str],
    said: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (folder / "broken.toml").write_text("[run\n")
    monkeypatch.setattr("guardrail.launch.preflight.count_cuda_devices", lambda: 0)
    before = sorted(folder.rglob("*"))
    assert main(arguments) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    for words in said:
        assert words in errors
    assert "Traceback" not in errors
    assert sorted(folder.rglob("*")) == before


def test_more_processes_than_devices(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guardrail.launch.preflight.count_cuda_devices", lambda: 2)
    assert (
        main(["launch", "good.toml", "--set", "launch.processes=4", "--set", "launch.device=auto"])
        == 2
    )
    errors = capsys.readouterr().err
    (problem,) = (line for line in errors.splitlines() if "launch.processes = 4: " in line)
    assert numbers_in(problem) == [4, 2]


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    for name, summary in COMMANDS.items():
        assert name in overview and summary in " ".join(overview.split())
        assert main([name, "--help"]) == 0
        assert len(capsys.readouterr().out) > 100
    assert main([]) in (0, 2)
    assert main(["-h"]) == 0


def test_output_into_a_closed_pipe_is_no_error(folder: Path) -> None:
    for _ in range(3):
        make_run(folder)
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(
        [sys.executable, "-m", "guardrail", "runs"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert (result.returncode, result.stderr) == (0, "")


# -- runs


def test_runs_tells_the_living_from_the_lost(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(folder)
    make_run(folder, heartbeat=time.time() - 3600)
    make_run(folder, phase=Phase.HALTED, heartbeat=time.time() - 3600, exit_code=3)
    RunDirectory.create(folder / "runs", "words", CONFIG)
    assert main(["runs", "--json"]) == 0
    rows = {row["run"][-2:]: row for row in json.loads(capsys.readouterr().out)}
    assert [rows[number]["state"] for number in ("01", "02", "03", "04")] == [
        "step",
        "lost",
        "halted",
        "new",
    ]
    assert rows["03"]["exit_code"] == 3
    assert main(["runs"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["RUN", "STATE", "STEP", "LOSS", "EXIT", "LAST", "SIGN"]
    assert len(table) == 5 and any(
        "lost" in line and "7 / 100" in line and "1 h ago" in line for line in table
    )


def test_runs_of_an_empty_place_prints_no_data(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", "--root", "nowhere"]) == 0
    output, errors = capsys.readouterr()
    assert output == "" and errors.endswith(" nowhere\n")


def test_hostile_text_in_a_status_does_not_reach_the_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory.create(folder / "runs", "words", CONFIG)
    run.write_status(
        Status(run="\x1b]0;owned\x07", phase=Phase.STEP, heartbeat=time.time(), host="\x1b[2Jhost")
    )
    assert main(["runs"]) == 0 and main(["runs", "--json"]) == 0
    assert "\x1b" not in capsys.readouterr().out


# -- ctl


class Answering:
    """Plays the trainer: answers every command of a run from a thread."""

    def __init__(self, run: RunDirectory, *, applied: bool = True, reason: str = "") -> None:
        self.seen: list[Command] = []
        self._run, self._applied, self._reason = run, applied, reason
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        while not self._stop.wait(0.01):
            for command in self._run.commands_pending():
                self.seen.append(command)
                self._run.answer(command, applied=self._applied, reason=self._reason, step=42)

    def __enter__(self) -> Answering:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture
def alive(folder: Path) -> Iterator[RunDirectory]:
    yield make_run(folder)


@pytest.mark.parametrize(
    ("words", "kind", "value"),
    [
        (["pause"], "pause", 0.0),
        (["resume"], "resume", 0.0),
        (["rollback"], "rollback", math.nan),
        (["rollback", "1200"], "rollback", 1200.0),
        (["skip", "10"], "skip", 10.0),
        (["lr", "0.5"], "lr", 0.5),
        (["shrink-embedding", "0.1"], "shrink-embedding", 0.1),
        (["embed-alpha", "0.1"], "shrink-embedding", 0.1),
        (["checkpoint"], "checkpoint", 0.0),
        (["mode", "advise"], "mode", float(list(Mode).index(Mode.ADVISE))),
        (["stop"], "stop", 0.0),
        (["answer", "1"], "answer", 1.0),
        (["answer", "stop"], "answer", 2.0),
    ],
)
def test_ctl_sends_and_prints_the_step_of_the_answer(
    alive: RunDirectory,
    words: list[str],
    kind: str,
    value: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Answering(alive) as trainer:
        assert main(["ctl", alive.name, *words, "--wait", "30"]) == 0
        assert main(["ctl", alive.name, *words, "--json"]) == 0
    first, second = trainer.seen
    assert (first.kind, first.value) == (kind, pytest.approx(value, nan_ok=True))
    assert first.id != second.id and "@" in first.who
    line, document = capsys.readouterr().out.split("\n", 1)
    assert line == f"step 42: {kind} applied"
    answer = json.loads(document)
    assert (answer["effect"], answer["step"], answer["command"], answer["id"]) == (
        "applied",
        42,
        kind,
        second.id,
    )


def test_ctl_refused_by_the_run(alive: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    reason = "there is no snapshot at step 3"
    with Answering(alive, applied=False, reason=reason):
        assert main(["ctl", alive.name, "rollback", "3"]) == 2
    output, errors = capsys.readouterr()
    assert output == "" and alive.name in errors and reason in errors


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["puase"], " pause?"),
        (["skip"], "skip needs 1 to"),
        (["skip", "0"], "skip takes 1 to"),
        (["skip", "2.5"], "skip takes 1 to"),
        (["skip", "1e9"], "not 1e9"),
        (["rollback", "abc"], "not abc"),
        (["lr", "fast"], "(0, 100], not fast"),
        (["lr", "nan"], "(0, 100], not nan"),
        (["shrink-embedding", "2"], "(0, 1], not 2"),
        (["mode", "wild"], "(0 to 3), not wild"),
        (["answer", "9"], "(0 to 2), not 9"),
        (["pause", "--question", "3"], "answer, not pause"),
        (["pause", "3"], "pause "),
        (["stop", "--at-step", "-1"], "at_step "),
    ],
)
def test_ctl_refuses_nonsense_without_asking_the_run(
    alive: RunDirectory, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ctl", alive.name, *words]) == 2
    assert said in capsys.readouterr().err
    assert alive.commands_pending() == [] and not any(alive.commands.iterdir())


def test_ctl_without_an_answer_keeps_the_command_in_the_inbox(
    alive: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ctl", alive.name, "pause", "--wait", "0.2"]) == 2
    assert "after 0.2 s" in capsys.readouterr().err
    assert main(["ctl", alive.name, "resume", "--wait", "0"]) == 0
    assert capsys.readouterr().out == "sent\n"
    assert [command.kind for command in alive.commands_pending()] == ["pause", "resume"]


def test_ctl_to_a_run_that_ends_meanwhile(
    alive: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    why = "stopped: by a signal"
    timer = threading.Timer(0.3, lambda: alive.append("ended", why, phase="stopped", exit_code=130))
    timer.start()
    assert main(["ctl", alive.name, "checkpoint"]) == 2
    timer.join()
    errors = capsys.readouterr().err
    assert alive.name in errors and f"({why})" in errors
    timer = threading.Timer(
        0.3, lambda: alive.append("ended", "stopped", phase="stopped", exit_code=130)
    )
    timer.start()
    assert main(["ctl", alive.name, "stop"]) == 0, "the end is what was asked for"
    timer.join()


@pytest.mark.parametrize(
    ("phase", "age", "said"),
    [(Phase.FINISHED, 0, " finished "), (Phase.STEP, 3600, " process ")],
)
def test_ctl_to_a_run_that_does_not_run(
    folder: Path, phase: Phase, age: float, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(folder, phase=phase, heartbeat=time.time() - age)
    assert main(["ctl", run.name, "stop"]) == 2
    errors = capsys.readouterr().err
    assert f"{run.name} " in errors and said in errors
    assert not any(run.commands.iterdir())


# -- resume


def test_resume_refuses_a_run_that_lives_on_another_host(folder: Path) -> None:
    run = make_run(folder)
    with pytest.raises(RunDirectoryError, match=rf"^{run.name} .* elsewhere\n"):
        launching.prepare_resume(run.name, (), root="runs")


def test_resume_answers_what_was_sent_to_a_dead_run(folder: Path) -> None:
    """A stop that found nobody does not end the next start; what is due later, or sent afterwards,
    waits.
    """
    run = make_run(folder, phase=Phase.FAILED)
    sent = [
        ("stop", "stop", 0),
        ("past", "pause", 7),
        ("later", "checkpoint", 8),
    ]
    for id, kind, at_step in sent:
        run.send(Command(id=id, kind=kind, at_step=at_step))
    assert launching.prepare_resume(run.name, (), root="runs") is not None
    run.send(Command(id="new", kind="stop"))
    assert [command.id for command in run.commands_pending()] == ["later", "new"]
    refused = [event for event in run.events() if event.kind == "command"]
    assert [(event.data["id"], event.data["effect"], event.step) for event in refused] == [
        ("stop", "refused", 7),
        ("past", "refused", 7),
    ]
    assert "resumed" in refused[0].data["reason"]


def test_resume_of_a_run_whose_data_are_gone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = folder / "text"
    text.mkdir()
    (text / "a.txt").write_text("words")
    config = CONFIG + f'[data]\nsources = ["{text}"]\n'
    run = RunDirectory.create(folder / "runs", "words", config)
    (text / "a.txt").unlink()
    text.rmdir()
    assert main(["launch", "--resume", run.name]) == 2
    errors = capsys.readouterr().err
    assert "data.sources" in errors and str(run.path / "config.toml") in errors


# -- report, verify


def test_report_of_a_run_as_text_and_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(folder, phase=Phase.FINISHED, exit_code=0)
    run.append("started", "started", config_sha="0", world=1, seed=0, samples=10)
    run.append("ended", "finished", phase="finished", exit_code=0, reason="")
    assert main(["report", run.name]) == 0
    assert run.name in capsys.readouterr().out
    assert main(["report", "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)
    assert main(["report", "--quarantine"]) == 0
    assert capsys.readouterr().out == ""


def test_verify_of_a_run_without_a_checkpoint(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(folder)
    assert main(["verify", run.name]) == 5
    assert f"{run.name} " in capsys.readouterr().err


def test_verify_names_what_does_not_hold(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(folder)
    (run.checkpoints / "step-00000010").mkdir()
    for target in (run.name, str(run.checkpoints / "step-00000010")):
        assert main(["verify", target, "--fingerprint"]) == 5
        output, errors = capsys.readouterr()
        assert output == "" and "step-00000010: manifest.json is missing" in errors


@pytest.mark.parametrize(
    ("options", "variable", "where"),
    [
        pytest.param(["--root", "by-option"], "", "by-option", marks=pytest.mark.fault("T8")),
        pytest.param([], "by-variable", "by-variable", marks=pytest.mark.fault("T8")),
        pytest.param(
            ["--root", "by-option"], "by-variable", "by-option", marks=pytest.mark.fault("T8")
        ),
        (["--root", "by-option", "--set", "run.root=by-set"], "", "by-option"),
        (["--set", "run.root=by-set"], "by-variable", "by-set"),
        (["--set", "run.root=by-set"], "", "by-set"),
        ([], "", "by-file"),
    ],
)
def test_the_root_that_is_named_wins_for_a_new_run(
    options: list[str], variable: str, where: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does for attach, ctl and report: else they look for the run in another folder."""
    (folder / "good.toml").write_text(CONFIG.replace("[run]", '[run]\nroot = "by-file"'))
    monkeypatch.setattr(
        "guardrail.launch.supervisor_process.start_supervisor", lambda *arguments: None
    )
    if variable:
        monkeypatch.setenv("GUARDRAIL_ROOT", variable)
    assert main(["launch", "good.toml", "--detach", *options]) == 0
    (made,) = folder.glob("by-*/words/*/config.toml")
    assert made.relative_to(folder).parts[0] == where
    assert f"{folder / where}" in made.read_text(), "and the run remembers it"


@pytest.mark.fault("C2")
def test_ctl_reads_only_what_is_new_while_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory.create(tmp_path, "demo", "")
    for _ in range(200):
        run.append("note", "a long story " * 20)
    run.write_status(
        Status(run=run.name, phase=Phase.STEP, heartbeat=time.time(), host="elsewhere")
    )
    monkeypatch.setattr(control, "POLL_SECONDS", 0.002)
    parsed, here = [], threading.get_ident()
    parse = journal.parse

    def counted(data: bytes) -> tuple[list[Event], int]:
        if threading.get_ident() == here:
            parsed.append(len(data))
        return parse(data)

    monkeypatch.setattr(journal, "parse", counted)
    command = control.parse_command("pause", None)

    def answer() -> None:
        wait_for(lambda: run.commands_pending())
        for number in range(20):
            run.append("note", f"something else, {number}")
        run.answer(command, applied=True, step=7)

    trainer = threading.Thread(target=answer)
    trainer.start()
    answered = control.send_and_wait(run, command, seconds=60)
    trainer.join()
    assert answered is not None and answered.step == 7
    assert sum(parsed) < 2 * run.journal_path.stat().st_size, "not all of it again and again"


@pytest.mark.fault("R14")
def test_a_command_names_the_terminal_that_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two screens of one user on one machine have two names in the journal."""
    monkeypatch.delenv("GUARDRAIL_WHO", raising=False)
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.5 53210 10.0.0.1 22")
    monkeypatch.setattr(os, "ttyname", lambda descriptor: "/dev/pts/3")
    assert control.parse_command("pause", None).who.endswith(
        "@" + socket.gethostname() + " (pts/3 from 10.0.0.5)"
    )
    assert controls.sender_name() == control.parse_command("pause", None).who, (
        "the screen says the same"
    )
    monkeypatch.delenv("SSH_CONNECTION")
    monkeypatch.setattr(os, "ttyname", no_terminal)
    assert control.parse_command("pause", None).who.endswith(f"(process {os.getpid()})")
    monkeypatch.setenv("GUARDRAIL_WHO", "night shift\x1b[2J")
    assert control.parse_command("pause", None).who == "night shift"


def no_terminal(descriptor: int) -> str:
    raise OSError(25, "not a terminal")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


STATUS_DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_text(""),
    "missing": lambda path: path.unlink(),
    "half": lambda path: path.write_text('{"phase":'),
    "list": lambda path: path.write_text("[1,2]"),
    "null": lambda path: path.write_text("null"),
    "folder": _folder,
    "loop": _loop,
    "pipe": _pipe,
}


@pytest.mark.parametrize("damage", STATUS_DAMAGE)
def test_all_commands_know_that_a_run_has_ended_also_without_its_status(
    folder: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    run = FakeRun(name="done/x").begin().advance(30).end(Phase.HALTED, 3).write(folder / "runs")
    STATUS_DAMAGE[damage](run.path / "status.json")
    with without_waiting():
        assert main(["attach", str(run.path), "--headless"]) == 3
        capsys.readouterr()
        assert main(["runs", "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        assert (row["state"], row["step"], row["exit_code"]) == ("halted", 30, 3)
        assert main(["ctl", str(run.path), "pause"]) == 2
        errors = capsys.readouterr().err
        assert f"{run.name} " in errors and " halted " in errors and numbers_in(errors)[-1] == 30
        assert main(["report", str(run.path)]) == 0
        head = capsys.readouterr().out.splitlines()[0]
        assert "halted" in head and "exit code 3" in head
