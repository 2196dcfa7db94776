"""The parts of the guard, one by one: what the past says, what is recorded, what is measured, what
is applied.
"""

import errno
import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from guardrail.core.errors import RunDirectoryError
from guardrail.core.events.event import Event
from guardrail.core.events.run_state import Note
from guardrail.core.records.commands import Command
from guardrail.core.records.spans import Span
from guardrail.core.records.verdicts import Mode
from guardrail.decide.run_history import RunHistory, StepSetting
from guardrail.decide.sample_cursor import SampleCursor
from guardrail.decide.sample_order import SampleOrder
from guardrail.rundir.mailbox import CommandPoller
from guardrail.rundir.recorder import Recorder
from guardrail.rundir.run_directory import RunDirectory
from guardrail.torch.measure.gradient_norms import embedding_parameters
from guardrail.torch.measure.reduction import StepReduction
from guardrail.torch.measure.update_gate import Gate
from guardrail.torch.state import rng_state as rng
from guardrail.torch.state.forward_side_effects import ForwardSideEffects
from guardrail.torch.state.training_state import TrainingState
from tests.support.events import make_line
from tests.support.lab import wait_for
from tests.support.ranks import run_ranks
from tests.support.reduced import make_reduced
from tests.support.tiny import VOCABULARY, Setup, Tiny

# -- the past


def test_a_setting_is_a_function_of_the_step() -> None:
    setting = StepSetting(1.0)
    setting.set(11, 0.5)
    setting.set(21, 0.25)
    assert [setting.at(step) for step in (1, 10, 11, 20, 21, 99)] == [
        1.0,
        1.0,
        0.5,
        0.5,
        0.25,
        0.25,
    ]
    setting.set(11, 2.0)  # what was set for later steps is gone: this is the last word
    assert [setting.at(step) for step in (10, 11, 21)] == [1.0, 2.0, 2.0]


def test_a_setting_that_a_rollback_overtakes_holds_from_its_target_on() -> None:
    setting = StepSetting(1.0)
    setting.set(11, 0.5)
    setting.set(21, 0.25)
    setting.rewind(15)
    assert [setting.at(step) for step in (10, 11, 15, 16, 21)] == [1.0, 0.5, 0.5, 0.25, 0.25]
    setting.rewind(15)
    assert setting.changes == [(11, 0.5), (16, 0.25)]
    setting.rewind(100)
    assert setting.at(100) == 0.25


def event(kind: str, *, step: int = 0, timeline: int = 0, **data: Any) -> Event:
    return make_line(seq=0, time=0.0, step=step, timeline=timeline, kind=kind, data=data)


SPAN = Span(first=80, last=88, origin="rejected", step=11)


def test_the_past_of_a_journal() -> None:
    raw = msgspec.to_builtins(SPAN)
    rolled = Span(first=72, last=104, origin="rollback", step=12)
    past = RunHistory.from_events(
        [
            event("started", samples=100),
            event("command", step=5, command="lr", value=0.5, effect="applied"),
            event("command", step=6, command="lr", value=9.0, effect="refused"),
            event("skipped", step=10, span=raw),
            event("skipped", step=10, span=raw),
            event("incident", number=1),
            event(
                "rollback",
                step=12,
                to_step=5,
                new_timeline=1,
                window=[72, 104],
                span=msgspec.to_builtins(rolled),
            ),
            event(
                "command",
                step=8,
                timeline=1,
                command="mode",
                value=list(Mode).index(Mode.ASK),
                effect="applied",
            ),
            event("restarted", step=6, timeline=2),
            event("ended", step=9, timeline=2, phase="stopped"),
        ]
    )
    assert past.spans == [SPAN, rolled]
    assert (past.timeline, past.incident, past.restarts, past.ended, past.mode) == (
        2,
        1,
        1,
        "stopped",
        Mode.ASK,
    )
    assert past.lr.changes == [(6, 0.5)]
    # Timeline 0 lives up to 5, where 1 began; 1 up to 6, where 2 began.
    alive = {(t, s) for t in range(3) for s in range(12) if past.lives(timeline=t, step=s)}
    assert alive == {(0, s) for s in range(6)} | {(1, s) for s in range(7)} | {
        (2, s) for s in range(12)
    }


