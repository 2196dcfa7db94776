"""A new level: values that would be rejected are normal now, so the detectors learn them. Pure.

only norms   Norms are high again after a rollback, and the loss is normal. No batch is the cause.
             Clipping limits the length of the updates, so they do no harm.
new data     A cause test has shown that the data is of another kind. The model must learn it.
tolerated    Loss and norm are both raised in consecutive steps, also on every other batch. Skipping
             a batch, or a rollback, would not help.
"""

from __future__ import annotations

from msgspec import structs

from guardrail.core.records.findings import Finding, FindingKind, Observation, Severity
from guardrail.core.records.signals import LOSS
from guardrail.core.records.verdicts import Diagnosis
from guardrail.decide.detector_set import DetectorSet
from guardrail.detectors.build import find_detector

# Loss increase when the labels are in another order, as a share of that of usual batches. Text of
# other kinds had 0.39 to 0.91 (capitals, rot13, backwards). Shuffled labels, shuffled letters and
# noise had less than 0.05 (tests/bench/structure.py).
STRUCTURE = 0.25
QUIET = 0.5  # share of the way to its limit below which a loss is normal


def are_only_norms_high(
    detectors: DetectorSet, obs: Observation, findings: tuple[Finding, ...]
) -> bool:
    """Return whether only norms are rejected, and the loss is normal."""
    if LOSS not in obs.signals or detectors.loss_spike.is_raised(obs, QUIET):
        return False
    rejected = [finding for finding in findings if finding.severity is not Severity.NOTE]
    return all(finding.severity is Severity.REJECT and _is_of_norm(finding) for finding in rejected)


def _is_of_norm(finding: Finding) -> bool:
    return find_detector(finding.kind).is_harmless_with_clipping


def is_new_data(detectors: DetectorSet, obs: Observation, diagnosis: Diagnosis) -> bool:
    """Return whether the data that caused a rejected step is new data and not bad data.

    Two things must hold. The model finds structure in the data that it does not find in shuffled
    labels. And either the batches ahead look the same, or no signal of the step is a spike by
    itself (`is_only_raised`).

    Where the structure was not measured (no `structure` function, or a model that has not learnt
    any order yet), the answer is no: noise that lasts to the end of the data looks the same there,
    and training on it destroys the model. The batches are then skipped like bad data, within the
    limits of the guard, and the run halts at the limit.
    """
    if not diagnosis.cause.of_data:
        return False
    if diagnosis.structure is None or diagnosis.structure < STRUCTURE:
        return False
    return diagnosis.ahead or is_only_raised(detectors, obs)


def is_only_raised(detectors: DetectorSet, obs: Observation) -> bool:
    """Return whether no signal is high enough to be rejected by itself.

    Then loss and norm are both raised, step after step.
    """
    for detector in detectors.detectors.values():
        if detector is detectors.joint_cusum:
            continue
        if any(finding.severity is not Severity.NOTE for finding in detector.observe(obs)):
            return False
    return True


def begin_norms(
    detectors: DetectorSet, obs: Observation, findings: tuple[Finding, ...]
) -> tuple[Finding, ...]:
    """Let the rejected norms begin a new baseline. Return the findings as notes."""
    for finding in findings:
        detector = detectors.detectors.get(finding.signal)
        if finding.severity is Severity.REJECT and detector is not None:
            detector.begin_level(obs)
    return tuple(_note_norm(finding) for finding in findings)


def tolerate(
    detectors: DetectorSet, obs: Observation, findings: tuple[Finding, ...]
) -> tuple[Finding, ...]:
    """Let raised steps be applied, unless they are raised by more. Return the findings as notes.

    The baselines and the level of the loss stay: a loss that goes on to rise is a divergence.
    """
    detectors.joint_cusum.begin_level(obs)
    return tuple(structs.replace(finding, severity=Severity.NOTE) for finding in findings)


def begin_level(
    detectors: DetectorSet, obs: Observation, findings: tuple[Finding, ...]
) -> tuple[Finding, ...]:
    """Let every signal begin a new baseline with this step. Return the findings as notes."""
    for detector in detectors.detectors.values():
        detector.begin_level(obs)
    return tuple(map(_shifted, findings))


def _note_norm(finding: Finding) -> Finding:
    """Return a finding about a norm as a note, and any other finding as it is."""
    return _shifted(finding) if _is_of_norm(finding) else finding


def _shifted(finding: Finding) -> Finding:
    return structs.replace(finding, kind=FindingKind.LEVEL_SHIFT, severity=Severity.NOTE)
