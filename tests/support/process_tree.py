"""What a process and the processes that it started take, from /proc."""

from __future__ import annotations

import os
from pathlib import Path


def list_tree(pid: int) -> list[int]:
    """Return the ids of a process and of what it has started."""
    found = [pid]
    for one in found:
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
    return found


def cpu_of_tree(pid: int) -> float:
    """Return the CPU seconds that they have taken."""
    ticks = 0
    for one in list_tree(pid):
        fields = Path(f"/proc/{one}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def memory_of_tree(pid: int) -> float:
    """Return the sum of their largest resident memory, MB."""
    total = 0.0
    for one in list_tree(pid):
        for line in Path(f"/proc/{one}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                total += int(line.split()[1]) * 1024 / 1e6
    return total