def test_a_checkpoint_whose_name_is_used_again_is_judged_again() -> None:
    past = RunHistory.from_events(
        [
            event("checkpoint", path="step-20", state=state)
            for state in ("candidate", "good", "suspect")
        ]
    )
    assert past.good == past.suspects == {"step-20"}
    past.add(event("checkpoint", path="step-20", state="pruned"))
    past.add(event("checkpoint", path="step-20", state="candidate"))
    assert not past.good and not past.suspects


# -- the record


def made(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path, "run", "")


class Disk:
    """Refuses writes while `full`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        write_event, write = RunDirectory.write_event, os.write

        def writing_event(run: RunDirectory, event: Event) -> Event:
            self.refuse()
            return write_event(run, event)

        def writing(descriptor: int, data: bytes) -> int:
            self.refuse()
            return write(descriptor, data)

        monkeypatch.setattr(RunDirectory, "write_event", writing_event)
        monkeypatch.setattr("guardrail.rundir.metrics.os.write", writing)

    def refuse(self) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_events_and_rows_wait_for_a_full_disk_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guardrail.rundir.recorder.RETRY_SECONDS", 0.0)
    disk, run, learnt = Disk(monkeypatch), made(tmp_path), list[str]()
    recorder = Recorder(run, active=True, learn=lambda event: learnt.append(event.kind))
    recorder.write(Event(kind="one", step=1))
    recorder.row({"step": 1.0})
    disk.full = True
    for step in (2, 3):
        recorder.write(Event(kind="more", step=step))
        recorder.row({"step": float(step)})
    assert learnt == ["one", "more", "more"], "what happened is known at once, written or not"
    assert recorder.disk.startswith("failing: ") and os.strerror(errno.ENOSPC) in recorder.disk
    assert [e.kind for e in run.events()] == ["one"] and len(run.metrics()) == 1
    disk.full = False
    recorder.row({"step": 4.0})
    assert recorder.disk == "ok"
    assert run.metrics().column("step").tolist() == [1, 2, 3, 4]
    events = run.events()
    assert [e.step for e in events if e.kind in ("one", "more")] == [1, 2, 3]
    assert [e.seq for e in events] == list(range(1, len(events) + 1))
    states = [e.data["state"] for e in events if e.kind == "disk"]
    assert states[0] == "failing" and states[-1] == "ok"
    assert learnt == ["one", "more", "more"]
    recorder.close()


def test_what_waits_is_written_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, run = Disk(monkeypatch), made(tmp_path)
    recorder = Recorder(run, active=True, learn=lambda event: None)
    disk.full = True
    recorder.row({"step": 1.0})
    recorder.write(Event(kind="late", step=1))
    disk.full = False
    recorder.close()
    assert "late" in [e.kind for e in run.events()]
    assert run.metrics().column("step").tolist() == [1]


def test_other_ranks_learn_and_write_nothing(tmp_path: Path) -> None:
    run, learnt = made(tmp_path), list[Event]()
    recorder = Recorder(run, active=False, learn=learnt.append)
    recorder.write(Note(message="hello", step=3, timeline=1, data={"text": "x"}))
    recorder.row({"step": 1.0})
    recorder.note_failing("checkpoint", "full")
    recorder.close()
    assert [(e.kind, e.step, e.timeline, e.data) for e in learnt] == [("note", 3, 1, {"text": "x"})]
    assert not run.events() and not len(run.metrics())


@pytest.mark.fault("B1")
def test_an_event_that_waits_for_the_disk_keeps_its_own_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, run = Disk(monkeypatch), made(tmp_path)
    recorder = Recorder(run, active=True, learn=lambda event: None)
    disk.full = True
    happened = recorder.write(
        Note(message="it happened now", step=3, timeline=1, data={"loss": 2.5})
    )
    full_since = time.time()
    time.sleep(0.01)
    disk.full = False
    recorder.flush()
    note, failing, ok = run.events()
    assert (note.kind, note.time, note.step, note.timeline, note.data) == (
        "note",
        happened.time,
        3,
        1,
        {"loss": 2.5},
    )
    assert failing.data["state"] == "failing" and failing.time <= full_since < ok.time
    recorder.close()


def test_disk_says_each_change_once(tmp_path: Path) -> None:
    run = made(tmp_path)
    recorder = Recorder(run, active=True, learn=lambda event: None)
    reasons = {"checkpoint": "no room", "metrics": "full"}
    for _ in range(3):
        recorder.note_failing("checkpoint", reasons["checkpoint"])
    recorder.note_failing("metrics", reasons["metrics"])
    assert recorder.disk == f"failing: {'; '.join(reasons.values())}"
    recorder.note_working("checkpoint")
    recorder.note_working("checkpoint")
    recorder.note_working("metrics")
    assert [e.data["state"] for e in run.events()] == ["failing", "failing", "failing", "ok"]
    recorder.close()


# -- the inbox


def test_commands_come_in_order_and_not_before_their_step(tmp_path: Path) -> None:
    run = made(tmp_path)
    run.send(Command(id="later", kind="stop", at_step=7))
    run.send(Command(id="now", kind="pause"))
    mailbox = CommandPoller(run, seconds=0.01)
    try:
        first = mailbox.next(1)
        assert first is not None and first.id == "now", (
            "what waited before the start is there at once"
        )
        assert mailbox.next(6) is None
        due = mailbox.next(7)
        assert due is not None and due.id == "later"
        time.sleep(0.05)
        assert mailbox.next(99) is None, (
            "a command that is not answered yet is not handed out twice"
        )
        assert len(list(run.commands.iterdir())) == 2
        run.send(Command(id="third", kind="resume"))
        wait_for(lambda: (found := mailbox.next(1)) is not None and found.id == "third")
        (run.commands / "junk.json").write_text("{")
        wait_for(lambda: run.events())
        (refused,) = run.events()
        assert (refused.kind, refused.data["effect"]) == ("command", "refused")
    finally:
        mailbox.close()
    with pytest.raises(RunDirectoryError):
        run.send(Command(id="bad", kind="lr", value=-1.0))


# -- what is measured


def whole(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).detach()


def measured(rank: int, kind: str) -> dict[str, Any]:
    """One window by hand: sums of token losses, and what plain torch says of the same gradients."""
    setup = Setup(kind)
    probes = StepReduction(setup.model, rank=setup.rank, world=setup.world)
    tokens = torch.randint(0, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(rank))
    logits = setup.model(tokens[:, :-1])
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    count = 10 + rank  # of the 20 labels
    total, nominal = losses[:count].sum(), 40.0
    (total * (setup.world / nominal)).backward()
    stop, command = rank == 1, ((2, 0.5) if rank == 0 else (0, 0.0))
    result = probes.reduce(
        total,
        count,
        nominal_tokens=nominal,
        step_time=1.0 + rank,
        command=command,
        stop=stop,
        incomplete=False,
    )
    gradients = [whole(p.grad) for p in setup.model.parameters()]
    embedding = [whole(p.grad) for p in embedding_parameters(setup.model)]
    factor = nominal / sum(10 + r for r in range(setup.world))
    return {
        "reduced": result,
        "loss": total.item(),
        "count": count,
        "norm": torch.nn.utils.get_total_norm(gradients).item() * factor,
        "embed": torch.nn.utils.get_total_norm(embedding).item() * factor,
    }


@pytest.mark.parametrize(("world", "kind"), [(1, "plain"), (2, "ddp"), (2, "fsdp")])
def test_norms_and_sums_over_ranks_and_shards(tmp_path: Path, world: int, kind: str) -> None:
    ranks = run_ranks(measured, world, kind, folder=tmp_path, init=world > 1)
    results = [r["reduced"] for r in ranks]
    assert all(result == results[0] for result in results), "every rank holds the same numbers"
    result = results[0]
    tokens = sum(r["count"] for r in ranks)
    assert result.tokens == tokens
    assert result.loss == pytest.approx(sum(r["loss"] for r in ranks) / tokens, rel=1e-6)
    assert result.scale == pytest.approx(40.0 / tokens)
    assert result.grad_norm == pytest.approx(ranks[0]["norm"], rel=1e-5)
    assert result.embed_grad_norm == pytest.approx(ranks[0]["embed"], rel=1e-5)
    assert result.embed_share == pytest.approx(
        (ranks[0]["embed"] / ranks[0]["norm"]) ** 2, rel=1e-5
    )
    assert (result.command_kind, result.command_value) == (2, 0.5)
    assert result.stop == (world > 1)
    assert result.step_times == tuple(1.0 + rank for rank in range(world))


def test_a_norm_over_gradients_of_which_some_are_missing() -> None:
    model = Tiny()
    probes = StepReduction(model, rank=0, world=1)
    present = [p for index, p in enumerate(model.parameters()) if index % 2]
    for p in present:
        p.grad = torch.full_like(p, 0.5)
    result = probes.reduce(torch.tensor(3.0), 2, nominal_tokens=None, step_time=0.0)
    assert result.grad_norm == pytest.approx(math.sqrt(sum(p.numel() for p in present)) * 0.5)
    assert result.embed_grad_norm == 0.0 and result.loss == 1.5
    nothing = StepReduction(Tiny(), rank=0, world=1).reduce(
        torch.tensor(0.0), 0, nominal_tokens=8.0, step_time=0.0
    )
    assert (nothing.tokens, nothing.grad_norm, nothing.scale) == (0, 0.0, 1.0) and math.isnan(
        nothing.loss
    )


def test_watching_a_gradient_neither_copies_nor_changes_it() -> None:
    """autograd takes a gradient over that nobody else holds; of one that a hook still holds it
    makes a copy.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3)).to(torch.bfloat16)
    model[2].double()  # norms of any kind of number add up
    made: dict[str, int] = {}
    for name, p in model.named_parameters():
        p.register_hook(lambda gradient, name=name: made.update({name: gradient.data_ptr()}))
    probes = StepReduction(model, rank=0, world=2)
    model[2](model[1](model[0](torch.tensor([[1, 2, 1]]))).double()).square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {name: g.data_ptr() for name, g in gradients.items()} == made
    assert float(probes.own_norms.total()) == pytest.approx(
        sum(g.double().norm().item() for g in gradients.values())
    )


