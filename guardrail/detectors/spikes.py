"""The spike detectors of a run: of the loss, of each norm, and of each further signal."""

from __future__ import annotations

from typing import ClassVar, Self

from guardrail.core.records.findings import FindingKind, Severity
from guardrail.core.records.signals import EMBED_GRAD_NORM, GRAD_NORM, LOSS, UPDATE_NORM
from guardrail.detectors.base import DetectorParts
from guardrail.detectors.loss_scale import ScaleCollapse
from guardrail.detectors.signed_loss import SignedLoss
from guardrail.detectors.spike import Spike
from guardrail.detectors.spike_settings import SpikeSettings

# Smallest log jump that is ever a spike, as sigmas of this size: 8 x 0.01 = 8 % of the loss, 10 x
# 0.2 = 7.4-fold for a norm of gradients. A gradient that is a few times too long is clipped and
# does no harm.
LOSS_FLOOR, NORM_FLOOR = 0.01, 0.2
# The norm of an update, and any other signal, is judged by its own scatter. Under Adam an update
# norm scatters by a few per cent. An update whose norm has doubled is in the weights already. A
# note needs at least 22 % (0.6 x 10 x 0.033).
QUIET_FLOOR = 0.033
# Jumps over the median of the first steps that are rejected before there is a scale.
LOSS_COLD, NORM_COLD = 3.0, 100.0
# The name of the detector of a further signal is this and the signal. A signal may have the name of
# another detector.
NAMED = "named "


def spike_keys(*names: str) -> tuple[str, ...]:
    """Return keys of [guard.detectors.spike], those of the history after them."""
    return tuple(f"detectors.spike.{name}" for name in (*names, "history", "min_history"))


class LossSpike(Spike):
    """Judges the loss."""

    name = signal = LOSS
    kind = FindingKind.LOSS_SPIKE
    signals = (LOSS,)
    keys = spike_keys("loss_threshold")
    needs_positive_loss = True
    floor, cold_factor = LOSS_FLOOR, LOSS_COLD

    @classmethod
    def create(cls, parts: DetectorParts) -> LossSpike:
        settings = parts.settings(SpikeSettings)
        signed = parts.get(SignedLoss)
        return cls(settings, threshold=settings.loss_threshold, signed=signed)


class NormSpike(Spike):
    """Base of the detectors of gradient norms. They may be multiplied by the loss scale of fp16.

    Attributes:
        threshold_key: the key of [guard.detectors.spike] with its limit.
    """

    threshold_key: ClassVar[str]
    is_harmless_with_clipping = True
    floor, cold_factor = NORM_FLOOR, NORM_COLD

    @classmethod
    def create(cls, parts: DetectorParts) -> Self:
        settings = parts.settings(SpikeSettings)
        scale = parts.get(ScaleCollapse)
        threshold = getattr(settings, cls.threshold_key)
        return cls(settings, threshold=threshold, loss_scale=scale)


class GradNormSpike(NormSpike):
    """Judges the norm of all gradients."""

    name = signal = GRAD_NORM
    kind = FindingKind.GRAD_SPIKE
    signals = (GRAD_NORM,)
    threshold_key = "grad_threshold"
    keys = spike_keys(threshold_key)


class EmbedNormSpike(NormSpike):
    """Judges the norm of the embedding gradients."""

    name = signal = EMBED_GRAD_NORM
    kind = FindingKind.EMBED_SPIKE
    signals = (EMBED_GRAD_NORM,)
    threshold_key = "embed_threshold"
    keys = spike_keys(threshold_key)


class UpdateNormSpike(Spike):
    """Notes the norm of the update, which is known after the update."""

    name = signal = UPDATE_NORM
    kind = FindingKind.UPDATE_SPIKE
    signals = (UPDATE_NORM,)
    severities = (Severity.NOTE,)
    keys = ("log_update_norm", *spike_keys("grad_threshold"))
    is_note_only = True
    floor, cold_factor = QUIET_FLOOR, NORM_COLD

    @classmethod
    def create(cls, parts: DetectorParts) -> UpdateNormSpike:
        settings = parts.settings(SpikeSettings)
        return cls(settings, threshold=settings.grad_threshold)


class NamedSpike(Spike):
    """Notes a further signal: one of `guard.extra_signals`, or the gradient norm of a block.

    A signal whose name ends with "loss" counts as a loss. One whose name begins with "grad_norm/"
    is the gradient norm of a block. Any other one is judged by its own scatter.

    Args:
        signal: its name in `Observation.signals`.
    """

    name = "named ..."
    kind = FindingKind.SPIKE
    watches = "your own signals, norms of blocks"
    severities = (Severity.NOTE,)
    keys = (
        "extra_signals",
        "log_block_norms",
        *spike_keys("loss_threshold", "grad_threshold"),
    )
    dates_onset = False  # what a spike of such a signal means is not known
    is_note_only = True
    title = "Your own signals"
    help = """\
Each name in `guard.extra_signals` gets a spike detector that only notes. So does each block norm
of `guard.log_block_norms`, where `grad_norm/layers.3` shows where a spike began.

| name | limit | smallest scale |
|---|---|---|
| ends with `loss` | `loss_threshold` | 0.01, as for the loss |
| begins with `grad_norm/` | `grad_threshold` | 0.2, as for a norm |
| any other | `grad_threshold` | 0.033 |

**Test:** `tests/parallel/test_further_signals.py`."""

    def __init__(self, signal: str, settings: SpikeSettings) -> None:
        is_loss = signal.lower().endswith("loss")
        is_gradient = signal.startswith(f"{GRAD_NORM}/")
        self.signal = signal
        self.signals = (signal,)
        threshold = settings.grad_threshold
        self.floor, self.cold_factor = QUIET_FLOOR, NORM_COLD
        if is_gradient:
            self.kind = FindingKind.GRAD_SPIKE
            self.floor = NORM_FLOOR
        if is_loss:
            threshold = settings.loss_threshold
            self.floor, self.cold_factor = LOSS_FLOOR, LOSS_COLD
        super().__init__(settings, threshold=threshold)

    def first_suspect_step(self) -> None:
        """Return None: a further signal only takes note."""
        return None
