"""The list of all detectors, and the detectors of one run.

A new detector needs its own file, and its class in `DETECTORS` (or in `ON_DEMAND`). Its settings,
the sentences of its findings and its section in docs/detection.md follow from the class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardrail.core.records.findings import FindingKind
from guardrail.detectors.base import Detector, DetectorParts, DetectorSettings
from guardrail.detectors.divergence import Divergence
from guardrail.detectors.embedding_share import EmbeddingShare
from guardrail.detectors.growth import EmbedNormGrowth, GradNormGrowth, UpdateNormGrowth
from guardrail.detectors.impossible import Impossible
from guardrail.detectors.joint_cusum import JointCusum
from guardrail.detectors.loss_scale import ScaleCollapse
from guardrail.detectors.no_tokens import NoTokens
from guardrail.detectors.nonfinite import NonFinite
from guardrail.detectors.restart import Restart
from guardrail.detectors.resume_jump import ResumeJump
from guardrail.detectors.signed_loss import SignedLoss
from guardrail.detectors.spikes import (
    EmbedNormSpike,
    GradNormSpike,
    LossSpike,
    NamedSpike,
    UpdateNormSpike,
)
from guardrail.detectors.stuck import StuckGradNorm, StuckLoss

if TYPE_CHECKING:  # as in guardrail.detectors.base
    from guardrail.core.guard_options import GuardOptions

# Asked about every step with their signals, in this order.
DETECTORS: tuple[type[Detector], ...] = (
    NonFinite,
    Impossible,
    SignedLoss,
    LossSpike,
    GradNormSpike,
    JointCusum,
    EmbedNormSpike,
    EmbeddingShare,
    UpdateNormSpike,
    ScaleCollapse,
    Divergence,
    GradNormGrowth,
    EmbedNormGrowth,
    UpdateNormGrowth,
    StuckLoss,
    StuckGradNorm,
)
# Asked by the controller when they apply: a further signal, a batch without labels, the first steps
# after a resume, a step counter that went back. The last three have no state.
ON_DEMAND: tuple[type[Detector], ...] = (NamedSpike, NoTokens, ResumeJump, Restart)

# The signals that one of these detectors judges. Each other signal gets a `NamedSpike`.
OWN_SIGNALS = frozenset(signal for cls in DETECTORS for signal in cls.signals)


# Tables of [guard.detectors] -> the type of their keys.
SETTINGS: dict[str, type[DetectorSettings]] = {
    cls.Settings.table: cls.Settings for cls in (*DETECTORS, *ON_DEMAND) if cls.Settings is not None
}


def build_detectors(options: GuardOptions) -> tuple[dict[str, Detector], DetectorParts]:
    """Return (name -> detector, in the order in which they are asked; all parts of them)."""
    parts = DetectorParts(options)
    return {cls.name: parts.get(cls) for cls in DETECTORS}, parts


def find_detector(kind: FindingKind) -> type[Detector]:
    """Return the class that reports findings of this kind; the base class for any other kind."""
    return _BY_KIND.get(kind, Detector)


def _map_kinds() -> dict[FindingKind, type[Detector]]:
    """Return kind -> the first class that reports it. Those that share a kind agree about it."""
    classes: dict[FindingKind, type[Detector]] = {}
    for cls in (*DETECTORS, *ON_DEMAND):
        classes.setdefault(cls.kind, cls)
    return classes


_BY_KIND = _map_kinds()
