"""What a rank hears, in processes of their own: handlers, wakeup descriptors and faulthandler are
per process.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guardrail.rundir.stop_signals import KILLED
from tests.support.lab import wait_for

PRELUDE = """
import ctypes, os, signal, sys, time
from pathlib import Path
from guardrail.rundir.stop_signals import StopSignals
signals = StopSignals()
signals.install(Path(sys.argv[1]))
print("ready", flush=True)
"""


Rank = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[Rank]:
    """Starts a process with the handlers installed that then runs some code."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(code), str(tmp_path / "stacks")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


WAIT = """
while not signals.requested:
    time.sleep(0.01)
print("saved")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_to_stop(rank: Rank, number: signal.Signals) -> None:
    process = rank(WAIT)
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output, errors) == (0, "saved\n", "")


def test_usr1_may_come_many_times(rank: Rank) -> None:
    process = rank("time.sleep(1)\n" + WAIT)
    for _ in range(5):
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # the first one of its kind
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, "saved\n")


def test_a_second_sigterm_ends_a_process_that_is_inside_c(rank: Rank) -> None:
    """PyDLL holds no bytecode boundary: as in a collective, no Python handler could run."""
    process = rank(
        """
        import guardrail.rundir.stop_signals
        guardrail.rundir.stop_signals.DEBOUNCE_SECONDS = 0.1
        print("set", flush=True)
        ctypes.CDLL(None).pause(); ctypes.CDLL(None).sleep(600); ctypes.CDLL(None).sleep(600)
        """
    )
    assert process.stdout is not None and process.stdout.readline() == "set\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == KILLED == 143


@pytest.mark.fault("A4", "R5")
def test_a_burst_of_sigterms_is_one_request(rank: Rank) -> None:
    """A scheduler signals a process and its group: the second one arrives while the first one is
    being answered.
    """
    process = rank(WAIT.replace('print("saved")', 'time.sleep(0.3); print("saved")'))
    for pause in (0.0005, 0.005, 0.02, 0.1):
        process.send_signal(signal.SIGTERM)
        time.sleep(pause)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, "saved\n")


def test_the_first_sigterm_is_seen_by_threads_while_the_main_thread_is_inside_c(rank: Rank) -> None:
    process = rank(
        """
        import threading
        def watch():
            while not signals.requested:
                time.sleep(0.01)
            print("seen", flush=True)
            os._exit(0)
        threading.Thread(target=watch).start()
        libc = ctypes.CDLL(None)
        mask = (ctypes.c_ubyte * 128)()
        while True:
            libc.poll(None, 0, 600_000)  # returns with EINTR, and no bytecode runs a handler that would matter here
        """,
    )
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert output == "seen\n"


def test_a_forked_worker_neither_saves_nor_speaks_for_the_rank(rank: Rank) -> None:
    """SIGUSR1 to a data worker does nothing, even a newborn one; SIGTERM ends it; the rank hears
    nothing.
    """
    process = rank(
        """
        codes = []
        for _ in range(30):
            child = os.fork()
            if child == 0:
                time.sleep(600)
            os.kill(child, signal.SIGUSR1)
            time.sleep(0.01)
            os.kill(child, signal.SIGTERM)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        time.sleep(0.2)
        print(set(codes), signals.requested)
        """
    )
    output, _ = process.communicate(timeout=60)
    assert output == f"{{{-signal.SIGTERM}}} False\n"


def test_usr2_writes_the_stacks_of_all_threads(rank: Rank, tmp_path: Path) -> None:
    process = rank(
        """
        import threading
        def worker_thread():
            time.sleep(600)
        threading.Thread(target=worker_thread, daemon=True).start()
        def main_thread():
            print("there", flush=True)
            time.sleep(600)
        main_thread()
        """,
    )
    assert process.stdout is not None and process.stdout.readline() == "there\n"
    stacks = tmp_path / "stacks"
    for times in (1, 2):
        process.send_signal(signal.SIGUSR2)
        wait_for(lambda times=times: stacks.read_text().count("in main_thread") == times)  # type: ignore[misc]
    assert stacks.read_text().count("in worker_thread") == 2
    assert process.poll() is None
