"""The guard in a loop of one's own, without a run directory and without the trainer; and its parts,
one by one.
"""

import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import guardrail.torch.checkpoint.disk_checkpoints
from guardrail.core.config import GuardConfig
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.commands import Command
from guardrail.core.records.status import Phase
from guardrail.core.records.verdicts import Action, Mode, Verdict
from guardrail.core.sections import CheckpointSection, SnapshotSection
from guardrail.decide.sample_cursor import SampleCursor
from guardrail.decide.sample_order import SampleOrder
from guardrail.rundir.checkpoint_folders import checkpoint_dirs
from guardrail.rundir.run_directory import RunDirectory
from guardrail.torch.checkpoint.checkpoint_index import CheckpointEvent
from guardrail.torch.guard.guard import Guard, Step
from guardrail.torch.state.digests import component_digests
from tests.support.lab import wait_for

VOCABULARY, LENGTH, BATCH = 17, 6, 4


class Model(nn.Module):
    """With all that a forward pass can leave behind: dropout, running statistics, a count."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.norm = nn.BatchNorm1d(8)
        self.out = nn.Linear(8, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.norm(x.flatten(0, 1)).view_as(x)
        return self.out(F.dropout(x, 0.2, self.training))


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.02),
}


class Loop:
    """A training loop as a user writes it: global dice, a torch scheduler, mean losses."""

    def __init__(
        self,
        optimizer: str = "adamw",
        *,
        bad: range = range(0),
        factor: float = math.nan,
        steps: int = 40,
        run: RunDirectory | None = None,
        **settings: Any,
    ) -> None:
        torch.manual_seed(1)
        self.bad, self.factor = bad, factor
        self.data = torch.randint(0, VOCABULARY, (200, LENGTH + 1)) // torch.randint(1, 4, (200, 1))
        self.model = Model()
        self.optimizer = OPTIMIZERS[optimizer](self.model)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: 1 / (1 + 0.05 * step)
        )
        self.attempts: list[Step] = []
        self.losses: dict[int, float] = {}
        # 40 steps of 4 samples: each bad batch is already 2.5 % of the data.
        guard = {"warmup": 10, "window": 32, "confirm": 4, "max_skipped_share": 1.0, **settings}
        self.guard = Guard.from_config(
            GuardConfig(
                guard=GuardOptions(**guard),
                snapshots=SnapshotSection(every=5, keep=3),
                checkpoint=CheckpointSection(every=10),
            ),
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            data=SampleOrder(samples=len(self.data), seed=3),
            batch_size=BATCH,
            total_steps=steps,
            run=run,
        )

    def loss(self, step: Step) -> Tensor:
        tokens = self.data[list(step.batch.samples)]
        loss = F.cross_entropy(self.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        return loss * self.factor if any(p in self.bad for p in step.batch.positions) else loss

    def train(self) -> "Loop":
        for step in self.guard:
            self.attempts.append(step)
            loss = self.loss(step)
            loss.backward()
            step.finish(loss)
            if step.applied:
                self.losses[step.number] = loss.item()
        return self

    def digest(self) -> dict[str, str]:
        state = self.guard.state
        return component_digests(state.tensors(), state.scalars())


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("bad", [range(60, 64), range(60, 72)])
def test_a_loop_of_ones_own_is_exact(optimizer: str, bad: range) -> None:
    a = Loop(optimizer, bad=bad).train()
    assert a.guard.phase is Phase.FINISHED
    actions = {step.verdict.action for step in a.attempts if step.verdict is not None}
    assert actions == (
        {Action.APPLY, Action.SKIP}
        if len(bad) == 4
        else {Action.APPLY, Action.SKIP, Action.ROLLBACK}
    )
    b = Loop(optimizer, mode=Mode.OFF)
    b.guard.cursor.quarantine.read(a.guard.cursor.quarantine.lines())
    b.train()
    assert len(b.attempts) == 40 < len(a.attempts)
    assert a.losses == b.losses
    assert a.digest() == b.digest()
    assert all(math.isfinite(value) for value in a.losses.values())
    assert torch.isfinite(a.model.norm.running_mean).all()  # type: ignore[arg-type]


def test_it_is_what_plain_torch_does() -> None:
    guarded = Loop().train()
    torch.manual_seed(1)
    plain = Loop()
    for number in range(1, 41):
        batch = plain.guard.cursor.next_batch()
        assert batch is not None
        step = Step(plain.guard.finish, number=number, batch=batch, began=0.0)
        loss = plain.loss(step)
        loss.backward()
        nn.utils.clip_grad_norm_(plain.model.parameters(), 1.0)
        plain.optimizer.step()
        plain.scheduler.step()
        plain.optimizer.zero_grad()
        plain.guard.cursor.advance(batch, applied=True)
        assert loss.item() == pytest.approx(guarded.losses[number], rel=1e-4)


def test_a_step_that_is_not_finished_is_an_error() -> None:
    loop = Loop()
    with pytest.raises(RuntimeError, match=r"without step\.finish"):
        for step in loop.guard:
            loop.loss(step).backward()
    with pytest.raises(RuntimeError, match="called twice"):
        loop = Loop()
        for step in loop.guard:
            loss = loop.loss(step)
            loss.backward()
            step.finish(loss)
            step.finish(loss)


def test_an_exception_in_the_body_gets_out_and_everything_is_released(tmp_path: Path) -> None:
    before = threading.active_count()
    run = RunDirectory.create(tmp_path, "own", "")
    loop = Loop(run=run)
    with pytest.raises(ZeroDivisionError):
        for step in loop.guard:
            loss = loop.loss(step)
            loss.backward()
            step.finish(loss)
            if step.number == 3:
                assert threading.active_count() >= before + 3  # heartbeat, inbox, checkpoints
                raise ZeroDivisionError
    assert threading.active_count() == before
    assert run.metrics().column("step").tolist() == [1, 2, 3]
    assert run.read_ranks()[0].step_seconds > 0, "its own time, which shows a straggler"
    assert not any(event.kind == "ended" for event in run.events())


def test_a_loop_that_breaks_off_can_be_taken_up_again(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "own", "")
    whole = Loop(bad=range(60, 72)).train()
    first = Loop(bad=range(60, 72), run=run)
    for step in first.guard:
        loss = first.loss(step)
        loss.backward()
        step.finish(loss)
        if step.number == 26:
            first.guard.snapshots.store.wait(60)  # type: ignore[union-attr]
            break
    second = Loop(bad=range(60, 72), run=run).train()
    assert second.attempts[0].number == 21
    assert {number: whole.losses[number] for number in second.losses} == second.losses
    assert second.digest() == whole.digest()


def test_a_checkpoint_that_is_pruned_before_anybody_looked_at_its_commit_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raised StopIteration in a generator, which ended the run, now and then, after a kill."""
    run = RunDirectory.create(tmp_path, "own", "")
    loop = Loop(run=run)
    store = loop.guard.snapshots.store
    assert store is not None
    gone: list[str] = []
    look = store.take_events

    def poll() -> list[CheckpointEvent]:
        """As a prune between the commit and this look, of a checkpoint of a stretch that was given
        up since.
        """
        events = look()
        for event in events:
            if event.state == "candidate" and event.step and not gone:
                gone.append(event.name)
                monkeypatch.setattr(
                    loop.guard.snapshots._search.history,
                    "lives",
                    lambda *, timeline, step, gone=event.step: step != gone,
                )
                del store._index._infos[event.name]
        return events

    monkeypatch.setattr(store, "take_events", poll)
    loop.train()
    assert gone and loop.guard.phase is Phase.FINISHED


