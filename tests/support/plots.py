"""A curve drawn straight from its points."""

from collections.abc import Sequence

import numpy as np

from guardrail.tui.numerics.raster import Curve, Plot, columns, draw
from guardrail.tui.numerics.scales import XScale


def plot(
    curve: Curve,
    scale: XScale,
    *,
    height: int,
    log: bool = False,
    ghosts: Sequence[Curve] = (),
    baseline: np.ndarray | None = None,
    threshold: np.ndarray | None = None,
    rules: Sequence[int] = (),
) -> Plot:
    pale = [columns(ghost, scale) for ghost in ghosts]
    return draw(
        columns(curve, scale),
        pale,
        height=height,
        log=log,
        baseline=baseline,
        threshold=threshold,
        rules=rules,
    )
