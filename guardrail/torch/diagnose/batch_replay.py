"""Runs batches again between a verdict and its effect, and leaves no trace of it.

At a rejected step the optimizer has not stepped: parameters, moments and schedules are still those
that the batch met. A pass changes gradients, dice and buffers, and an older state changes
parameters; all of them are put back bit by bit. Moments, rates, loss scale, ledger and detectors
are never touched: a forward and a backward pass need none of them.
"""

from __future__ import annotations

import contextlib
import math
import socket
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from guardrail.decide.root_cause import NONDETERMINISTIC, RankNumbers, ReplayPass
from guardrail.decide.sample_cursor import Batch
from guardrail.decide.sample_outliers import Sample
from guardrail.rundir.manifest import BUFFER, MODEL
from guardrail.torch.checkpoint.memory_snapshots import Snapshot
from guardrail.torch.diagnose.per_sample import Rows, embedding_gradients, merged, samples_of
from guardrail.torch.measure.reduced_step import ReducedStep
from guardrail.torch.measure.reduction import StepReduction
from guardrail.torch.state.forward_side_effects import ForwardSideEffects
from guardrail.torch.state.training_state import TrainingState

# (batch, step, rows) -> (loss sum of this rank, 0-d; label tokens behind it; nominal tokens):
# forward and backward over this rank's share of any batch, with its own dice, as for `Step.finish`,
# which is not called. `step` is the number that the update would get. Where `rows` is a list, the
# hook appends each micro-batch's to it.
Replay = Callable[[Batch, int, Rows | None], tuple[Tensor, Tensor | float, float | None]]
# (batch, step) -> (loss sum of this rank's share, the same with the labels of each row in another
# order, label tokens): forward passes without gradients and without the run's dice, the same each
# time. Called on every rank.
Structure = Callable[[Batch, int], tuple[float, float, float]]


class Replays:
    """Args:
    replay: see `Replay`; called on every rank.
    structure: see `Structure`; None: nobody can tell.
    loss_scale: gives the present loss scale; None: nothing scales the loss.
    gathered: every rank's value, by rank; a collective.
    alive: called before each pass: this rank gets ahead.
    """

    def __init__(
        self,
        replay: Replay,
        structure: Structure | None = None,
        *,
        state: TrainingState,
        probes: StepReduction,
        loss_scale: Callable[[], float | None],
        gathered: Callable[[Any], list[Any]],
        alive: Callable[[], None],
    ) -> None:
        self._replay, self._structure, self.state, self.probes = replay, structure, state, probes
        self._loss_scale, self.gathered, self._alive = loss_scale, gathered, alive
        self.passes = 0  # of the present visit
        # (from an older state?, positions of a batch) -> this rank's rows of it
        self._rows: dict[tuple[bool, tuple[int, ...]], list[Sample]] = {}
        self._away = False

    def begin(self) -> None:
        """Another attempt, from another state: what was seen of samples is out of date."""
        self._rows = {}

    @property
    def tolerance(self) -> float:
        return tolerance(self.probes.device)

    @contextlib.contextmanager
    def visit(self, *, keep_gradients: bool) -> Iterator[None]:
        """Around all passes of one occasion.

        Args:
            keep_gradients: those at hand may still be applied. They are copied; DDP's buckets are
            written to again.
        """
        parameters = self.probes.parameters
        gradients = [
            p.grad.detach().clone() if p.grad is not None and keep_gradients else None
            for p in parameters
        ]
        self.passes = 0
        self._drop()
        try:
            yield
        finally:
            self._drop()
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            self.state.reshard()

    def own(self) -> list[RankNumbers]:
        """What each rank computed by itself in the last reduction. A collective."""
        loss_sum, after, before = self.probes.own.tolist()
        mine = (loss_sum, before, after, socket.gethostname())
        return [
            RankNumbers(loss_sum=a, before=b, after=c, host=host)
            for a, b, c, host in self.gathered(mine)
        ]

    def samples(self, batch: Batch, *, step: int) -> list[Sample]:
        """What each sample of a batch shows from the state at hand; run now unless it was. A
        collective.
        """
        key = (self._away, batch.positions)
        if key not in self._rows:
            self.run(batch, step=step, what="")
        return merged(row for rows in self.gathered(self._rows[key]) for row in rows)

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Around one pass: dice and buffers begin and end as they are."""
        self._alive()
        self.passes += 1
        self.state.reshard()
        aside = ForwardSideEffects(self.state)
        aside.begin()
        try:
            yield
        finally:
            aside.undo()
            self._drop()
            self.state.reshard()

    def structure(self, batch: Batch, *, step: int) -> float | None:
        """Nats a token that another order of the labels costs now; None: nobody can tell. A
        collective.
        """
        if self._structure is None:
            return None
        with self._aside():
            mine = self._structure(batch, step)
        loss, other, tokens = (
            math.fsum(column) for column in zip(*self.gathered(mine), strict=True)
        )
        gain = (other - loss) / tokens if tokens else math.nan
        return gain if math.isfinite(gain) else None

    def run(self, batch: Batch, *, step: int, what: str) -> ReplayPass:
        """One pass from the state at hand; dice and buffers begin and end as they are."""
        rows: Rows = []
        with self._aside():
            with embedding_gradients(self.state.model) as norms:
                loss, tokens, nominal = self._replay(batch, step, rows)
            self._rows[self._away, batch.positions] = samples_of(rows, norms)
            reduced = self.probes.reduce(
                loss if nominal is not None else loss * tokens,
                tokens,
                nominal_tokens=nominal,
                step_time=0.0,
                loss_scale=self._loss_scale(),
                replayed=True,
            )
        return pass_of(reduced, what=what)

    @contextlib.contextmanager
    def older(self, snapshot: Snapshot) -> Iterator[None]:
        """Within it, parameters and buffers are those of a snapshot. The present ones wait in host
        memory.
        """
        self.state.reshard()
        names = [name for name in snapshot.layout.names if name.startswith((MODEL, BUFFER))]
        live = self.state.tensors()
        held = {name: live[name].cpu().clone() for name in names}
        snapshot.wait()
        try:
            self._put({name: snapshot.tensors[name] for name in names})
            self._away = True
            yield
        finally:
            self._away = False
            self._rows = {key: rows for key, rows in self._rows.items() if not key[0]}
            self._put(held)

    @torch.no_grad()
    def _put(self, tensors: dict[str, Tensor]) -> None:
        self.state.reshard()
        live = self.state.tensors()
        for name, tensor in tensors.items():
            live[name].copy_(tensor)

    def _drop(self) -> None:
        for parameter in self.probes.parameters:
            parameter.grad = None


def tolerance(device: torch.device) -> float:
    """Relative, within which the same pass gives the same number: on a CPU, and under deterministic
    algorithms on a device, bit by bit; else as far as kernels that add in any order may be off."""
    return (
        0.0
        if device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
        else NONDETERMINISTIC
    )


def pass_of(reduced: ReducedStep, *, what: str) -> ReplayPass:
    return ReplayPass(
        what=what,
        signals=reduced.signals(),
        nonfinite=bool(reduced.nonfinite_loss or reduced.nonfinite_grad),
    )
