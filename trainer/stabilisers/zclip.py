"""ZClip (Kumar et al. 2025): shortens a gradient whose norm is far above the running mean."""

from __future__ import annotations

import math
from typing import Any


class ZClip:
    """Gives the largest norm that an update may have, from the norms before it.

    Called with the gradient norm of an update that will be applied. With z = (norm - mean) / std,
    a norm with z > z_limit is shortened to mean + z_limit^2 std / z. The statistics then learn the
    shortened norm. A norm that is not finite is not learned; in the published code one such norm
    switches the method off.

    Args:
        z_limit: norms with a higher score are shortened (published: 2.5).
        clip: largest norm in any case; 0: none.
    """

    WARMUP = 25  # norms from which the first mean and variance are computed
    KEEP = 0.97  # share of mean and variance that each update keeps

    def __init__(self, *, z_limit: float, clip: float) -> None:
        self.z_limit, self.clip = z_limit, clip
        self.mean = self.variance = 0.0
        self.first: list[float] = []

    def __call__(self, norm: float) -> float:
        fixed = self.clip or math.inf
        if not math.isfinite(norm):
            return fixed
        if len(self.first) < self.WARMUP:
            self.first.append(norm)
            if len(self.first) == self.WARMUP:
                self.mean = sum(self.first) / self.WARMUP
                self.variance = sum((x - self.mean) ** 2 for x in self.first) / self.WARMUP
            return fixed
        deviation = math.sqrt(self.variance)
        score = (norm - self.mean) / (deviation + 1e-6)
        limit = math.inf
        if score > self.z_limit:
            limit = self.mean + self.z_limit**2 * deviation / score
        learned = min(norm, limit)
        self.mean = self.KEEP * self.mean + (1 - self.KEEP) * learned
        self.variance = self.KEEP * self.variance + (1 - self.KEEP) * (learned - self.mean) ** 2
        return min(limit, fixed)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "variance": self.variance, "first": list(self.first)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.variance = float(state["mean"]), float(state["variance"])
        self.first = [float(norm) for norm in state["first"]]
