"""The screen in a real terminal: leaving, hanging up, a terminal that is gone or does not read,
hostile bytes.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from guardrail.core.records.status import Phase
from guardrail.rundir.run_directory import RunDirectory
from guardrail.tui.panes.table import PANES
from guardrail.tui.terminal import hangup as terminal
from tests.support.fake_run import FakeRun, LiveRun, example
from tests.support.terminal import Terminal
from tests.unit.tui.test_panels import HOSTILE

_SCREEN = """
import fcntl, os, signal, sys, termios
if "controlling" in sys.argv: fcntl.ioctl(0, termios.TIOCSCTTY, 0)
if "nohup" in sys.argv: signal.signal(signal.SIGHUP, signal.SIG_IGN)
from guardrail.tui.app.app import run_screen
sys.exit(run_screen(sys.argv[1], read_only="read-only" in sys.argv))
"""


def attach(run: RunDirectory, *options: str) -> Terminal:
    """The screen of a run in a terminal that does not answer questions."""
    return Terminal([sys.executable, "-c", _SCREEN, str(run.path), *options], synchronised=False)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return example().write(tmp_path)


@pytest.fixture
def opened(run: RunDirectory) -> Iterator[list[Terminal]]:
    """Terminals that a test opens; whatever is left of them is closed."""
    terminals: list[Terminal] = []
    yield terminals
    for one in terminals:
        one.end()


def show(run: RunDirectory, opened: list[Terminal], *options: str) -> Terminal:
    one = attach(run, *options)
    opened.append(one)
    one.until("incidents")
    return one


@pytest.mark.parametrize("key", ["q", "\x03", "\x11"], ids=["q", "ctrl-c", "ctrl-q"])
def test_leaving(key: str, run: RunDirectory, opened: list[Terminal]) -> None:
    screen = show(run, opened, "controlling")
    screen.press(key)
    assert screen.ends() == 0
    screen.read()
    assert b"\x1b[?1049l" in screen.output, "the shell's screen is back"
    assert termios.tcgetattr(screen.slave) == screen.before
    assert run.screens() == 0 and not run.commands_pending(), (
        "nobody watches any more, and nothing was asked for"
    )


def test_a_key_reaches_the_run(run: RunDirectory, opened: list[Terminal]) -> None:
    status = run.read_status()
    assert status is not None
    # of a run that lives
    run.write_status(msgspec.structs.replace(status, heartbeat=time.time() + 600))
    screen = show(run, opened, "controlling")
    screen.press("c")
    deadline = time.monotonic() + 20
    while not run.commands_pending() and time.monotonic() < deadline:
        screen.read()
    assert [command.kind for command in run.commands_pending()] == ["checkpoint"]
    screen.until("no answer yet")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_leaves_and_restores(
    number: int, run: RunDirectory, opened: list[Terminal]
) -> None:
    screen = show(run, opened, "controlling")
    screen.process.send_signal(number)
    assert screen.ends() == 0
    screen.read()
    assert b"\x1b[?1049l" in screen.output and b"\x1b[?25h" in screen.output
    assert termios.tcgetattr(screen.slave) == screen.before


@pytest.mark.parametrize(
    "options", [["controlling"], ["controlling", "nohup"], ["detached"]], ids="-".join
)
def test_a_closed_terminal_ends_the_screen(
    options: list[str], run: RunDirectory, opened: list[Terminal]
) -> None:
    """With SIGHUP, with SIGHUP ignored by nohup, and without a controlling terminal, where none is
    sent.
    """
    screen = show(run, opened, *options)
    screen.close()
    assert screen.ends() == 0


@pytest.mark.parametrize("end", ["hang up", "read again"])
def test_a_terminal_that_does_not_read_blocks_only_the_screen(
    end: str, run: RunDirectory, opened: list[Terminal]
) -> None:
    """It catches up when the terminal reads again; a hang-up ends it even while it is stuck."""
    screen = show(run, opened, "controlling")
    for _ in range(150):
        screen.press("\t")  # each draws all charts anew: far more than a terminal buffers
        time.sleep(0.02)
    run.append("note", "written while nobody read")
    if end == "hang up":
        screen.process.send_signal(signal.SIGHUP)
        assert screen.ends(reading=False) == 0
    else:
        screen.until("written while nobody read")
        screen.press("q")
        assert screen.ends() == 0


@pytest.mark.slow
def test_a_minute_without_a_reader_costs_training_nothing(
    tmp_path: Path, opened: list[Terminal]
) -> None:
    """Somebody's laptop sleeps. The rows of the run are counted meanwhile, and what the viewer
    holds.
    """
    fake = FakeRun(total=100_000).begin().advance(2000)
    run = fake.write(tmp_path)
    live = LiveRun(fake, run, rate=20, spike_every=0)
    trainer = threading.Thread(target=live.go, args=(100.0,), daemon=True)
    screen = show(run, opened, "controlling")
    trainer.start()
    screen.read(2.0)
    rows, before = len(run.metrics()), screen.memory("VmRSS")
    deadline, pressed = time.monotonic() + 60, 0
    while time.monotonic() < deadline:
        if pressed < 400:  # each draws all charts anew: far more than a terminal buffers
            screen.press("\t")
            pressed += 1
        time.sleep(0.05)
    made, held = len(run.metrics()) - rows, screen.memory("VmRSS") - before
    assert made > 60 * 20 / 4, "the run goes on as if nobody watched"
    assert held < 20.0, f"{held:.1f} MB more, for frames that nobody reads"
    newest = run.metrics().column("step")[-1]
    sent = len(screen.output)
    run.append("note", "written after a minute")
    screen.until("written after a minute", seconds=60.0)
    assert len(screen.output) - sent < 3_000_000, (
        "what was held back is a few frames, not all of a minute"
    )
    deadline = time.monotonic() + 60
    while step_of(screen.display()) < newest:
        assert time.monotonic() < deadline, screen.display()[0]
        screen.take(0.1)
    screen.press("q")
    assert screen.ends() == 0


def step_of(display: list[str]) -> int:
    """The step that the header says; -1: none."""
    found = re.search(r"step +([\d,]+)", display[0])
    return int(found[1].replace(",", "")) if found else -1


def test_hostile_bytes_never_reach_the_terminal(tmp_path: Path, opened: list[Terminal]) -> None:
    fake = FakeRun().begin().advance(50)
    for evil in HOSTILE.values():
        if "\ud800" not in evil:
            fake.event("note", evil)
    fake.disk = "failing: " + HOSTILE["clipboard"]
    run = fake.write(tmp_path)
    with run.journal_path.open("ab") as journal:
        journal.write(
            b'{"seq": 99, "time": 1.0, "step": 1, "timeline": 0, "kind": "note", "message": "\xff\xfe\x9b2J"}\n'
        )
    evil = (
        HOSTILE["clipboard"].encode()
        + b"\xff\xfe\x9b2J\xc2\x9d0;t\x07 [/red] "
        + "\u202e語".encode()
    )
    run.logs.mkdir(exist_ok=True)
    (run.logs / "rank-0.log").write_bytes(
        evil + b"\n" + evil * 200_000 + b"\nthe newest line " + evil + b"\n"
    )
    (run.path / "config.toml").write_text(
        '[run]\nname = "a\\u001B]52;c;ZXZpbA==\\u0007\\u009D \\u202E [/red]"\n'
    )
    screen = show(run, opened, "controlling")
    screen.until("disk failing")
    for pane in PANES:
        screen.press(pane.number + "f")
        screen.read(0.3)
        screen.press("f")
    screen.until("the newest line")
    screen.press("j")
    screen.until("scroll")
    screen.read(1.0)
    # textual's own: the shape of the mouse pointer
    told = screen.output.replace(b"\x1b]22;default\x07", b"")
    assert b"\x1b]" not in told, "no operating system command: title, clipboard"
    assert b"\x1bP" not in told and b"\x07" not in told and b"ZXZpbA==" not in told
    assert b"\xc2\x9b" not in told and b"\xc2\x9d" not in told and "\u202e".encode() not in told


def test_no_colour_means_none(
    run: RunDirectory, opened: list[Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    screen = show(run, opened, "controlling")
    screen.read(0.5)
    for sequence in (b"38;2", b"48;2", b"38;5", b"48;5", b"[31m", b"[32m", b"[33m", b"[36m"):
        assert sequence not in screen.output, sequence


def command(run: RunDirectory, opened: list[Terminal], *words: str, **environment: str) -> Terminal:
    """A command of guardrail, as it is typed."""
    one = Terminal(
        [sys.executable, "-m", "guardrail", *words], synchronised=False, environment=environment
    )
    opened.append(one)
    return one


@pytest.mark.fault("E9")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_screen_that_is_killed_leaves_the_terminal_usable(
    number: signal.Signals, run: RunDirectory, opened: list[Terminal]
) -> None:
    screen = command(run, opened, "attach", str(run.path))
    screen.until("incidents")
    assert b"\x1b[?1049h" in screen.output and termios.tcgetattr(screen.slave) != screen.before
    os.kill(screen.screen, number)
    assert screen.ends() == 128 + number
    screen.read()
    for off in (
        b"\x1b[?1049l",
        b"\x1b[?1000l",
        b"\x1b[?1003l",
        b"\x1b[?1006l",
        b"\x1b[?2004l",
        b"\x1b[?25h",
    ):
        assert off in screen.output, off
    assert termios.tcgetattr(screen.slave) == screen.before, "lines and echo as before"
    assert f" {number.name}; ".encode() in screen.output


@pytest.mark.fault("E9")
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGTSTP])
def test_a_screen_that_is_stopped_leaves_the_terminal_usable_and_draws_all_of_itself_afterwards(
    number: signal.Signals, run: RunDirectory, opened: list[Terminal]
) -> None:
    screen = command(run, opened, "attach", str(run.path))
    screen.until("incidents")
    os.kill(screen.screen, number)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{screen.process.pid}/stat").read_text().split(")")[1].split()[0] != "T":
        assert time.monotonic() < deadline, "who waits stops too, so that the shell goes on"
        screen.take(0.1)
    screen.read()
    for off in (b"\x1b[?1049l", b"\x1b[?1000l", b"\x1b[?1003l", b"\x1b[?25h"):
        assert off in screen.output, off
    assert termios.tcgetattr(screen.slave) == screen.before
    drawn = len(screen.output)
    screen.process.send_signal(signal.SIGCONT)
    while not all(words in screen.output[drawn:] for words in (b"\x1b[?1049h", b"incidents")):
        assert time.monotonic() < deadline, screen.output[drawn:]
        screen.take(0.1)
    screen.press("q")
    assert screen.ends() == 0
    assert termios.tcgetattr(screen.slave) == screen.before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_who_waits_passes_signals_on(
    number: int, run: RunDirectory, opened: list[Terminal]
) -> None:
    # under nohup it is ignored, and a child would inherit that
    before = signal.signal(number, signal.SIG_DFL)
    try:
        screen = command(run, opened, "attach", str(run.path))
    finally:
        signal.signal(number, before)
    screen.until("incidents")
    screen.process.send_signal(number)
    assert screen.ends() == 0
    screen.read()
    assert b"\x1b[?1049l" in screen.output and termios.tcgetattr(screen.slave) == screen.before


def test_a_screen_ends_with_who_waits_for_it(run: RunDirectory, opened: list[Terminal]) -> None:
    screen = command(run, opened, "attach", str(run.path))
    screen.until("incidents")
    child = screen.screen
    assert child != screen.process.pid
    screen.process.kill()
    deadline = time.monotonic() + 20
    while b"\x1b[?1049l" not in screen.output:
        assert time.monotonic() < deadline, "it goes on drawing over the shell"
        screen.take(0.1)
    while (
        Path(f"/proc/{child}").exists()
        and "Z" not in Path(f"/proc/{child}/stat").read_text().split(")")[1]
    ):
        assert time.monotonic() < deadline, "the screen lives on"
        screen.take(0.1)
    assert b"training is not affected" in screen.output


def test_the_exit_code_and_errors_of_a_screen_come_through(
    run: RunDirectory, opened: list[Terminal]
) -> None:
    screen = command(run, opened, "attach", str(run.path))
    screen.until("incidents")
    screen.press("q")
    assert screen.ends() == 0 and run.screens() == 0
    nowhere = command(run, opened, "view", str(run.path / "nothing-here.csv"))
    assert nowhere.ends() == 2
    nowhere.read()
    assert b"Traceback" not in nowhere.output and b"guardrail: " in nowhere.output


@pytest.mark.fault("E10", "T21")
@pytest.mark.parametrize("name", ["dumb", ""])
@pytest.mark.parametrize("word", ["attach", "view"])
def test_a_terminal_without_a_screen_gets_plain_lines(
    word: str, name: str, tmp_path: Path, opened: list[Terminal]
) -> None:
    run = example().end(Phase.FINISHED, 0).write(tmp_path)
    screen = command(run, opened, word, str(run.path), TERM=name)
    assert screen.ends(60) == 0
    screen.read()
    assert b"\x1b" not in screen.output, "not one escape sequence"
    assert b"finished at step" in screen.output


@pytest.mark.fault("E10")
def test_a_log_of_another_tool_is_plain_lines_too(tmp_path: Path, opened: list[Terminal]) -> None:
    rows = ["step,loss"] + [
        f"{n},{9.0 if n == 150 else 2.0 + 0.01 * (n % 7)}" for n in range(1, 200)
    ]
    (tmp_path / "log.csv").write_text("\n".join(rows))
    screen = Terminal([sys.executable, "-m", "guardrail", "view", str(tmp_path / "log.csv")],
                      environment={"TERM": "dumb"})  # fmt: skip
    opened.append(screen)
    assert screen.ends(60) == 0
    screen.read()
    assert (
        b"\x1b" not in screen.output
        and b"199 rows" in screen.output
        and b"would skip at step 150" in screen.output
    )


def test_gone() -> None:
    master, slave = os.openpty()
    try:
        assert not terminal.is_gone(slave)
        os.close(master)
        master = -1
        assert terminal.is_gone(slave)
    finally:
        for descriptor in (master, slave):
            if descriptor >= 0:
                os.close(descriptor)
    assert terminal.is_gone(slave), "a closed descriptor counts as gone"
