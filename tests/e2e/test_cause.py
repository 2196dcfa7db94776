"""The cause test on staged faults of all four kinds, on real ranks, and that a run does not know it
has been tested.
"""

import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest

from guardrail.core.records.verdicts import Cause
from guardrail.rundir.run_directory import RunDirectory
from tests.support.running import (
    SHAPES,
    assert_same,
    new_run,
    of_kind,
    others_slow,
    spans,
    tiny,
    told,
    train,
    trained,
)
from tests.support.texts import numbers_in


def spike(**settings: Any) -> dict[str, Any]:
    return {"kind": "spike_loss", "value": 50.0, **settings}


# Weights that something has scaled between two steps.
BROKEN: dict[str, Any] = {"kind": "scale_weights", "value": 4.0, "times": 1}


def causes(run: RunDirectory) -> list[dict[str, Any]]:
    return [event.data for event in of_kind(run, "diagnosis")]


@pytest.mark.parametrize(
    ("world", "strategy"), [*SHAPES[:2], pytest.param(*SHAPES[2], marks=pytest.mark.slow)]
)
def test_all_four_causes(tmp_path: Path, world: int, strategy: str) -> None:
    faults = [
        spike(step=18, first=136, last=144),  # this data, in this state
        spike(step=26, times=1, rank=world - 1),  # once, on one rank
        spike(first=300, last=302),  # this data, in any state
        BROKEN | {"step": 46},  # any batch, in this state
    ]
    config = tiny(tmp_path, world=world, strategy=strategy, faults=faults, train={"steps": 54})
    a = trained(config)
    found = causes(a)
    named = [Cause.DATA_AND_STATE, Cause.HARDWARE, Cause.DATA, Cause.STATE]
    assert [one["cause"] for one in found] == [cause.value for cause in named]
    assert (found[1]["rank"], found[1]["host"]) == (world - 1, socket.gethostname())
    assert [one["passes"] for one in found] == [9, 1, 9, 4]


# Any batch in the state of step 30; and then, in the same incident, ten batches of bad data here
# and there.
MIXED = [
    BROKEN | {"step": 30},
    *(spike(first=8 * batch, last=8 * batch + 8) for batch in range(30, 50, 2)),
]


@pytest.mark.parametrize(("world", "strategy"), others_slow(SHAPES[0]))
def test_bad_data_behind_trouble_with_the_state_is_no_trouble_with_the_state(
    tmp_path: Path, world: int, strategy: str
) -> None:
    config = tiny(
        tmp_path,
        world=world,
        strategy=strategy,
        faults=MIXED,
        train={"steps": 40},
        guard={"rollbacks": 3},
    )
    run = trained(config)
    first, *rest = causes(run)
    assert first["cause"] == Cause.STATE.value and len(rest) >= 5
    assert {one["cause"] for one in rest} == {Cause.DATA.value} and {
        one["incident"] for one in rest
    } == {1}
    assert len(of_kind(run, "rollback")) == 1
    assert {position for span in spans(run) for position in range(span.first, span.last)} == {
        position for batch in range(30, 50, 2) for position in range(8 * batch, 8 * batch + 8)
    }, "what is bad is left out, and nothing else"
    # nothing breaks its weights
    healthy = msgspec.structs.replace(told(config, run), faults=config.faults[1:])
    assert_same(run, trained(healthy))


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_hardware_that_is_not_borne_ends_the_run_with_the_ranks_and_hosts_name(
    tmp_path: Path, strategy: str
) -> None:
    faults = [spike(step=26, times=1, rank=1)]
    config = tiny(
        tmp_path,
        world=2,
        strategy=strategy,
        faults=faults,
        train={"steps": 40},
        guard={"retries": 0},
    )
    run = new_run(config)
    assert train(run, 2) == "halted"
    (ended,) = of_kind(run, "ended")
    evidence, found, why = ended.data["reason"].partition(f" rank 1 on {socket.gethostname()} ")
    assert evidence and found and numbers_in(why) == [1, 200, 0], "one retry of guard.max_retries"
    assert ended.step == 25 and not spans(run), "no data was left out for it"


@pytest.mark.ci_slow
def test_a_run_does_not_know_that_it_has_been_tested(tmp_path: Path) -> None:
    """With dropout, on 2 fsdp ranks, and nothing that a cause would change: only the test itself
    differs.
    """
    faults = [spike(step=18, first=136, last=144), spike(first=300, last=302)]
    runs = [
        trained(
            tiny(
                tmp_path,
                world=2,
                strategy="fsdp",
                faults=faults,
                train={"steps": 42},
                guard={"cause_test": tested},
            )
        )
        for tested in (True, False)
    ]
    assert [len(causes(run)) for run in runs] == [2, 0]
    assert_same(*runs)
