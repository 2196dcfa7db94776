"""Which samples of a rejected batch are bad, and whether it is enough to skip only them.

Samples that stand out among those of healthy batches (guardrail.decide.sample_outliers) are named
with their documents and with the anomalies of their text (guardrail.report.text_quality). If they
are few, the batch is run once more without the heaviest of them, then without more of them. If it
is healthy then, only they are skipped, and the batch is formed again from the same position.

If updates of bad data are in the weights already, the samples are examined from an older state, in
every batch from the onset on. A rollback then skips only those samples without which each of these
batches is healthy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from guardrail.core.records.record import Record
from guardrail.core.records.spans import MAX_NAMED
from guardrail.core.records.verdicts import Verdict
from guardrail.core.text import clean_text
from guardrail.decide.anomaly_signature import AnomalySignature, ReplayPass
from guardrail.decide.rollback_window import Applied
from guardrail.decide.sample_cursor import Batch, SampleCursor
from guardrail.decide.sample_outliers import Outlier, Sample, find_outliers, select_heaviest
from guardrail.report.text_quality import CorpusStatistics, text_anomalies
from guardrail.torch.diagnose.batch_replay import Replays

ORDINARY = 3  # healthy batches that the samples are compared with
# Largest share of a batch. Beyond it the batch's median is no longer that of good samples, and
# little would be left.
FEW = 0.5
# Share of the heaviest sample's weight from which on a sample is skipped; tried one by one.
PARTS = (0.1, 0.01, 0.0)
EXCERPT = 160  # characters
# Characters of a sample that are searched for anomalies: the rejected step waits for it.
LOOKED_AT = 16_384

# Sample ids -> their texts, as the model got them.
Texts = Callable[[Sequence[int]], list[str]]


class Attribution(Record, frozen=True, kw_only=True):
    """The samples of a batch that stand out.

    Attributes:
        outliers: the largest score first; if `positions` are given, only these.
        positions: ascending, those to skip if they explain the anomaly; empty: the complete batch.
        ordinary: positions of the samples that they were compared with.
    """

    outliers: tuple[Outlier, ...]
    positions: tuple[int, ...] = ()
    ordinary: tuple[int, ...] = ()


def attribute_samples(
    batch: Batch,
    *,
    verdict: Verdict,
    replays: Replays,
    ledger: SampleCursor,
    applied: Sequence[Applied],
) -> Attribution:
    """Find the samples of a rejected batch that stand out.

    A collective. Call it when gradients, RNG states and buffers of the attempt are restored.

    Args:
        verdict: rejects the batch.
        applied: the last applied batches, oldest first.
    """
    step, anomaly = verdict.step, AnomalySignature.from_findings(verdict.findings)
    onset = min(verdict.onset or step, step)
    earlier = [one for one in applied if one.step < onset]
    with replays.visit(keep_gradients=False):
        ordinary: list[Sample] = []
        for one in earlier[-ORDINARY:]:
            healthy = ledger.batch_of_range(one.first, one.last)
            if healthy is not None:
                ordinary += replays.samples(healthy, step=step)
        return _find_bad_samples(
            batch, ordinary, step=step, anomaly=anomaly, replays=replays, ledger=ledger
        )


def find_explaining_positions(
    batches: Sequence[Batch],
    *,
    healthy: Sequence[Batch],
    level: ReplayPass | None,
    step: int,
    anomaly: AnomalySignature,
    replays: Replays,
    ledger: SampleCursor,
) -> tuple[int, ...]:
    """Return the few positions without which none of these batches shows the anomaly, ascending.

    () if there are none such. A collective, inside `Replays.at_older_state`.

    Args:
        batches: from the onset of the anomaly on.
        healthy: from before it.
        level: pass of a healthy batch from that state.
        step: number that an update of that state would get.
    """
    ordinary: list[Sample] = []
    for one in healthy:
        ordinary += replays.samples(one, step=step)
    positions: list[int] = []
    for batch in batches:
        result = replays.run(batch, step=step, what="the batch")
        attribution = _find_bad_samples(
            batch, ordinary, step=step, anomaly=anomaly, replays=replays, ledger=ledger, level=level
        )
        if anomaly.is_shown_by(result, level) and not attribution.positions:
            return ()
        positions += attribution.positions
    return tuple(sorted(positions))


def _find_bad_samples(
    batch: Batch,
    ordinary: Sequence[Sample],
    *,
    step: int,
    anomaly: AnomalySignature,
    replays: Replays,
    ledger: SampleCursor,
    level: ReplayPass | None = None,
) -> Attribution:
    outliers = find_outliers(replays.samples(batch, step=step), ordinary)
    attribution = Attribution(
        outliers=tuple(outliers), ordinary=tuple(sample.position for sample in ordinary)
    )
    tried: list[int] = []
    for part in PARTS:
        some = select_heaviest(outliers, ordinary, part=part)
        bad = sorted(outlier.sample.position for outlier in some)
        if not bad or bad == tried or len(bad) > FEW * len(batch.positions):
            continue
        tried = bad
        rest = ledger.batch_of_positions(
            position for position in batch.positions if position not in bad
        )
        if rest is None:
            continue
        result = replays.run(rest, step=step, what="the rest of the batch")
        if not anomaly.is_shown_by(result, level):
            return msgspec.structs.replace(attribution, outliers=tuple(some), positions=tuple(bad))
    return attribution


def describe_outliers(
    attribution: Attribution,
    *,
    ledger: SampleCursor,
    texts: Texts | None,
    documents: Callable[[Sequence[int]], tuple[list[dict[str, Any]], int]] | None,
) -> list[dict[str, Any]]:
    """Return the outliers for the journal.

    Each has position, id, loss, score and share, and, where they are known, documents, an excerpt
    of the text, and its anomalies ("odd").
    """
    outliers = attribution.outliers[:MAX_NAMED]
    ids = [ledger.order.sample(outlier.sample.position) for outlier in outliers]
    ordinary_ids = [ledger.order.sample(position) for position in attribution.ordinary]
    own_texts: list[str] = []
    ordinary_texts: list[str] = []
    if texts is not None:
        all_texts = texts([*ids, *ordinary_ids])
        own_texts, ordinary_texts = all_texts[: len(ids)], all_texts[len(ids) :]
    usual: CorpusStatistics | None = None
    if ordinary_texts:
        usual = CorpusStatistics(text[:LOOKED_AT] for text in ordinary_texts)
    entries: list[dict[str, Any]] = []
    for index, (outlier, sample) in enumerate(zip(outliers, ids, strict=True)):
        entry: dict[str, Any] = {
            "position": outlier.sample.position,
            "id": sample,
            "loss": outlier.sample.loss,
            "score": outlier.score,
            "share": outlier.share,
        }
        if documents is not None:
            entry["documents"] = documents([sample])[0]
        if own_texts:
            text = own_texts[index]
            others = [*own_texts[:index], *own_texts[index + 1 :], *ordinary_texts]
            entry["excerpt"] = clean_text(text, EXCERPT)
            entry["odd"] = text_anomalies(text[:LOOKED_AT], usual=usual)
            if text in others:
                entry["odd"].append("the very same text as another sample")
        entries.append(entry)
    return entries
