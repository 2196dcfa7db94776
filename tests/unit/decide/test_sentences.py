"""The sentences of the room: effects of remedies, refusals, causes, and unresolved incidents."""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec

from guardrail.core.events.event import Event
from guardrail.core.records.commands import Shown
from guardrail.core.records.findings import Finding, FindingKind, Severity
from guardrail.core.records.signals import LOSS
from guardrail.core.records.spans import Span
from guardrail.core.records.status import Unresolved
from guardrail.core.records.verdicts import Remedy
from guardrail.decide.anomaly_signature import AnomalySignature, ReplayPass
from guardrail.decide.control_commands.accept import NO_INCIDENT
from guardrail.decide.control_commands.answer import NO_QUESTION
from guardrail.decide.control_commands.resume import NOT_PAUSED
from guardrail.decide.hardware_fault import RankNumbers, diagnose_hardware
from guardrail.decide.questions import (
    Open,
    how_to_answer,
    question_changed,
    setting_changed,
    target_changed,
    timeline_changed,
)
from guardrail.decide.remedies.registry import REMEDIES, find_effect
from guardrail.decide.root_cause import add_batches_ahead, add_label_order, diagnose_passes
from guardrail.decide.sample_cursor import SampleCursor
from guardrail.decide.sample_order import SampleOrder
from guardrail.decide.undo import find_undo_plan
from tests.support.events import make_line
from tests.support.golden import assert_golden


def effects() -> Iterator[str]:
    for kind in sorted({cls.effect for cls in REMEDIES if cls.effect}):
        effect = Remedy(kind=kind, value=0.5, from_step=1234, hold_steps=2000, ramp_steps=3)
        cls = find_effect(kind)
        for hold, ramp in ((2000, 3), (2000, 0), (0, 0)):
            one = msgspec.structs.replace(effect, hold_steps=hold, ramp_steps=ramp)
            yield from (cls.sentence(one), cls.report_line(one), cls.short_line(one))


def skipped(seq: int, first: int, last: int, origin: str = "rejected", **data: object) -> Event:
    span = Span(first=first, last=last, origin=origin, step=seq)
    data = {"span": msgspec.to_builtins(span), **data}
    kind = "rollback" if origin == "rollback" else "skipped"
    return make_line(seq=seq, time=0.0, step=seq, timeline=0, kind=kind, message="", data=data)


def refusals() -> Iterator[str]:
    yield from (NO_INCIDENT, NO_QUESTION, NOT_PAUSED, how_to_answer(0), how_to_answer(7))
    over = {7: "answer continue by ann@vm at step 20"}
    for shown_for, now in (
        (0, Open(9, {})),
        (7, Open(0, {})),
        (7, Open(0, over)),
        (7, Open(9, over)),
    ):
        yield question_changed(shown_for, now)
    shown = Shown(to_step=40, tier="memory", steps_lost=3, steps_lost_most=13, timeline=1)
    yield target_changed(shown, to_step=30, tier="disk", steps_lost=3)
    yield target_changed(shown, to_step=40, tier="memory", steps_lost=14)
    yield timeline_changed(shown, timeline=2, step=50)
    yield setting_changed(Shown(instead_of=1.0), 0.5, "x0.5")
    undo = make_line(
        seq=3, time=0.0, step=3, timeline=0, kind="undo", message="", data={"lines": [2]}
    )
    undone = [skipped(2, 80, 88), undo]
    wider = [skipped(4, 200, 208), skipped(8, 184, 224, "rollback", new_timeline=1)]
    for events, seq in ((undone, None), (undone, 2), (undone, 3), (wider, 4)):
        yield str(find_undo_plan(events, seq))
    cursor = SampleCursor(SampleOrder(samples=100, seed=1), batch_size=10)
    span = Span(first=0, last=8, origin="rejected", step=1)
    yield cursor.why_guard_may_not_skip(span, share=0.03, data=100)
    yield cursor.why_user_may_not_skip(0, 100)


def causes() -> Iterator[str]:
    finding = Finding(
        signal=LOSS, step=31, kind=FindingKind.LOSS_SPIKE, severity=Severity.REJECT, value=12.0,
        baseline=2.3, score=160.0, threshold=8.0, onset=31,
    )  # fmt: skip
    anomaly = AnomalySignature.from_findings([finding])

    def at(loss: float, what: str = "the batch") -> ReplayPass:
        return ReplayPass(what=what, signals={LOSS: loss})

    for others, suspects, lasting in (
        ([], [], False),
        ([2.3, 2.4], [], False),
        ([], [at(2.5)], False),
        ([9.0, 9.5, 2.3], [], False),
        ([2.3, 2.4], [at(2.5)], False),
        ([2.3, 2.4], [at(11.0)], False),
        ([2.3, 2.4], [at(10.0, "the batch of step 29"), at(11.0)], True),
        ([9.0, 9.5], [at(11.0)], True),
        ([9.0, 9.5], [at(2.5)], True),
    ):
        diagnosis = diagnose_passes(
            anomaly,
            again=at(12.0),
            others=[at(loss) for loss in others],
            suspects=suspects,
            level=at(2.4) if suspects else None,
            older_step=20,
            lasting=lasting,
            passes=6,
        )
        yield f"{diagnosis.cause.value}: {diagnosis.reason}"
    far = [(distance, at(9.0)) for distance in (2, 5, 9)]
    yield add_batches_ahead(diagnosis, anomaly, far, passes=9).reason
    yield add_label_order(diagnosis, [0.01], [0.5, 0.7], passes=9).reason
    healthy = [RankNumbers(loss_sum=5.0, before=1.0, after=4.0, host=f"n{rank}") for rank in (0, 1)]
    for wrong in ({"loss_sum": math.nan}, {"before": 7.0}, {"after": 9.0}):
        first = [healthy[0], msgspec.structs.replace(healthy[1], **wrong)]
        found = diagnose_hardware(first, healthy, 0.0, sums=(2.0, 2.0), passes=1)
        assert found is not None
        yield found.reason
    other = [msgspec.structs.replace(one, loss_sum=6.0) for one in healthy]
    for first, sums in ((other, (2.0, 2.0)), (healthy, (2.0, 2.1))):
        found = diagnose_hardware(first, healthy, 0.0, sums=sums, passes=1)
        assert found is not None
        yield found.reason


def unresolved() -> Iterator[str]:
    above = Unresolved(incident=1, since=400, loss=10.3, expected=1.8)
    below = Unresolved(incident=1, since=120, loss=2.86, expected=2.912)
    for one in (above, below, Unresolved(incident=1, since=60)):
        for is_open in (True, False):
            for acted, let_pass in ((True, ""), (False, ""), (False, "advise")):
                case = msgspec.structs.replace(one, is_open=is_open, acted=acted, let_pass=let_pass)
                yield f"{case.headline() or '-'} | {case.sentence()}"


def test_the_sentences_of_decisions() -> None:
    lines: list[str] = []
    for section in (effects, refusals, causes, unresolved):
        lines += [f"-- {section.__name__}", *section(), ""]
    assert all("\n" not in line for line in lines)
    assert_golden("decide_sentences.txt", "\n".join(lines))
