"""The loop under faults: every rank reaches the same verdict at the same step, and a step left out
leaves no trace.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from guardrail.core.config import load_trainer_config
from guardrail.core.events.decisions import VerdictGiven
from guardrail.core.records.commands import Command
from guardrail.core.records.findings import FindingKind
from guardrail.core.records.spans import Span
from guardrail.core.records.verdicts import Action
from guardrail.core.toml_file import dump_toml
from guardrail.decide.sample_cursor import SampleCursor
from guardrail.rundir.run_directory import RunDirectory
from guardrail.torch.checkpoint.memory_snapshots import SnapshotRing
from guardrail.torch.measure.update_gate import Gate
from tests.support.ranks import run_ranks
from tests.support.running import (
    BATCH,
    BLIND,
    COMMON,
    FEW_SHAPES,
    LENGTH,
    SHAPES,
    assert_same,
    final,
    new_run,
    of_kind,
    spans,
    table,
    tiny,
    told,
    train,
    trained,
)
from trainer.config.config import Config
from trainer.objectives.loss import IGNORED, loss_sum
from trainer.train import Trainer

TWO = FEW_SHAPES[1:]


def watched(rank: int, path: Path) -> list[dict[str, Any]]:
    """Train as the trainer does, and tell of each attempt what became of it, on this rank."""
    config = load_trainer_config(path / "config.toml")
    assert isinstance(config, Config)
    trainer = Trainer(config, run=RunDirectory.open(path))
    attempts = []
    rows: list[int] = []
    load_batch = trainer.loader.load

    def remembered(batch: Any) -> Any:
        micro_batches = load_batch(batch)
        rows.extend(sample for micro in micro_batches for sample in micro.sample_ids)
        return micro_batches

    trainer.loader.load = remembered  # type: ignore[method-assign]
    collectives: list[str] = []
    for name in (
        "all_reduce",
        "broadcast",
        "broadcast_object_list",
        "all_gather_object",
        "barrier",
    ):
        setattr(dist, name, counted(getattr(dist, name), name, collectives))
    for step in trainer.guard:
        before = trainer.guard.state.digests()
        collectives.clear()
        trainer.train_step(step)
        assert step.verdict is not None
        attempts.append(
            {
                "step": step.number,
                "action": step.verdict.action,
                "touched": trainer.guard.state.digests() != before,
                "gradients": sum(p.grad is not None for p in trainer.model.parameters()),
                "rows": tuple(rows),
                "collectives": collectives[:],
            }
        )
        rows.clear()
    return attempts


def counted(collective: Callable[..., Any], name: str, calls: list[str]) -> Callable[..., Any]:
    def counting(*arguments: Any, **settings: Any) -> Any:
        calls.append(name)
        return collective(*arguments, **settings)

    return counting


def watch(config: Config) -> tuple[RunDirectory, list[list[dict[str, Any]]]]:
    run = new_run(config)
    return run, run_ranks(watched, config.world, run.path, folder=run.path / "results", init=False)


# -- modes and ranks


@pytest.mark.parametrize(("world", "strategy"), [SHAPES[0], FEW_SHAPES[2]])
def test_advise_changes_nothing(tmp_path: Path, world: int, strategy: str) -> None:
    faults = [{"kind": "spike_loss", "first": 160, "last": 184, "value": 50.0}]
    sections: dict[str, Any] = {"faults": faults, "train": {"steps": 28}}
    advised = trained(
        tiny(tmp_path, world=world, strategy=strategy, guard={"mode": "advise"}, **sections)
    )
    free = trained(
        tiny(tmp_path, world=world, strategy=strategy, guard={"mode": "off"}, **sections)
    )
    would = [(e.data["action"], e.data["would"]) for e in of_kind(advised, "verdict")]
    assert would[:3] == [("apply", "skip"), ("apply", "skip"), ("apply", "rollback")]
    assert not of_kind(free, "verdict")
    assert not spans(advised) and not of_kind(advised, "rollback")
    assert len(table(advised)) == 28
    assert_same(advised, free)


def test_the_same_samples_on_one_rank_and_on_two(tmp_path: Path) -> None:
    faults = [
        {"kind": "spike_loss", "first": first, "last": last, "value": 50.0}
        for first, last in ((80, 88), (160, 184))
    ]
    sections: dict[str, Any] = {
        "faults": faults,
        "train": {"steps": 30},
        "data": {"order": "shuffled"},
        "guard": BLIND,
    }
    one, (alone,) = watch(tiny(tmp_path, **sections))
    two, (first, second) = watch(tiny(tmp_path, world=2, **sections))
    assert [(a["step"], a["action"]) for a in alone] == [(a["step"], a["action"]) for a in first]
    assert [set(a["rows"]) for a in alone] == [
        {*a["rows"], *b["rows"]} for a, b in zip(first, second, strict=True)
    ]
    assert all(
        len(a["rows"]) == BATCH and len(b["rows"]) == BATCH // 2
        for a, b in zip(alone, first, strict=True)
    )
    assert {a["action"] for a in alone} == {Action.APPLY, Action.SKIP, Action.ROLLBACK}
    places = ("step", "first", "last")
    assert np.array_equal(table(one, places), table(two, places))


@pytest.mark.parametrize(("world", "strategy"), FEW_SHAPES)
def test_evaluation_changes_nothing(tmp_path: Path, world: int, strategy: str) -> None:
    sections = {"data": {"eval_fraction": 0.1}, "checkpoint": {"every": 7}}
    train_sections = [{"steps": 20}, {"steps": 20, "eval_every": 3, "eval_batches": 2}]
    plain, evaluated = [
        trained(tiny(tmp_path, world=world, strategy=strategy, train=section, **sections))
        for section in train_sections
    ]
    assert [e.step for e in of_kind(evaluated, "eval")] == [3, 6, 9, 12, 15, 18, 20]
    view = evaluated.metrics()
    assert view.column("step")[np.isfinite(view.column("eval_loss"))].tolist() == [
        3,
        6,
        9,
        12,
        15,
        18,
        20,
    ]
    assert_same(plain, evaluated)


@pytest.mark.parametrize(
    ("first", "then"),
    [((2, "ddp"), (1, "ddp")), ((1, "ddp"), (2, "ddp")), ((2, "fsdp"), (1, "ddp"))],
)
def test_a_run_goes_on_with_another_number_of_ranks(
    tmp_path: Path, first: tuple[int, str], then: tuple[int, str]
) -> None:
    sections: dict[str, Any] = {"model": {"dropout": 0.0}, "train": {"steps": 30}}
    configs = [
        tiny(tmp_path, world=world, strategy=strategy, **sections)
        for world, strategy in (first, then)
    ]
    whole, run = trained(configs[0]), new_run(configs[0])
    run.send(Command(id="stop", kind="stop", at_step=17))
    assert train(run, first[0]) == "stopped"
    run.write_config(dump_toml(configs[1]))
    assert train(run, then[0]) == "finished"
    assert of_kind(run, "restarted")[0].step == 17
    assert {said for key, said in of_kind(run, "resume_check")[0].data.items()} == {"ok"}
    places = ("step", "first", "last", "lr", "tokens")
    assert np.array_equal(table(run, places), table(whole, places))
    np.testing.assert_allclose(table(run, ("loss",)), table(whole, ("loss",)), rtol=1e-4)


# -- the laws


def test_a_step_agrees_in_one_collective(tmp_path: Path) -> None:
    faults = [{"kind": "spike_loss", "first": 80, "last": 88, "value": 50.0}]
    # Looking for a cause runs more batches, at the first rejected step of an incident.
    guard = {"cause_test": False}
    _, ranks = watch(
        tiny(
            tmp_path,
            world=2,
            faults=faults,
            train={"steps": 20},
            checkpoint={"every": 5},
            guard=guard,
        )
    )
    for attempts in ranks:
        assert {a["action"] for a in attempts} == {Action.APPLY, Action.SKIP}
        for attempt in attempts:
            # After the verdict of a rejected step, what led to it is gathered: here the tokens that
            # pull on the embedding. And ranks meet while the documents of the skipped samples are
            # looked up.
            first, *later = attempt["collectives"]
            assert first == "all_reduce"
            assert set(later) == (
                {"all_gather_object"} if attempt["action"] is Action.SKIP else set()
            )


def test_what_is_done_stands_in_the_journal_first(tmp_path: Path) -> None:
    faults = [
        {"kind": "spike_loss", "first": first, "last": last, "value": 50.0}
        for first, last in ((80, 88), (160, 184))
    ]
    run = new_run(tiny(tmp_path, faults=faults, guard=BLIND, train={"steps": 26}))
    run.send(Command(id="slower", kind="lr", value=0.5, at_step=5))
    run.send(Command(id="skip", kind="skip", value=1, at_step=24))
    seen = tmp_path / "seen"
    skip_span, restore, factor = SampleCursor.skip_span, SnapshotRing.restore, Gate.apply
    with pytest.MonkeyPatch.context() as patch:

        def leaving_out(self: SampleCursor, span: Span) -> int:
            assert span in spans(run), "left out before it was journaled"
            with seen.open("a") as file:
                file.write(f"{span.origin} ")
            return skip_span(self, span)

        def restoring(self: SnapshotRing, snapshot: Any) -> Any:
            assert run.events()[-1].kind == "rollback", "gone back before it was journaled"
            return restore(self, snapshot)

        def applying(self: Gate, *arguments: Any, lr_factor: float, **settings: Any) -> None:
            assert lr_factor == 1.0 or of_kind(run, "command"), (
                "a rate used before it was journaled"
            )
            factor(self, *arguments, lr_factor=lr_factor, **settings)

        patch.setattr(SampleCursor, "skip_span", leaving_out)
        patch.setattr(SnapshotRing, "restore", restoring)
        patch.setattr(Gate, "apply", applying)
        assert train(run, 1) == "finished"
    assert seen.read_text().split() == ["rejected", "rejected", "rejected", "rollback", "user"]


# -- one rank alone goes wrong


@pytest.mark.parametrize(("world", "strategy"), TWO)
@pytest.mark.parametrize("kind", ["nan_loss", "inf_grad", "inf_grad_reduced"])
def test_a_fault_of_rank_1_is_seen_by_both(
    tmp_path: Path, world: int, strategy: str, kind: str
) -> None:
    fault = {
        "kind": kind,
        "first": 80,
        "last": 88,
        "rank": 1,
        "micro": 1 if kind != "inf_grad_reduced" else -1,
    }
    config = tiny(tmp_path, world=world, strategy=strategy, faults=[fault], train={"steps": 16})
    run, (zero, one) = watch(config)
    for attempts in (zero, one):
        left_out = [a for a in attempts if a["action"] is not Action.APPLY]
        assert [(a["step"], a["action"], a["touched"], a["gradients"]) for a in left_out] == [
            (11, Action.SKIP, False, 0)
        ]
        assert all(a["touched"] for a in attempts if a["action"] is Action.APPLY)
    (verdict,) = of_kind(run, "verdict")
    assert verdict.data["at_step"] == 11
    assert all(finding["kind"] == "nonfinite" for finding in verdict.data["findings"])
    ranks = {finding["signal"]: finding["ranks"] for finding in verdict.data["findings"]}
    assert ranks["grad_norm"] == [1]
    assert (ranks.get("loss") == [1]) is (kind == "nan_loss")
    parameters = verdict.data["parameters"]
    if kind == "inf_grad":
        # After the reduction it is on every rank that holds this part of the gradient.
        holders = "0" if strategy == "fsdp" else "01"
        assert parameters == {rank: ["norm.weight"] for rank in holders}
    elif kind == "inf_grad_reduced":
        assert list(parameters) == ["1"] and len(parameters["1"]) == 1
    assert "rank 1" in verdict.message
    assert np.isfinite(table(run)).all()
    assert_same_as_told(config, run)


def assert_same_as_told(config: Config, run: RunDirectory) -> None:
    """Nothing of what was left out is in the weights: a run that never met it ends with the
    same.
    """
    config = told(config, run)
    other = new_run(config)
    assert train(other, config.world) == "finished"
    assert np.array_equal(table(run), table(other))
    assert final(run) == final(other)


# -- labels that are all ignored


def reference_norm(rank: int, path: Path) -> tuple[float, float]:
    """(loss, gradient norm) of step 11, by plain torch over the samples that are not ignored."""
    config = load_trainer_config(path / "config.toml")
    assert isinstance(config, Config)
    trainer = Trainer(config)
    for step in trainer.guard:
        if step.number == 11:
            micro_batches = trainer.loader.load(step.batch)
            kept = [m for index, m in enumerate(micro_batches) if index != 1]
            tokens = torch.from_numpy(np.concatenate([m.tokens for m in kept]))
            labels = torch.from_numpy(np.concatenate([m.labels for m in kept]))
            assert not (labels == IGNORED).any()
            total, count = loss_sum(trainer.model(tokens), labels)
            (total / count).backward()
            norm = torch.nn.utils.get_total_norm(
                [p.grad for p in trainer.model.parameters() if p.grad is not None]
            )
            return (total / count).item(), norm.item()
        trainer.train_step(step)
    raise AssertionError("step 11 was never made")


def test_a_window_with_an_ignored_micro_batch_is_normalised_by_the_rest(tmp_path: Path) -> None:
    fault = {"kind": "ignore_labels", "first": 80, "last": 88, "micro": 1}
    sections: dict[str, Any] = {
        "model": {"dropout": 0.0},
        "train": {"steps": 20, "micro_batch_size": 2},
    }
    run = trained(tiny(tmp_path, faults=[fault], **sections))
    assert not of_kind(run, "verdict") and not spans(run)
    step, loss, norm, tokens = table(run, ("step", "loss", "grad_norm", "tokens"))[10]
    assert (step, tokens) == (11, (BATCH - 2) * LENGTH)
    plain = new_run(tiny(tmp_path, **sections))
    ((want_loss, want_norm),) = run_ranks(
        reference_norm, 1, plain.path, folder=tmp_path / "plain", init=False
    )
    assert loss == pytest.approx(want_loss, rel=1e-5)
    assert norm == pytest.approx(want_norm, rel=1e-5)


@pytest.mark.parametrize(("world", "strategy"), FEW_SHAPES)
def test_batches_without_a_label_are_left_out_and_never_add_up_to_a_rollback(
    tmp_path: Path, world: int, strategy: str
) -> None:
    faults = [
        {"kind": "ignore_labels", "first": 80, "last": 128},
        {"kind": "ignore_labels", "first": 0, "last": 8},
    ]
    config = tiny(tmp_path, world=world, strategy=strategy, faults=faults, train={"steps": 20})
    run = trained(config)
    assert [(span.first, span.last, span.origin) for span in spans(run)] == [
        (first, first + BATCH, "rejected") for first in (0, 80, 88, 96, 104, 112, 120)
    ]
    assert not of_kind(run, "rollback") and not of_kind(run, "incident")
    verdicts = [event for event in run.events() if isinstance(event, VerdictGiven)]
    found = [one for event in verdicts for one in event.findings]
    assert {one.kind for one in found} == {FindingKind.NO_TOKENS} and len(found) == len(spans(run))
    assert np.isfinite(table(run, COMMON)).all()
    assert_same_as_told(config, run)
