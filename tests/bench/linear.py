"""Costs that must grow linearly with the length of a run, a skip or a text, not with its square.

    python -m tests.bench.linear

replay      compare the rows of a replay with those of the run, 100 times while they arrive
skip        skip the samples of a long span, and form the next batch in the epoch after it
text        statistics of a text, for scripts with and without spaces
"""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Iterator

import numpy as np

from guardrail.core.records.spans import Span
from guardrail.decide.sample_cursor import SampleCursor
from guardrail.decide.sample_order import SampleOrder
from guardrail.decide.timelines import TimelineIndex
from guardrail.operate.replay_comparison import Comparison
from guardrail.operate.replay_plan import ReplayPlan
from guardrail.report.text_quality import text_anomalies
from guardrail.rundir.metrics import MetricsView

COLUMNS = ("step", "timeline", "verdict", *(f"signal_{number}" for number in range(12)))
LOOKS = 100
# Characters of each script; a text is drawn from words of them.
SCRIPTS = {
    "Latin": "abcdefghijklmnopqrstuvwxyz",
    "Chinese": "".join(map(chr, range(0x4E00, 0x4E00 + 2000))),
    "Japanese": "".join(map(chr, [*range(0x3041, 0x3090), *range(0x4E00, 0x4E00 + 1000)])),
    "Thai": "".join(map(chr, range(0x0E01, 0x0E2F))),
    "Korean": "".join(map(chr, range(0xAC00, 0xAC00 + 1500))),
    "base64": "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/",
}


class Rows:
    """The first rows of a run."""

    def __init__(self, table: np.ndarray) -> None:
        self.table, self.rows = table, len(table)

    def metrics(self) -> MetricsView:
        return MetricsView(COLUMNS, self.table[: self.rows], TimelineIndex)


def compare(steps: int) -> float:
    table = np.random.default_rng(0).normal(size=(steps, len(COLUMNS)))
    table[:, 0], table[:, 1], table[:, 2] = np.arange(1, steps + 1), 0, 0
    run, scratch = Rows(table), Rows(table.copy())
    compared = Comparison(run, scratch, ReplayPlan(None, 0, steps))  # type: ignore[arg-type]
    began = time.process_time()
    for look in range(1, LOOKS + 1):
        scratch.rows = steps * look // LOOKS
        compared.compare_new_rows()
    compared.finish()
    assert compared.first is None and not compared.missing
    return time.process_time() - began


def skip(batches: int) -> tuple[float, float]:
    """(Seconds, MB) for a skip of so many batches of 32."""
    count = 32 * batches
    book = SampleCursor(SampleOrder(samples=2 * count, seed=1), batch_size=32)
    span = Span(
        first=count // 2, last=count // 2 + count, origin="user", step=1, reason="", batches=batches
    )
    tracemalloc.start()
    book.skip_span(span)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    book.cursor = 2 * count
    began = time.process_time()
    for _ in range(100):
        batch = book.next_batch()
        assert batch is not None
        book.advance(batch, applied=True)
    return (time.process_time() - began) / 100, kept / 1e6


def text_of(script: str, size: int) -> str:
    """Return words of two to eight characters, some of them frequent, with spaces if the script has them."""
    draw = random.Random(0)
    words = ["".join(draw.choices(SCRIPTS[script], k=draw.randrange(2, 8))) for _ in range(5000)]
    between = " " if script in ("Latin", "Korean") else ""
    return between.join(draw.choices(words, k=size // 4))[:size]


def lines() -> Iterator[str]:
    for steps in (25_000, 50_000, 100_000):
        yield f"replay    {steps:>9,} steps, looked at {LOOKS} times {compare(steps):8.2f} s of CPU"
    for batches in (1_000, 10_000, 100_000):
        seconds, megabytes = skip(batches)
        yield f"skip      {batches:>9,} batches of 32 {megabytes:10.2f} MB kept, {1e3 * seconds:6.2f} ms a later batch"
    for script in SCRIPTS:
        for size in (250_000, 1_000_000):
            text = text_of(script, size)
            began = time.process_time()
            text_anomalies(text)
            yield f"text      {size:>9,} characters {script:12} {time.process_time() - began:8.2f} s of CPU"


def main() -> None:
    for line in lines():
        print(line, flush=True)


if __name__ == "__main__":
    main()
