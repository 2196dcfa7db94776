"""The closed loop of alpha: an incident that the embedding leads shrinks its gradients, and a
schedule gives them back.

Nothing is told: what comes back to the embedding is staged a hundred thousand times too large, the
detectors find it, and the controller answers. Then a rollback and a restart strike while the factor
is on its way back.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guardrail.core.records.commands import Command
from guardrail.decide.run_history import RunHistory
from guardrail.rundir.run_directory import RunDirectory
from tests.support.running import (
    BATCH,
    BLIND,
    assert_same,
    new_run,
    of_kind,
    remedies_of,
    table,
    tiny,
    told,
    train,
    trained,
)
from trainer.config.config import Config

# steps: the embedding leads, a rollback is called for, the run is stopped
LED, SPIKED, STOPPED = 26, 31, 38
FACTOR, HOLD, BACK = 0.25, 4, 11


def config_of(
    folder: Path, *, world: int = 1, strategy: str = "ddp", tied: bool = True, **guard: Any
) -> Config:
    # one batch is left out in between
    led, spiked = (LED - 1) * BATCH, (SPIKED - 1) * BATCH + BATCH
    return tiny(
        folder,
        world=world,
        strategy=strategy,
        model={"tied": tied},
        faults=[
            {"kind": "spike_embedding", "first": led, "last": led + BATCH, "value": 1e5},
            {"kind": "spike_loss", "first": spiked, "last": spiked + 3 * BATCH, "value": 50.0},
        ],
        guard={**BLIND, "embed_factor": FACTOR, "embed_hold": HOLD, "embed_back": BACK, **guard},
        checkpoint={"every": 10, "keep": 4},
        train={"steps": 46},
    )


def alphas(config: Config, run: RunDirectory, steps: range) -> list[float]:
    past = RunHistory.from_events(run.events())
    return [past.effects(step, config.guard).embed_alpha for step in steps]


@pytest.mark.parametrize(
    ("world", "strategy", "tied"),
    [
        (2, "ddp", False),
        pytest.param(2, "fsdp", False, marks=pytest.mark.ci_slow),
        pytest.param(2, "ddp", True, marks=pytest.mark.slow),
        pytest.param(2, "fsdp", True, marks=pytest.mark.slow),
    ],
)
def test_down_when_the_embedding_leads_and_back_exactly(
    tmp_path: Path, world: int, strategy: str, tied: bool
) -> None:
    config = config_of(tmp_path, world=world, strategy=strategy, tied=tied)
    run = new_run(config)
    run.send(Command(id="stop", kind="stop", at_step=STOPPED))
    assert train(run, world) == "stopped"
    assert train(run, world) == "finished"
    first = of_kind(run, "skipped")[0]
    assert first.data["span"]["step"] == LED
    (alpha,) = remedies_of(run)
    assert (alpha.kind, alpha.value, alpha.from_step, alpha.hold_steps, alpha.ramp_steps) == (
        "embed_alpha", FACTOR, LED, HOLD, BACK,
    )  # fmt: skip
    (back,) = of_kind(run, "rollback")
    assert LED <= back.data["to_step"] + 1 <= back.data["from_step"] < STOPPED < LED + HOLD + BACK
    rise = [FACTOR + (1 - FACTOR) * (at + 1) / (BACK + 1) for at in range(BACK)]
    assert alphas(config, run, range(LED - 2, 46)) == pytest.approx(
        [1.0, 1.0, *[FACTOR] * HOLD, *rise, *[1.0] * 5]
    )
    assert_same(run, trained(told(config, run)))


def test_the_factor_is_what_makes_the_difference(tmp_path: Path) -> None:
    """The same incident with and without it: alike up to the update that it shrinks, and not
    after.
    """
    with_it, without = (
        trained(config_of(tmp_path, **change)) for change in ({}, {"embed_factor": 1.0})
    )
    assert remedies_of(with_it) and not remedies_of(without)
    ours, others = table(with_it), table(without)
    assert np.array_equal(ours[:LED, :4], others[:LED, :4]), (
        "its first loss is that of the state before it"
    )
    assert (ours[LED:, 3] != others[LED:, 3]).all()
