"""Runs batches again between a verdict and its effect, without changing the run.

At a rejected step the optimizer has not stepped: parameters, moments and schedules are those that
the batch was run with. A pass changes gradients, RNG states and buffers, and an older state changes
parameters; all of them are restored bit by bit. Moments, rates, loss scale, cursor and detectors
are never changed: a forward and a backward pass need none of them.
"""

from __future__ import annotations

import contextlib
import math
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from guardrail.decide.anomaly_signature import ReplayPass
from guardrail.decide.hardware_fault import NONDETERMINISTIC, RankNumbers
from guardrail.decide.repeatability import Repeatability, compare_passes
from guardrail.decide.sample_cursor import Batch
from guardrail.decide.sample_outliers import Sample
from guardrail.rundir.manifest import BUFFER, MODEL
from guardrail.torch.checkpoint.memory_snapshots import Snapshot
from guardrail.torch.diagnose.per_sample import (
    Rows,
    build_samples,
    merge_samples,
    record_embedding_gradients,
)
from guardrail.torch.measure.gradient_norms import to_local
from guardrail.torch.measure.reduced_step import ReducedStep
from guardrail.torch.measure.reduction import StepReduction
from guardrail.torch.state.forward_side_effects import ForwardSideEffects
from guardrail.torch.state.training_state import TrainingState

# Elements of a gradient that a checksum widens to int64 at a time: 128 MiB with their places.
_CHECKSUM_ELEMENTS = 1 << 23

# (batch, step, rows) -> (loss sum of this rank, 0-d; label tokens in it; nominal tokens): forward
# and backward over this rank's share of any batch, with its own RNG state, as for `Step.finish`,
# which is not called. `step` is the number that the update would get. If `rows` is a list, the hook
# appends each micro-batch's rows to it.
Replay = Callable[[Batch, int, Rows | None], tuple[Tensor, Tensor | float, float | None]]
# (batch, step) -> (loss sum of this rank's share, the same with the labels of each row in another
# order, label tokens): forward passes without gradients and without the run's RNG state, the same
# each time. Called on every rank.
LabelOrderLosses = Callable[[Batch, int], tuple[float, float, float]]


