"""What torch finds on this machine, asked in another process: importing it takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from typing import Any

from guardrail.core.text import clean_text

PATIENCE_SECONDS = 2.0  # before the first line about the import
TORCH_SECONDS = 180.0  # the first import after a boot reads a gigabyte

# Runs in the process that imports torch; prints one JSON object.
_SCRIPT = """
import json, torch, torch.distributed as dist
cuda = torch.cuda.is_available()
devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if cuda else []
print(json.dumps({
    "cuda_built": torch.version.cuda or torch.version.hip or "",
    "devices": [{"name": d.name, "bytes": d.total_memory} for d in devices],
    "bf16": bool(cuda and torch.cuda.is_bf16_supported()),
    "gloo": dist.is_available() and dist.is_gloo_available(),
    "nccl": dist.is_available() and dist.is_nccl_available(),
}))
"""


def ask_torch() -> dict[str, Any]:
    """Return what torch finds, as the script prints it; {"error": why} if it cannot be imported.

    While it takes long, a line on stderr reports the seconds.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    done = threading.Event()
    reporter = threading.Thread(target=_report_seconds, args=(done,), daemon=True)
    reporter.start()
    try:
        output, errors = process.communicate(timeout=TORCH_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"error": f"not imported within {TORCH_SECONDS:.0f} s"}
    finally:
        done.set()
        reporter.join()
    try:
        answer: dict[str, Any] = json.loads(output.splitlines()[-1])
        return answer
    except (ValueError, IndexError):
        last = errors.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        return {"error": clean_text(last[0], 300)}


def _report_seconds(done: threading.Event) -> None:
    began = time.monotonic()
    while not done.wait(PATIENCE_SECONDS):
        print(f"importing torch, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