def test_ask_without_anybody_to_ask_takes_its_own_proposal() -> None:
    loop = Loop(bad=range(60, 72), mode=Mode.ASK).train()
    assert loop.guard.phase is Phase.FINISHED and loop.guard.timeline == 1
    assert loop.digest() == Loop(bad=range(60, 72)).train().digest()


def test_an_update_that_a_person_lets_through_leaves_what_it_would_have_left(
    tmp_path: Path,
) -> None:
    run = RunDirectory.create(tmp_path, "own", "")
    loop = Loop(bad=range(60, 72), factor=50.0, mode=Mode.ASK, run=run)

    def answer() -> None:
        wait_for(lambda: any(event.kind == "paused" for event in run.events()), what="a question")
        run.send(Command(id="go-on", kind="answer", value=1.0))

    person = threading.Thread(target=answer)
    person.start()
    loop.train()
    person.join()
    assert loop.attempts[17].applied and loop.attempts[17].number == 16
    told = Loop(bad=range(60, 72), factor=50.0, mode=Mode.OFF)
    told.guard.cursor.quarantine.read(loop.guard.cursor.quarantine.lines())
    told.train()
    assert loop.losses == told.losses
    assert loop.digest() == told.digest()


def test_out_of_rollbacks_it_halts() -> None:
    loop = Loop(bad=range(60, 72), rollbacks=0).train()
    assert loop.guard.phase is Phase.HALTED
    assert (loop.guard.step, loop.attempts[-1].applied) == (15, False)


