"""The metrics row of a step, and the speed of the last steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from guardrail.core.records.verdicts import Action, Verdict
from guardrail.torch.guard.context import RunContext
from guardrail.torch.guard.step import Step
from guardrail.torch.measure.reduced_step import ReducedStep

RECENT_STEPS = 20  # applied steps that the speed is averaged over


class StepMetrics:
    """The metrics row of the present step, and times of the last ones.

    Args:
        set_step_time: called with the seconds that this rank itself has worked in a step.

    Attributes:
        row: of the present step; None before it was judged and after it was written.
        guarding: seconds of the present step that the guard took.
    """

    def __init__(self, ctx: RunContext, *, set_step_time: Callable[[float], None]) -> None:
        self._ctx = ctx
        self._set_step_time = set_step_time
        self.row: dict[str, float] | None = None
        self.guarding = 0.0
        self._recent: list[tuple[float, int]] = []  # (seconds, tokens) of the last applied steps
        self._guard_seconds = 0.0  # of all applied steps
        self._step_seconds = 0.0  # of all applied steps
        self._is_written = False  # the present row

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
        row: dict[str, float] = {
            "step": step.number,
            "timeline": self._ctx.progress.timeline,
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
            row[f"{signal}_baseline"] = baseline
            row[f"{signal}_threshold"] = threshold
        self.row = row
        self._is_written = False

    def set_learning_rate(self, lr: float) -> None:
        """Correct the row: another learning rate was set while the guard asked."""
        if self.row is not None:
            self.row["lr"] = lr

    def set_action(self, action: Action) -> None:
        """Correct the row: another action than the first verdict's is carried out."""
        if self.row is not None:
            self.row["verdict"] = list(Action).index(action)

    def set_eval_loss(self, loss: float) -> None:
        """Add the held-out loss after the present step to its row."""
        if self.row is not None:
            self.row["eval_loss"] = loss
            if self._is_written:
                self._ctx.recorder.amend(self.row)

    def add(self, step: Step, reduced: ReducedStep, *, seconds: float, guarding: float) -> None:
        """Add the times of a step to its row and to the averages.

        Args:
            seconds: of the complete step.
            guarding: the guard's part of it: reduction, verdict, copies, the row.
        """
        if self.row is not None:
            self.row["step_time"] = seconds
            self.row["guard_time"] = guarding
        self._set_step_time(reduced.step_times[self._ctx.ranks.rank])
        if step.applied:
            self._recent = [*self._recent[-(RECENT_STEPS - 1) :], (seconds, reduced.tokens)]
            self._guard_seconds += guarding
            self._step_seconds += seconds

    def measure(self, work: Callable[[], None]) -> None:
        """Run work that only the guard needs, and count its time as the guard's."""
        began = time.perf_counter()
        work()
        self.measure_since(began)

    def measure_since(self, began: float) -> None:
        """Count the time since `began`, a `time.perf_counter()`, as the guard's."""
        self.guarding += time.perf_counter() - began

    def flush(self) -> None:
        """Write the row, if there is one."""
        if self.row is not None:
            if not self._is_written:
                self._ctx.recorder.row(self.row)
            self.row = None

    def write_now(self) -> None:
        """Write the row of a finding at once: the process may die before the next step begins."""
        if self.row is not None and not self._is_written:
            self._is_written = True
            self._ctx.recorder.row(self.row)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second over the last applied steps; 0: there was none."""
        recent = self._recent  # the thread of the heartbeat reads it too
        seconds = sum(seconds for seconds, _ in recent)
        tokens = sum(tokens for _, tokens in recent)
        if not seconds:
            return 0.0
        return tokens / seconds

    def seconds_for(self, steps: int) -> float:
        """Return how long so many steps take at the present speed; 0: not known yet."""
        recent = self._recent
        if not recent:
            return 0.0
        return steps * sum(seconds for seconds, _ in recent) / len(recent)

    @property
    def guard_share(self) -> float:
        """The guard's share of the time of all applied steps, 0 to 1."""
        if not self._step_seconds:
            return 0.0
        return self._guard_seconds / self._step_seconds
