"""The screen in a real terminal: leaving, hanging up, a terminal that is gone or does not read, hostile bytes."""

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

import pytest

from guardrail.rundir import RunDirectory
from guardrail.tui import terminal
from guardrail.tui.panes.table import PANES
from tests.fake_run import FakeRun, LiveRun, example
from tests.terminal import Terminal
from tests.test_tui_panels import HOSTILE

_SCREEN = """
import fcntl, os, signal, sys, termios
if "controlling" in sys.argv: fcntl.ioctl(0, termios.TIOCSCTTY, 0)
if "nohup" in sys.argv: signal.signal(signal.SIGHUP, signal.SIG_IGN)
from guardrail.tui.app import run_screen
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
    assert run.screens() == 0 and not run.commands_pending(), "nobody watches any more, and nothing was asked for"


def test_a_key_reaches_the_run(run: RunDirectory, opened: list[Terminal]) -> None:
    screen = show(run, opened, "controlling")
    screen.press("c")
    deadline = time.monotonic() + 20
    while not run.commands_pending() and time.monotonic() < deadline:
        screen.read()
    assert [command.kind.value for command in run.commands_pending()] == ["checkpoint"]
    screen.until("no answer yet")


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


@pytest.mark.slow
def test_a_minute_without_a_reader_costs_training_nothing(tmp_path: Path, opened: list[Terminal]) -> None:
    """Somebody's laptop sleeps. The rows of the run are counted meanwhile, and what the viewer holds."""
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
    assert len(screen.output) - sent < 3_000_000, "what was held back is a few frames, not all of a minute"
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
    fake.durability = "degraded: " + HOSTILE["clipboard"]
    run = fake.write(tmp_path)
    with run.journal_path.open("ab") as journal:
        journal.write(
            b'{"seq": 99, "time": 1.0, "step": 1, "timeline": 0, "kind": "note", "message": "\xff\xfe\x9b2J"}\n'
        )
    evil = HOSTILE["clipboard"].encode() + b"\xff\xfe\x9b2J\xc2\x9d0;t\x07 [/red] " + "\u202e語".encode()
    run.logs.mkdir(exist_ok=True)
    (run.logs / "rank-0.log").write_bytes(evil + b"\n" + evil * 200_000 + b"\nthe newest line " + evil + b"\n")
    (run.path / "config.toml").write_text('[run]\nname = "a\\u001B]52;c;ZXZpbA==\\u0007\\u009D \\u202E [/red]"\n')
    screen = show(run, opened, "controlling")
    screen.until("degraded")
    for pane in PANES:
        screen.press(pane.number + "f")
        screen.read(0.3)
        screen.press("f")
    screen.until("the newest line")
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