class Replays:
    """Runs batches again.

    Args:
        replay: see `Replay`; called on every rank.
        label_order_losses: see `LabelOrderLosses`; None: the loop cannot compute them.
        state: the training state.
        reduction: reduces the numbers of a pass.
        loss_scale: returns the present loss scale; None: there is none.
        gather: returns every rank's value, by rank; a collective.
        report_progress: called before each pass: this rank is alive.

    Attributes:
        passes: number of passes of the present visit.
        repeatability: of passes in this process; None: not measured.
    """

    def __init__(
        self,
        replay: Replay,
        label_order_losses: LabelOrderLosses | None = None,
        *,
        state: TrainingState,
        reduction: StepReduction,
        loss_scale: Callable[[], float | None],
        gather: Callable[[Any], list[Any]],
        report_progress: Callable[[], None],
    ) -> None:
        self._replay, self._label_order_losses = replay, label_order_losses
        self.state, self.reduction = state, reduction
        self._loss_scale, self._gather = loss_scale, gather
        self._report_progress = report_progress
        self.passes = 0
        self.repeatability: Repeatability | None = None
        # (from an older state?, positions of a batch) -> this rank's samples of it
        self._samples: dict[tuple[bool, tuple[int, ...]], list[Sample]] = {}
        self._is_older_state = False

    def start_attempt(self) -> None:
        """Drop what is known of samples: the next attempt begins from another state."""
        self._samples = {}

    @property
    def tolerance(self) -> float:
        """The relative difference within which two passes count as the same."""
        if self.repeatability is None:
            return assumed_tolerance(self.reduction.device)
        return self.repeatability.tolerance

    def measure_repeatability(self, batch: Batch, *, step: int) -> Repeatability:
        """Run a batch twice, and remember whether it gave the same bits. A collective.

        The run stays unchanged. There must be no gradients that are still needed.
        """
        numbers: list[list[RankNumbers]] = []
        sums: list[list[float]] = []
        with self.visit(keep_gradients=False):
            for _ in range(2):
                checksums: list[int] = []
                one = self.run(batch, step=step, what="the batch", checksums=checksums)
                numbers.append(self.gather_rank_numbers())
                sums.append([*one.signals.values(), *self._gather(checksums[0])])
        self.repeatability = compare_passes(numbers[0], numbers[1], sums=(sums[0], sums[1]))
        self.start_attempt()
        return self.repeatability

    @contextlib.contextmanager
    def visit(self, *, keep_gradients: bool) -> Iterator[None]:
        """Surround all passes of one occasion; restore the gradients afterwards.

        Args:
            keep_gradients: the present gradients may still be applied. They are copied, because
                DDP's buckets are written to again.
        """
        parameters = self.reduction.parameters
        gradients: list[Tensor | None] = [None] * len(parameters)
        if keep_gradients:
            for index, parameter in enumerate(parameters):
                if parameter.grad is not None:
                    gradients[index] = parameter.grad.detach().clone()
        self.passes = 0
        self._drop_gradients()
        try:
            yield
        finally:
            self._drop_gradients()
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            self.state.reshard()

    def gather_rank_numbers(self) -> list[RankNumbers]:
        """Return what each rank computed by itself in the last reduction. A collective."""
        loss_sum, after, before = self.reduction.own.tolist()
        own = (loss_sum, before, after, socket.gethostname())
        numbers: list[RankNumbers] = []
        for their_loss, their_before, their_after, host in self._gather(own):
            numbers.append(
                RankNumbers(loss_sum=their_loss, before=their_before, after=their_after, host=host)
            )
        return numbers

    def samples(self, batch: Batch, *, step: int) -> list[Sample]:
        """Return each sample of a batch, as the present state shows it. A collective.

        The batch is run now unless it was run from this state before.
        """
        key = (self._is_older_state, batch.positions)
        if key not in self._samples:
            self.run(batch, step=step, what="")
        gathered: list[Sample] = []
        for samples in self._gather(self._samples[key]):
            gathered += samples
        return merge_samples(gathered)

    @contextlib.contextmanager
    def _one_pass(self) -> Iterator[None]:
        """Surround one pass; restore RNG states and buffers afterwards."""
        self._report_progress()
        self.passes += 1
        self.state.reshard()
        effects = ForwardSideEffects(self.state)
        effects.begin()
        try:
            yield
        finally:
            effects.undo()
            self._drop_gradients()
            self.state.reshard()

    def measure_label_order(self, batch: Batch, *, step: int) -> float | None:
        """Return the loss increase (nats per token) when the labels of each row are shuffled.

        A collective. None if the loop cannot compute it.
        """
        if self._label_order_losses is None:
            return None
        with self._one_pass():
            own = self._label_order_losses(batch, step)
        columns = zip(*self._gather(own), strict=True)
        loss, shuffled_loss, tokens = (math.fsum(column) for column in columns)
        if not tokens:
            return None
        gain = (shuffled_loss - loss) / tokens
        return gain if math.isfinite(gain) else None

    def run(
        self, batch: Batch, *, step: int, what: str, checksums: list[int] | None = None
    ) -> ReplayPass:
        """Run one pass from the present state; RNG states and buffers are restored. A collective.

        Args:
            step: number that an update would get.
            what: the batch, for a sentence.
            checksums: if given, the checksum of this rank's reduced gradients is appended.
        """
        rows: Rows = []
        with self._one_pass():
            with record_embedding_gradients(self.state.model) as norms:
                loss, tokens, nominal = self._replay(batch, step, rows)
            self._samples[self._is_older_state, batch.positions] = build_samples(rows, norms)
            if nominal is None:
                loss = loss * tokens
            reduced = self.reduction.reduce(
                loss,
                tokens,
                nominal_tokens=nominal,
                step_time=0.0,
                loss_scale=self._loss_scale(),
                replayed=True,
            )
            if checksums is not None:
                checksums.append(checksum_gradients(self.reduction.parameters))
        return build_pass(reduced, what=what)

    @contextlib.contextmanager
    def at_older_state(self, snapshot: Snapshot) -> Iterator[None]:
        """Use parameters and buffers of a snapshot inside of the block.

        The present ones are kept in host memory meanwhile.
        """
        self.state.reshard()
        names = [name for name in snapshot.layout.names if name.startswith((MODEL, BUFFER))]
        live = self.state.tensors()
        present = {name: live[name].cpu().clone() for name in names}
        snapshot.wait()
        try:
            self._load({name: snapshot.tensors[name] for name in names})
            self._is_older_state = True
            yield
        finally:
            self._is_older_state = False
            self._samples = {key: rows for key, rows in self._samples.items() if not key[0]}
            self._load(present)

    @torch.no_grad()
    def _load(self, tensors: dict[str, Tensor]) -> None:
        self.state.reshard()
        live = self.state.tensors()
        for name, tensor in tensors.items():
            live[name].copy_(tensor)

    def _drop_gradients(self) -> None:
        for parameter in self.reduction.parameters:
            parameter.grad = None


def checksum_gradients(parameters: Sequence[nn.Parameter]) -> int:
    """Return a number that depends on every bit of the gradients, or of this rank's shards.

    A norm does not: one last bit of one element is lost in its rounding. Waits for the device once.
    """
    total: Tensor | None = None
    for parameter in parameters:
        if parameter.grad is None:
            continue
        checksum = _checksum_bits(to_local(parameter.grad).detach())
        # int64 wraps around, the same each time.
        total = checksum if total is None else total * 31 + checksum
    if total is None:
        return 0
    return int(total) % 2**52  # a float64 holds it exactly


def _checksum_bits(tensor: Tensor) -> Tensor:
    """Return the sum of all elements' bits, each times its place; int64, 0-d."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.contiguous().view(-1).view(integers[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for part in bits.split(_CHECKSUM_ELEMENTS):
        places = torch.arange(1, part.numel() + 1, dtype=torch.int64, device=bits.device)
        total = total * 31 + (part.to(torch.int64) * places).sum()
    return total


def needs_measurement(device: torch.device) -> bool:
    """Return whether two passes may differ.

    Kernels of a CPU add in a fixed order, and so does gloo.
    """
    if device.type != "cpu":
        return True
    return dist.is_initialized() and dist.get_backend() != "gloo"


def assumed_tolerance(device: torch.device) -> float:
    """Return the tolerance where nothing was measured.

    torch's flag for deterministic algorithms does not count: it covers neither NCCL nor kernels of
    other packages, and it is also set where torch only warns.
    """
    if needs_measurement(device):
        return NONDETERMINISTIC
    return 0.0


def build_pass(reduced: ReducedStep, *, what: str) -> ReplayPass:
    """Return the numbers of a reduction as a pass."""
    return ReplayPass(
        what=what,
        signals=reduced.signals(),
        nonfinite=bool(reduced.nonfinite_loss or reduced.nonfinite_grad),
    )
