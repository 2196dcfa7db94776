"""A new level: what would be rejected is where the run now is, so that the detectors learn it
instead. Pure.

norms alone     High again behind a rollback while the loss has nothing of it: then no batch is to blame and no harm is
                done, and the clip keeps the updates as long as they were.
everything      The data has become another kind, as a replay has shown: it is there to be learnt.
borne           Loss and norm are both raised, step after step, and so they are with every other batch: to leave one out
                or to go back for so little would be in vain.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import structs

from guardrail.core.records import LOSS, Diagnosis, Finding, FindingKind, Observation, Severity
from guardrail.detectors.base import Detector
from guardrail.detectors.build import TOGETHER
from guardrail.detectors.embedding_share import EmbeddingShare
from guardrail.detectors.joint_cusum import JointCusum
from guardrail.detectors.spike import Spike

# Claims about norms alone: where the loss has nothing of it, clipping is all that the update needs.
NORMS = frozenset({FindingKind.GRAD_SPIKE, FindingKind.EMBED_SPIKE})
# Of what the order of labels is worth in usual batches: text of other kinds had 0.39 to 0.91 of it
# (capitals, rot13, backwards), shuffled labels, shuffled letters and noise less than 0.05
# (tests/bench/structure.py).
STRUCTURE = 0.25
QUIET = 0.5  # share of the way to its limit below which a loss has nothing of it


def norms_alone(
    detectors: Mapping[str, Detector], obs: Observation, findings: Iterable[Finding]
) -> bool:
    """Whether norms alone are high, and the loss has nothing of it."""
    grave = [finding for finding in findings if finding.severity is not Severity.NOTE]
    loss = detectors[LOSS]
    quiet = LOSS in obs.signals and isinstance(loss, Spike) and not loss.raised(obs, QUIET)
    return quiet and all(
        finding.kind in NORMS and finding.severity is Severity.REJECT for finding in grave
    )


def another_kind(detectors: Mapping[str, Detector], obs: Observation, diagnosis: Diagnosis) -> bool:
    """Whether the data that caused a rejected step is another kind of data and not bad data.

    Two things must hold. The model finds structure in the data that it does not find in shuffled
    labels. And either the batches ahead look the same, or no signal of the step is a spike by
    itself (`raised_only`).

    Where the structure was not measured (no `structure` function, or a model that has not learnt
    any order yet), the answer is no: noise that lasts to the end of the data looks the same there,
    and training on it destroys the model. The batches are then skipped like bad data, within the
    limits of the guard, and the run halts at the limit.
    """
    if (
        not diagnosis.cause.of_data
        or diagnosis.structure is None
        or diagnosis.structure < STRUCTURE
    ):
        return False
    return diagnosis.ahead or raised_only(detectors, obs)


def raised_only(detectors: Mapping[str, Detector], obs: Observation) -> bool:
    """Whether no signal by itself is high enough to be rejected: loss and norm are both raised,
    step after step.
    """
    alone = (detector for name, detector in detectors.items() if name != TOGETHER)
    return all(
        finding.severity is Severity.NOTE for detector in alone for finding in detector.observe(obs)
    )


def begin_norms(
    detectors: Mapping[str, Detector], obs: Observation, findings: tuple[Finding, ...]
) -> tuple[Finding, ...]:
    """The norms that were to be rejected begin a new baseline. Returns the findings as they are
    noted.
    """
    for finding in findings:
        detector = detectors.get(finding.signal)
        if finding.severity is Severity.REJECT and isinstance(detector, Spike | EmbeddingShare):
            detector.adopt(obs)
    return tuple(_shifted(finding) if finding.kind in NORMS else finding for finding in findings)


def bear(
    detectors: Mapping[str, Detector], obs: Observation, findings: tuple[Finding, ...]
) -> tuple[Finding, ...]:
    """A raised step is applied, and the next ones as well unless they are raised by more. Returns
    it as it is noted.

    Baselines and what is known of the loss stay: should it go on to rise, that is a divergence.
    """
    together = detectors[TOGETHER]
    assert isinstance(together, JointCusum)
    together.adopt(obs)
    return tuple(structs.replace(finding, severity=Severity.NOTE) for finding in findings)


def begin(
    detectors: Mapping[str, Detector], obs: Observation, findings: tuple[Finding, ...]
) -> tuple[Finding, ...]:
    """Every signal begins a new baseline with this step. Returns the findings as they are noted."""
    for detector in detectors.values():
        if isinstance(detector, Spike | EmbeddingShare | JointCusum):
            detector.adopt(obs)
        else:
            detector.reset()
    return tuple(map(_shifted, findings))


def _shifted(finding: Finding) -> Finding:
    return structs.replace(finding, kind=FindingKind.LEVEL_SHIFT, severity=Severity.NOTE)
