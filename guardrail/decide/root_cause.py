"""What the passes of a replay say about the cause of an incident. Pure: reduced numbers in, a
diagnosis out.

    the batch again     Same state, batch and dice. Other numbers: hardware, or kernels that do not repeat themselves.
    other batches       Same state. Most of them in the same trouble: the state.
    an older state      The batch there. In trouble as well: the data; healthy there: data, only from now.

Where the trouble began before the step at hand (a divergence, a norm that climbed), the updates of
the onset are in the weights already, so that every batch is in trouble now, whatever began it.
"State" then says that the damage lies in the weights. What put it there is asked of the older
state: if one of the batches from the onset on is in trouble there too, it was the data; if each of
them is healthy there, it was the state: the learning rate, the optimizer, a weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from msgspec import structs

from guardrail.core.cause_evidence import (
    BatchesAhead,
    CauseEvidence,
    LabelOrder,
    OlderState,
    OtherBatches,
    SameBatch,
)
from guardrail.core.records import (
    Cause,
    Diagnosis,
    Finding,
    Observation,
    Record,
    Severity,
)
from guardrail.detectors.base import ReplaySign
from guardrail.detectors.build import find_detector
from guardrail.detectors.impossible import Impossible
from guardrail.detectors.nonfinite import NonFinite

# Kernels that add in any order repeat themselves to some 1e-3 at worst (sums in bfloat16), and the
# smallest jump that is ever rejected is one of 8 % (detectors.standard). Half of that lies far from
# both.
NONDETERMINISTIC = 0.04
# Robust sigmas below which no signal is ever rejected for itself.
ALONE = 4.0
# Batches ahead that must be in the same trouble, all but one of those that were looked at.
LEAST_AHEAD = 3
# Nats a token that the order of labels must be worth in usual batches to be a measure of anything.
LEAST_GAIN = 0.1


class ReplayPass(Record, frozen=True, kw_only=True):
    """One forward and backward pass over a global batch, after the reduction; equal on all ranks.

    Attributes:
        what: the batch, for a sentence: "the batch of step 30".
        signals: as in an Observation.
        nonfinite: of some rank, whatever the sums say.
    """

    what: str
    signals: dict[str, float]
    nonfinite: bool = False

    def broken(self) -> bool:
        """Whether a loss or gradient is no usable number."""
        flags = (0,) if self.nonfinite else ()
        obs = Observation(step=0, first=0, last=1, signals=self.signals, nonfinite_loss=flags)
        return bool(NonFinite().observe(obs) or Impossible().observe(obs))


class RankNumbers(Record, frozen=True, kw_only=True):
    """What one rank computed by itself in a pass.

    Attributes:
        loss_sum: of its token losses.
        before: its gradients before the ranks reduced them: the sum of its parameters' norms; 0 on
        a single rank.
        after: squared norm of its gradients, or shards of them, after the reduction.
    """

    loss_sum: float
    before: float
    after: float
    host: str = ""


class AnomalySignature(Record, frozen=True, kw_only=True):
    """What a pass must show to be in the trouble for which a step was rejected.

    Attributes:
        signal: of the most severe finding.
        nonfinite: the trouble is a NaN, an Inf or a number that no model gives.
        limits: signal -> (baseline, limit); a value above it is in trouble. The limit is the
            detector's own threshold, or the logarithmic middle between baseline and the rejected
            value where that is lower: a pass that is nearer to the trouble than to the baseline is
            in it, even where the step had just passed its threshold. A threshold that only counts
            together with others (see detectors.together) is none by itself.
        stuck: signal -> the number that does not change.
    """

    signal: str
    nonfinite: bool = False
    limits: dict[str, tuple[float, float]]
    stuck: dict[str, float]

    @property
    def of_level(self) -> bool:
        """Whether numbers are too high, and nothing worse: what is no number is no other kind of
        data.
        """
        return not self.nonfinite and not self.stuck

    @classmethod
    def of(cls, findings: Sequence[Finding]) -> AnomalySignature:
        """From the findings of a verdict, the most severe first."""
        grave = [finding for finding in findings if finding.severity is not Severity.NOTE]
        return cls(
            signal=grave[0].signal if grave else "",
            nonfinite=any(_sign(finding) is ReplaySign.UNUSABLE_VALUE for finding in grave),
            limits={
                f.signal: (f.baseline, _limit(f))
                for f in reversed(grave)
                if 0.0 < f.baseline < f.value < math.inf
            },
            stuck={f.signal: f.value for f in grave if _sign(f) is ReplaySign.SAME_VALUE},
        )

    def shown_by(
        self, one: ReplayPass, level: ReplayPass | None = None, *, wholly: bool = False
    ) -> bool:
        """Whether a pass is in this trouble.

        Args:
            level: a healthy batch from the same state, where that is another one: an older model
            has higher losses.
            wholly: every signal must show it, not just one.
        """
        if one.broken():
            return True
        if any(one.signals.get(signal) == value for signal, value in self.stuck.items()):
            return True
        if self.nonfinite:
            return False  # finite now; what else was above its limit came with the NaN
        high = []
        for signal, (baseline, limit) in self.limits.items():
            usual = level.signals.get(signal, 0.0) / baseline if level is not None else 1.0
            high.append(
                one.signals.get(signal, 0.0)
                > limit * max(1.0, usual if math.isfinite(usual) else 1.0)
            )
        return bool(high) and (all(high) if wholly else any(high))

    def value(self, one: ReplayPass) -> str:
        """Of the signal in question, for a sentence."""
        return f"{one.signals.get(self.signal, math.nan):.4g}"


def _sign(finding: Finding) -> ReplaySign:
    return find_detector(finding.kind).replay_sign


def _limit(finding: Finding) -> float:
    jump = math.log(finding.value / finding.baseline)
    middle = finding.baseline * math.exp(jump / 2)
    if finding.severity is Severity.WEIGHTS_DAMAGED or not finding.score > 0:
        return middle
    # score = jump / scale and threshold = limit / scale, both in log units.
    threshold = max(finding.threshold, ALONE)
    return min(middle, finding.baseline * math.exp(min(jump, jump * threshold / finding.score)))


def same(one: float, other: float, tolerance: float = 0.0) -> bool:
    """Equal, both NaN, or apart by no more than a relative tolerance."""
    if one == other or (math.isnan(one) and math.isnan(other)):
        return True
    return (
        tolerance > 0
        and math.isfinite(one)
        and math.isfinite(other)
        and math.isclose(one, other, rel_tol=tolerance)
    )


def apart(
    first: Sequence[RankNumbers], again: Sequence[RankNumbers], tolerance: float
) -> tuple[list[int], str] | None:
    """(Ranks whose own numbers did not come again, what did not), None where all did.

    What a rank computes before the reduction is its own; after it, a wrong gradient of one stands
    on all. So ranks are named by what was before, and by what is after only where that was the same
    everywhere.
    """
    pairs = list(zip(first, again, strict=True))
    own = [r for r, (a, b) in enumerate(pairs) if not same(a.loss_sum, b.loss_sum, tolerance)]
    if own:
        return own, "the loss"
    own = [r for r, (a, b) in enumerate(pairs) if not same(a.before, b.before, tolerance)]
    if own:
        return own, "the gradient"
    own = [r for r, (a, b) in enumerate(pairs) if not same(a.after, b.after, 2 * tolerance)]
    return (own, "the gradient after the reduction") if own else None


def hardware(
    first: Sequence[RankNumbers],
    again: Sequence[RankNumbers],
    tolerance: float,
    *,
    sums: tuple[float, float],
    passes: int,
) -> Diagnosis | None:
    """The diagnosis where a pass did not give the same numbers twice, None where it did.

    Args:
        sums: the reduced loss of both: where each rank's own numbers came again and this did not,
            the ranks' reduction went wrong.
    """
    repeats = "the same batch from the same state, with the same dice, gave another number"
    found = apart(first, again, tolerance)
    if found is None and same(*sums, tolerance):
        return None
    if found is None:
        place = "in the reduction between the ranks"
        reason = f"{repeats} {place}: loss {sums[0]:.6g} at first and {sums[1]:.6g} then"
        evidence = _not_repeated("loss", *sums, where=place)
        return Diagnosis(cause=Cause.HARDWARE, reason=reason, passes=passes, evidence=evidence)
    ranks, what = found
    numbers = {"the loss": "loss_sum", "the gradient": "before"}.get(what, "after")
    worst = max(
        ranks,
        key=lambda rank: _distance(getattr(first[rank], numbers), getattr(again[rank], numbers)),
    )
    one, other = getattr(first[worst], numbers), getattr(again[worst], numbers)
    if numbers == "after":
        one, other = _root(one), _root(other)
    everyone = len(ranks) == len(first) > 1
    named = "every rank" if everyone else "rank " + ", ".join(map(str, ranks))
    host = first[worst].host
    where = f"{named} ({host})" if host and not everyone else named
    return Diagnosis(
        cause=Cause.HARDWARE,
        reason=f"{repeats} on {where}: {what} {one:.6g} at first and {other:.6g} then",
        rank=-1 if everyone else worst,
        host="" if everyone else host,
        passes=passes,
        evidence=_not_repeated(what.removeprefix("the "), one, other, where=where),
    )


def _not_repeated(signal: str, first: float, again: float, *, where: str) -> CauseEvidence:
    """Return the evidence of a pass that did not give the same numbers twice."""
    same_batch = SameBatch(signal=signal, repeated=False, first=first, again=again, where=where)
    return CauseEvidence(same_batch=same_batch)


def judge(
    trouble: AnomalySignature,
    *,
    again: ReplayPass,
    others: Sequence[ReplayPass],
    suspects: Sequence[ReplayPass] = (),
    level: ReplayPass | None = None,
    older_step: int = -1,
    lasting: bool = False,
    passes: int,
) -> Diagnosis:
    """The cause, once the batch has given the same numbers again.

    Args:
        again: the batch at hand from the state at hand.
        others: other batches from that state.
        suspects: from an older state: the batch at hand; or, where `lasting`, those from the onset
        on. Empty: none.
        level: a healthy batch from that older state, of step `older_step`.
        lasting: the trouble began before the step at hand, so its updates are in the weights.
    """
    hit = [one for one in others if trouble.shown_by(one)]
    bad = [one for one in suspects if trouble.shown_by(one, level)]
    again_says = f"{trouble.signal} {trouble.value(again)} comes again"
    others_say = f"{len(hit)} of {len(others)} other batches show it ({_values(trouble, others)}){_against(trouble)}"
    older_says = f"from the state of step {older_step} {_named(trouble, bad or suspects)}"
    if level is not None and suspects:
        older_says += f", where another batch has {trouble.value(level)}"
    everywhere = 2 * len(hit) > len(others)
    earlier = [one for one in bad if one.what != again.what]

    evidence = CauseEvidence(
        same_batch=_repeated(trouble, again),
        other_batches=_evidence_of_others(trouble, others, spiked=len(hit)),
        older_state=_evidence_of_older(
            trouble, bad or suspects, level, step=older_step, spiked=bool(bad)
        ),
    )

    def diagnosis(cause: Cause, *sentences: str, applied: bool = False) -> Diagnosis:
        reason = ", ".join([again_says, *sentences])
        return Diagnosis(
            cause=cause, reason=reason, passes=passes, applied=applied, evidence=evidence
        )

    if not others and not suspects:
        return diagnosis(
            Cause.UNKNOWN, "and there is neither another batch nor an older state to compare with"
        )
    if everywhere and others:
        if lasting and bad:
            return diagnosis(
                Cause.DATA,
                others_say,
                f"and {older_says} too: its update is in the weights",
                applied=True,
            )
        if lasting and suspects:
            return diagnosis(Cause.STATE, others_say, f"and {older_says} only: no batch did it")
        return diagnosis(Cause.STATE, others_say)
    if bad:
        # The state bears it still, and each such update makes it a little worse: it goes as well.
        also = ": its update is in the weights" if earlier else ""
        said = f"and {older_says} too{also}"
        return diagnosis(Cause.DATA, *([others_say] if others else []), said, applied=bool(earlier))
    if suspects and others:
        return diagnosis(Cause.DATA_AND_STATE, others_say, f"and {older_says} only")
    if suspects:
        return diagnosis(
            Cause.UNKNOWN, f"{older_says} only", "and there is no other batch to compare with"
        )
    return diagnosis(Cause.UNKNOWN, others_say, "and there is no older state to compare with")


def ahead_of(
    diagnosis: Diagnosis,
    trouble: AnomalySignature,
    far: Sequence[tuple[int, ReplayPass]],
    *,
    passes: int,
) -> Diagnosis:
    """The diagnosis in the light of what lies ahead of data that is to blame.

    Args:
        far: (batches ahead, pass from the state at hand).
    """
    hit = sum(trouble.shown_by(one, wholly=True) for _, one in far)
    if not far or not trouble.of_level:
        return structs.replace(diagnosis, passes=passes)
    ahead = hit >= LEAST_AHEAD and hit >= len(far) - 1
    distances = [distance for distance, _ in far]
    said = f"and so do {hit} of {len(far)} batches {min(distances)} to {max(distances)} ahead"
    batches_ahead = BatchesAhead(
        tested=len(far), spiked=hit, nearest=min(distances), farthest=max(distances)
    )
    return structs.replace(
        diagnosis,
        reason=f"{diagnosis.reason}, {said}",
        passes=passes,
        ahead=ahead,
        evidence=structs.replace(
            diagnosis.evidence or CauseEvidence(), batches_ahead=batches_ahead
        ),
    )


def structure_of(
    diagnosis: Diagnosis,
    gains: Sequence[float | None],
    usual: Sequence[float | None],
    *,
    passes: int,
) -> Diagnosis:
    """The diagnosis in the light of what the order of its labels is worth to the model.

    In text of any kind the model finds something: vowels follow consonants, spaces end words. Where
    labels are as good as drawn by lot (shuffled, of another batch, noise) it finds nothing, and any
    other order does as well.

    Args:
        gains: nats a token that it costs when each row's labels stand in another random order, of
            the batches in trouble; the least counts.
        usual: the same of healthy batches.
    """
    found, known = ([one for one in some if one is not None] for some in (gains, usual))
    level = sum(known) / len(known) if known else 0.0
    if not found or level < LEAST_GAIN:
        return structs.replace(diagnosis, passes=passes)
    gain = min(found)
    said = f"with its labels in another order the loss is {gain:.2g} higher, and {level:.2g} with usual batches"
    label_order = LabelOrder(here=gain, normal=level)
    return structs.replace(
        diagnosis,
        reason=f"{diagnosis.reason}; {said}",
        passes=passes,
        structure=gain / level,
        evidence=structs.replace(diagnosis.evidence or CauseEvidence(), label_order=label_order),
    )


def _repeated(trouble: AnomalySignature, again: ReplayPass) -> SameBatch:
    value = again.signals.get(trouble.signal, math.nan)
    return SameBatch(signal=trouble.signal, repeated=True, first=value, again=value)


def _evidence_of_others(
    trouble: AnomalySignature, others: Sequence[ReplayPass], *, spiked: int
) -> OtherBatches | None:
    if not others:
        return None
    limit = None
    if trouble.signal in trouble.limits and not trouble.nonfinite:
        limit = trouble.limits[trouble.signal][1]
    return OtherBatches(
        tested=len(others), spiked=spiked, values=_numbers(trouble, others), limit=limit
    )


def _evidence_of_older(
    trouble: AnomalySignature,
    suspects: Sequence[ReplayPass],
    level: ReplayPass | None,
    *,
    step: int,
    spiked: bool,
) -> OlderState | None:
    if not suspects:
        return None
    return OlderState(
        step=step,
        spiked=spiked,
        values=_numbers(trouble, suspects[:2]),
        other_batch=None if level is None else _numbers(trouble, [level])[0],
    )


def _numbers(trouble: AnomalySignature, passes: Iterable[ReplayPass]) -> tuple[float, ...]:
    return tuple(one.signals.get(trouble.signal, math.nan) for one in passes)


def _values(trouble: AnomalySignature, passes: Iterable[ReplayPass]) -> str:
    return ", ".join(trouble.value(one) for one in passes)


def _against(trouble: AnomalySignature) -> str:
    bounds = trouble.limits.get(trouble.signal)
    return "" if bounds is None or trouble.nonfinite else f" over {bounds[1]:.4g}"


def _named(trouble: AnomalySignature, passes: Sequence[ReplayPass]) -> str:
    return " and ".join(f"{one.what} has {trouble.value(one)}" for one in passes[:2])


def _distance(one: float, other: float) -> float:
    if not (math.isfinite(one) and math.isfinite(other)):
        return math.inf
    return abs(one - other) / max(abs(one), abs(other), 1e-300)


def _root(square: float) -> float:
    return math.sqrt(square) if square >= 0 else math.nan
