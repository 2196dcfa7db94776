"""How much guardrail's figures on recorded runs hang on each of its constants: every one 20 % up
and down, by itself.

    python -m tests.bench.sensitivity TRACES [--by 0.2] [--only NAME]

A constant at the edge of a plateau was fitted to these runs and will fail on others. One in the
middle was not. TRACES as for detection.py. Whole numbers move by at least one.
"""

from __future__ import annotations

import math
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

from guardrail.backtest.scoring import score_runs
from guardrail.core.guard_options import GuardOptions
from guardrail.core.section import replace_key
from guardrail.detectors import (
    baseline,
    benign_outliers,
    divergence,
    embedding_share,
    growth,
    joint_cusum,
    resume_jump,
    spike,
    spikes,
    stuck,
)
from tests.bench.detection import by_guardrail, read_traces
from tests.support.bench_options import make_parser

MODULES = (
    baseline,
    benign_outliers,
    divergence,
    embedding_share,
    growth,
    joint_cusum,
    resume_jump,
    spike,
    spikes,
    stuck,
)
SETTINGS = (
    "detectors.spike.history",
    "detectors.spike.min_history",
    "detectors.spike.loss_threshold",
    "detectors.spike.grad_threshold",
    "rollback_after_rejections",
    "detectors.divergence.threshold",
    "detectors.divergence.steps",
)
CONSTANTS: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (baseline, ("FOLLOW", "LAG", "YOUNGEST", "USUAL_SHARE", "USUAL_HISTORIES")),
    (spikes.LossSpike, ("floor", "cold_factor")),
    (spikes.GradNormSpike, ("floor", "cold_factor")),
    (spike, ("COLD", "NOTE_SHARE", "ONSET_SHARE", "NEW_LEVEL", "LOOK_BACK")),
    (divergence.Divergence, ("SHIFT", "MEMORY")),
    (growth, ("BLOCK", "LEAST", "SIGMAS", "SURE")),
    (benign_outliers, ("KEEP", "LEAST", "RATE", "PRIOR", "PRIOR_EXCESS")),
    (stuck, ("CHANCE", "KNOWN")),
    (joint_cusum, ("RAISED", "SHARE", "DRIFT", "ENOUGH", "MOST")),
)
FIGURES = (
    "acted",
    "noted",
    "false_skips_per_10k",
    "false_rollbacks_per_10k",
    "false_notes_per_10k",
    "delay_median",
)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("traces", type=Path, nargs="?")
    parser.add_argument("--by", type=float, default=0.2)
    parser.add_argument("--only", help="of this constant alone")
    arguments = parser.parse_args()
    if arguments.traces is None:
        print("needs a folder of recorded runs")
        return
    labels, logs = read_traces(arguments.traces)

    def row(name: str, value: float, settings: GuardOptions) -> None:
        figures = score_runs(labels, by_guardrail(logs, settings)[1])[0]
        cells = " ".join(f"{figures[key]:>12.4g}" for key in FIGURES)
        print(f"{name:28} {value:>10.4g} {cells}", flush=True)

    print(
        f"{'constant':28} {'value':>10} "
        + " ".join(f"{key.removesuffix('_per_10k')[-12:]:>12}" for key in FIGURES)
    )
    plain = GuardOptions()
    row("as it is", math.nan, plain)
    for name in SETTINGS:
        for value in moved(attrgetter(name)(plain), arguments.by):
            if arguments.only in (None, name):
                row(f"guard.{name}", value, replace_key(plain, name, value))
    for owner, names in CONSTANTS:
        for name in names:
            was = getattr(owner, name)
            for value in moved(was, arguments.by):
                if arguments.only in (None, name):
                    put(owner, name, was, value)
                    row(f"{owner.__name__.rsplit('.', 1)[-1]}.{name}", value, plain)
                    put(owner, name, value, was)


def moved(value: float, by: float) -> tuple[float, float]:
    if isinstance(value, int):
        least = max(1, round(by * value))
        return value - least, value + least
    return value * (1.0 - by), value * (1.0 + by)


def put(owner: Any, name: str, was: float, value: float) -> None:
    """Set a constant, also where another module has imported it."""
    owners = MODULES if isinstance(owner, ModuleType) else (owner,)
    for one in owners:
        if one is owner or (getattr(one, name, None) is was and name not in ("LEAST", "FLOOR")):
            setattr(one, name, value)


if __name__ == "__main__":
    main()
