"""Numbers of the passes of a replay -> a cause, without a model."""

import math

import msgspec
import pytest

from guardrail.core.records.findings import Finding, FindingKind, Severity
from guardrail.core.records.signals import GRAD_NORM, LOSS
from guardrail.core.records.verdicts import Cause, Diagnosis
from guardrail.decide.anomaly_signature import AnomalySignature, ReplayPass
from guardrail.decide.hardware_fault import RankNumbers, diagnose_hardware
from guardrail.decide.root_cause import diagnose_passes
from tests.support.findings import make_finding


def finding(
    value: float = 12.0,
    *,
    kind: FindingKind = FindingKind.LOSS_SPIKE,
    severity: Severity = Severity.REJECT,
) -> Finding:
    """A loss of `value` against 2.3; a log jump of 0.08 would be rejected."""
    score = math.log(value / 2.3) / 0.01
    return make_finding(
        31, kind=kind, severity=severity, value=value, baseline=2.3, score=score, threshold=8.0
    )


def loss(value: float, what: str = "the batch") -> ReplayPass:
    return ReplayPass(what=what, signals={LOSS: value, GRAD_NORM: 1.0})


def judged(
    others: list[float], suspects: list[float], *, level: float = 2.4, lasting: bool = False
) -> Diagnosis:
    return diagnose_passes(
        AnomalySignature.from_findings([finding()]),
        again=loss(12.0),
        others=[loss(value) for value in others],
        suspects=[loss(value) for value in suspects],
        level=loss(level) if suspects else None,
        older_step=20,
        lasting=lasting,
        passes=6,
    )


@pytest.mark.parametrize(
    ("others", "suspects", "cause"),
    [
        ([2.3, 2.31, 2.29], [11.0], Cause.DATA),
        ([2.3, 2.31, 12.5], [11.0], Cause.DATA),  # the stretch of bad data goes on
        ([2.3, 2.31, 2.29], [2.5], Cause.DATA_AND_STATE),
        ([9.0, 9.5, 2.31], [], Cause.STATE),
        ([2.3, 2.31], [], Cause.UNKNOWN),
        ([], [2.5], Cause.UNKNOWN),
        ([], [11.0], Cause.DATA),
        ([], [], Cause.UNKNOWN),
    ],
)
def test_cause_of_a_single_step(others: list[float], suspects: list[float], cause: Cause) -> None:
    diagnosis = judged(others, suspects)
    assert diagnosis.cause is cause
    assert "12" in diagnosis.reason and diagnosis.passes == 6


def test_an_older_model_is_held_against_its_own_level() -> None:
    # 3.4 is far above 2.3, and not above what that state has on other batches.
    assert judged([2.3, 2.3], [3.4], level=3.3).cause is Cause.DATA_AND_STATE
    assert judged([2.3, 2.3], [4.5], level=3.3).cause is Cause.DATA


def test_trouble_that_began_earlier_asks_who_put_it_there() -> None:
    assert judged([9.0, 9.5], [2.4, 2.5], lasting=True).cause is Cause.STATE
    poisoned = judged([9.0, 9.5], [11.0, 2.5], lasting=True)
    assert poisoned.cause is Cause.DATA and poisoned.applied
    assert poisoned.evidence is not None and poisoned.evidence.older_state is not None
    assert poisoned.evidence.older_state.spiked


def test_an_update_of_bad_data_counts_even_where_the_state_bears_it() -> None:
    def told(**passes: float) -> Diagnosis:
        return diagnose_passes(
            AnomalySignature.from_findings([finding()]),
            again=loss(12.0),
            others=[loss(2.3), loss(2.31)],
            suspects=[loss(passes["applied"], "the batch of step 29"), loss(11.0)],
            level=loss(2.4),
            lasting=True,
            passes=6,
        )

    assert (told(applied=10.0).cause, told(applied=10.0).applied) == (Cause.DATA, True)
    # What was applied was healthy: the trouble begins with the batch at hand.
    assert (told(applied=2.5).cause, told(applied=2.5).applied) == (Cause.DATA, False)


def test_what_is_nearer_to_the_trouble_than_to_the_baseline_is_in_it() -> None:
    trouble = AnomalySignature.from_findings(
        [finding(2.6)]
    )  # rejected from 2.49 on; the middle is 2.445
    assert trouble.is_shown_by(loss(2.46)) and not trouble.is_shown_by(loss(2.44))
    # Far beyond its threshold the threshold itself counts.
    assert AnomalySignature.from_findings([finding(115.0)]).is_shown_by(loss(2.6))
    # What stays up has no threshold for one step.
    lasting = AnomalySignature.from_findings(
        [finding(2.6, kind=FindingKind.DIVERGENCE, severity=Severity.WEIGHTS_DAMAGED)]
    )
    assert lasting.is_shown_by(loss(2.46)) and not lasting.is_shown_by(loss(2.44))


