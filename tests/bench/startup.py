"""Time until a command answers: complete processes, in turn, medians.

    python -m tests.bench.startup [--rounds 20]

Goal: `guardrail --help` in 0.1 s. The table also has the interpreter alone and click alone: no
command in Python can be faster.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from tests.support.bench_options import make_parser

GUARDRAIL = str(Path(sys.executable).with_name("guardrail"))
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "python -c 'import click'": [sys.executable, "-c", "import click"],
    "guardrail --help": [GUARDRAIL, "--help"],
    "guardrail launch --help": [GUARDRAIL, "launch", "--help"],
    "guardrail runs": [GUARDRAIL, "runs", "--root", "/nonexistent"],
    "python -c 'import torch'": [sys.executable, "-c", "import torch"],
}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(rounds + 1):
        for name, command in COMMANDS.items():
            if "torch" in name and number > 3:
                continue
            began = time.perf_counter()
            subprocess.run(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True
            )
            if number:  # the first round warms the file cache
                seconds[name].append(time.perf_counter() - began)
    print(
        f"{'':26} {'median ms':>10} {'least':>7} {'most':>7}   ({rounds} rounds in turn, torch 3)"
    )
    for name, times in seconds.items():
        middle, least, most = statistics.median(times) * 1e3, min(times) * 1e3, max(times) * 1e3
        print(f"{name:26} {middle:10.0f} {least:7.0f} {most:7.0f}")


if __name__ == "__main__":
    main()
