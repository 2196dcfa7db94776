"""Both gates over random histories: `guard.decide = "deferred"` leaves what `"sync"` leaves, in memory
and on the disk.
"""

from __future__ import annotations

import copy
import math
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from guardrail.core.config import GuardConfig
from guardrail.core.errors import UsageError
from guardrail.core.guard_options import EscalationStep, GuardOptions
from guardrail.core.records.commands import Command
from guardrail.core.records.status import Phase
from guardrail.core.records.verdicts import Action, Mode
from guardrail.core.sections import CheckpointSection, SnapshotSection
from guardrail.decide.controller import Controller
from guardrail.decide.sample_order import SampleOrder
from guardrail.rundir.checkpoint_folders import checkpoint_dirs
from guardrail.rundir.manifest import read_manifest
from guardrail.rundir.run_directory import RunDirectory
from guardrail.rundir.verification import fingerprint
from guardrail.torch.checkpoint.disk_checkpoints import CheckpointStore
from guardrail.torch.guard import command_handler, command_inbox
from guardrail.torch.guard.guard import Guard
from guardrail.torch.state import rng_state as rng
from guardrail.torch.state.digests import component_digests

torch.set_num_threads(1)  # a model this small only waits for a second one

BATCH, SAMPLES = 4, 400
SNAPSHOTS, CHECKPOINTS = 4, 8  # steps between two of them
FIRST = 15  # update before which nothing happens: the detectors must know what is usual
TIMES = ("time", "step_time", "guard_time", "step_time_max", "slowest_rank")
# Keys of journal lines and checkpoints that hold times, or differ between two runs.
CLOCKS = (
    "seconds",
    "steps_lost_most",  # from the time of a step
    "seconds_lost",
    "text",
    "bytes",
    "host",
    "versions",
    "deadline",
    "run_id",
    "journal_seq",
)


# -- histories


@dataclass
class History:
    """What happens to one run.

    Attributes:
        bad: position of the order -> factor of the loss of the batch that holds it.
        late: positions whose batch is applied before it is judged, unless the host waits for that
        step anyway.
        commands: (kind, value, step that it comes with), in their order; step 0: directly after the
        one before it.
        answers: to the guard's questions, one each; a question without one gets what was proposed.
        stop: update with which a stop signal comes, 0: none. The run is then resumed.
        overflows: positions of batches whose scaled gradients overflow. Such a run needs a loss
        scale.
    """

    mode: Mode = Mode.AUTO
    rollbacks: int = 3
    steps: int = FIRST + 13
    bad: dict[int, float] = field(default_factory=dict)
    late: set[int] = field(default_factory=set)
    commands: list[tuple[str, float, int]] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    stop: int = 0
    overflows: set[int] = field(default_factory=set)


EVENTS = (
    "healthy",
    "rejected",
    "not finite",
    "three rejected",
    "late",
    "stop signal",
    "stop",
    "pause",
    "pause and go back",
    "rollback",
    "checkpoint",
    "skip",
    "lr",
    "overflow",
)


def add_event(history: History, event: str, step: int) -> None:
    """Let something happen at about update `step`; positions count as if no batch had been skipped
    before.
    """
    first = (step - 1) * BATCH
    commands = history.commands
    match event:
        case "rejected":
            history.bad[first + 1] = 1e4
        case "not finite":
            history.bad[first + 2] = math.nan
        case "three rejected":
            history.bad |= dict.fromkeys(range(first, first + 4 * BATCH), 1e4)
        case "late":
            history.bad[first + 1] = 1e4
            history.late.add(first + 1)
        case "stop signal":
            history.stop = history.stop or step
        case "stop":
            commands.append(("stop", 0.0, step))
        case "pause":
            commands += [("pause", 0.0, step), ("resume", 0.0, 0)]
        case "pause and go back":
            commands += [("pause", 0.0, step), ("checkpoint", 0.0, 0)]
            commands += [("rollback", math.nan, 0), ("resume", 0.0, 0)]
        case "rollback":
            commands.append(("rollback", math.nan, step))
        case "checkpoint":
            commands.append(("checkpoint", 0.0, step))
        case "skip":
            commands.append(("skip", 2.0, step))
        case "lr":
            commands.append(("lr", 0.5, step))
        case "overflow":
            history.overflows.add(first + 1)


