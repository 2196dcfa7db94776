"""The controller on real instabilities that tests/support/record_traces.py staged: the truth is known by
construction.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.findings import Observation
from guardrail.core.records.verdicts import Mode, Verdict
from guardrail.decide.controller import Controller
from tests.support.feed import BATCH
from tests.support.places import TESTS
from tests.support.record_traces import write_text
from tests.support.running import of_kind, spans, tiny, trained

FOLDER = TESTS / "cases" / "traces"
TRUTH: dict[str, dict[str, Any]] = json.loads((FOLDER / "truth.json").read_text(encoding="utf-8"))
ESCALATION = ("healthy", "note", "skip", "rollback", "halt")


def verdicts(name: str) -> list[Verdict]:
    """What `advise` says of each step."""
    controller = Controller(GuardOptions(mode=Mode.ADVISE))
    found = []
    with (FOLDER / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        for row, cells in enumerate(csv.DictReader(file)):
            step = int(cells.pop("step"))
            signals = {signal: float(value) for signal, value in cells.items()}
            seen = Observation(
                step=step, first=row * BATCH, last=(row + 1) * BATCH, signals=signals
            )
            found.append(controller.observe(seen))
    return found


def height(verdict: Verdict) -> int:
    if verdict.would is not None:
        return ESCALATION.index(verdict.would.value)
    return ESCALATION.index("note" if verdict.findings else "healthy")


def test_each_recording_has_its_truth() -> None:
    assert sorted(TRUTH) == sorted(file.stem for file in FOLDER.glob("*.csv"))


@pytest.mark.parametrize("name", TRUTH)
def test_the_verdicts_on_a_staged_run_are_right(name: str) -> None:
    truth, found = TRUTH[name], verdicts(name)
    onset, last = truth["onset"], truth["onset"] + truth["within"]
    assert not [v.reason for v in found if v.step < onset and v.findings], "nothing was wrong yet"
    reached = max(height(v) for v in found if onset <= v.step <= last)
    assert reached >= ESCALATION.index(truth["expect"]), [v.reason for v in found if v.findings][:5]
    assert max(map(height, found)) <= ESCALATION.index(truth["most"])
    acted = next((v for v in found if v.would is not None), None)
    if acted is not None and truth["expect"] in ("skip", "rollback"):
        assert acted.onset is not None and onset <= acted.onset <= min(last, onset + 2)


def test_the_embedding_is_named_where_it_is_the_source() -> None:
    for name in ("repeated_ngrams", "embedding_rows", "one_token"):
        first = next(v for v in verdicts(name) if v.findings)
        assert any(f.signal.startswith("embed") for f in first.findings), name
    first = next(v for v in verdicts("loss_fault") if v.findings)
    assert not any(f.signal.startswith("embed") for f in first.findings)


@pytest.mark.parametrize("documents", [20, 10_000], ids=["for a while", "for good"])
def test_another_kind_of_text_is_learnt_and_not_skipped(tmp_path: Path, documents: int) -> None:
    """In `auto`, where what is skipped is never learnt and looks as strange in every batch that
    follows.
    """
    write_text(tmp_path / "corpus")
    for document in sorted((tmp_path / "corpus").iterdir())[100 : 100 + documents]:
        document.write_text(document.read_text(encoding="utf-8").upper(), encoding="utf-8")
    config = tiny(
        tmp_path,
        data={"sequence_length": 64, "order": "stream"},
        model={"dropout": 0.0, "width": 48},
        optim={"lr": 3e-3, "warmup_steps": 30},
        train={"steps": 130, "batch_size": 16, "micro_batch_size": 16},
        guard={"mode": "auto"},
    )
    run = trained(config)
    (cause,) = of_kind(run, "diagnosis")
    assert (
        cause.data["shift"]
        and cause.data["ahead"] is (documents > 100)
        and cause.data["structure"] > 0.4
    )
    assert not spans(run)
