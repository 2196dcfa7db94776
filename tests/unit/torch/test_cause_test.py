"""Which batches a cause test runs again."""

from __future__ import annotations

from typing import Any, cast

import pytest

from guardrail.core.records.signals import LOSS
from guardrail.core.records.spans import Span
from guardrail.decide.anomaly_signature import AnomalySignature, ReplayPass
from guardrail.decide.sample_cursor import Batch, SampleCursor
from guardrail.decide.sample_order import SampleOrder
from guardrail.torch.diagnose.cause_test import PLACES, CauseTest
from tests.support.findings import make_finding

SIZE = 8  # samples of a batch
SPIKE = make_finding(31, value=6.0, baseline=2.0, score=110.0)


class RecordedReplays:
    """Keeps the batches that it is asked to run; each shows the anomaly."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def run(self, batch: Batch, *, step: int, what: str) -> ReplayPass:
        self.batches.append(batch)
        return ReplayPass(what=what, signals={LOSS: 6.0})


@pytest.mark.parametrize("skipped", [0, 5, 20])
def test_a_batch_ahead_has_at_most_the_samples_of_a_batch(skipped: int) -> None:
    """Also where the rejected batch covers quarantined positions. A loader refuses more."""
    cursor = SampleCursor(SampleOrder(samples=4000, shuffled=False), batch_size=SIZE)
    if skipped:
        cursor.skip_span(Span(first=4, last=4 + skipped, origin="rollback", step=1))
    batch = cursor.next_batch()
    assert batch is not None
    assert batch.last - batch.first == SIZE + skipped
    replays = RecordedReplays()
    cause_test = CauseTest(cast(Any, replays), ledger=cursor, ring=cast(Any, None))
    anomaly = AnomalySignature.from_findings([SPIKE])
    found = cause_test._run_ahead(batch, anomaly, reach=100, step=31)
    assert len(found) == len(replays.batches) == len(PLACES)
    assert [len(one.samples) for one in replays.batches] == [SIZE] * len(PLACES)
    # Counted in batches from the end of the rejected one.
    assert [one.first - batch.last for one in replays.batches] == [
        (distance - 1) * SIZE for distance, _ in found
    ]
