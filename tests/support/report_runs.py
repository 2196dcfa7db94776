"""Run directories with the rows and journal lines that the tests of the report need."""

from __future__ import annotations

import re
from typing import Any

from guardrail.core.records.spans import Span
from guardrail.core.records.status import Phase, Status
from guardrail.core.records.verdicts import Action, Mode
from guardrail.rundir.run_directory import RunDirectory
from tests.support.findings import make_finding

DOCUMENT = {
    "path": "/data/0037.txt",
    "record": 12,
    "first_byte": 10,
    "last_byte": 90,
    "excerpt": "Ã‚Â Ã‚Â",
}


def rows(
    run: RunDirectory,
    *steps: int,
    timeline: int = 0,
    verdict: Action = Action.APPLY,
    **values: float,
) -> None:
    with run.metrics_writer() as writer:
        for step in steps:
            row = {
                "step": step,
                "timeline": timeline,
                "loss": 2.0 + step,
                "verdict": list(Action).index(verdict),
            }
            writer.append(row | values)


def start(run: RunDirectory, samples: int = 100, **data: Any) -> None:
    run.append(
        "started",
        "training begins on 2 ranks",
        world=2,
        samples=samples,
        order_seed=7,
        shuffled=True,
        **data,
    )


def spike(run: RunDirectory, *, number: int = 1, step: int = 5, first: int = 40) -> None:
    """Two batches of four rejected at `step`, then a rollback to `step - 3` that leaves out one
    more before them.
    """
    for n in range(2):
        span = Span(
            first=first + 4 * n, last=first + 4 * n + 4, origin="rejected", step=step, reason="loss"
        )
        rows(run, step, verdict=Action.SKIP)
        run.append(
            "verdict",
            f"step {step}: skip: loss 11.50 against 2.31",
            step=step - 1,
            action="skip",
            findings=[
                make_finding(step, value=11.5 + n, score=41.2 + n),
                make_finding(step, signal="grad_norm", score=20.0),
            ],
            incident=number,
        )
        if not n:
            run.append(
                "incident",
                f"incident {number}: open",
                step=step - 1,
                number=number,
                state="open",
                onset=step,
            )
        run.append(
            "skipped",
            step=step - 1,
            span=span,
            incident=number,
            documents=[DOCUMENT],
            documents_total=2,
            samples=4,
        )
    run.append(
        "verdict", f"step {step}: rollback", step=step - 1, action="rollback", incident=number
    )
    run.append(
        "rollback",
        f"rolled back from step {step - 1} to {step - 3}",
        step=step - 1,
        to_step=step - 3,
        from_step=step - 1,
        onset=step,
        window=[first - 4, first + 8],
        tier="memory",
        new_timeline=1,
        incident=number,
        span=Span(first=first - 4, last=first + 8, origin="rollback", step=step, batches=3),
        documents=[DOCUMENT, {"path": "/data/0038.txt"}],
        documents_total=5,
    )


def finished(run: RunDirectory) -> None:
    start(run)
    rows(run, 1, 2, 3, 4)
    run.append("checkpoint", path="step-00000000", state="good", cp_step=0, bytes=900, step=1)
    run.append(
        "checkpoint", path="step-00000002", state="candidate", cp_step=2, bytes=41_000_000, step=2
    )
    spike(run)
    rows(run, 3, 4, 5, 6, timeline=1)
    run.append("checkpoint", path="step-00000002", state="good", cp_step=2, step=4, timeline=1)
    run.append(
        "checkpoint", path="", state="failed", reason="No space left on device", step=5, timeline=1
    )
    run.append("incident", "incident 1: recovered", step=6, timeline=1, number=1, state="recovered")
    answer = {
        "id": "a",
        "command": "lr",
        "value": 0.5,
        "who": "me@host",
        "effect": "applied",
        "reason": "",
    }
    run.append("command", "lr applied", step=6, timeline=1, **answer)
    run.append(
        "ended",
        "finished at step 6: all steps made",
        step=6,
        timeline=1,
        phase="finished",
        reason="all done",
    )
    run.write_status(
        Status(
            run=run.name, phase=Phase.FINISHED, step=6, total_steps=6, exit_code=0, mode=Mode.AUTO
        )
    )


def assert_harmless(told: str) -> None:
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", told)
