"""The rescue benchmark in small: its cells run, compare and are kept, and its table says what they
found.
"""

from pathlib import Path

import pytest

from tests.bench.rescue import NONE, excess, named, print_table, summary
from tests.bench.rescue_cells import ARMS, Bench, Cell, configuration
from tests.bench.rescue_faults import DATA, FAULTS, HEALTHY, STATE, healthy
from tests.support.running import write_corpus
from tests.support.texts import numbers_in

FAULT = "weights x1000"
CELLS: list[Cell] = [(HEALTHY, "unguarded", 0), (FAULT, "unguarded", 0), (FAULT, "guardrail", 0)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("rescue")
    sections = {
        "data": {
            "sources": [str(write_corpus(folder / "corpus"))],
            "sequence_length": 32,
            "eval_fraction": 0.1,
        },
        "model": {"layers": 1, "width": 16},
        "guard": {"warmup": 12},
    }
    bench = Bench(folder / "cache", steps=60, sections=sections)
    bench.run(CELLS, workers=2)
    return bench


def test_the_guard_rescues_what_nobody_else_does(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [bench.known(cell).get("error") for cell in CELLS] == [None] * 3  # type: ignore[union-attr]
    lost, kept = (excess(bench, cell) for cell in CELLS[1:])
    assert lost is not None and lost > 0.5
    assert kept is not None and abs(kept) < 0.01
    assert named(bench.known(CELLS[2])["causes"], FAULTS[FAULT].causes)  # type: ignore[index]
    print_table(bench, [HEALTHY, FAULT], ["unguarded", "guardrail"], [0])
    told = capsys.readouterr().out
    row = next(line for line in told.splitlines() if line.startswith(f"| {FAULT}"))
    assert row.endswith("| 1/1: state |") and "| +0.0 |" in row
    counts = dict(line.split(": ", 1) for line in told.splitlines() if "%" in line and ": " in line)
    # percent, runs within it, all runs, interventions
    assert numbers_in(counts["unguarded"]) == [1, 0, 1, 0]
    assert numbers_in(counts["guardrail"])[:3] == [1, 1, 1]


def test_a_finished_cell_is_not_run_again(bench: Bench) -> None:
    times = [bench.file(cell).stat().st_mtime_ns for cell in CELLS]
    Bench(bench.cache, steps=60).run(CELLS, workers=2)
    assert [bench.file(cell).stat().st_mtime_ns for cell in CELLS] == times


def test_a_cell_that_failed_is_told_and_counts_nowhere(tmp_path: Path) -> None:
    bench = Bench(tmp_path, steps=60)
    cell = (FAULT, "ARC", 0)
    said = bench.keep(
        cell, {"error": "Traceback ...\nModuleNotFoundError: No module named 'arc'\n"}
    )
    assert said == "weights x1000, ARC, 0: ModuleNotFoundError: No module named 'arc'"
    assert excess(bench, cell) is None
    assert summary(bench, [FAULT], ["ARC"], [0]) == []


def test_the_first_cause_counts() -> None:
    assert (
        named([DATA, STATE], (DATA,))
        and not named([STATE, DATA], (DATA,))
        and not named([], (DATA,))
    )


def test_every_fault_gives_a_configuration() -> None:
    for name, staged in FAULTS.items():
        assert staged.what
        assert bool(staged.faults(240) or staged.sections) == (name not in NONE)
        assert FAULTS[healthy(name)].world == staged.world


@pytest.mark.parametrize("arm", ARMS)
def test_no_arm_is_halted_by_the_limit_on_skipped_data(tmp_path: Path, arm: str) -> None:
    config = configuration(
        FAULTS[FAULT], arm, 0, folder=tmp_path, cache=tmp_path, steps=60, sections={}
    )
    assert config.guard.max_skipped_share == 1.0
