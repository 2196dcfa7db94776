"""A guard in a loop of a few numbers, whose loss can be made to jump: runs of hundreds of steps in
a second.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from guardrail.core.config import GuardConfig
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.commands import Command
from guardrail.core.records.status import Status
from guardrail.core.sections import CheckpointSection, SnapshotSection
from guardrail.decide.sample_order import SampleOrder
from guardrail.rundir.run_directory import RunDirectory
from guardrail.torch.guard.guard import Guard, Step

USUAL, HIGH = 1.8, 10.0


class Model(nn.Module):
    """Its loss is what the test says; its gradient is noise."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def loss(self, number: int, level: float) -> Tensor:
        chance = random.Random(number)
        noise = torch.tensor([chance.gauss(0.0, 1.0) for _ in range(4)])
        wanted = level * math.exp(chance.gauss(0.0, 0.02))
        reached = (self.weight * noise).sum() * 1e-3
        return reached - reached.detach() + wanted


class Loop:
    """A loop whose loss steps up to `HIGH` for good with step `onset`, or in the batches with
    positions in `bad`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        onset: int = 60,
        bad: range | None = None,
        steps: int = 130,
        samples: int = 100_000,
        directory: bool = True,
        **guard: Any,
    ) -> None:
        self.onset, self.bad = onset, bad
        path = folder / "run"
        self.run = (
            RunDirectory(path)
            if path.exists() or not directory
            else RunDirectory.create_at(path, "")
        )
        self.model = Model()
        section = {"warmup": 10, "window": 32, "confirm": 4, "divergence_steps": 8, **guard}
        self.guard = Guard.from_config(
            GuardConfig(
                guard=GuardOptions(**section),
                snapshots=SnapshotSection(every=5, keep=3),
                checkpoint=CheckpointSection(every=10, keep=2),
            ),
            model=self.model,
            optimizer=torch.optim.SGD(self.model.parameters(), lr=1e-3),
            data=SampleOrder(samples=samples, seed=3),
            batch_size=4,
            total_steps=steps,
            run=self.run if directory else None,
        )

    def train(self) -> Loop:
        for step in self.guard:
            self.take(step)
        return self

    def take(self, step: Step) -> None:
        high = step.number >= self.onset
        if self.bad is not None:
            high = any(position in self.bad for position in step.batch.positions)
        loss = self.model.loss(step.batch.first, HIGH if high else USUAL)
        loss.backward()
        step.finish(loss)
        store = self.guard.snapshots.store
        # Which checkpoints there are is no matter of the disk's speed.
        assert store is None or store.wait(60.0)

    def send(self, kind: str, *, at_step: int, value: float = 0.0) -> None:
        self.run.send(
            Command(id=f"{kind}-{at_step}", kind=kind, value=value, at_step=at_step, who="tester")
        )

    def status(self) -> Status:
        return self.guard.status()

    def states(self) -> dict[int, str]:
        """Step -> the state of its checkpoint, of those on disk."""
        infos = self.guard.snapshots.store.infos() if self.guard.snapshots.store is not None else []
        return {info.step: info.state for info in infos}
