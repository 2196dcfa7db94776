"""The screen in a real terminal: leaving, hanging up, a terminal that is gone or does not read, hostile bytes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guardrail.rundir import RunDirectory
from guardrail.tui import terminal
from tests.fake_run import FakeRun, example
from tests.test_tui_panels import HOSTILE

_SCREEN = """
import fcntl, os, signal, sys, termios
if "controlling" in sys.argv: fcntl.ioctl(0, termios.TIOCSCTTY, 0)
if "nohup" in sys.argv: signal.signal(signal.SIGHUP, signal.SIG_IGN)
from guardrail.tui.app import run_screen
sys.exit(run_screen(sys.argv[1], read_only="read-only" in sys.argv))
"""


class Terminal:
    """A pseudo-terminal of 100 x 30 with the screen of a run in it."""

    def __init__(self, run: RunDirectory, *options: str) -> None:
        self.master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        self.before = termios.tcgetattr(slave)
        self.output = b""
        # An exported size would win over the terminal's own.
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {
            "TERM": "xterm-256color"
        }
        command = [sys.executable, "-c", _SCREEN, str(run.path), *options]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=environment
        )
        self.slave = slave

    def read(self, seconds: float = 0.1) -> None:
        """Take what the screen has written, as a terminal does."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self.master], [], [], left)[0]:
                with contextlib.suppress(OSError):
                    self.output += os.read(self.master, 65536)

    def until(self, text: str, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while text.encode() not in self.output:
            assert time.monotonic() < deadline, f"{text!r} never came: {self.output[-2000:]!r}"
            assert self.process.poll() is None, f"the screen has ended: {self.output[-2000:]!r}"
            self.read()

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def close(self) -> None:
        """The window is closed, the connection dropped."""
        for descriptor in (self.slave, self.master):
            if descriptor >= 0:
                os.close(descriptor)
        self.slave = self.master = -1

    def ends(self, seconds: float = 15.0, *, reading: bool = True) -> int:
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < deadline, "the screen did not end"
            if reading and self.master >= 0:
                self.read(0.05)
            else:
                time.sleep(0.05)
        return int(self.process.returncode)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return example().write(tmp_path)


@pytest.fixture
def opened(run: RunDirectory) -> Iterator[list[Terminal]]:
    """Terminals that a test opens; whatever is left of them is closed."""
    terminals: list[Terminal] = []
    yield terminals
    for one in terminals:
        one.process.kill()
        one.process.wait()
        one.close()


def show(run: RunDirectory, opened: list[Terminal], *options: str) -> Terminal:
    one = Terminal(run, *options)
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
    assert run.screens() == 0 and not run.commands_pending(), "nobody watches any more, and nothing was asked for"


def test_a_key_reaches_the_run(run: RunDirectory, opened: list[Terminal]) -> None:
    screen = show(run, opened, "controlling")
    screen.press("c")
    screen.until("no answer yet")
    assert [command.kind.value for command in run.commands_pending()] == ["checkpoint"]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_leaves_and_restores(number: int, run: RunDirectory, opened: list[Terminal]) -> None:
    screen = show(run, opened, "controlling")
    screen.process.send_signal(number)
    assert screen.ends() == 0
    screen.read()
    assert b"\x1b[?1049l" in screen.output and b"\x1b[?25h" in screen.output
    assert termios.tcgetattr(screen.slave) == screen.before


@pytest.mark.parametrize("options", [["controlling"], ["controlling", "nohup"], ["detached"]], ids="-".join)
def test_a_closed_terminal_ends_the_screen(options: list[str], run: RunDirectory, opened: list[Terminal]) -> None:
    """With SIGHUP, with SIGHUP ignored by nohup, and without a controlling terminal, where none is sent."""
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


def test_hostile_bytes_never_reach_the_terminal(tmp_path: Path, opened: list[Terminal]) -> None:
    fake = FakeRun().begin().advance(50)
    for evil in HOSTILE.values():
        if "\ud800" not in evil:
            fake.event("note", evil)
    fake.durability = "degraded: " + HOSTILE["clipboard"]
    run = fake.write(tmp_path)
    with run.journal_path.open("ab") as journal:
        journal.write(
            b'{"seq": 99, "time": 1.0, "step": 1, "timeline": 0, "kind": "note", "message": "\xff\xfe\x9b2J"}\n'
        )
    screen = show(run, opened, "controlling")
    screen.until("degraded")
    screen.press("j")
    screen.until("scroll")
    screen.read(1.0)
    told = screen.output.replace(b"\x1b]22;default\x07", b"")  # textual's own: the shape of the mouse pointer
    assert b"\x1b]" not in told, "no operating system command: title, clipboard"
    assert b"\x1bP" not in told and b"\x07" not in told and b"ZXZpbA==" not in told
    assert b"\xc2\x9b" not in told and b"\xc2\x9d" not in told and "\u202e".encode() not in told


def test_no_colour_means_none(run: RunDirectory, opened: list[Terminal], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    screen = show(run, opened, "controlling")
    screen.read(0.5)
    for sequence in (b"38;2", b"48;2", b"38;5", b"48;5", b"[31m", b"[32m", b"[33m", b"[36m"):
        assert sequence not in screen.output, sequence


def test_gone() -> None:
    master, slave = os.openpty()
    try:
        assert not terminal.gone(slave)
        os.close(master)
        master = -1
        assert terminal.gone(slave)
    finally:
        for descriptor in (master, slave):
            if descriptor >= 0:
                os.close(descriptor)
    assert terminal.gone(slave), "a closed descriptor counts as gone"
