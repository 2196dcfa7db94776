"""The spike detectors of a run: of the loss, of each norm, and of each further signal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from guardrail.core.records import (
    EMBED_GRAD_NORM,
    GRAD_NORM,
    LOSS,
    UPDATE_NORM,
    FindingKind,
    Severity,
)
from guardrail.detectors.base import DetectorParts
from guardrail.detectors.loss_scale import ScaleCollapse
from guardrail.detectors.signed_loss import SignedLoss
from guardrail.detectors.spike import Spike

if TYPE_CHECKING:  # as in guardrail.detectors.base
    from guardrail.core.guard_options import GuardOptions

# Smallest log jump that is ever a spike, as sigmas of this size: 8 x 0.01 = 8 % of the loss, 10 x
# 0.2 = 7.4-fold for a norm of gradients. A gradient that is a few times too long is clipped and
# does no harm.
LOSS_FLOOR, NORM_FLOOR = 0.01, 0.2
# The norm of an update, and any other signal, is judged by its own scatter. Under Adam an update
# norm scatters by a few per cent, and one that has doubled is in the weights already. A note needs
# at least 22 % (0.6 x 10 x 0.033).
QUIET_FLOOR = 0.033
# Jumps over the median of the first steps that are rejected before there is a scale.
LOSS_COLD, NORM_COLD = 3.0, 100.0
# The name of the detector of a further signal is this and the signal. A signal may have the name of
# another detector.
NAMED = "named "


class LossSpike(Spike):
    """Judges the loss."""

    name = signal = LOSS
    kind = FindingKind.LOSS_SPIKE
    signals = (LOSS,)
    keys = ("loss_score", "window", "warmup")
    needs_positive_loss = True
    floor, cold_factor = LOSS_FLOOR, LOSS_COLD

    @classmethod
    def create(cls, parts: DetectorParts) -> LossSpike:
        options = parts.options
        signed = parts.get(SignedLoss)
        return cls(threshold=options.loss_score, signed=signed, **_history(options))


class GradNormSpike(Spike):
    """Judges the norm of all gradients."""

    name = signal = GRAD_NORM
    kind = FindingKind.GRAD_SPIKE
    signals = (GRAD_NORM,)
    keys = ("grad_score", "window", "warmup")
    is_harmless_with_clipping = True
    floor, cold_factor = NORM_FLOOR, NORM_COLD

    @classmethod
    def create(cls, parts: DetectorParts) -> GradNormSpike:
        options = parts.options
        scale = parts.get(ScaleCollapse)
        return cls(threshold=options.grad_score, loss_scale=scale, **_history(options))


class EmbedNormSpike(Spike):
    """Judges the norm of the embedding gradients."""

    name = signal = EMBED_GRAD_NORM
    kind = FindingKind.EMBED_SPIKE
    signals = (EMBED_GRAD_NORM,)
    keys = ("embed_score", "window", "warmup")
    is_harmless_with_clipping = True
    floor, cold_factor = NORM_FLOOR, NORM_COLD

    @classmethod
    def create(cls, parts: DetectorParts) -> EmbedNormSpike:
        options = parts.options
        scale = parts.get(ScaleCollapse)
        return cls(threshold=options.embed_score, loss_scale=scale, **_history(options))


class UpdateNormSpike(Spike):
    """Notes the norm of the update, which is known after the update."""

    name = signal = UPDATE_NORM
    kind = FindingKind.UPDATE_SPIKE
    signals = (UPDATE_NORM,)
    severities = (Severity.NOTE,)
    keys = ("grad_score", "log_update_norm")
    is_note_only = True
    floor, cold_factor = QUIET_FLOOR, NORM_COLD

    @classmethod
    def create(cls, parts: DetectorParts) -> UpdateNormSpike:
        options = parts.options
        return cls(threshold=options.grad_score, **_history(options))


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
    keys = ("extra_signals", "log_block_norms")
    dates_onset = False  # what a spike of such a signal means is not known
    is_note_only = True
    title = "Your own signals"
    help = """\
Each name in `guard.extra_signals` gets a spike detector that only notes. So does each block norm
of `guard.log_block_norms`, where `grad_norm/layers.3` shows where a spike began.

| name | limit | smallest scale |
|---|---|---|
| ends with `loss` | `guard.loss_score` | 0.01, as for the loss |
| begins with `grad_norm/` | `guard.grad_score` | 0.2, as for a norm |
| any other | `guard.grad_score` | 0.033 |

**Test:** `tests/parallel/test_further_signals.py`."""

    def __init__(self, signal: str, options: GuardOptions) -> None:
        is_loss = signal.lower().endswith("loss")
        is_gradient = signal.startswith(f"{GRAD_NORM}/")
        self.signal = signal
        self.signals = (signal,)
        threshold = options.grad_score
        self.floor, self.cold_factor = QUIET_FLOOR, NORM_COLD
        if is_gradient:
            self.kind = FindingKind.GRAD_SPIKE
            self.floor = NORM_FLOOR
        if is_loss:
            threshold = options.loss_score
            self.floor, self.cold_factor = LOSS_FLOOR, LOSS_COLD
        super().__init__(threshold=threshold, **_history(options))

    def first_suspect_step(self) -> None:
        """Return None: a further signal only takes note."""
        return None


def _history(options: GuardOptions) -> dict[str, Any]:
    return {"history": options.window, "min_history": options.warmup}
