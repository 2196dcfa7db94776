"""What a `guardrail ctl` costs while it waits for an answer: CPU seconds, as a share of one core.

    python -m tests.bench.control [--seconds 60] [--lines 50000]

The journal already has `--lines` lines and gets one more per second. Goal: under 1 % of a core.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path

from guardrail.core.errors import UsageError
from guardrail.core.records.status import Phase, Status
from guardrail.operate import control
from guardrail.rundir.run_directory import RunDirectory


def alive(run: RunDirectory, step: int) -> None:
    """Write, as another host would, that the run is alive."""
    run.write_status(
        Status(run=run.name, phase=Phase.STEP, step=step, heartbeat=time.time(), host="elsewhere")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--lines", type=int, default=50_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory.create(Path(folder), "bench", "")
        event = run.append("eval", "held-out loss 2.3146 after step 100", step=100, loss=2.3146)
        line = run.journal_path.read_bytes().rstrip(b"\n")
        old = f'"seq":{event.seq},'.encode()
        with run.journal_path.open("ab") as file:
            for seq in range(2, options.lines + 1):
                file.write(line.replace(old, f'"seq":{seq},'.encode()) + b"\n")
        alive(run, 1)
        left = threading.Event()

        def train() -> None:
            while not left.wait(1.0):
                run.append("eval", "held-out loss", step=100, loss=2.3)
                alive(run, 1)

        trainer = threading.Thread(target=train)
        trainer.start()
        began, cpu = time.monotonic(), time.process_time()
        try:
            control.send_and_wait(
                run, control.parse_command("checkpoint", None), seconds=options.seconds
            )
        except UsageError as error:
            print(error)
        left.set()
        wall, cpu = time.monotonic() - began, time.process_time() - cpu
        trainer.join()
        size = run.journal_path.stat().st_size / 1e6
        print(
            f"ctl waiting {wall:.0f} s, journal {size:.1f} MB: {cpu:.2f} s CPU, {100 * cpu / wall:.2f} % of a core"
        )


if __name__ == "__main__":
    main()
