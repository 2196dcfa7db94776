"""The sentence of a verdict, for each reason that a response can have."""

from __future__ import annotations

from typing import Any

from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.findings import Finding, FindingKind, Severity
from guardrail.core.records.verdicts import Action, Cause, Diagnosis
from guardrail.decide.rejected_step import RejectedStep
from guardrail.decide.response_reason import Plan, format_reason
from guardrail.decide.rollback import Rollback
from tests.support.feed import BATCH, obs
from tests.support.golden import assert_golden

STEP, FIRST = 101, 100 * BATCH
DATA, STATE = Diagnosis(cause=Cause.DATA), Diagnosis(cause=Cause.STATE)
APPLIED = Diagnosis(cause=Cause.DATA, applied=True)
WINDOW = (FIRST - BATCH, FIRST + BATCH)


def found(
    kind: FindingKind = FindingKind.LOSS_SPIKE, severity: Severity = Severity.REJECT
) -> Finding:
    return Finding(
        signal="loss", step=STEP, kind=kind, severity=severity, value=9.0, baseline=2.3,
        score=41.0, threshold=8.0, onset=STEP,
    )  # fmt: skip


def reason(
    action: Action, *, finding: Finding | None = None, rollbacks: int = 0, **more: Any
) -> str:
    """Return the sentence; `more` are fields of the `RejectedStep` or of the `Plan`."""
    done = Rollback(from_step=STEP - 1, to_step=90, onset=STEP, window=WINDOW)
    case: dict[str, Any] = {
        "obs": obs(STEP, 9.0, 0.5, first=FIRST),
        "findings": (finding or found(),),
        "onset": STEP,
        "streak": 0,
        "rollbacks": [done] * rollbacks,
        "diagnosis": None,
        "history": (),
        "overflows": 0,
        "settings": GuardOptions(),
    }
    plan: dict[str, Any] = {
        "escalation": action.value,
        "window": WINDOW,
        "bad_samples": 0,
        "before": STEP - 1 if action is Action.ROLLBACK else None,
    }
    for name, value in more.items():
        (plan if name in plan else case)[name] = value
    return format_reason(RejectedStep(**case), Plan(action=action, **plan))


def test_every_reason() -> None:
    no_labels = found(FindingKind.NO_TOKENS)
    damaged = found(FindingKind.DIVERGENCE, Severity.WEIGHTS_DAMAGED)
    overflows = found(FindingKind.SCALE_COLLAPSE, Severity.WEIGHTS_DAMAGED)
    most = GuardOptions().max_data_skips
    skip, rollback, halt = Action.SKIP, Action.ROLLBACK, Action.HALT
    sentences = {
        "a rejected step": reason(skip),
        "a rejected step, advised": reason(skip, advise=True),
        "a batch without labels": reason(skip, finding=no_labels),
        "bad data": reason(skip, diagnosis=DATA, streak=4),
        "too much bad data": reason(halt, diagnosis=DATA, streak=most),
        "too much bad data, asked": reason(halt, diagnosis=DATA, streak=most, escalation="pause"),
        "several rejections": reason(rollback, streak=2),
        "several rejections, advised": reason(rollback, streak=2, advise=True),
        "a lasting anomaly": reason(rollback, finding=damaged),
        "a scale collapse": reason(rollback, finding=overflows),
        "the state": reason(rollback, diagnosis=STATE, window=(FIRST, FIRST)),
        "an applied update": reason(rollback, diagnosis=APPLIED),
        "bad samples": reason(rollback, diagnosis=APPLIED, bad_samples=2),
        "a second rollback": reason(rollback, streak=2, rollbacks=1, escalation="widen"),
        "a third rollback": reason(rollback, streak=2, rollbacks=2, escalation="lower_lr"),
        "too many rollbacks": reason(halt, streak=2, rollbacks=GuardOptions().max_rollbacks),
        "no remedy left": reason(halt, streak=2, rollbacks=1),
        "no remedy left, asked": reason(halt, streak=2, rollbacks=1, escalation="pause"),
    }
    assert len(set(sentences.values())) == len(sentences)
    text = "".join(f"{case}:\n    {sentence}\n" for case, sentence in sentences.items())
    assert_golden("verdict_reasons.txt", text)
