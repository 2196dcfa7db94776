"""A rollback that leaves samples out is exact: run A meets bad samples and goes back by itself, run
B is told from its beginning what A left out and has no guard. Every step and the final weights are
the same, bit by bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guardrail.core.records.commands import Command
from guardrail.rundir.run_directory import RunDirectory
from tests.support.running import (
    BANDS,
    BATCH,
    BLIND,
    COMMON,
    FEW_SHAPES,
    ONE_SHAPE,
    SHAPES,
    assert_same,
    corpus_of,
    new_run,
    of_kind,
    prompt_disk,
    spans,
    tiny,
    told,
    train,
    train_with_a_stop,
    trained,
    write_corpus,
)
from trainer.config.config import Config


def spike(first: int, last: int, **settings: Any) -> dict[str, Any]:
    """A fault that multiplies the loss of every batch with a position in [first, last)."""
    return {"kind": "spike_loss", "first": first, "last": last, "value": 50.0, **settings}


def rollbacks(run: RunDirectory) -> list[dict[str, Any]]:
    return [event.data for event in of_kind(run, "rollback")]


def assert_exact(config: Config, a: RunDirectory) -> None:
    assert_same(a, trained(told(config, a)))


@pytest.mark.parametrize(("world", "strategy"), FEW_SHAPES)
def test_corrupted_documents(tmp_path: Path, world: int, strategy: str) -> None:
    write_corpus(tmp_path / "corpus", bad=range(6, 9))
    config = tiny(
        tmp_path, world=world, strategy=strategy, guard={"loss_score": 5.0}, train={"steps": 40}
    )
    a = trained(config)
    # Eleven batches and more, the data is to blame, and nothing of it was applied: nothing is made
    # again.
    out = spans(a)
    assert {span.origin for span in out} == {"rejected"} and len(out) > 2 * config.guard.persist
    named = [
        document["path"] for event in of_kind(a, "skipped") for document in event.data["documents"]
    ]
    assert any(name.endswith("0007.txt") for name in named)
    assert_exact(config, a)


@pytest.mark.parametrize(("world", "strategy"), ONE_SHAPE)
def test_second_rollback_inside_the_stretch_that_is_run_again(
    tmp_path: Path, world: int, strategy: str
) -> None:
    # Step 21 is tried three times and the run goes back to 15. Step 20 is then made of the batch
    # behind those, and the second fault strikes what step 21 would be made of: the run has not got
    # beyond where it gave up before.
    faults = [spike(160, 184), spike(192, 216)]
    config = tiny(
        tmp_path, world=world, strategy=strategy, faults=faults, guard=BLIND, train={"steps": 34}
    )
    a = trained(config)
    first, second = rollbacks(a)
    assert first["to_step"] < second["from_step"] <= first["from_step"]
    assert (first["rung"], second["rung"]) == ("rollback", "widen") and second["window"][1] > first[
        "window"
    ][1]
    assert_exact(config, a)


@pytest.mark.parametrize(("world", "strategy"), ONE_SHAPE)
def test_rollback_across_an_epoch_boundary(tmp_path: Path, world: int, strategy: str) -> None:
    write_corpus(tmp_path / "corpus", documents=5)
    sections: dict[str, Any] = {
        "data": {"order": "shuffled"},
        "train": {"steps": 0, "epochs": 2},
        "guard": {"window_before": 2, "window_after": 1, **BLIND},
    }
    n = len(corpus_of(tiny(tmp_path, world=world, strategy=strategy, **sections)).train)
    assert n % BATCH, "an epoch must end inside a batch"
    config = tiny(
        tmp_path, world=world, strategy=strategy, faults=[spike(n - 12, n + 12)], **sections
    )
    a = trained(config)
    window = rollbacks(a)[0]["window"]
    assert window[0] < n < window[1]
    config_b = told(config, a)
    lines = Path(config_b.data.quarantine).read_text(encoding="utf-8").split()
    assert {line.endswith("@1") for line in lines} == {True, False}
    assert_same(a, trained(config_b))


def test_wide_window(tmp_path: Path) -> None:
    guard = {"window_before": 7, "window_after": 3, **BLIND}
    config = tiny(tmp_path, world=2, faults=[spike(240, 264)], guard=guard, train={"steps": 45})
    a = trained(config)
    (done,) = rollbacks(a)
    assert done["window"] == [240 - 7 * BATCH, 264 + 3 * BATCH]
    assert done["to_step"] == 20
    # What is run again with the same batches is expected to be the same, and is.
    view = a.metrics((*COMMON, *BANDS, "timeline"))
    again = (view.column("step") > done["to_step"]) & (view.column("last") <= done["window"][0])
    first, second = (
        view.array[again & (view.column("timeline") == timeline), :-1] for timeline in (0, 1)
    )
    assert len(first) == 3 and np.array_equal(first, second)
    assert_exact(config, a)


@pytest.mark.parametrize("keep", [3, 0])
@pytest.mark.parametrize(("world", "strategy"), FEW_SHAPES)
def test_rollback_to_the_disk_where_the_ring_does_not_reach(
    tmp_path: Path, world: int, strategy: str, keep: int
) -> None:
    config = tiny(
        tmp_path,
        world=world,
        strategy=strategy,
        faults=[spike(200, 224)],
        guard={"window_before": 10, **BLIND},
        snapshots={"every": 3, "keep": keep},
        checkpoint={"every": 6, "keep": 4},
        train={"steps": 32},
    )
    with prompt_disk():
        a = trained(config)
    (done,) = rollbacks(a)
    assert (done["tier"], done["to_step"]) == ("disk", 12)
    assert_exact(config, a)


@pytest.mark.parametrize("gate", ["sync", "lagged"])
def test_without_a_ring_data_is_left_out_and_a_person_goes_back_to_the_disk(
    tmp_path: Path, gate: str
) -> None:
    config = tiny(
        tmp_path,
        faults=[spike(160, 176), spike(240, 248)],
        guard={"gate": gate},
        snapshots={"keep": 0},
        checkpoint={"every": 8},
        train={"steps": 34},
    )
    a = new_run(config)
    a.send(Command(id="back", kind="rollback", value=16, at_step=27))
    with prompt_disk():
        assert train(a, 1) == "finished"
    causes = of_kind(a, "diagnosis")
    assert causes
    assert all(event.data["evidence"]["older_state"] is None for event in causes)
    assert [event.data["action"] for event in of_kind(a, "verdict")] == ["skip"] * 3
    assert [(done["tier"], done["to_step"]) for done in rollbacks(a)] == [("disk", 16)]
    assert_exact(config, a)


def test_rollback_beyond_the_newest_good_ones_finds_what_retention_has_kept(tmp_path: Path) -> None:
    config = tiny(
        tmp_path,
        faults=[spike(480, 504)],
        guard={"window_before": 12, **BLIND},
        snapshots={"every": 5, "keep": 2},
        checkpoint={"every": 5, "keep": 2},
        train={"steps": 66},
    )
    with prompt_disk():
        a = trained(config)
    (done,) = rollbacks(a)
    # The window begins with step 49. The newest good ones are younger, and the very first would be
    # the last resort.
    assert (done["tier"], done["from_step"]) == ("disk", 60) and 5 <= done["to_step"] <= 45
    assert_exact(config, a)


def test_rollback_to_the_disk_after_a_restart_with_an_empty_ring(tmp_path: Path) -> None:
    config = tiny(
        tmp_path,
        world=2,
        strategy="fsdp",
        faults=[spike(224, 248)],
        guard={"window_before": 6, **BLIND},
        checkpoint={"every": 6, "keep": 4},
        train={"steps": 34},
    )
    a = new_run(config)
    train_with_a_stop(a, 2, step=26)
    (done,) = rollbacks(a)
    assert (done["tier"], done["to_step"]) == ("disk", 18)
    assert_exact(config, a)


@pytest.mark.parametrize(("world", "strategy"), SHAPES)
def test_rollback_and_skip_by_command(tmp_path: Path, world: int, strategy: str) -> None:
    config = tiny(tmp_path, world=world, strategy=strategy, train={"steps": 32})
    a = new_run(config)
    a.send(Command(id="skip", kind="skip", value=3, at_step=12))
    a.send(Command(id="back", kind="rollback", value=15, at_step=19))
    a.send(Command(id="newest", kind="rollback", value=float("nan"), at_step=27))
    assert train(a, world) == "finished"
    assert [span.origin for span in spans(a)] == ["user", "user", "user"]
    assert [done["to_step"] for done in rollbacks(a)] == [15, 20]
    assert [e.step for e in of_kind(a, "command")] == [12, 19, 27]
    assert_exact(config, a)


def test_a_person_is_kept_from_leaving_all_data_out(tmp_path: Path) -> None:
    """A run on little data that has gone round it once: back to its beginning would be the end of
    it.
    """
    write_corpus(tmp_path / "corpus", documents=30)
    config = tiny(tmp_path, train={"steps": 30, "batch_size": 64, "micro_batch_size": 32})
    samples = len(corpus_of(config).train)
    a = new_run(config)
    a.send(Command(id="all", kind="skip", value=samples, at_step=4))
    a.send(Command(id="back", kind="rollback", value=5, at_step=24))
    a.send(Command(id="few", kind="skip", value=1, at_step=25))
    assert 10 * 64 < samples < 19 * 64
    assert train(a, 1) == "finished"
    said = [(event.data["effect"], event.data["reason"]) for event in of_kind(a, "command")]
    refused = ("refused", f"all {samples:,} samples of the training split would be skipped")
    assert said == [refused, refused, ("applied", "")]
    assert not rollbacks(a) and not a.commands_pending()
    assert_exact(config, a)


def test_bf16(tmp_path: Path) -> None:
    train_section = {"steps": 30, "precision": "bf16"}
    config = tiny(
        tmp_path,
        world=2,
        strategy="fsdp",
        faults=[spike(160, 184)],
        guard=BLIND,
        train=train_section,
    )
    a = trained(config)
    assert len(rollbacks(a)) == 1
    assert_exact(config, a)
