"""Sentences that said what was not so: what was only advised, numbers that look equal, one thing in
the plural.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from guardrail.core.records.findings import Finding, FindingKind, Severity
from guardrail.core.records.verdicts import Mode
from guardrail.decide.advised_incidents import advised_words
from guardrail.launch.log_printer import LogLines
from guardrail.operate.preview import Preview
from guardrail.operate.preview import preview_command as of
from guardrail.operate.run_state import RunState
from guardrail.report.svg_curves import fit_vertical_axis
from guardrail.rundir.run_directory import RunDirectory
from guardrail.tui.numerics.scales import fit_y_scale
from tests.parallel.test_preview import wish
from tests.unit.torch.test_guard import Loop
from tests.unit.tui.test_run_story import finding


@pytest.mark.fault("T6")
def test_advise_journals_what_would_be_done(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "advised", "")
    Loop(bad=range(80, 100), factor=1e3, run=run, mode=Mode.ADVISE).train()
    verdicts = [event for event in run.events() if event.kind == "verdict"]
    assert len(verdicts) >= 3
    for event in verdicts:
        assert event.data["action"] == "apply"
        assert event.data["would"] in ("skip", "rollback", "halt")
        does, _, reason = event.message.partition(": ")
        assert does.startswith(f"{advised_words(event.data['would'])} ")
        assert reason.rpartition(": ")[2].split()[0] == "would", "nothing is said to be done"
    lines = [line for line in LogLines(run).read_new_lines() if "verdict" in line]
    assert 1 <= len(lines) < len(verdicts), (
        "one line for each incident and action, not one for each step"
    )


@pytest.mark.fault("T21")
def test_a_score_just_over_its_limit_is_not_said_to_equal_it() -> None:
    def said(score: float) -> str:
        found = Finding(
            **finding(score=score, threshold=10.0)
            | {"kind": FindingKind.LOSS_SPIKE, "severity": Severity.REJECT}
        )
        return found.sentence()

    assert said(10.004).endswith("score 10.004 (limit 10)") and said(41.23).endswith(
        "score 41.2 (limit 10)"
    )
    assert said(9.0).endswith("score 9 (limit 10)") and said(math.inf).endswith(
        "score inf (limit 10)"
    )


@pytest.mark.fault("T21")
def test_a_rate_that_looks_the_same_is_said_once() -> None:
    def said(lr: float) -> str:
        return Preview(command="rollback", lr=lr, lr_before=0.002).sentence()

    assert re.findall(r"[\d.]+", said(0.0020001)) == ["0.002"]
    assert re.findall(r"[\d.]+", said(0.001)) == ["0.001", "0.002"]


@pytest.mark.parametrize(
    ("batches", "said"),
    [pytest.param(1, "1 batch is", marks=pytest.mark.fault("T21")), (2, "2 batches are")],
)
def test_one_batch_is_no_batches(batches: int, said: str) -> None:
    sentence = of(RunState(), wish("skip", batches)).sentence()
    assert re.findall(r"\d+ \w+ \w+", sentence) == [said]


@pytest.mark.fault("T21")
def test_no_axis_of_a_loss_reaches_below_zero() -> None:
    losses = np.array([8.0, 4.0, 1.0, 0.1, 0.02])
    assert fit_vertical_axis(losses, losses).value_at(1.0) >= 0.0
    assert fit_vertical_axis(-losses, -losses).value_at(1.0) < -8.0, (
        "a signal that is negative has one"
    )
    flat = np.full(40, 0.0)
    assert fit_y_scale([(flat, flat)], log=False).bottom >= 0.0
