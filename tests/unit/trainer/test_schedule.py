"""The learning rate and the batch size as functions of the step, and the ledger that follows the
second.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guardrail.core.config import build_config
from guardrail.core.errors import ConfigError
from guardrail.core.records.spans import Span
from guardrail.decide.sample_cursor import Batch, SampleCursor
from guardrail.decide.sample_order import SampleOrder
from tests.support.running import of_kind, table, tiny, trained
from trainer.config.batch_ramp import BatchPlan
from trainer.config.config import Config
from trainer.config.recipe import OptimSection
from trainer.config.schedule import Schedule, warmup_steps

# 32 K to 3.2 M tokens in 12 G
GPT3 = BatchPlan.growing(start=16, by=16, size=1600, samples=12_000_000_000 // 2048)


def schedule(shape: str, **changes: Any) -> Schedule:
    section = OptimSection(lr=2.0, warmup_steps=10, min_lr_share=0.1, schedule=shape, **changes)  # type: ignore[arg-type]
    return Schedule.from_section(section, steps=110)


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        ("linear", {5: 1.0, 10: 2.0, 60: 1.1, 110: 0.2, 999: 0.2}),
        ("wsd", {5: 1.0, 10: 2.0, 60: 2.0, 88: 2.0, 99: 1.1, 110: 0.2, 999: 0.2}),
        ("constant", {5: 1.0, 10: 2.0, 60: 2.0, 110: 2.0, 999: 2.0}),
        ("cosine", {5: 1.0, 10: 2.0, 60: 1.1, 110: 0.2, 999: 0.2}),
    ],
)
def test_shapes_at_their_corners(shape: str, values: dict[int, float]) -> None:
    for step, value in values.items():
        assert schedule(shape)(step) == pytest.approx(value), step


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd"])
def test_the_way_down_is_that_of_torchs_own_schedules(shape: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    # one fifth of 110 steps, or all behind the warm-up
    ours, start = schedule(shape), 88 if shape == "wsd" else 10
    if shape == "cosine":
        theirs: Any = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, T_max=110 - start, eta_min=0.2
        )
    else:
        theirs = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=110 - start)
    for step in range(start, 111):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9), step
        optimizer.step()
        theirs.step()


def test_wsd_decays_over_its_share_and_never_before_the_warmup_ends() -> None:
    assert (
        schedule("wsd", decay_share=0.5)(55) == 2.0 and schedule("wsd", decay_share=0.5)(56) < 2.0
    )
    assert (
        schedule("wsd", decay_share=1.0)(10) == 2.0 and schedule("wsd", decay_share=1.0)(11) < 2.0
    )


def test_warmup_in_steps_tokens_or_a_share() -> None:
    plan = BatchPlan.constant(4)

    def count(**given: Any) -> int:
        section = OptimSection(**given)
        return warmup_steps(section, steps=1000, plan=plan, sequence_length=8)

    assert count(warmup_steps=7) == 7
    assert count(warmup_tokens=320) == 10 and count(warmup_tokens=321) == 11
    assert count(warmup_share=0.002) == 2 and count(warmup_share=0.0001) == 1


def test_under_a_ramp_the_same_tokens_take_more_steps() -> None:
    section = OptimSection(warmup_tokens=375_000_000)
    steps = [
        warmup_steps(section, steps=0, plan=p, sequence_length=2048)
        for p in (BatchPlan.constant(1600), GPT3)
    ]
    # 121 M tokens in each stage: 3700 steps of 16 samples, 1850 of 32, 1234 of 48, and what is left
    # in batches of 64.
    assert steps == [115, 3700 + 1850 + 1234 + 86]


def test_gpt3s_ramp_is_linear_in_tokens() -> None:
    assert GPT3(1) * 2048 == 32768 and GPT3(10**6) * 2048 == 3_276_800
    full = next(step for step in range(1, 100_000) if GPT3(step) == 1600)
    assert GPT3.samples_in(full - 1) * 2048 == pytest.approx(12e9, rel=0.01)
    half = GPT3.steps_for(6e9 / 2048)
    assert GPT3(half) == pytest.approx(800, abs=16)


plans = st.builds(
    lambda start, by, stages, samples: BatchPlan.growing(
        start=start, by=by, size=start + by * stages, samples=samples
    ),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(0, 6),
    st.integers(1, 300),
)


@given(plans, st.integers(0, 200))
@settings(deadline=None)
def test_sums_and_their_inverse_agree_with_counting(plan: BatchPlan, steps: int) -> None:
    sizes = [plan(step) for step in range(1, steps + 1)]
    assert sizes == sorted(sizes)
    assert plan.samples_in(steps) == sum(sizes)
    samples = max(0, sum(sizes) - 1)
    needed = next(n for n in range(steps + 1) if plan.samples_in(n) >= samples)
    assert plan.steps_for(samples) == needed


# -- the ledger


def advance(book: SampleCursor, applied: bool = True) -> Batch:
    batch = book.next_batch()
    assert batch is not None
    book.advance(batch, applied=applied)
    return batch


def ramped(samples: int = 400) -> SampleCursor:
    return SampleCursor(
        SampleOrder(samples=samples, seed=1),
        batch_size=BatchPlan.growing(start=2, by=2, size=8, samples=24),
    )


def test_a_batch_that_is_left_out_does_not_make_the_next_one_larger() -> None:
    book = ramped()
    assert [len(advance(book).samples) for _ in range(4)] == [2, 2, 2, 2]
    assert [len(advance(book, applied=False).samples) for _ in range(3)] == [4, 4, 4]
    assert [len(advance(book).samples) for _ in range(2)] == [4, 4]
    assert book.batch_size == 6


def test_the_size_goes_back_with_the_state_and_through_json() -> None:
    book = ramped()
    for _ in range(5):
        advance(book)
    saved = msgspec.json.decode(msgspec.json.encode(book.state()))
    following = [advance(book) for _ in range(6)]
    book.restore(saved)
    assert [advance(book) for _ in range(6)] == following
    again = ramped()
    again.restore(saved)
    assert [advance(again) for _ in range(6)] == following


@given(st.integers(0, 2**32), st.integers(1, 40))
@settings(deadline=None)
def test_a_rollback_makes_the_batches_of_a_run_that_knew_from_its_beginning(
    seed: int, steps: int
) -> None:
    rng = random.Random(seed)
    book = ramped()
    saved = book.state()
    for _ in range(steps):
        if rng.random() < 0.2:
            saved = book.state()
        if rng.random() < 0.15:
            batch = advance(book, applied=False)
            book.skip_span(Span(first=batch.first, last=batch.last, origin="rejected", step=1))
        else:
            advance(book)
    if book.cursor > saved.cursor:
        book.skip_span(Span(first=saved.cursor, last=book.cursor, origin="rollback", step=1))
    book.restore(saved)
    knew = ramped()
    knew.quarantine = book.quarantine
    made = [advance(knew) for _ in range(saved.applied)]
    assert not made or made[-1].last <= book.cursor
    following = [(b.positions, b.samples) for b in (advance(book) for _ in range(8))]
    assert following == [(b.positions, b.samples) for b in (advance(knew) for _ in range(8))]


# -- in a run


def test_a_run_under_a_ramp_is_quiet_and_its_tokens_grow(tmp_path: Path) -> None:
    ramp = {"ramp_from": 2, "ramp_by": 2, "ramp_tokens": 2400, "micro_batch_size": 2, "steps": 70}
    config = tiny(tmp_path, train=ramp, guard={"loss_score": 5.0})
    run = trained(config)
    assert not of_kind(run, "verdict") and not of_kind(run, "rollback")
    plan = config.batch_plan
    rows = table(run, ("step", "tokens", "lr"))
    assert rows[:, 1].tolist() == [plan(step) * 32 for step in range(1, 71)]
    assert plan(1) == 2 and plan(70) == 8
    assert rows[:, 2].tolist() == [config.schedule(steps=70)(step) for step in range(1, 71)]


@pytest.mark.parametrize(
    ("train", "optim", "key"),
    [
        ({"ramp_from": 8}, {}, "train.batch_ramp.tokens"),
        ({"ramp_tokens": 8}, {}, "train.batch_ramp.start"),
        ({"ramp_from": 3, "ramp_tokens": 9, "micro_batch_size": 2}, {}, "train.batch_ramp.start"),
        ({"ramp_from": 16, "ramp_tokens": 9}, {}, "train.batch_ramp.start"),
        (
            {"ramp_from": 8, "ramp_by": 3, "ramp_tokens": 9, "micro_batch_size": 2},
            {},
            "train.batch_ramp.increment",
        ),
        ({}, {"warmup_share": 0.1, "warmup_tokens": 5}, "optim.warmup_tokens"),
        ({}, {"warmup_tokens": 10**9}, "optim.warmup_tokens"),
        ({}, {"stable": True, "name": "adam"}, "optim.stable"),
        ({"strategy": "fsdp"}, {"name": "adafactor"}, "optim.name"),
        ({"objective": "span"}, {}, "train.objective"),
    ],
)
def test_what_does_not_go_together_is_refused(
    train: dict[str, Any], optim: dict[str, Any], key: str
) -> None:
    tree = {"train": {"steps": 200, "batch_size": 16, **train}, "optim": optim}
    with pytest.raises(ConfigError) as caught:
        build_config(tree, file="x.toml", base=Path.cwd())
    assert caught.value.key == key


def test_epochs_are_counted_in_the_batches_of_the_plan() -> None:
    tree = {
        "train": {
            "epochs": 1,
            "batch_size": 8,
            "ramp_from": 4,
            "ramp_tokens": 256,
            "micro_batch_size": 4,
        }
    }
    made = build_config({**tree, "data": {"sequence_length": 32}}, file="x.toml", base=Path.cwd())
    assert isinstance(made, Config)
    assert [made.batch_plan(step) for step in (1, 2, 3, 4)] == [4, 4, 8, 8]
    assert made.batch_plan.steps_for(100) == 2 + 12  # 8 samples, then 92 in batches of 8
