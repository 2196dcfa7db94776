"""The numbers of a cause test: in its evidence, in the sentences that older versions wrote instead,
and in the slots that a journal may hold.
"""

from __future__ import annotations

import math

import msgspec
import pytest

from guardrail.core.cause_evidence import (
    BatchesAhead,
    CauseEvidence,
    LabelOrder,
    OlderState,
    OtherBatches,
    SameBatch,
)
from guardrail.core.events.decisions import Diagnosed
from guardrail.core.records.verdicts import Cause
from guardrail.decide.anomaly_signature import AnomalySignature, ReplayPass
from guardrail.decide.hardware_fault import BETWEEN_RANKS, RankNumbers, diagnose_hardware
from guardrail.decide.root_cause import add_batches_ahead, add_label_order, diagnose_passes
from guardrail.report.cause_evidence import evidence_from_sentence, find_evidence
from tests.support.events import make_line

SPIKE = AnomalySignature(signal="loss", limits={"loss": (2.0, 4.0)}, stuck={})


def diagnosis(data: dict[str, object]) -> Diagnosed:
    line = make_line(seq=1, time=0.0, kind="diagnosis", data=data)
    assert isinstance(line, Diagnosed)
    return line


def passed(loss: float, what: str = "another batch") -> ReplayPass:
    return ReplayPass(what=what, signals={"loss": loss})


def test_the_sentence_of_bad_data() -> None:
    found = diagnose_passes(
        SPIKE,
        again=passed(8.5, "the batch"),
        others=[passed(2.0), passed(2.25), passed(7.5)],
        suspects=[passed(8.25, "the batch")],
        level=passed(2.5),
        older_step=160,
        passes=9,
    )
    found = add_batches_ahead(found, SPIKE, [(131, passed(2.0)), (81, passed(2.0))], passes=9)
    found = add_label_order(found, [0.0026], [2.0, 2.2], passes=9)
    assert found.cause is Cause.DATA
    assert all(number in found.reason for number in ("8.5", "2.25", "8.25", "131", "0.0026"))
    older_version = (
        "loss 8.5 comes again, 1 of 3 other batches show it (2, 2.25, 7.5) over 4, and from the "
        "state of step 160 the batch has 8.25, where another batch has 2.5 too, and so do 0 of 2 "
        "batches 81 to 131 ahead; with its labels in another order the loss is 0.0026 higher, and "
        "2.1 with usual batches"
    )
    assert (
        found.evidence
        == evidence_from_sentence(older_version)
        == CauseEvidence(
            same_batch=SameBatch(signal="loss", repeated=True, first=8.5, again=8.5),
            other_batches=OtherBatches(tested=3, spiked=1, values=(2.0, 2.25, 7.5), limit=4.0),
            older_state=OlderState(step=160, spiked=True, values=(8.25,), other_batch=2.5),
            batches_ahead=BatchesAhead(tested=2, spiked=0, nearest=81, farthest=131),
            label_order=LabelOrder(here=0.0026, normal=2.1),
        )
    )


def test_the_sentences_of_other_causes() -> None:
    again, normal = passed(8.5, "the batch"), [passed(2.0), passed(2.25)]
    state = diagnose_passes(SPIKE, again=again, others=[passed(9.0), passed(8.0)], passes=3)
    older_version = "loss 8.5 comes again, 2 of 2 other batches show it (9, 8) over 4"
    assert state.evidence == evidence_from_sentence(older_version)
    others = state.evidence.other_batches
    assert state.cause is Cause.STATE and others is not None
    assert (others.tested, others.spiked) == (2, 2)
    both = diagnose_passes(
        SPIKE,
        again=again,
        others=normal,
        suspects=[passed(2.0, "the batch")],
        older_step=7,
        passes=3,
    )
    older_version = (
        "loss 8.5 comes again, 0 of 2 other batches show it (2, 2.25) over 4, and from the state of "
        "step 7 the batch has 2 only"
    )
    assert both.evidence == evidence_from_sentence(older_version)
    older = both.evidence.older_state
    assert both.cause is Cause.DATA_AND_STATE
    assert older == OlderState(step=7, spiked=False, values=(2.0,))
    unknown = diagnose_passes(SPIKE, again=again, others=[], passes=3)
    only = evidence_from_sentence(
        "loss 8.5 comes again, and there is neither another batch nor an older state to compare with"
    )
    assert unknown.evidence == only
    assert unknown.cause is Cause.UNKNOWN and only == CauseEvidence(same_batch=only.same_batch)


@pytest.mark.parametrize("world", [1, 2])
def test_the_sentence_of_a_number_that_did_not_come_again(world: int) -> None:
    first = [RankNumbers(loss_sum=4.0, before=math.nan, after=1.0, host="vm")] * world
    again = [*first[1:], RankNumbers(loss_sum=4.0, before=1.5, after=1.0, host="vm")]
    found = diagnose_hardware(first, again, 0.0, sums=(2.0, 2.0), passes=1)
    assert found is not None
    same = evidence_from_sentence(
        "the same batch from the same state, with the same dice, gave another number on "
        f"rank {world - 1} (vm): the gradient nan at first and 1.5 then"
    ).same_batch
    assert found.evidence is not None and repr(found.evidence.same_batch) == repr(same)
    assert same is not None and not same.repeated and same.signal == "gradient"
    assert math.isnan(same.first) and same.again == 1.5 and same.where == f"rank {world - 1} (vm)"
    alike = [RankNumbers(loss_sum=4.0, before=1.0, after=1.0)] * 2
    found = diagnose_hardware(alike, alike, 0.0, sums=(2.0, 2.5), passes=1)
    older_version = (
        "the same batch from the same state, with the same dice, gave another number in the "
        "reduction between the ranks: loss 2 at first and 2.5 then"
    )
    assert found is not None and found.evidence == evidence_from_sentence(older_version)
    same = found.evidence.same_batch
    assert same == SameBatch(
        signal="loss",
        repeated=False,
        first=2.0,
        again=2.5,
        where=BETWEEN_RANKS,
    )


def test_slots_of_a_journal_are_taken_as_they_are() -> None:
    slots = CauseEvidence(
        other_batches=OtherBatches(tested=3, spiked=1),
        label_order=LabelOrder(here=0.1, normal=2.0),
    )
    line = {"evidence": msgspec.to_builtins(slots), "reason": "loss 8 comes again"}
    assert find_evidence(diagnosis(line)) == slots


@pytest.mark.parametrize(
    "line",
    [
        {},
        {"reason": 3},
        {"reason": "other words"},
        {"evidence": {"other_batches": "x"}},
        {"evidence": {"label_order": {"here": [], "normal": 1}}},
        {"reason": "loss 1.2.3 comes again".replace("comes", "went")},
    ],
)
def test_what_cannot_be_read_is_no_evidence(line: dict[str, object]) -> None:
    assert find_evidence(diagnosis(line)) is None


def test_a_sentence_of_any_length_is_read_in_time() -> None:
    reason = "from the state of step 1 " * 50_000 + "loss 1.2.3 comes again"
    assert find_evidence(diagnosis({"reason": reason})) is None
    numbers = evidence_from_sentence(
        "loss 1.2.3 comes again, 9" + "9" * 90 + " of 3 other batches show it ()"
    )
    assert numbers.other_batches is not None and numbers.other_batches.spiked == 0
