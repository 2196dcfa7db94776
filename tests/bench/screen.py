"""The screen of a run of a million steps: a real `guardrail attach` in a pseudo-terminal of 120 x 32.

    python -m tests.bench.screen [--steps 1000000] [--rounds 5] [--leet VENV RUN.wandb]

It measures: the time from the command to the first frame and to the complete curve; keys; the
screen of a run with ten steps per second; a terminal that stops reading; a day of steps. CPU
seconds are those of all threads of the process, from the kernel's scheduler: they can be compared
on a machine that others use too. Processes start with a warm file cache. `--leet` measures W&B LEET
on a log of the same size with three metrics, in its own environment: guardrail does not install
wandb.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from guardrail.core.records.signals import METRIC_COLUMNS
from guardrail.rundir.run_directory import RunDirectory
from tests.support.bench_options import make_parser
from tests.support.fake_run import FakeRun
from tests.support.process_tree import cpu_of_tree, list_tree, memory_of_tree
from tests.support.terminal import FRAME_END, Terminal, blank

COLUMNS, ROWS = 120, 32
GUARDRAIL = str(Path(sys.executable).with_name("guardrail"))
PROBE = str(Path(__file__).parents[1] / "support" / "screen_probe.py")
LAST_LOSS = 1.777  # of the newest row: the whole curve is on the screen once its title says so
KEYS = {
    "zoom in": "+",
    "zoom out": "-",
    "value cursor": "\x1b[D",
    "next chart": "\x1b[B",
    "logarithm": "x",
    "next pane": "\t",
    "the curves": "1",
}
SPAN = 30.0  # seconds for which a quiet screen is watched


class Table:
    """Lines of: what, measured, goal."""

    def __init__(self) -> None:
        print("| what | measured | goal |\n|---|---|---|", flush=True)

    def line(self, what: str, measured: str, goal: str = "") -> None:
        print(f"| {what} | {measured} | {goal} |", flush=True)


def build(root: Path, steps: int) -> RunDirectory:
    """Build a healthy run of `steps` steps."""
    fake = (
        FakeRun(name="bench/2026-11-25-01", total=2 * steps)
        .begin()
        .advance(steps, checkpoints=steps // 20)
    )
    fake.chunks[-1][-1, METRIC_COLUMNS.index("loss")] = LAST_LOSS
    fake.time = time.time()
    return fake.write(root)


def attach(run: RunDirectory, *command: str, environment: dict[str, str] | None = None) -> Terminal:
    words = list(command) or [GUARDRAIL]
    return Terminal(
        [*words, "attach", str(run.path)], columns=COLUMNS, rows=ROWS, environment=environment
    )


def leave(terminal: Terminal, key: str = "q") -> None:
    try:
        terminal.press(key)
        terminal.ends()
    finally:
        terminal.end()


def shown_at(terminal: Terminal, shows: Callable[[list[str]], bool]) -> tuple[float, float]:
    """(seconds since the command, CPU seconds) of the first chunk after which the screen shows
    something.
    """
    screen, stream = blank(terminal.columns, terminal.rows)
    for at, cpu, data in terminal.chunks:
        stream.feed(data)  # type: ignore[attr-defined]
        if shows(screen.display):  # type: ignore[attr-defined]
            return at - terminal.began, cpu
    raise SystemExit(f"the screen never came: {screen.display}")  # type: ignore[attr-defined]


def framed(display: list[str]) -> bool:
    return any("help" in row for row in display[-2:]) and any(
        "gradient norm" in row for row in display
    )


def whole(display: list[str]) -> bool:
    return any(" loss " in row and f"{LAST_LOSS:.3g} " in row for row in display) and framed(
        display
    )


def middle(values: Sequence[float], scale: float = 1.0, digits: int = 2) -> str:
    """Median, and between what."""
    scaled = sorted(value * scale for value in values)
    return f"{statistics.median(scaled):.{digits}f} ({scaled[0]:.{digits}f} to {scaled[-1]:.{digits}f})"


def bare_import(modules: str, rounds: int) -> list[float]:
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {modules}"], check=True)
        seconds.append(time.perf_counter() - began)
    return seconds


def opening(table: Table, run: RunDirectory, steps: int, rounds: int) -> None:
    """Fresh processes, in turn with a bare import of what they need."""
    frames, curves, after, memory, torch = [], [], [], [], False
    for _ in range(rounds):
        terminal = attach(run, sys.executable, PROBE)
        try:
            terminal.read(1.0)
            terminal.shows(f"{LAST_LOSS:.3g} ")
            terminal.read(0.5)
            torch |= "torch" in Path(f"/proc/{terminal.process.pid}/maps").read_text()
            memory.append(terminal.memory())
            imported = shown_at(
                terminal, lambda display: any("@imported@" in row for row in display)
            )
            drawn = shown_at(terminal, whole)
            after.append((drawn[0] - imported[0], drawn[1] - imported[1]))
            leave(terminal)
            terminal = attach(run)
            terminal.read(1.0)
            terminal.shows(f"{LAST_LOSS:.3g} ")
            frames.append(shown_at(terminal, framed))
            curves.append(shown_at(terminal, whole))
            leave(terminal)
        finally:
            terminal.end()
    bare = bare_import("numpy, textual.app, textual.widgets", rounds)
    for name, found, goal in (
        ("first frame with skeleton", frames, "0.5 s"),
        ("the whole curve", curves, ""),
    ):
        table.line(f"command to {name}, {steps:,} steps", f"{middle([s for s, _ in found])} s, "
                   f"CPU {middle([c for _, c in found])} s", goal)  # fmt: skip
    table.line("... of which a bare import of numpy and textual", f"{middle(bare)} s")
    table.line("after imports to the whole curve", f"{middle([s for s, _ in after])} s, "
               f"CPU {middle([c for _, c in after])} s", "0.5 s")  # fmt: skip
    table.line("memory at most", f"{middle(memory, digits=0)} MB", "150 MB")
    table.line("torch imported", "yes" if torch else "no", "no")


class Writer(threading.Thread):
    """Goes on with the run, as a trainer does: so many rows a second, a heartbeat a second. Notes
    what a row takes.
    """

    def __init__(self, run: RunDirectory, step: int, rate: float = 10.0) -> None:
        super().__init__(daemon=True)
        self.run_directory, self.step, self._rate = run, step, rate
        self.took: list[float] = []
        self._leaving = threading.Event()

    def run(self) -> None:
        status, rng = self.run_directory.read_status(), np.random.default_rng(1)
        assert status is not None
        fake = FakeRun(total=10 * self.step, seed=1)
        fake.step, fake.time, beat, following = self.step, time.time(), 0.0, time.monotonic()
        names = dict.fromkeys(METRIC_COLUMNS)
        with self.run_directory.metrics_writer() as writer:
            while not self._leaving.is_set():
                fake.advance(fake.step + 1, checkpoints=0, ring=0)
                row = dict(zip(names, fake.chunks.pop()[0].tolist(), strict=True))
                row["loss"] = 2.15 + 0.045 * float(rng.normal())
                began = time.perf_counter()
                writer.append(row)
                self.took.append(time.perf_counter() - began)
                self.step = fake.step
                if time.monotonic() - beat >= 1.0:
                    beat, fake.time = time.monotonic(), time.time()
                    self.run_directory.write_status(fake.status)
                following += 1 / self._rate
                self._leaving.wait(max(0.0, following - time.monotonic()))

    def stop(self) -> None:
        self._leaving.set()
        self.join()


def quiet(table: Table, run: RunDirectory, steps: int) -> int:
    """The screen of a healthy run with ten steps a second; returns the newest step."""
    told = Path(tempfile.mkstemp()[1])
    terminal = attach(run, sys.executable, PROBE, environment={"GUARDRAIL_PROBE": str(told)})
    writer = Writer(run, steps)
    try:
        terminal.shows(f"{LAST_LOSS:.3g} ")
        writer.start()
        terminal.read(4.0)
        first, cpu, before = len(terminal.chunks), terminal.cpu(), terminal.memory("VmRSS")
        began = time.monotonic()
        terminal.read(SPAN)
        spent, took, seen = terminal.cpu() - cpu, time.monotonic() - began, terminal.chunks[first:]
        rate = [0] * int(SPAN)  # bytes in each second
        for at, _, data in seen:
            if began <= at < began + len(rate):
                rate[int(at - began)] += len(data)
        frames = b"".join(data for _, _, data in seen).count(FRAME_END)
        grown = terminal.memory("VmRSS") - before
        leave(terminal)
        ticks = np.loadtxt(told, ndmin=2)
        ticks = ticks[(ticks[:, 0] >= began) & (ticks[:, 0] < began + SPAN)]
    finally:
        writer.stop()
        terminal.end()
        told.unlink()
    table.line("a tick of the screen at 10 steps/s, 3 charts (CPU of building and drawing a frame)",
               f"{statistics.median(ticks[:, 1]) * 1e3:.1f} ms (95 % under {np.quantile(ticks[:, 1], 0.95) * 1e3:.1f})",
               "5 ms")  # fmt: skip
    table.line("CPU of a core at 10 steps/s", f"{100 * spent / took:.1f} %", "5 %")
    table.line("output on a quiet screen, median of seconds", f"{statistics.median(rate) / 1e3:.2f} kB/s "
               f"(mean {statistics.fmean(rate) / 1e3:.2f}) in {frames / took:.1f} frames/s", "1.1 kB/s")  # fmt: skip
    table.line(f"memory grown in {SPAN:.0f} s", f"{grown:.1f} MB")
    return writer.step


def settle(terminal: Terminal, seconds: float = 0.5) -> None:
    while terminal.take(seconds):
        pass


def key_latency(terminal: Terminal, key: str) -> float:
    """Seconds from a key to the end of the frame that it brings."""
    settle(terminal)
    pressed = time.monotonic()
    terminal.press(key)
    seen, last = b"", pressed
    while time.monotonic() < pressed + 2.0:
        data = terminal.take(0.15)
        if data:
            seen, last = seen + data, time.monotonic()
        if (FRAME_END in seen) or (seen and not data):
            return last - pressed
    return math.inf


def keys(table: Table, run: RunDirectory, rounds: int) -> None:
    """Of a run that stands still, so that no frame but the key's own comes."""
    terminal = attach(run)
    try:
        terminal.read(2.0)
        found: dict[str, list[float]] = {name: [] for name in KEYS}
        for _ in range(rounds):  # in turn, so that each of them changes something
            for name, key in KEYS.items():
                found[name].append(key_latency(terminal, key))
        leave(terminal)
    finally:
        terminal.end()
    every = [value for values in found.values() for value in values]
    told = ", ".join(
        f"{name} {statistics.median(values) * 1e3:.0f}" for name, values in found.items()
    )
    table.line(
        "key to the end of its frame (medians, ms: " + told + ")",
        f"{middle(every, 1e3, 0)} ms",
        "50 ms",
    )


