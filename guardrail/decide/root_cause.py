"""The cause of an incident, from the passes of a replay. Pure: reduced numbers -> a diagnosis.

    the batch again     Same state, batch and RNG state. Other numbers: hardware, or kernels that do
                        not repeat themselves (see `hardware_fault`).
    other batches       Same state. If most of them show the anomaly: the state.
    an older state      The batch there. It shows the anomaly too: the data. It is healthy there:
                        data, only from this state.

The anomaly may have begun before the present step (a divergence, a norm that climbed). Then the
updates of the onset are in the weights, and every batch shows the anomaly. "State" then means that
the weights are damaged, and the older state shows what damaged them. If a batch from the onset on
shows the anomaly there, the data was the cause. If each of them is healthy there, the state was the
cause: the learning rate, the optimizer, a weight.
"""

from __future__ import annotations

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
from guardrail.core.records.verdicts import Cause, Diagnosis
from guardrail.decide.anomaly_signature import AnomalySignature, ReplayPass

# Batches ahead that must show the same anomaly; and all but one of those that were run.
LEAST_AHEAD = 3
# Loss increase (nats per token) with shuffled labels that usual batches must have. With less, the
# order of labels measures nothing.
LEAST_GAIN = 0.1


def diagnose_passes(
    anomaly: AnomalySignature,
    *,
    again: ReplayPass,
    others: Sequence[ReplayPass],
    suspects: Sequence[ReplayPass] = (),
    level: ReplayPass | None = None,
    older_step: int = -1,
    lasting: bool = False,
    passes: int,
) -> Diagnosis:
    """Return the cause, once the batch has given the same numbers again.

    Args:
        again: the batch, from the present state.
        others: other batches from that state.
        suspects: from an older state: the batch; or, if `lasting`, those from the onset on. Empty:
            none.
        level: a healthy batch from that older state, of step `older_step`.
        lasting: the anomaly began before the present step, so its updates are in the weights.
    """
    hit = [one for one in others if anomaly.is_shown_by(one)]
    bad = [one for one in suspects if anomaly.is_shown_by(one, level)]
    is_everywhere = 2 * len(hit) > len(others)
    is_applied = any(one.what != again.what for one in bad)
    again_text = f"{anomaly.signal} {anomaly.format_value(again)} again from the same state"
    others_text = _describe_others(anomaly, others, hit=len(hit))
    older_text = _describe_older(anomaly, bad or suspects, level, step=older_step, hit=len(bad))
    evidence = CauseEvidence(
        same_batch=_repeated(anomaly, again),
        other_batches=_evidence_of_others(anomaly, others, spiked=len(hit)),
        older_state=_evidence_of_older(
            anomaly, bad or suspects, level, step=older_step, spiked=bool(bad)
        ),
    )

    def diagnosis(cause: Cause, *sentences: str, applied: bool = False) -> Diagnosis:
        reason = "; ".join([again_text, *sentences])
        return Diagnosis(
            cause=cause, reason=reason, passes=passes, applied=applied, evidence=evidence
        )

    if not others and not suspects:
        return diagnosis(Cause.UNKNOWN, "no other batch and no older state to compare with")
    if is_everywhere and others:
        if lasting and bad:
            return diagnosis(
                Cause.DATA, others_text, older_text, "its update is in the weights", applied=True
            )
        if lasting and suspects:
            return diagnosis(Cause.STATE, others_text, older_text, "no batch is the cause")
        return diagnosis(Cause.STATE, others_text)
    if bad:
        # The state still tolerates it, and each such update makes it a little worse. So the applied
        # ones are rolled back as well.
        sentences = [others_text] if others else []
        sentences.append(older_text)
        if is_applied:
            sentences.append("its update is in the weights")
        return diagnosis(Cause.DATA, *sentences, applied=is_applied)
    if suspects and others:
        return diagnosis(Cause.DATA_AND_STATE, others_text, older_text)
    if suspects:
        return diagnosis(Cause.UNKNOWN, older_text, "no other batch to compare with")
    return diagnosis(Cause.UNKNOWN, others_text, "no older state to compare with")


