"""The known faults, and which tests guard against each.

    python -m tests.support.faults                            the tests of each fault
    python -m tests.support.faults --against COMMIT [FILES]   the marked tests over an older product

A test that fails without the fix of a fault carries `@pytest.mark.fault("R1")`. Without arguments
this module prints the tests of each fault and names the faults that have none. With `--against
COMMIT` it runs the marked tests over `guardrail/` and `trainer/` of that commit. A test fails there
if the commit lacks the fix. It refuses a commit that lacks a module which the tests import.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections import defaultdict

import pytest

from tests.support.places import ROOT

FAULTS = {
    "A1": "deferred gate: a stop saves RNG state and buffers of a step that never counted",
    "A2": "deferred gate: a late rollback restores state before the pending step is dropped",
    "A3": "secrets of [notify] reach the event file, the screen and config.toml",
    "A4": "a second SIGTERM within milliseconds ends a rank unsaved",
    "A5": "nodes with different text train on different data",
    "A6": "text without spaces: quadratic time, and called odd",
    "A7": "z-loss multiplies an infinite logit by a mask of zero",
    "A8": "an optimizer that raises leaves the temporary learning rate in place",
    "A9": "a kill during a halt leaves a damaged checkpoint marked as candidate",
    "A10": "a candidate checkpoint becomes good by being loaded",
    "A11": "automatic rollbacks can skip all data",
    "A12": "an unexplained crash of one rank in a pipeline test",
    "A13": "outcomes that depend on the rounding of one CPU; noise accepted as new data",
    "B1": "events that wait for the disk get a later time",
    "B2": "the mark of the embed-alpha command is never drawn",
    "B3": "a KeyError in a preview ends the screen's sender thread",
    "B4": "the run list reads files on the UI thread",
    "B5": "the number of data ranks is printed as the number of processes",
    "B6": "ROCm and WSL2 are refused before the start",
    "B7": "GPU utilisation is never shown and nothing says why",
    "B8": "a clock difference between hosts makes a living run look dead",
    "B9": "a run given in epochs has no total and no ETA",
    "C1": "pruning checkpoints verifies manifests inside a step",
    "C2": "ctl reads the whole journal again while it waits",
    "C3": "replay compares in quadratic time",
    "C4": "one heartbeat file per rank and second",
    "C5": "a long skip stores one entry per sample",
    "C6": "a step waits for the checkpoint writer to release a snapshot slot",
    "T1": "green HEALTHY over an unresolved incident, good checkpoints pruned",
    "T2": "the dialog of one question shows the choices of another",
    "T3": "a question that opens takes the Enter meant for something else",
    "T4": "a confirmed command has another target or cost than was shown",
    "T5": "an answer names no question",
    "T6": "advise mode says RECOVERING and journals actions that were not done",
    "T7": "resume --preview hides that resume carries out the proposed rollback",
    "T8": "launch ignores --root and GUARDRAIL_ROOT",
    "T10": "keys typed ahead are lost",
    "T11": "dialogs open as an empty box that takes keys",
    "T12": "undo goes back where nothing can be undone",
    "T13": "a run dead for days looks alive",
    "T14": "a standing embedding factor or clip is not on the screen",
    "T15": "an answered question still stands as asking",
    "T16": "a resumed run in set-up shows the state of a dead process",
    "T17": "a moved, cut or unreadable run directory is not mentioned",
    "T18": "TensorBoard texts are doubled after a rollback",
    "T19": "attach --headless mixes present rates with old steps and has no times",
    "T20": "narrow screens cut text without a sign",
    "T21": "small errors of wording and axis on the screen",
    "E1": "settings built in Python are not checked",
    "E2": "a run without any gradient trains silently",
    "E3": "a resume replaces the written learning rate by the saved one",
    "E4": "a slow save of rank 0 kills rank 1 in a broadcast",
    "E5": "a custom loop ends in DataError because all samples are quarantined",
    "E6": "a checkpoint of another run is resumed from",
    "E7": "Megatron rows without lm loss vanish",
    "E8": "a tensor frozen between save and resume is not noticed",
    "E9": "a killed screen leaves the terminal unusable",
    "E10": "a dumb terminal gets a full screen",
    "E11": "one score floor for signals with different scatter",
    "E12": "a gradient norm that jumps with the loss scale is an alarm",
    "E13": "bf16 weights that never change are not mentioned",
    "E14": "a loop that steps the optimizer itself is not noticed",
    "E15": "another sample order at a resume goes on in the middle of an epoch",
    "E16": "log formats that are read wrongly or silently not at all",
    "RL": "logs of reinforcement learning are read and judged as those of pre-training",
    "R1": "an automatic restart on one node hangs",
    "R2": "the supervisor kills the healthy ranks of the next start",
    "R3": "a run whose end could not be saved says finished",
    "R4": "one command file ends the mailbox thread",
    "R5": "SIGTERM twice loses the run's state",
    "R6": "a death is noticed 30 s late while a peer is in set-up",
    "R7": "a rank that cannot write cannot report its failure",
    "R8": "a full disk at the first write: traceback and a status that stays setup",
    "R9": "every supervisor reads the files of all ranks",
    "R10": "webhook and tokens in the config pane and TensorBoard",
    "R11": "deep nesting and control characters in a configuration",
    "R12": "tiny configurations raise false incidents",
    "R13": "OMP_NUM_THREADS of the user is overruled",
    "R14": "verify accepts a link out of the checkpoint; two screens have one name",
}


class _Collector:
    """A pytest plugin that remembers which test carries which fault."""

    def __init__(self) -> None:
        self.tests: dict[str, list[str]] = defaultdict(list)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            for mark in item.iter_markers("fault"):
                for fault in mark.args:
                    self.tests[fault].append(item.nodeid)


def collect_marked_tests() -> dict[str, list[str]]:
    """Fault -> ids of the tests that carry it, over the whole suite (slow tests included)."""
    collector = _Collector()
    arguments = ["--collect-only", "-qq", "-m", "fault", str(ROOT / "tests")]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = pytest.main(arguments, plugins=[collector])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        sys.exit(output.getvalue())
    return dict(collector.tests)


def print_listing(tests: dict[str, list[str]]) -> int:
    """Print the tests of each fault; returns how many faults have none."""
    for fault, sentence in FAULTS.items():
        marked = sorted({test.split("[")[0] for test in tests.get(fault, [])})
        print(f"{fault:4} {sentence}")
        for test in marked:
            print(f"       {test}")
    missing = [fault for fault in FAULTS if fault not in tests]
    print(f"\n{len(FAULTS) - len(missing)} of {len(FAULTS)} faults have a test")
    if missing:
        print(f"without a test: {', '.join(missing)}")
    return len(missing)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--against",
        metavar="COMMIT",
        help="run the marked tests over the product of this commit; further arguments go to pytest",
    )
    options, extra = parser.parse_known_args()
    if options.against:
        from tests.support.run_against import run_against

        return run_against(options.against, extra)
    return 1 if print_listing(collect_marked_tests()) else 0


if __name__ == "__main__":
    sys.exit(main())
