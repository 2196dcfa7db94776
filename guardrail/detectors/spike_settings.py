"""[guard.detectors.spike]: the limits of spikes, and the history that baselines cover."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from guardrail.core.errors import ConfigError
from guardrail.core.section import PositiveFloat
from guardrail.detectors.base import DetectorSettings


class SpikeSettings(DetectorSettings, frozen=True, kw_only=True):
    """[guard.detectors.spike]: limits of spikes in loss and norms, and the history of all baselines."""

    table: ClassVar[str] = "spike"

    # A step is rejected above this threshold. The unit is robust standard deviations of the logarithm
    # from the baseline (median and MAD, Hampel 1974).
    loss_threshold: PositiveFloat = 8.0
    # The same for the gradient norm, in robust standard deviations. An update norm above it is noted.
    grad_threshold: PositiveFloat = 10.0
    # The same for the gradient norm of the embedding, and for its share of the gradient in log odds.
    embed_threshold: PositiveFloat = 10.0
    # Accepted steps before a detector trusts its scale. Until then only larger jumps are rejected.
    # Non-finite values are rejected from the first step.
    min_history: Annotated[int, Meta(ge=8)] = 32
    # Accepted steps that the baseline of a detector covers.
    history: Annotated[int, Meta(ge=16)] = 128

    def check(self, key: str) -> None:
        if self.min_history > self.history:
            raise ConfigError(
                f"at most {key}.history ({self.history})",
                key=f"{key}.min_history",
                value=self.min_history,
                hint="the first min_history steps fill the history",
            )
