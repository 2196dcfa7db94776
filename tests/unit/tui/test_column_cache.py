"""Of a curve that grows only the last dot columns are computed, and they are those that all of its
points make.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from guardrail.core.records.signals import METRIC_COLUMNS
from guardrail.tui.chart import axis
from guardrail.tui.chart.column_cache import ColumnCache
from guardrail.tui.model.view import View
from guardrail.tui.numerics import pyramid
from guardrail.tui.numerics.decimated_series import DecimatedSeries
from guardrail.tui.numerics.pyramid import Level
from tests.support.fake_run import FakeRun, snapshot_of

CELLS = 90


@pytest.mark.parametrize(
    "looks", [{}, {"axis": "tokens"}, {"smooth": 2}, {"span": 200.0}, {"span": 300.0, "end": 900.0}]
)
def test_what_grows_is_what_is_there(looks: dict[str, object]) -> None:
    """With rollbacks, sums of old rows and steps that were tried again; against an eye that has
    seen nothing.
    """
    fake, track, eyes = (
        FakeRun().begin(),
        DecimatedSeries((), ("tokens",), exact=64),
        {"loss": ColumnCache(), "grad_norm": ColumnCache()},
    )
    rng, added = np.random.default_rng(3), 0
    for turn in range(120):
        fake.advance(fake.step + int(rng.integers(1, 30)))
        if turn % 25 == 24:
            fake.spike()
        if turn % 40 == 39:
            fake.spike(under_way=True)  # a row with the step of the one that will replace it
        if turn % 3:
            track.add(METRIC_COLUMNS, fake.rows[added:], first=added)
            added = len(fake.rows)
        series = track.series()
        view = replace(View(replace(snapshot_of(fake), series=series), fake.time), **looks)  # type: ignore[arg-type]
        scale = axis.make_x_scale(view, CELLS)
        for signal, eye in eyes.items():
            assert (
                eye.look(view, signal, scale, 12).key()
                == ColumnCache().look(view, signal, scale, 12).key()
            ), (turn, signal)


def test_a_frame_looks_at_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a matter of time: the values that are read for a frame in which three rows came are
    counted.
    """
    fake = FakeRun(total=400_000).begin()
    fake.advance(200_000, checkpoints=0, ring=0)
    track, eye, looked = DecimatedSeries(), ColumnCache(), [0]
    track.add(METRIC_COLUMNS, fake.rows)
    take = pyramid._take

    def counted(level: Level, begin: np.ndarray, end: np.ndarray, *results: np.ndarray) -> None:
        looked[0] += int(np.maximum(0, end - begin).sum())
        take(level, begin, end, *results)

    monkeypatch.setattr(pyramid, "_take", counted)
    snapshot = snapshot_of(fake)
    counts = []
    for _ in range(6):
        looked[0], added = 0, len(fake.rows)
        view = View(replace(snapshot, series=track.series()), fake.time)
        eye.look(view, "loss", axis.make_x_scale(view, CELLS), 12)
        counts.append(looked[0])
        fake.advance(fake.step + 3, checkpoints=0, ring=0)
        track.add(METRIC_COLUMNS, fake.rows[added:])
    assert max(counts[1:]) < 200 and counts[0] > 10 * max(counts[1:])
    again = eye.look(view, "loss", axis.make_x_scale(view, CELLS), 12)
    looked[0] = 0
    assert (
        eye.look(view, "loss", axis.make_x_scale(view, CELLS), 12).key() == again.key()
        and looked[0] == 0
    )
