"""What a step has cost and shown: its row of metrics, and the run's status."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

from guardrail.core.records import Action, Phase, Status, Verdict
from guardrail.torch.guard.step import Step
from guardrail.torch.measure.reduction import ReducedStep

if TYPE_CHECKING:
    from guardrail.torch.guard.guard import Guard

VERSIONS = {
    "python": platform.python_version(),
    "torch": torch.__version__,
    "guardrail": version("guardrail"),
}


class StepMetrics:
    """The books of one guard; `guarding` are the seconds that it took of the present step."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self.row: dict[str, float] | None = None
        self.guarding = 0.0
        self._recent: list[tuple[float, int]] = []  # (seconds, tokens) of the last applied steps
        self._guard_seconds = self._step_seconds = 0.0  # of all applied steps
        self._started = time.time()
        self._written = False  # the present row

    def begin(
        self,
        step: Step,
        reduced: ReducedStep,
        verdict: Verdict,
        bands: dict[str, tuple[float, float]],
        lr: float,
    ) -> None:
        """Begin the row of a step.

        Args:
            bands: signal -> (baseline, threshold) before this step was judged.
            lr: learning rate that an update of this step is made with.
        """
        guard = self._guard
        row: dict[str, float] = {
            "step": step.number,
            "timeline": guard.timeline,
            "time": time.time(),
            "first": step.batch.first,
            "last": step.batch.last,
            "lr": lr,
            "tokens": reduced.tokens,
            "step_time_max": max(reduced.step_times),
            "slowest_rank": reduced.step_times.index(max(reduced.step_times)),
            "verdict": list(Action).index(verdict.action),
            "eval_loss": math.nan,
            **reduced.signals(),
        }
        for signal, (baseline, threshold) in bands.items():
            row[f"{signal}_baseline"], row[f"{signal}_threshold"] = baseline, threshold
        self.row = row
        self._written = False

    def rated(self, lr: float) -> None:
        """Another learning rate was set while the step was under question."""
        if self.row is not None:
            self.row["lr"] = lr

    def judged(self, action: Action) -> None:
        """Another verdict than the first one came to be carried out."""
        if self.row is not None:
            self.row["verdict"] = list(Action).index(action)

    def add(self, step: Step, reduced: ReducedStep, *, seconds: float, guarding: float) -> None:
        """Times of a step, for the row and the status. The guard's own: reduction, verdict, copies,
        the row.
        """
        guard = self._guard
        if self.row is not None:
            self.row["step_time"], self.row["guard_time"] = seconds, guarding
        if guard.heartbeat is not None:
            guard.heartbeat.step_seconds = reduced.step_times[guard.rank]
        if step.applied:
            self._recent = [*self._recent[-19:], (seconds, reduced.tokens)]
            self._guard_seconds += guarding
            self._step_seconds += seconds

    def measured(self, what: Callable[[], None]) -> None:
        """Do something that only the guard needs: it is part of what it costs."""
        began = time.perf_counter()
        what()
        self.guarding += time.perf_counter() - began

    def flush(self) -> None:
        """Write the row; harmless when there is none."""
        guard = self._guard
        if self.row is not None:
            if not self._written:
                guard.recorder.row(self.row)
            self.row = None

    def write(self) -> None:
        """Write the row of an alarm at once: the process may die of what was found before the next
        step begins.
        """
        if self.row is not None and not self._written:
            self._written = True
            self._guard.recorder.row(self.row)

    def evaluated(self, loss: float) -> None:
        """The held-out loss after the present step."""
        if self.row is not None:
            self.row["eval_loss"] = loss
            if self._written:
                self._guard.recorder.amend(self.row)

    def status(self) -> Status:
        """The present state for status.json; called by the heartbeat's thread."""
        guard = self._guard
        recent = self._recent
        seconds, tokens = sum(s for s, _ in recent), sum(t for _, t in recent)
        total = guard.total_steps
        if not total and guard.ledger.limit is not None:
            # A run given in epochs; what is skipped from now on makes it shorter.
            total = guard.step + guard.ledger.batches_left()
        ahead = max(0, total - guard.step)
        unresolved = guard.controller.unresolved()
        return Status(
            run=guard.run.name if guard.run is not None else "",
            phase=guard.phase or Phase.STEP,
            step=guard.step,
            total_steps=total,
            cursor=guard.ledger.cursor,
            timeline=guard.timeline,
            mode=guard.mode,
            durability=guard.recorder.durability,
            commands_problem=guard.desk.problem,
            question=guard.desk.question,
            question_number=guard.desk.number,
            deadline=guard.desk.deadline,
            default=guard.desk.default,
            tokens=guard.tokens,
            tokens_per_second=tokens / seconds if seconds else 0.0,
            eta_seconds=ahead * seconds / len(recent) if recent else 0.0,
            lr_factor=guard.effects(guard.step + 1).lr,
            unresolved=None if unresolved is None else guard.past.unresolved(unresolved),
            guard_share=self._guard_seconds / self._step_seconds if self._step_seconds else 0.0,
            started=self._started,
            world=guard.world,
            versions=VERSIONS,
            snapshots=guard.tiers.infos,
        )
