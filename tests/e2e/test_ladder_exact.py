"""Every rung is exact: run A goes up the ladder by itself and is stopped in the middle; run B has
no guard and is told from its beginning what was left out and which remedies hold. Every step and
the final weights are the same."""

from pathlib import Path
from typing import Any

import pytest

from guardrail.backtest.rejudge import Rejudge
from guardrail.core.records.commands import Command
from tests.support.running import (
    BATCH,
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

ESCALATION = [
    {"do": "skip"},
    {"do": "widen"},
    {"do": "lower_lr", "factor": 0.5, "hold": 5, "back": 6},
    {"do": "older", "steps": 8},
    {"do": "tighten_clip", "factor": 0.1, "hold": 8, "back": 0},
    {"do": "reset_moments", "factor": 0.2, "hold": 2, "back": 4},
]
ALPHA = {"kind": "embed_alpha", "value": 0.3, "from_step": 24, "hold": 6, "back": 10}


def stretch(first: int, batches: int) -> dict[str, Any]:
    return {"kind": "spike_loss", "first": first, "last": first + batches * BATCH, "value": 50.0}


@pytest.mark.parametrize(
    ("world", "strategy"),
    [(1, "ddp"), *(pytest.param(2, kind, marks=pytest.mark.ci_slow) for kind in ("ddp", "fsdp"))],
)
def test_every_rung_is_exact_through_a_crash(tmp_path: Path, world: int, strategy: str) -> None:
    config = tiny(
        tmp_path,
        world=world,
        strategy=strategy,
        # Three bad batches call for a rollback; what the widened window has not reached calls for
        # the next rungs.
        faults=[stretch(240, 3 + 2 + 4 * 3)],
        guard={"ladder": ESCALATION, "cause_test": False, "window_max": 8, "remedies": [ALPHA]},
        checkpoint={"every": 10, "keep": 4},
        train={"steps": 50},
    )
    a = new_run(config)
    a.send(Command(id="stop", kind="stop", at_step=33))
    assert train(a, world) == "stopped"
    assert train(a, world) == "finished"
    back = [event.data for event in of_kind(a, "rollback")]
    assert [one["rung"] for one in back] == [
        "widen",
        "lower_lr",
        "older",
        "tighten_clip",
        "reset_moments",
    ]
    widened, older = back[0], back[2]
    assert widened["window"][1] - widened["window"][0] == 8 * BATCH
    assert older["to_step"] < older["onset"] - 8
    assert {remedy.kind for remedy in remedies_of(a)} == {"lr", "clip", "moments"}
    b = trained(told(config, a))
    assert_same(a, b)
    assert not of_kind(b, "rollback")
    steps, rates = table(a, ("step", "lr")).T
    plain = table(trained(tiny(tmp_path, world=1, train={"steps": 50})), ("lr",))[:, 0]
    assert min(rates / plain) < 0.3 and rates[-1] == plain[-1] and len(steps) == 50
    assert all(judged.agrees for judged in Rejudge(a, config.guard, own=True))
