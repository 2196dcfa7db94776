"""A curve drawn straight from its points."""

from collections.abc import Sequence

import numpy as np

from guardrail.tui.numerics.raster import Curve, Plot, dot_columns, draw_plot
from guardrail.tui.numerics.scales import XScale


def plot(
    curve: Curve,
    scale: XScale,
    *,
    height: int,
    log: bool = False,
    abandoned: Sequence[Curve] = (),
    baseline: np.ndarray | None = None,
    threshold: np.ndarray | None = None,
    rules: Sequence[int] = (),
) -> Plot:
    pale = [dot_columns(ghost, scale) for ghost in abandoned]
    return draw_plot(
        dot_columns(curve, scale),
        pale,
        height=height,
        log=log,
        baseline=baseline,
        threshold=threshold,
        rules=rules,
    )