@st.composite
def histories(draw: st.DrawFn) -> History:
    """A few events after the warm-up, then the rest of the run."""
    asks = draw(st.booleans())
    history = History(mode=Mode.ASK if asks else Mode.AUTO, rollbacks=draw(st.sampled_from([0, 3])))
    step = FIRST
    for event in draw(st.lists(st.sampled_from(EVENTS), min_size=1, max_size=4)):
        add_event(history, event, step)
        step += draw(st.integers(1, 5))
    history.answers = draw(st.lists(st.integers(0, 2), max_size=3)) if asks else []
    return history


class ScriptedMailbox:
    """Gives the commands and answers of a history in their order; a stop leaves the rest for the
    run that resumes.
    """

    history: History
    guard: Guard
    problem = ""

    def __init__(self, run: RunDirectory, **options: object) -> None:
        self._count = 0

    def next(self, step: int) -> Command | None:
        history = self.history
        if self.guard.command_handler.question.text:
            return self._made("answer", float(history.answers.pop(0))) if history.answers else None
        if not history.commands or history.commands[0][2] > step:
            return None
        kind, value, _ = history.commands.pop(0)
        return self._made(kind, value)

    def _made(self, kind: str, value: float) -> Command:
        self._count += 1
        return Command(id=f"{kind}-{self._count}", kind=kind, value=value, who="tester")

    def close(self) -> None:
        pass


# -- the run