def add_batches_ahead(
    diagnosis: Diagnosis,
    anomaly: AnomalySignature,
    far: Sequence[tuple[int, ReplayPass]],
    *,
    passes: int,
) -> Diagnosis:
    """Return a diagnosis of bad data with what batches ahead show.

    Args:
        far: (batches ahead, pass from the present state).
    """
    if not far or not anomaly.is_level:
        return structs.replace(diagnosis, passes=passes)
    hit = sum(anomaly.is_shown_by(one, all_signals=True) for _, one in far)
    distances = [distance for distance, _ in far]
    nearest, farthest = min(distances), max(distances)
    text = f"{hit} of {len(far)} batches {nearest} to {farthest} ahead show it too"
    ahead = BatchesAhead(tested=len(far), spiked=hit, nearest=nearest, farthest=farthest)
    evidence = diagnosis.evidence or CauseEvidence()
    return structs.replace(
        diagnosis,
        reason=f"{diagnosis.reason}; {text}",
        passes=passes,
        ahead=hit >= LEAST_AHEAD and hit >= len(far) - 1,
        evidence=structs.replace(evidence, batches_ahead=ahead),
    )


def add_label_order(
    diagnosis: Diagnosis,
    gains: Sequence[float | None],
    usual_gains: Sequence[float | None],
    *,
    passes: int,
) -> Diagnosis:
    """Return a diagnosis of bad data with what the order of its labels is worth to the model.

    A model finds structure in text of any kind: vowels follow consonants, spaces end words. If the
    labels are random (shuffled, of another batch, noise), it finds none, and any other order gives
    the same loss.

    Args:
        gains: loss increase (nats per token) when the labels of each row are shuffled, of the bad
            batches; the least counts.
        usual_gains: the same of healthy batches.
    """
    measured = [gain for gain in gains if gain is not None]
    usual = [gain for gain in usual_gains if gain is not None]
    level = sum(usual) / len(usual) if usual else 0.0
    if not measured or level < LEAST_GAIN:
        return structs.replace(diagnosis, passes=passes)
    gain = min(measured)
    text = f"shuffled labels raise the loss by {gain:.2g} here, by {level:.2g} in normal batches"
    evidence = diagnosis.evidence or CauseEvidence()
    return structs.replace(
        diagnosis,
        reason=f"{diagnosis.reason}; {text}",
        passes=passes,
        structure=gain / level,
        evidence=structs.replace(evidence, label_order=LabelOrder(here=gain, normal=level)),
    )


def _repeated(anomaly: AnomalySignature, again: ReplayPass) -> SameBatch:
    value = anomaly.value_in(again)
    return SameBatch(signal=anomaly.signal, repeated=True, first=value, again=value)


def _evidence_of_others(
    anomaly: AnomalySignature, others: Sequence[ReplayPass], *, spiked: int
) -> OtherBatches | None:
    if not others:
        return None
    return OtherBatches(
        tested=len(others), spiked=spiked, values=_values(anomaly, others), limit=_limit(anomaly)
    )


def _evidence_of_older(
    anomaly: AnomalySignature,
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
        values=_values(anomaly, suspects[:2]),
        other_batch=None if level is None else anomaly.value_in(level),
    )


def _values(anomaly: AnomalySignature, passes: Iterable[ReplayPass]) -> tuple[float, ...]:
    return tuple(anomaly.value_in(one) for one in passes)


def _limit(anomaly: AnomalySignature) -> float | None:
    """Return the limit of the signal in question; None if the anomaly has no limit."""
    if anomaly.nonfinite or anomaly.signal not in anomaly.limits:
        return None
    return anomaly.limits[anomaly.signal][1]


def _describe_others(anomaly: AnomalySignature, others: Sequence[ReplayPass], *, hit: int) -> str:
    """Return "1 of 3 other batches show the anomaly (0.8, 0.9, 67; limit 8.9)"."""
    values = ", ".join(anomaly.format_value(one) for one in others)
    limit = _limit(anomaly)
    if limit is not None:
        values += f"; limit {limit:.4g}"
    return f"{hit} of {len(others)} other batches show the anomaly ({values})"


def _describe_older(
    anomaly: AnomalySignature,
    suspects: Sequence[ReplayPass],
    level: ReplayPass | None,
    *,
    step: int,
    hit: int,
) -> str:
    """Return "the older state of step 160 shows it too (the batch 83; another batch 1.3)"."""
    values = ", ".join(f"{one.what} {anomaly.format_value(one)}" for one in suspects[:2])
    if level is not None and suspects:
        values += f"; another batch {anomaly.format_value(level)}"
    result = "shows it too" if hit else "does not show it"
    return f"the older state of step {step} {result} ({values})"