def test_a_nan_names_its_parameter() -> None:
    model = Tiny()
    probes = StepReduction(model, rank=0, world=1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    name, bias = next(
        (name, p)
        for name, p in model.named_parameters()
        if name.startswith("blocks.1") and p.ndim == 1
    )
    assert bias.grad is not None
    bias.grad[2] = math.nan
    result = probes.reduce(torch.tensor(1.0), 1, nominal_tokens=None, step_time=0.0)
    assert (
        math.isnan(result.grad_norm)
        and result.nonfinite_grad == (0,)
        and result.nonfinite_loss == ()
    )
    assert probes.find_nonfinite_gradients() == [name]


# -- what is applied


def gate_of(model: nn.Module, *, clip: float = 1.0, lr: float = 0.1) -> Gate:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return Gate(
        [optimizer],
        parameters=list(model.parameters()),
        embedding=embedding_parameters(model),
        clip=clip,
    )


def with_gradients(seed: int = 0, size: float = 1.0) -> Tiny:
    torch.manual_seed(seed)
    model = Tiny()
    for p in model.parameters():
        p.grad = torch.randn_like(p) * size
    return model


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_clipping_is_torchs(size: float) -> None:
    model, other = with_gradients(size=size), with_gradients(size=size)
    gate = gate_of(model)
    norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0).item()
    gate.apply(gate.factor(make_reduced(grad_norm=norm)))
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.grad is None


