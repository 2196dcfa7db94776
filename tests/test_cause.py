"""The cause test on staged faults of all four kinds, on real ranks, and that a run does not know it has been tested."""

import socket
from pathlib import Path
from typing import Any

import pytest

from guardrail.records import Cause
from guardrail.rundir import RunDirectory
from tests.running import SHAPES, assert_same, of_kind, tiny, trained


def spike(**settings: Any) -> dict[str, Any]:
    return {"kind": "spike_loss", "value": 50.0, **settings}


def causes(run: RunDirectory) -> list[dict[str, Any]]:
    return [event.data for event in of_kind(run, "cause")]


@pytest.mark.parametrize(("world", "strategy"), SHAPES)
def test_all_four_causes(tmp_path: Path, world: int, strategy: str) -> None:
    faults = [
        spike(step=18, first=136, last=144),  # this data, in this state
        spike(step=26, times=1, rank=world - 1),  # once, on one rank
        spike(first=300, last=302),  # this data, in any state
        spike(step=46, times=2),  # any batch, in this state; the test itself uses no fault up
    ]
    config = tiny(tmp_path, world=world, strategy=strategy, faults=faults, train={"steps": 54})
    a = trained(config)
    found = causes(a)
    named = [Cause.DATA_AND_STATE, Cause.HARDWARE, Cause.DATA, Cause.STATE]
    assert [one["cause"] for one in found] == [cause.value for cause in named]
    assert (found[1]["rank"], found[1]["host"]) == (world - 1, socket.gethostname())
    assert [one["passes"] for one in found] == [6, 1, 6, 4]


def test_a_run_does_not_know_that_it_has_been_tested(tmp_path: Path) -> None:
    """With dropout, on 2 fsdp ranks, and nothing that a cause would change: only the test itself differs."""
    faults = [spike(step=18, first=136, last=144), spike(first=300, last=302)]
    runs = [
        trained(
            tiny(
                tmp_path,
                world=2,
                strategy="fsdp",
                faults=faults,
                train={"steps": 50},
                guard={"cause_test": tested},
            )
        )
        for tested in (True, False)
    ]
    assert [len(causes(run)) for run in runs] == [2, 0]
    assert_same(*runs)
