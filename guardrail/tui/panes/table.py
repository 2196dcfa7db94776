"""All panes. The screen, its keys, its help and docs/keys.md are made from this table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from guardrail.tui.panes import config, data, incidents, log, output, ranks, snapshots
from guardrail.tui.panes.pane import Pane

CURVES = "curves"  # the charts, which the digit 1 focuses
_IN_ORDER: tuple[Pane[Any], ...] = (
    incidents.PANE,
    ranks.PANE,
    snapshots.PANE,
    data.PANE,
    log.PANE,
    config.PANE,
    output.PANE,
)  # at most eight: the digits 2 to 9 focus them
PANES = tuple(replace(pane, number=str(digit)) for digit, pane in enumerate(_IN_ORDER, 2))
BY_NAME = {pane.name: pane for pane in PANES}
NAMES = (CURVES, *BY_NAME)