def test_the_factor_weighs_tokens_and_shrinks_the_embedding_before_it_clips() -> None:
    gate = gate_of(Tiny())
    assert gate.factor(make_reduced(grad_norm=0.5, scale=2.0)) == 2.0
    assert gate.factor(make_reduced(grad_norm=5.0, scale=2.0)) == pytest.approx(2.0 / 5.0)
    shrunk = math.sqrt(16.0 + (0.1 * 3.0) ** 2)
    assert gate.factor(
        make_reduced(grad_norm=5.0, embed_grad_norm=3.0), embed_alpha=0.1
    ) == pytest.approx(1.0 / shrunk)
    assert gate_of(Tiny(), clip=0.0).factor(make_reduced(grad_norm=5.0)) == 1.0
    assert math.isnan(gate.factor(make_reduced(grad_norm=math.nan)))
    assert gate.factor(make_reduced(grad_norm=math.inf)) == 0.0


def test_rates_hold_for_one_update_and_the_embedding_alone_is_shrunk() -> None:
    model, plain = with_gradients(), with_gradients()
    before = [p.detach().clone() for p in model.parameters()]
    gate = gate_of(model, clip=0.0, lr=0.1)
    gate.apply(1.0, lr_factor=0.5, embed_alpha=0.1)
    assert gate.optimizers[0].param_groups[0]["lr"] == 0.1
    embedding = {id(p) for p in gate.embedding}
    assert len(embedding) == 1
    for p, old, other in zip(model.parameters(), before, plain.parameters(), strict=True):
        assert other.grad is not None
        share = 0.1 if id(p) in embedding else 1.0
        torch.testing.assert_close(p.detach(), old - 0.05 * share * other.grad)