def test_what_counts_only_together_with_others_is_no_threshold_by_itself() -> None:
    """A row of steps is rejected for 1.6 sigmas of each signal; many a healthy batch has that of
    one of them.
    """
    weak = msgspec.structs.replace(finding(2.3 * math.exp(0.045)), threshold=1.6)
    norm = msgspec.structs.replace(weak, signal=GRAD_NORM, value=2.0, baseline=1.0, score=5.0)
    trouble = AnomalySignature.from_findings([weak, norm])
    ordinary = ReplayPass(what="another", signals={LOSS: 2.3 * math.exp(0.02), GRAD_NORM: 1.3})
    assert not trouble.is_shown_by(ordinary)
    high_norm = ReplayPass(what="another", signals={LOSS: 2.3, GRAD_NORM: 1.6})
    assert trouble.is_shown_by(high_norm) and not trouble.is_shown_by(high_norm, all_signals=True)
    assert trouble.is_shown_by(
        ReplayPass(what="bad", signals={LOSS: 2.3 * math.exp(0.03), GRAD_NORM: 1.6}),
        all_signals=True,
    )


def test_nan_is_shown_by_nan_alone() -> None:
    nan = finding(12.0, kind=FindingKind.NONFINITE)
    trouble = AnomalySignature.from_findings([nan, finding()])
    assert trouble.is_shown_by(loss(math.nan)) and trouble.is_shown_by(
        ReplayPass(what="", signals={LOSS: 2.3}, nonfinite=True)
    )
    assert not trouble.is_shown_by(loss(11.0))


def own(*losses: float, before: float = 1.0, after: float = 1.0) -> list[RankNumbers]:
    return [
        RankNumbers(loss_sum=value, before=before, after=after, host=f"node{rank}")
        for rank, value in enumerate(losses)
    ]


def test_a_rank_that_computes_something_else_is_named() -> None:
    found = diagnose_hardware(
        own(5.0, math.nan), own(5.0, 5.5), 0.0, sums=(math.nan, 2.0), passes=1
    )
    assert found is not None and found.cause is Cause.HARDWARE
    assert (
        (found.rank, found.host) == (1, "node1")
        and "nan" in found.reason
        and "node1" in found.reason
    )


def test_gradients_before_the_reduction_tell_the_rank_and_those_after_it_do_not() -> None:
    first = [RankNumbers(loss_sum=5.0, before=before, after=9.0, host="h") for before in (1.0, 7.0)]
    again = [RankNumbers(loss_sum=5.0, before=1.0, after=2.0, host="h") for _ in range(2)]
    found = diagnose_hardware(first, again, 0.0, sums=(2.0, 2.0), passes=1)
    assert found is not None and found.rank == 1
    # Where only what came after the reduction differs, on one rank, that rank's memory is at fault.
    first[1] = RankNumbers(loss_sum=5.0, before=1.0, after=9.0, host="h")
    first[0] = RankNumbers(loss_sum=5.0, before=1.0, after=2.0, host="h")
    found = diagnose_hardware(first, again, 0.0, sums=(2.0, 2.0), passes=1)
    assert found is not None and found.rank == 1
    assert found.evidence is not None and found.evidence.same_batch is not None
    repeated = found.evidence.same_batch
    assert (repeated.first, repeated.again) == (math.sqrt(9.0), math.sqrt(2.0))


def test_all_ranks_off_names_none_and_a_wrong_sum_names_the_reduction() -> None:
    found = diagnose_hardware(own(5.0, 6.0), own(5.1, 6.1), 0.0, sums=(2.0, 2.1), passes=1)
    assert found is not None and found.rank == -1 and "every rank" in found.reason
    found = diagnose_hardware(own(5.0, 6.0), own(5.0, 6.0), 0.0, sums=(2.0, 2.1), passes=1)
    assert found is not None and found.rank == -1 and "reduction" in found.reason


def test_the_same_numbers_are_no_fault() -> None:
    assert (
        diagnose_hardware(
            own(5.0, math.nan), own(5.0, math.nan), 0.0, sums=(math.nan, math.nan), passes=1
        )
        is None
    )
    # One unit in the last place counts on a CPU and not where kernels add in any order.
    last = math.nextafter(5.0, 6.0)
    assert diagnose_hardware(own(5.0), own(last), 0.0, sums=(2.0, 2.0), passes=1) is not None
    assert diagnose_hardware(own(5.0), own(last), 0.04, sums=(2.0, 2.0), passes=1) is None
    assert diagnose_hardware(own(5.0), own(5.5), 0.04, sums=(2.0, 2.2), passes=1) is not None