class Model(nn.Module):
    """Dropout, running statistics, and a buffer that each pass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1)
        )
        self.register_buffer("passes", torch.zeros(2))
        self.passes: Tensor

    def forward(self, rows: Tensor) -> Tensor:
        self.passes += torch.rand(2)
        output: Tensor = self.layers(rows)
        return output


class Loop:
    """A custom loop that draws from every generator, before and after `finish`."""

    def __init__(self, gate: str, history: History, run: RunDirectory) -> None:
        torch.manual_seed(3)
        self.history = history
        self.model = Model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.03, fused=True)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if history.overflows else None
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=80)
        signals = SimpleNamespace(requested=False)
        self.signals = signals
        sections: dict[str, Any] = {
            "mode": history.mode,
            "rollbacks": history.rollbacks,
            "gate": gate,
        }
        guard = GuardOptions(
            window=32,
            warmup=12,
            steps_until_good=3,
            log_update_norm=True,
            answer_timeout=1e-9,  # what no answer is scripted for is answered at once
            escalation=(
                EscalationStep(action="skip"),
                EscalationStep(action="rollback", max_uses=9),
            ),
            **sections,
        )
        self.guard = Guard.from_config(
            GuardConfig(
                guard=guard,
                snapshots=SnapshotSection(every=SNAPSHOTS, keep=4),
                checkpoint=CheckpointSection(every=CHECKPOINTS),
            ),
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            scaler=self.scaler,
            data=SampleOrder(samples=SAMPLES, seed=1),
            batch_size=BATCH,
            total_steps=history.steps,
            run=run,
            signals=signals,  # type: ignore[arg-type]
        )
        ScriptedMailbox.history, ScriptedMailbox.guard = history, self.guard
        self._judge_late()

    def loss(self, samples: tuple[int, ...], positions: tuple[int, ...]) -> Tensor:
        rows = torch.tensor(samples, dtype=torch.float32)[:, None].sin() * torch.arange(1.0, 5.0)
        rows = rows + 0.01 * random.random() + 0.01 * float(np.random.rand())
        loss = ((self.model(rows) - rows.sum(1, keepdim=True)) ** 2).mean() + 0.5
        for position in self.history.bad.keys() & set(positions):
            loss = loss * self.history.bad[position]
        return loss

    def train(self) -> Loop:
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(4)
        for step in self.guard:
            self.signals.requested = bool(self.history.stop) and step.number >= self.history.stop
            loss = self.loss(step.batch.samples, step.batch.positions)
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            if self.history.overflows & set(step.batch.positions):
                next(self.model.parameters()).grad.view(-1)[0] = math.inf  # type: ignore[union-attr]
            step.finish(loss)
            torch.rand(1), random.random(), np.random.rand()
        return self

    # -- an update that is applied before it is judged

    def _judge_late(self) -> None:
        """Make both gates apply the batches at `history.late` first; the gate that waits does what
        the other would.
        """
        guard = self.guard
        if guard.deferred_gate is not None:
            return
        carry_out, finish = guard.verdict_executor.carry_out, guard.finish_previous_step
        applied: list[tuple[Any, Any, Any]] = []

        def apply_first(step: Any, verdict: Any, reduced: Any, observation: Any) -> Any:
            if verdict.action is Action.APPLY or not self.is_late(step.batch.first, step.number):
                return carry_out(step, verdict, reduced, observation)
            guard.applier.apply(step, reduced)
            applied.append((step, observation, verdict))
            return verdict

        def judge_late() -> float:
            """Once the loop has done with the step, as the gate that does not wait."""
            if applied:
                guard.between_steps.set_applied(False)  # no copy is made of it
                guard.verdict_executor.roll_back_late(*applied.pop())
                if guard.phase is not None:
                    guard.between_steps.drop_requests()
            return finish()

        guard.verdict_executor.carry_out = apply_first  # type: ignore[method-assign]
        guard.finish_previous_step = judge_late  # type: ignore[method-assign]

    def is_late(self, first: int, step: int) -> bool:
        due = step == self.history.steps or step % SNAPSHOTS == 0 or step % CHECKPOINTS == 0
        return not due and bool(self.history.late & set(range(first, first + BATCH)))

    def safe_limits(
        self, original: Any, controller: Controller, like: Any
    ) -> dict[str, float] | None:
        """Those of the controller, but for a batch that is to be applied before it is judged."""
        if controller is self.guard.controller and self.is_late(like.first, like.step):
            return dict.fromkeys(like.signals, math.inf)
        found: dict[str, float] | None = original(controller, like)
        return found

    # -- what is left

    def left(self) -> dict[str, Any]:
        """Everything that must be equal, in memory."""
        guard, state = self.guard, self.guard.state
        return {
            "phase": guard.phase,
            "counters": (guard.step, guard.tokens, guard.timeline),
            "state": component_digests(state.tensors(), state.scalars()),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "rng": rng.capture_rng_states(),
            "ledger": (guard.cursor.state(), list(guard.cursor.quarantine.lines())),
            "controller": guard.controller.state_dict(),
            "snapshots": [
                (info.step, info.cursor, info.timeline, info.state)
                for info in guard.snapshots.ring.infos()
            ],
        }


def journal(run: RunDirectory) -> list[Any]:
    """The journal without its clocks; lines of checkpoints last, since they come when the disk is
    ready.
    """
    lines: list[Any] = []
    saves: list[Any] = []
    for event in run.events():
        line = (event.kind, event.step, event.timeline, event.message, without_clocks(event.data))
        if event.kind == "checkpoint":
            saves.append((event.data["path"], event.data["state"], event.data["cp_step"]))
        else:
            lines.append(line)
    return [*lines, *sorted(saves)]


def without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_clocks(inner) for key, inner in value.items() if key not in CLOCKS}
    return [without_clocks(inner) for inner in value] if isinstance(value, list | tuple) else value


def checkpoints(run: RunDirectory) -> dict[str, Any]:
    """Of each its fingerprint, the hashes of its files (buffers and moments too), and what travels
    besides.
    """
    found = {}
    for path in checkpoint_dirs(run.checkpoints):
        manifest = read_manifest(path)
        hashes = [(file.name, file.sha256) for file in manifest.files]
        extras = [without_clocks(rank.extra) for rank in manifest.ranks]
        found[path.name] = (fingerprint(path), hashes, manifest.scalars, extras)
    return found


def rows(run: RunDirectory) -> dict[str, list[float]]:
    view = run.metrics()
    return {
        name: np.nan_to_num(view.column(name), nan=-1.0).tolist()
        for name in view.columns
        if name not in TIMES
    }


save = CheckpointStore.save


def saved_at_once(store: CheckpointStore, *arguments: Any, **options: Any) -> None:
    save(store, *arguments, **options)
    store.wait(60)


@contextmanager
def scripted() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_inbox, "CommandPoller", ScriptedMailbox)
        patch.setattr(command_handler, "PARKED_SECONDS", 0.0)
        # else the disk decides when a checkpoint becomes good
        patch.setattr(CheckpointStore, "save", saved_at_once)
        yield patch


def outcome_of(gate: str, history: History, folder: Path) -> dict[str, Any]:
    """What a run of this history leaves; one that was stopped is resumed once."""
    history = copy.deepcopy(history)
    run = RunDirectory.create(folder, gate, "")
    left = []
    with scripted() as patch:
        original = Controller.safe_limits
        while True:
            loop = Loop(gate, history, run)
            patch.setattr(
                Controller,
                "safe_limits",
                lambda self, like, loop=loop: loop.safe_limits(original, self, like),
            )
            left.append(loop.train().left())
            if loop.guard.phase is not Phase.STOPPED or len(left) > 1:
                break
            history.stop = 0
    return {
        "left": left,
        "journal": journal(run),
        "checkpoints": checkpoints(run),
        "rows": rows(run),
    }


def assert_gates_agree(history: History) -> None:
    """Run a history with both gates. One that the deferred gate refuses must be refused before its
    first step.
    """
    with tempfile.TemporaryDirectory() as name:
        waiting = outcome_of("sync", history, Path(name))
        if history.overflows:
            with pytest.raises(UsageError, match=r"guard\.decide = .* scaler"):
                outcome_of("lagged", history, Path(name))
            return
        lagged = outcome_of("lagged", history, Path(name))
    assert lagged["journal"] == waiting["journal"]
    assert lagged["rows"] == waiting["rows"]
    for ours, theirs in zip(lagged["left"], waiting["left"], strict=True):
        assert ours == theirs
    assert lagged["checkpoints"] == waiting["checkpoints"]


def history_of(*events: str, **settings: Any) -> History:
    """These events, three updates apart."""
    history = History(**settings)
    for number, event in enumerate(events):
        add_event(history, event, FIRST + 1 + 3 * number)
    return history


@pytest.mark.fault("A1")
@pytest.mark.parametrize("event", ["stop signal", "checkpoint"])
def test_what_is_saved_is_the_state_after_the_landed_step(event: str) -> None:
    assert_gates_agree(history_of(event))


@pytest.mark.fault("A2")
def test_a_late_rejection_restores_everything() -> None:
    assert_gates_agree(history_of("late", "rollback"))


def test_a_late_rejection_that_would_leave_too_much_out_halts_alike() -> None:
    assert_gates_agree(History(mode=Mode.AUTO, rollbacks=0, steps=28, bad={57: 10000.0}, late={57}))


@pytest.mark.parametrize("mode", [Mode.ASK, Mode.AUTO])
def test_a_question_that_is_answered_and_a_halt(mode: Mode) -> None:
    assert_gates_agree(history_of("three rejected", mode=mode, rollbacks=0, answers=[1]))


def test_overflows_need_a_loss_scale_and_that_is_refused() -> None:
    assert_gates_agree(history_of("overflow", "stop"))


@given(histories())
@settings(max_examples=3, deadline=None, derandomize=True)
def test_random_histories(history: History) -> None:
    assert_gates_agree(history)


@pytest.mark.slow
@pytest.mark.ci_slow
@pytest.mark.timeout(1800)
@given(histories())
@settings(max_examples=200, deadline=None)
def test_more_random_histories(history: History) -> None:
    # The deferred gate pauses when the next step has begun. A signal of that step thus reaches it
    # during the pause, and the other gate after it.
    pauses = [at_step for kind, _, at_step in history.commands if kind == "pause"]
    assume(not history.stop or all(0 < at_step < history.stop - 2 for at_step in pauses))
    assert_gates_agree(history)
