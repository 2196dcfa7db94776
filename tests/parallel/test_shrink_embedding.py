"""The rung `shrink_embedding` in live runs: taken where the embedding leads, on its gradients
alone, back on schedule, and exact whatever the run goes through meanwhile."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from guardrail.backtest.rejudge import Rejudge
from guardrail.core.records.commands import Command
from guardrail.core.records.status import Phase
from guardrail.decide.run_history import RunHistory
from guardrail.report.quarantine import quarantine_lines
from tests.parallel.test_law import killed_behind
from tests.support.ranks import run_ranks
from tests.support.running import (
    BATCH,
    BLIND,
    assert_same,
    new_run,
    of_kind,
    others_slow,
    remedies_of,
    tiny,
    told,
    train,
    trained,
)
from trainer.config.config import Config
from trainer.train import Trainer

# steps: the embedding leads; the run is stopped, with the factor on its way back
LED, STOPPED = 18, 28
HOLD, BACK = 6, 9
SHRINK = {"do": "shrink_embedding", "factor": 0.16, "hold": HOLD, "back": BACK}
ESCALATION = [
    {"do": "skip"},
    SHRINK,
    {"do": "lower_lr", "factor": 0.5, "hold": 3, "back": 4},
    {"do": "halt"},
]
FROM = LED - 1  # a batch before the onset is left out as well
# The first batch that is left out halves the gradients for two steps, and both together meet the
# floor.
HALVED, FLOOR = (LED, LED + 1), 0.1
RISE = [0.16 + 0.84 * (at + 1) / (BACK + 1) for at in range(BACK)]
ALPHAS = {FROM + at: alpha for at, alpha in enumerate([*[0.16] * HOLD, *RISE])} | dict.fromkeys(
    HALVED, FLOOR
)


def config_of(
    folder: Path, *, world: int = 1, strategy: str = "ddp", steps: int = 36, **guard: Any
) -> Config:
    """What comes back to the embedding is wild in three batches, and a few steps later the loss of
    three others is.
    """
    led, spiked = (LED - 1) * BATCH, (LED + 9) * BATCH
    return tiny(
        folder,
        world=world,
        strategy=strategy,
        model={"tied": False},
        faults=[
            {"kind": "spike_embedding", "first": led, "last": led + 3 * BATCH, "value": 1e5},
            {"kind": "spike_loss", "first": spiked, "last": spiked + 3 * BATCH, "value": 50.0},
        ],
        guard={
            "ladder": ESCALATION,
            "embed_floor": FLOOR,
            "embed_hold": len(HALVED),
            "embed_back": 0,
            **BLIND,
            **guard,
        },
        checkpoint={"every": 8, "keep": 4},
        train={"steps": steps},
    )


@pytest.mark.parametrize(("world", "strategy"), others_slow((2, "ddp")))
def test_it_is_exact_through_a_kill_another_rollback_and_a_stop(
    tmp_path: Path, world: int, strategy: str
) -> None:
    config = config_of(tmp_path, world=world, strategy=strategy)
    run = new_run(config)
    run.send(Command(id="stop", kind="stop", at_step=STOPPED))
    assert killed_behind(run, world, lambda event: event.kind == "rollback"), (
        "before the factor has taken effect"
    )
    assert [train(run, world), train(run, world)] == ["stopped", "finished"]
    shrunk, slowed = (event.data for event in of_kind(run, "rollback"))
    assert (shrunk["rung"], slowed["rung"]) == ("shrink_embedding", "lower_lr")
    assert slowed["onset"] > FROM + HOLD and slowed["to_step"] < STOPPED < FROM + HOLD + BACK
    assert [(remedy.kind, remedy.value, remedy.from_step) for remedy in remedies_of(run)] == [
        ("embed_alpha", 0.5, LED), ("embed_alpha", 0.16, FROM), ("lr", 0.5, slowed["onset"] - 1),
    ]  # fmt: skip
    past = RunHistory.from_events(run.events())
    alphas = {step: past.effects(step, config.guard).embed_alpha for step in range(1, 37)}
    assert alphas == pytest.approx(dict.fromkeys(alphas, 1.0) | ALPHAS)
    assert_same(run, trained(told(config, run)))
    assert all(judged.agrees for judged in Rejudge(run, config.guard, own=True))


def test_the_gradients_of_the_embedding_are_shrunk_and_no_others(tmp_path: Path) -> None:
    (ratios,) = run_ranks(_ratios, 1, config_of(tmp_path), folder=tmp_path, init=False)
    assert ratios == pytest.approx(dict.fromkeys(range(1, 37), 1.0) | ALPHAS, rel=1e-4)


def _ratios(rank: int, config: Config) -> dict[int, float]:
    """Step -> what the gradients of the embedding were multiplied by, over what all others were."""
    trainer = Trainer(config)
    gate, ratios = trainer.guard.gate, {}
    apply, (optimizer,), embedding = gate.apply, gate.optimizers, {id(p) for p in gate.embedding}

    def norms() -> Tensor:
        parts: list[list[Tensor]] = [[], []]
        for parameter in gate.parameters:
            assert parameter.grad is not None
            parts[id(parameter) in embedding].append(parameter.grad.flatten())
        return torch.stack([torch.cat(part).norm() for part in parts])

    def watched(*given: Any, **named: Any) -> None:
        before, after = norms(), []
        hook = optimizer.register_step_pre_hook(lambda *_: after.append(norms()))
        apply(*given, **named)
        hook.remove()
        others, own = (after[0] / before).tolist()
        ratios[trainer.guard.step + 1] = own / others

    gate.apply = watched  # type: ignore[method-assign]
    assert trainer.train() is Phase.FINISHED
    return ratios


def test_where_the_state_is_to_blame_it_comes_first_and_costs_no_data(tmp_path: Path) -> None:
    """Any batch blows it up, from this state; again behind the rollback it is its new level, and is
    let be.
    """
    config = config_of(tmp_path, cause_test=True)
    fault, replace = config.faults[0], msgspec.structs.replace
    config = replace(config, faults=(replace(fault, first=0, last=0, step=LED, times=2),))
    run = trained(config)
    (cause,), (back,) = of_kind(run, "diagnosis"), of_kind(run, "rollback")
    assert (cause.data["cause"], back.data["rung"]) == ("state", "shrink_embedding")
    assert not quarantine_lines(run)
    assert [remedy.value for remedy in remedies_of(run)] == [0.16]
    assert_same(
        run, trained(replace(told(config, run), faults=(replace(config.faults[0], times=1),)))
    )
