"""Which samples of a rejected batch are to blame, and whether leaving only them out is enough.

Samples that stand out among those of healthy batches (guardrail.decide.sample_outliers) are named
with their documents and with what is odd about their text (guardrail.report.text_quality). If they
are few, the batch is run once more without those that weigh most, else without more of them; where
it is healthy then, they alone are left out, and the batch is formed again from the same place in
the order.

Where updates of bad data are in the weights the samples are looked at from an older state, in every
batch from the onset on: a rollback leaves only them out where without them each of these batches is
healthy there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from guardrail.core.records import MAX_NAMED, Record, Verdict
from guardrail.core.text import clean_text
from guardrail.decide.rollback_window import Applied
from guardrail.decide.root_cause import AnomalySignature, ReplayPass
from guardrail.decide.sample_cursor import Batch, SampleCursor
from guardrail.decide.sample_outliers import Outlier, Sample, foremost, outliers
from guardrail.report.text_quality import CorpusStatistics, text_anomalies
from guardrail.torch.diagnose.batch_replay import Replays

ORDINARY = 3  # healthy batches that the samples are held against
# of a batch. Beyond it the batch's median is no longer one of good samples, and little would be
# kept.
FEW = 0.5
# of the weight of the worst sample, that a sample needs to be left out; tried one by one
PARTS = (0.1, 0.01, 0.0)
EXCERPT = 160  # characters
# Characters of a sample that are looked at for what is odd: the rejected step waits for it.
LOOKED_AT = 16_384

# Sample ids -> their texts, as the model met them.
Texts = Callable[[Sequence[int]], list[str]]


class Attribution(Record, frozen=True, kw_only=True):
    """Attributes:
    outliers: of the batch, furthest first; where `positions` are to be left out, these alone.
    positions: that are to be left out, ascending, where they explain the trouble; else empty: all
    of the batch. ordinary: positions of the samples that they were held against.
    """

    outliers: tuple[Outlier, ...]
    positions: tuple[int, ...] = ()
    ordinary: tuple[int, ...] = ()


def attribute(
    batch: Batch,
    *,
    verdict: Verdict,
    replays: Replays,
    ledger: SampleCursor,
    applied: Sequence[Applied],
) -> Attribution:
    """A collective. Call it when gradients, dice and buffers of the attempt are gone.

    Args:
        verdict: that rejects the batch.
        applied: the last applied batches, oldest first.
    """
    step, trouble = verdict.step, AnomalySignature.of(verdict.findings)
    onset = min(verdict.onset or step, step)
    with replays.visit(keep_gradients=False):
        ordinary: list[Sample] = []
        for one in [one for one in applied if one.step < onset][-ORDINARY:]:
            healthy = ledger.batch_of_range(one.first, one.last)
            ordinary += replays.samples(healthy, step=step) if healthy is not None else []
        return _attribute(
            batch, ordinary, step=step, trouble=trouble, replays=replays, ledger=ledger
        )


def explaining(
    batches: Sequence[Batch],
    *,
    healthy: Sequence[Batch],
    level: ReplayPass | None,
    step: int,
    trouble: AnomalySignature,
    replays: Replays,
    ledger: SampleCursor,
) -> tuple[int, ...]:
    """The few samples without which none of these batches is in trouble, ascending; () where there
    are none such.

    A collective, within a visit of an older state.

    Args:
        batches: from the onset of the trouble on.
        healthy: from before it.
        level: one of these from that state.
        step: that an update of that state would get.
    """
    ordinary = [sample for one in healthy for sample in replays.samples(one, step=step)]
    found: list[int] = []
    for batch in batches:
        shown = trouble.shown_by(replays.run(batch, step=step, what="the batch"), level)
        named = _attribute(
            batch, ordinary, step=step, trouble=trouble, replays=replays, ledger=ledger, level=level
        )
        if shown and not named.positions:
            return ()
        found += named.positions
    return tuple(sorted(found))


def _attribute(
    batch: Batch,
    ordinary: Sequence[Sample],
    *,
    step: int,
    trouble: AnomalySignature,
    replays: Replays,
    ledger: SampleCursor,
    level: ReplayPass | None = None,
) -> Attribution:
    found = outliers(replays.samples(batch, step=step), ordinary)
    named = Attribution(
        outliers=tuple(found), ordinary=tuple(sample.position for sample in ordinary)
    )
    tried: list[int] = []
    for part in PARTS:
        some = foremost(found, ordinary, part=part)
        bad = sorted(outlier.sample.position for outlier in some)
        if not bad or bad == tried or len(bad) > FEW * len(batch.positions):
            continue
        tried = bad
        rest = ledger.batch_of_positions(
            position for position in batch.positions if position not in bad
        )
        if rest is None or trouble.shown_by(
            replays.run(rest, step=step, what="the rest of the batch"), level
        ):
            continue
        return msgspec.structs.replace(named, outliers=tuple(some), positions=tuple(bad))
    return named


def told(
    attribution: Attribution,
    *,
    ledger: SampleCursor,
    texts: Texts | None,
    documents: Callable[[Sequence[int]], tuple[list[dict[str, Any]], int]] | None,
) -> list[dict[str, Any]]:
    """The outliers for the journal: position, id, loss, score, share, documents, excerpt, and what
    is odd.
    """
    chosen = attribution.outliers[:MAX_NAMED]
    ids = [ledger.order.sample(outlier.sample.position) for outlier in chosen]
    ordinary = [ledger.order.sample(position) for position in attribution.ordinary]
    written = texts([*ids, *ordinary]) if texts is not None else []
    mine, theirs = written[: len(ids)], written[len(ids) :]
    usual = CorpusStatistics(text[:LOOKED_AT] for text in theirs) if theirs else None
    lines = []
    for at, (outlier, sample) in enumerate(zip(chosen, ids, strict=True)):
        line: dict[str, Any] = {
            "position": outlier.sample.position,
            "id": sample,
            "loss": outlier.sample.loss,
            "score": outlier.score,
            "share": outlier.share,
        }
        if documents is not None:
            line["documents"] = documents([sample])[0]
        if mine:
            others = [*mine[:at], *mine[at + 1 :], *theirs]
            line |= {
                "excerpt": clean_text(mine[at], EXCERPT),
                "odd": text_anomalies(mine[at][:LOOKED_AT], usual=usual),
            }
            line["odd"] += ["the very same text as another sample"] * (mine[at] in others)
        lines.append(line)
    return lines