@pytest.mark.fault("A9")
def test_a_process_that_dies_while_it_halts_leaves_no_candidate_with_the_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run directory is copied right after the commit of the last checkpoint: that is what such
    a death leaves.
    """
    run = RunDirectory.create(tmp_path, "halts", "")
    commit = guardrail.torch.checkpoint.disk_checkpoints.commit

    def copied(job: Any, *given: Any, **named: Any) -> Any:
        done = commit(job, *given, **named)
        if job.snapshot.step == 25:
            shutil.copytree(run.path, tmp_path / "died")
        return done

    monkeypatch.setattr(guardrail.torch.checkpoint.disk_checkpoints, "commit", copied)
    loop = Loop(run=run)
    for step in loop.guard:
        loss = loop.loss(step)
        loss.backward()
        step.finish(loss)
        if step.number == 25:
            verdict = Verdict(action=Action.HALT, step=25, onset=22, reason="the loss diverged")
            loop.guard.verdict_executor.halt(verdict)
    assert loop.guard.phase is Phase.HALTED
    died = RunDirectory.open(tmp_path / "died")
    assert checkpoint_dirs(died.checkpoints)[0].name == "step-00000025"
    Loop(run=died).train()
    assert [event.step for event in died.events() if event.kind == "restarted"] == [20]


def test_the_data_end() -> None:
    loop = Loop(steps=0)
    loop.guard.cursor.limit = 30
    loop.train()
    assert loop.guard.phase is Phase.FINISHED
    assert [len(step.batch.samples) for step in loop.attempts] == [4] * 7 + [2]


@pytest.mark.fault("B9")
def test_a_run_that_ends_with_its_data_has_a_total_and_a_time() -> None:
    """Given in epochs: 25 batches; one that is skipped makes the run a step shorter."""
    loop = Loop(bad=range(40, 44), steps=0)
    loop.guard.cursor.limit = 100
    seen = []
    for step in loop.guard:
        loss = loop.loss(step)
        loss.backward()
        step.finish(loss)
        status = loop.guard.status()
        seen.append((status.total_steps, status.eta_seconds > 0))
    assert seen[0] == (25, True) and seen[9] == (25, True)
    assert seen[-1] == (24, False) and loop.guard.step == 24
    assert all(total in (24, 25) for total, _ in seen)


def test_growing_batches_are_counted_to_the_end_of_the_data() -> None:
    ledger = SampleCursor(
        SampleOrder(samples=100), batch_size=lambda step: 4 if step <= 5 else 8, limit=100
    )
    assert ledger.batches_left() == 15
    for _ in range(6):
        batch = ledger.next_batch()
        assert batch is not None
        ledger.advance(batch, applied=True)
    assert ledger.batches_left() == 9
    assert SampleCursor(SampleOrder(samples=100), batch_size=4).batches_left() == 0, "endless"