def deaf(table: Table, run: RunDirectory, steps: int, seconds: float) -> int:
    """A terminal that stops reading, with keys that would draw everything anew; returns the newest
    step.
    """
    terminal, writer = attach(run), Writer(run, steps)
    try:
        terminal.read(2.0)
        writer.start()
        terminal.read(seconds)
        reading = len(writer.took)
        until, pressed = time.monotonic() + seconds, 0
        while time.monotonic() < until:
            if pressed < 400:
                terminal.press("\t")
                pressed += 1
            time.sleep(0.02)
        blocked, newest, again = writer.took[reading:], writer.step, time.monotonic()
        caught = -1
        while caught < newest and time.monotonic() < again + 30:
            terminal.take(0.05)
            caught = step_of(terminal.display())
        late = time.monotonic() - again
        leave(terminal)
    finally:
        writer.stop()
        terminal.end()
    table.line(f"a row of the trainer while the terminal reads / does not read for {seconds:.0f} s (medians, rows)",
               f"{statistics.median(writer.took[:reading]) * 1e6:.0f} / {statistics.median(blocked) * 1e6:.0f} µs, "
               f"{reading} / {len(blocked)}", "no difference")  # fmt: skip
    table.line(
        "the screen has caught up after",
        f"{late:.1f} s" if caught >= newest else "never",
        "it does",
    )
    return writer.step