def test_leaving_out_drops_the_gradients_and_touches_nothing_else() -> None:
    model = with_gradients(size=math.nan)
    before = [p.detach().clone() for p in model.parameters()]
    gate_of(model).drop_gradients()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


# -- dice and running statistics


def test_dice_survive_json() -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    np.random.normal()  # leaves a second normal value in the cache
    random.gauss(0, 1)
    state = json.loads(json.dumps(rng.capture_rng_states()))
    draw = lambda: (random.gauss(0, 1), random.random(), np.random.normal(), torch.rand(3).tolist())  # noqa: E731
    first = draw()
    assert draw() != first
    rng.restore_rng_states(state)
    assert draw() == first


def test_an_attempt_is_undone_and_redone() -> None:
    setup = Setup()
    norm = nn.BatchNorm1d(6)
    setup.inner.add_module("running", norm)
    attempt = ForwardSideEffects(TrainingState(setup.model, setup.optimizers))

    def look() -> tuple[Any, ...]:
        assert norm.running_mean is not None and norm.num_batches_tracked is not None
        return (
            setup.inner.seen.tolist(),
            norm.running_mean.tolist(),
            int(norm.num_batches_tracked),
            random.getstate(),
        )

    for _ in range(2):
        attempt.begin()
        before = look()
        setup.inner(torch.zeros((1, 2), dtype=torch.long))
        norm(torch.full((3, 6), math.nan))
        random.random()
        after = look()
        attempt.undo()
        assert look() == before
        attempt.redo()
        assert look()[0] == after[0] and look()[2:] == after[2:] and math.isnan(look()[1][0])
        attempt.undo()
        assert look() == before
        norm(torch.zeros((3, 6)))  # a healthy one, which counts


# -- the ledger as the guard uses it


def test_a_stretch_of_rejections_is_a_streak_until_something_is_applied() -> None:
    ledger = SampleCursor(SampleOrder(samples=100, shuffled=False), batch_size=8)
    streaks = []
    for applied in (True, False, False, True, False):
        batch = ledger.next_batch()
        assert batch is not None
        streaks.append(batch.streak)
        if not applied:
            ledger.skip_span(Span(first=batch.first, last=batch.last, origin="rejected", step=1))
        ledger.advance(batch, applied=applied)
    assert streaks == [0, 0, 1, 2, 0]
