"""Which method rescues a run: one fault per run of a small language model, the same for each method.

    python -m tests.bench.rescue [--seeds 0 1 2] [--faults NAME ...] [--arms NAME ...] [--quick]
    [--workers 2]

Decoders of 35,000 parameters on the source of Python's standard library, fp32 on the CPU. All arms
share data, seeds, clip and schedule. "healthy" is the same run without fault and guard. Each
finished cell is stored as a JSON file under --cache, so an interrupted benchmark continues. Delete
the folder after a change of the code. The table has the finished cells; --only-table prints it
without any run.

arc-training is installed by pip into the cache on the first run; nothing else depends on it. Without
a network its column gives the reason.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from tests.bench.rescue_cells import ARMS, Bench, Cell, install_arc
from tests.bench.rescue_faults import FAULTS, HEALTHY, HEALTHY_TWO, healthy
from tests.support.bench_options import make_parser

NONE = (HEALTHY, HEALTHY_TWO)


def excess(bench: Bench, cell: Cell) -> float | None:
    """Return held-out loss / that of the healthy run of the same seed - 1; inf if it is not finite."""
    own, sound = bench.known(cell), bench.known((healthy(cell[0]), "unguarded", cell[2]))
    if own is None or sound is None or "error" in own:
        return None
    if math.isnan(own["loss"]):
        return math.inf
    return own["loss"] / sound["loss"] - 1


def shown(values: Sequence[float | None]) -> str:
    """Return the median over the seeds and the worst seed, in percent."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    if len(known) == 1:
        return _percent(known[0])
    return f"{_percent(statistics.median(known))} ({_percent(max(known))})"


def _percent(value: float) -> str:
    if value == math.inf:
        return "NaN"
    if value > 10:
        return "> 1000"
    return f"{100 * value:+.1f}"


def print_table(
    bench: Bench, faults: Sequence[str], arms: Sequence[str], seeds: Sequence[int]
) -> None:
    print(
        f"Held-out loss above the healthy run's, in %: median (worst) of {len(seeds)} seeds, {bench.steps} steps\n"
    )
    columns = ["fault", *arms, "steps lost", "samples left out", "cause named"]
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns))
    for fault in faults:
        row = [fault]
        for arm in arms:
            row.append(shown([excess(bench, (fault, arm, seed)) for seed in seeds]))
        print("| " + " | ".join([*row, *_guarded(bench, fault, seeds)]) + " |")
    print()
    for line in summary(bench, faults, arms, seeds):
        print(line)


def _guarded(bench: Bench, fault: str, seeds: Sequence[int]) -> list[str]:
    """Return what guardrail's rescue cost, and whether it named the right cause."""
    cells = [bench.known((fault, "guardrail", seed)) for seed in seeds]
    known = [cell for cell in cells if cell is not None and "error" not in cell]
    if not known:
        return ["", "", ""]
    lost = round(statistics.median(cell["lost"] for cell in known))
    out = round(statistics.median(cell["left_out"] for cell in known))
    wanted = FAULTS[fault].causes
    told = [cell["causes"] for cell in known]
    if not any(told):
        return [str(lost), str(out), ""]
    names = ", ".join(dict.fromkeys(itertools.chain.from_iterable(told)))
    right = sum(named(causes, wanted) for causes in told)
    return [str(lost), str(out), f"{right}/{len(known)}: {names}"]


def named(causes: Sequence[str], wanted: Sequence[str]) -> bool:
    """Return whether the first diagnosis names a right cause."""
    return bool(causes) and causes[0] in wanted


def summary(
    bench: Bench, faults: Sequence[str], arms: Sequence[str], seeds: Sequence[int]
) -> list[str]:
    lines = []
    for arm in arms:
        staged = [(fault, arm, seed) for fault in faults if fault not in NONE for seed in seeds]
        found = [excess(bench, cell) for cell in staged]
        values = [value for value in found if value is not None]
        sound = [bench.known((fault, arm, seed)) for fault in NONE for seed in seeds]
        acts = sum(cell["acts"] for cell in sound if cell is not None and "error" not in cell)
        if values:
            near = sum(value <= 0.01 for value in values)
            lines.append(
                f"{arm}: within 1 % in {near} of {len(values)}; interventions on healthy runs: {acts}"
            )
    known = [(fault, bench.known((fault, "guardrail", seed))) for fault in faults for seed in seeds]
    judged = [(fault, cell["causes"]) for fault, cell in known if cell and cell.get("causes")]
    if judged:
        right = sum(named(causes, FAULTS[fault].causes) for fault, causes in judged)
        lines.append(f"the right cause first: {right} of {len(judged)} runs in which one was told")
    ratios = time_ratios(bench, seeds)
    if ratios:
        lines.append(
            f"wall time of a healthy run, guardrail over unguarded: median {statistics.median(ratios):.2f}"
        )
    return lines


def time_ratios(bench: Bench, seeds: Sequence[int]) -> list[float]:
    """Return the seconds of a healthy run with guardrail over those without, for each seed."""
    ratios = []
    for seed in seeds:
        guarded = bench.known((HEALTHY, "guardrail", seed))
        bare = bench.known((HEALTHY, "unguarded", seed))
        if guarded and bare and "error" not in guarded and "error" not in bare:
            ratios.append(guarded["seconds"] / bare["seconds"])
    return ratios


def list_cells(faults: Sequence[str], arms: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """Return the cells to run. Those of healthy runs come first; each is compared with them."""
    healthy_arms = list(dict.fromkeys(["unguarded", *arms]))
    staged = [fault for fault in faults if fault not in NONE]
    order = [
        *itertools.product(seeds, NONE, healthy_arms),
        *itertools.product(seeds, staged, arms),
    ]
    return [(fault, arm, seed) for seed, fault, arm in order]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--quick", action="store_true", help="one seed, guardrail and unguarded")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=Path(".rescue"))
    parser.add_argument("--only-table", action="store_true")
    parser.add_argument(
        "--journal", action="store_true", help="also what guardrail said in each run"
    )
    arguments = parser.parse_args()
    seeds, arms = arguments.seeds, arguments.arms
    if arguments.quick:
        seeds, arms = seeds[:1], ["unguarded", "guardrail"]
    faults = list(dict.fromkeys([*NONE, *arguments.faults]))
    bench = Bench(arguments.cache)
    if not arguments.only_table:
        if "ARC" in arms:
            install_arc(arguments.cache)
        bench.run(list_cells(faults, arms, seeds), workers=arguments.workers)
    print_table(bench, faults, arms, seeds)
    if arguments.journal:
        for fault, seed in itertools.product(faults, seeds):
            cell = bench.known((fault, "guardrail", seed)) or {}
            print(
                f"\n{fault}, seed {seed}:",
                *cell.get("journal", []),
                cell.get("error", ""),
                sep="\n  ",
            )


if __name__ == "__main__":
    main()