def step_of(display: Sequence[str]) -> int:
    """The step that the header says, -1 for none."""
    words = display[0].replace(",", "").split()
    where = words.index("step") + 1 if "step" in words else len(words)
    return int(words[where]) if where < len(words) and words[where].isdigit() else -1


def day(table: Table) -> None:
    """24 hours at ten steps a second, as many rows at once as half a minute brings."""
    command = [sys.executable, "-m", "tests.support.screen_probe", "day"]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    table.line(
        "memory after 1, 6, 12 and 24 hours of ten steps a second (simulated)",
        told.strip(),
        "does not grow",
    )


def leet(table: Table, environment: Path, log: Path) -> None:
    """W&B LEET on a log of the same size: until its axis shows the last step, what it takes,
    keys.
    """
    program = str(environment / "bin" / "wandb")
    terminal = Terminal([program, "leet", "run", str(log)], columns=COLUMNS, rows=ROWS)
    try:
        still, before, until = time.monotonic(), -1.0, time.monotonic() + 180
        while time.monotonic() < until and time.monotonic() - still < 8.0:
            terminal.read(0.5)
            if (cpu := cpu_of_tree(terminal.process.pid)) - before > 0.1:
                still, before = time.monotonic(), cpu
        peak = memory_of_tree(terminal.process.pid)
        took = [key_latency(terminal, key) for key in ("\t", "\t", "\t", "\t")]
        last = max(at for at, _, _ in terminal.chunks) - terminal.began
    finally:
        # what wandb starts outlives a launcher that is killed
        for one in reversed(list_tree(terminal.process.pid)[1:]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGTERM)
        terminal.end()
    table.line(
        "W&B LEET, 1 M steps of 3 metrics: busy until, CPU",
        f"{still - terminal.began:.1f} s, {before:.1f} s",
    )
    table.line(
        "W&B LEET: memory at most, key to screen",
        f"{peak:.0f} MB, {middle(took, 1e3, 0)} ms (last {last:.0f})",
    )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--deaf", type=float, default=60.0, help="seconds for which the terminal does not read"
    )
    parser.add_argument("--only", nargs="*", default=["opening", "quiet", "keys", "deaf", "day"])
    parser.add_argument("--leet", nargs=2, type=Path, metavar=("VENV", "LOG"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run, table, step = build(Path(folder), options.steps), Table(), options.steps
        if "opening" in options.only:
            opening(table, run, options.steps, options.rounds)
        if "keys" in options.only:
            keys(table, run, options.rounds)
        if "quiet" in options.only:
            step = quiet(table, run, step)
        if "deaf" in options.only:
            deaf(table, run, step, options.deaf)
        if "day" in options.only:
            day(table)
        if options.leet:
            leet(table, *options.leet)


if __name__ == "__main__":
    main()
