"""The heartbeat of this rank, as the parts of a guard use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from guardrail.core.records.status import Phase, Status
from guardrail.rundir.heartbeat import Heartbeat
from guardrail.rundir.run_directory import RunDirectory
from guardrail.torch.guard.context import RunContext
from guardrail.torch.measure.rank_timing import GpuMeter


class RankHeartbeat:
    """Reports phase, step and step time of this rank; reports nothing while there is no heartbeat.

    Args:
        heartbeat: created by the caller early in set-up; None: `start` makes one.
    """

    def __init__(self, ctx: RunContext, heartbeat: Heartbeat | None) -> None:
        self._ctx = ctx
        self._heartbeat = heartbeat

    def start(self, run: RunDirectory, parameters: Sequence[nn.Parameter]) -> None:
        """Start the thread, unless the caller has, and measure the device of `parameters`."""
        if self._heartbeat is None:
            self._heartbeat = Heartbeat(run, self._ctx.ranks.rank).start()
        self._heartbeat.meter = None
        if parameters:
            self._heartbeat.meter = GpuMeter(parameters[0].device)

    def write_status(self, status: Callable[[], Status]) -> None:
        """Let the thread write this status from now on; on rank 0."""
        if self._heartbeat is not None:
            self._heartbeat.status = status

    def set_phase(self, phase: Phase, step: int | None = None) -> None:
        """Report that this rank is in `phase` and makes progress.

        Args:
            step: that it works on; None: the last applied one.
        """
        if step is None:
            step = self._ctx.progress.step
        if self._heartbeat is not None:
            self._heartbeat.at(phase, step)

    def set_step_time(self, seconds: float) -> None:
        """Report how long this rank itself has worked in the last step, without waiting."""
        if self._heartbeat is not None:
            self._heartbeat.step_seconds = seconds

    def close(self) -> None:
        """End the thread and write the last state. May be called again."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._heartbeat = None
