"""Record a run of one version for tests/e2e/test_old_runs.py.

`python record.py NAME` makes NAME/ as NAME.toml says.

PYTHONPATH says which version of guardrail runs. The sources are copied to FOLDER first, because
the run writes their absolute paths down; the tests put theirs in place of FOLDER. Uses the command
line alone, so that it serves every version. The run is stopped before its end, and one command
waits for a later step. Of the checkpoints only the newest is stored: a manifest has 80 KiB.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FOLDER = Path("/tmp/old_runs")
RUN = FOLDER / "runs" / "old" / "2026-11-30-01"
NAMES_FOLDER = re.compile(r"site-packages|File \"/")


def call_guardrail(*words: str) -> None:
    command = [sys.executable, "-m", "guardrail", *words]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
    print(f"{done.returncode} {' '.join(words)}: {(done.stdout + done.stderr).strip()}", flush=True)


def ask_run(*words: str) -> None:
    call_guardrail("ctl", str(RUN), *words)


def read_status() -> dict[str, Any]:
    try:
        return json.loads((RUN / "status.json").read_text())
    except FileNotFoundError:
        return {}


def wait_until(true: Callable[[dict[str, Any]], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not true(read_status()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within a minute: {what}; {read_status()}")
        time.sleep(0.01)


def wait_parked(step: int) -> None:
    wait_until(
        lambda status: status.get("phase") == "paused" and status["step"] >= step - 1,
        f"parked at {step}",
    )


def wait_question() -> None:
    wait_until(lambda status: bool(status.get("question")), "a question")


def pause_at(step: int) -> None:
    ask_run("pause", "--at-step", str(step), "--wait", "0")


def go_on(until: int) -> None:
    """Resume a parked run, which parks again at the end of step `until`."""
    pause_at(until)
    ask_run("resume")
    wait_parked(until)


def kill_rank(rank: int) -> None:
    """End a rank of the run at once, as the kernel does when memory runs out."""
    wanted = {f"RANK={rank}".encode(), f"GUARDRAIL_RUN={RUN}".encode()}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            variables = set((process / "environ").read_bytes().split(b"\0"))
        except OSError:
            continue  # it has ended, or is another user's
        if b"trainer" in words and wanted <= variables:
            os.kill(int(process.name), signal.SIGKILL)


def begin_run(config: str) -> None:
    """Start a new run in FOLDER, where nothing else is."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    shutil.copytree(HERE / "sources", FOLDER / "sources")
    shutil.copy(HERE / config, FOLDER)
    RUN.parent.mkdir(parents=True)
    call_guardrail("launch", config, "--detach", "--run-dir", str(RUN))


def take_commands() -> None:
    """What a person may ask for; each is answered in the journal."""
    for words in (
        ("lr", "0.9"),
        ("embed-alpha", "0.5"),
        ("checkpoint",),
        ("skip", "1"),
        ("pause",),
    ):
        ask_run(*words)
    go_on(55)
    start_again("--set", "guard.cause_test=false")


def answer_question() -> None:
    pause_at(56)
    wait_parked(56)
    ask_run("policy", "ask")
    pause_at(74)
    ask_run("resume")
    wait_question()
    ask_run("answer", "0")
    wait_parked(74)
    ask_run("policy", "auto")
    ask_run("lr", "1.0")


def lose_rank() -> None:
    go_on(95)
    ask_run("checkpoint")
    pause_at(110)
    ask_run("resume")
    kill_rank(1)
    wait_parked(110)


def start_again(*overrides: str) -> None:
    ask_run("stop")
    wait_until(lambda status: status.get("exit_code") is not None, "the end")
    call_guardrail("launch", "--resume", str(RUN), "--detach", *overrides)


def record(config: str) -> None:
    begin_run(config)
    try:
        guide_run()
    finally:
        if read_status().get("exit_code") is None:
            ask_run("stop", "--wait", "0")
            wait_until(lambda status: status.get("exit_code") is not None, "the end")


def guide_run() -> None:
    pause_at(34)
    wait_parked(34)
    take_commands()
    answer_question()
    go_on(83)
    ask_run("undo")
    lose_rank()
    ask_run("lr", "0.7", "--at-step", "130", "--wait", "0")
    ask_run("stop", "--at-step", "118", "--wait", "0")
    ask_run("resume")
    wait_until(
        lambda status: status.get("phase") == "stopped" and status.get("exit_code") is not None,
        "the end",
    )


def store(run: Path, out: Path) -> None:
    """Copy what the tests need; lines of logs that name folders of this machine are left out."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(run, out)
    for folder in sorted((out / "checkpoints").iterdir())[:-1]:
        shutil.rmtree(folder)
    for log in (out / "logs").iterdir():
        lines = log.read_text().splitlines(keepends=True)
        log.write_text("".join(line for line in lines if not NAMES_FOLDER.search(line)))


if __name__ == "__main__":
    record(f"{sys.argv[1]}.toml")
    store(RUN, HERE / sys.argv[1])
