"""Tensors -> one packed float64 vector -> one all-reduce per step.

The vector holds everything that the ranks must agree on in a step: loss and token sums, squared
norms, finite flags and step times of each rank, a pending command, a stop request. After the
reduction every rank has the same numbers. `packed_vector` has the layout.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from guardrail.core.errors import UsageError
from guardrail.core.records.signals import GRAD_NORM, UPDATE_NORM
from guardrail.torch.measure.gradient_norms import (
    block_name,
    compute_norms,
    count_replicas,
    embedding_parameters,
    to_local,
)
from guardrail.torch.measure.missing_gradients import MissingGradients
from guardrail.torch.measure.own_gradients import OwnGradientNorms
from guardrail.torch.measure.packed_vector import (
    HEAD_SLOTS,
    RANK_SLOTS,
    PackedVector,
)
from guardrail.torch.measure.reduced_step import ReducedStep
from guardrail.torch.measure.vector_reader import VectorReader
from guardrail.torch.state import foreach
from guardrail.torch.state.collectives import gather_objects


def upload_numbers(
    numbers: np.ndarray | Sequence[float], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return numbers of the host on the device, without waiting for it.

    From pageable memory a copy of more than 64 KiB may wait: the vector of some 1,600 ranks.
    """
    tensor = torch.as_tensor(numbers, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def pack_numbers(vector: Tensor, more: Sequence[Tensor]) -> Tensor:
    """Return a packed vector with further numbers of the device after it, each 0-d."""
    if not more:
        return vector
    further = [number.detach().to(vector.device, vector.dtype) for number in more]
    return torch.cat([vector, torch.stack(further)])


class StepReduction:
    """Measures the gradients of the model and agrees on them with all other ranks.

    Args:
        model: unwrapped or wrapped; its nn.Embedding weights are the embedding parameters.
        rank, world: of the default process group; without one, 0 and 1.
        device: that computes, and on which the ranks reduce; None: that of the parameters.
        holders: ranks that hold the same part of the model as this one; None: all.
        counting: whether this rank's loss and tokens enter the sums. Of several ranks that compute
            the same, one counts.
        locate: with several ranks, measure each rank's own gradients before the reduction, so that
            a NaN or Inf can be traced to the rank that produced it. This reads the gradients once
            more.
        layers: measure the gradient norm of each block too. The ranks agree on the blocks here, in
            a collective.
        named: further numbers that `reduce` takes.
        updates: also reduce the squared norm of the last update, which `reduce` takes.

    Attributes:
        parameters: the trained parameters, in the order of the model.
        embedding: the embedding parameters among them.
        weights: [parameters], 1 / number of ranks that hold the same shard.
        signal_names: names of the values that `unpack_on_device` returns, in its order.
        own: of the last reduction, on the device: this rank's loss sum, the squared norm of its
            (shards of the) reduced gradients, and the sum of its parameters' gradient norms from
            before the reduction.

    Raises:
        UsageError: no parameter of the model requires a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: int,
        world: int,
        device: torch.device | None = None,
        holders: range | None = None,
        counting: bool = True,
        locate: bool = True,
        layers: bool = False,
        named: Sequence[str] = (),
        updates: bool = False,
    ) -> None:
        self.rank, self.world, self._counting = rank, world, counting
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise UsageError(
                "no parameter of the model requires a gradient. "
                "Set requires_grad on what is trained, or pass the model that is trained."
            )
        embeddings = {id(p) for p in embedding_parameters(model)}
        self._is_embedding = [id(p) in embeddings for p in self.parameters]
        self.embedding = [p for p in self.parameters if id(p) in embeddings]
        self._names = {id(p): _unwrapped_name(name) for name, p in model.named_parameters()}
        self._model_parameters = list(model.parameters())
        self.all_names = frozenset(self._names.values())
        home = to_local(self.parameters[0]).device  # the host, for offloaded parameters
        self.device = home if device is None else device
        # Apple's MPS has no float64, so the sums are float32 there.
        self.dtype = torch.float32 if self.device.type == "mps" else torch.float64
        held = world if holders is None else len(holders)
        replicas = [count_replicas(p, held) for p in self.parameters]
        self.weights = torch.tensor([1.0 / n for n in replicas], dtype=self.dtype, device=home)
        self._embedding_index = _true_indices(self._is_embedding).to(home)
        self._set_up_blocks(layers, home)
        self.named = (*named, UPDATE_NORM) if updates else tuple(named)
        self._layout = PackedVector(
            rank=rank, world=world, blocks=len(self.blocks), named=len(self.named)
        )
        block_signals = [f"{GRAD_NORM}/{block}" for block in self.blocks]
        self._reader = VectorReader(self._layout, block_signals, self.named)
        self.signal_names = self._reader.signal_names
        self.gradients = MissingGradients([self._names[id(p)] for p in self.parameters])
        self.own = torch.zeros(3, dtype=self.dtype, device=self.device)
        self.own_norms = OwnGradientNorms(self.device)
        if locate and world > 1:
            self.own_norms.watch(model)

    def _set_up_blocks(self, layers: bool, home: torch.device) -> None:
        """Agree on the blocks of the model over the ranks. Without `layers` there are none."""
        own_blocks: list[str] = []
        self.blocks: list[str] = []
        if layers:
            own_blocks = [block_name(self._names[id(p)]) for p in self.parameters]
            self.blocks = _agree_on_blocks(own_blocks, self.world)
        self._block_index = torch.tensor(
            [self.blocks.index(block) for block in own_blocks], dtype=torch.long, device=home
        )

    def close(self) -> None:
        """Remove the hooks from the model. May be called again."""
        self.own_norms.close()

    def reduce(
        self,
        *numbers: Any,
        nominal_tokens: float | None,
        loss_scale: float | None = None,
        **more: Any,
    ) -> ReducedStep:
        """Call `start` and `unpack` its result. Waits for the device."""
        return self.unpack(self.start(*numbers, **more).tolist(), nominal_tokens, loss_scale)

    @torch.no_grad()
    def start(
        self,
        loss_sum: Tensor,
        tokens: Tensor | float,
        *,
        step_time: float,
        command: tuple[int, float] = (0, 0.0),
        stop: bool = False,
        incomplete: bool = False,
        failed_save: int = 0,
        named: Mapping[str, Tensor | float] | None = None,
        update_square: Tensor | None = None,
        replayed: bool = False,
    ) -> Tensor:
        """Do the one all-reduce, without waiting for the device.

        Args:
            loss_sum: sum of this rank's token losses over the window, 0-d.
            tokens: number of label tokens in that sum.
            failed_save: number of this rank's last save that failed, counted from 1; 0: none.
            named: further numbers of this rank, 0-d; the signal is the mean over the counting ranks
                that give one.
            update_square: of `UpdateNorm`; None: no update is known.
            replayed: the gradients are those of a replay; a missing one means nothing.

        Returns:
            The packed vector and the roots of its squares, on the device, equal on every rank.

        Raises:
            UsageError: a number that was not announced; the ranks must agree on what they reduce.
        """
        present = [p.grad is not None for p in self.parameters]
        gradients = [to_local(p.grad) for p in self.parameters if p.grad is not None]
        grad_sq, embed_sq, block_sq = self._square_norms(present, gradients)
        grad_sq, embed_sq = grad_sq.to(self.device), embed_sq.to(self.device)
        loss_sum = loss_sum.detach().to(self.dtype)
        is_lacking = not (incomplete or replayed) and self.gradients.update(present)
        # Host numbers go to the device in one copy and device numbers are added there, so nothing
        # waits for the device before the reduction.
        host = np.zeros(self._layout.length)
        host[HEAD_SLOTS["command_kind"]] = float(command[0])
        host[HEAD_SLOTS["command_value"]] = command[1]
        host[HEAD_SLOTS["graded"]] = float(bool(gradients))
        host[HEAD_SLOTS["lacking"]] = float(is_lacking)
        host[HEAD_SLOTS["stop"]] = float(stop)
        host[HEAD_SLOTS["incomplete"]] = float(incomplete)
        own_start = self._layout.own_start
        host[own_start + RANK_SLOTS["step_time"]] = step_time
        host[own_start + RANK_SLOTS["failed_save"]] = float(failed_save)
        tensors = self._enter_named(host, named or {}, update_square)
        tokens_on_device = self._enter_tokens(host, tokens)
        vector = upload_numbers(host, self.device, self.dtype)
        for slot, value in tensors.items():
            vector[slot] = value.detach().to(self.device, self.dtype)
        if self.blocks:
            blocks = slice(self._layout.blocks_start, self._layout.named_start)
            vector[blocks] = block_sq.to(self.device)
        sums = [
            loss_sum,
            vector[HEAD_SLOTS["tokens"]] if tokens_on_device is None else tokens_on_device,
            grad_sq,
            embed_sq,
        ]
        if not self._counting:
            sums[:2] = torch.zeros_like(loss_sum), torch.zeros_like(loss_sum)
        self.own = torch.stack([loss_sum, grad_sq, self.own_norms.total().to(self.dtype)])
        flags = ~torch.isfinite(self.own)
        vector[: len(sums)] = torch.stack(sums)
        vector[own_start : own_start + len(flags)] = flags.to(self.dtype)
        self.own_norms.clear()
        if self.world > 1:
            dist.all_reduce(vector)
        return torch.cat([vector, self._squares(vector).sqrt()])

    def _enter_tokens(self, host: np.ndarray, tokens: Tensor | float) -> Tensor | None:
        """Write a token count of the host into `host`; return one that is on the device."""
        if isinstance(tokens, Tensor) and tokens.device.type == self.device.type:
            return tokens.detach().to(self.dtype)
        host[HEAD_SLOTS["tokens"]] = float(tokens)
        return None

    def _square_norms(
        self, present: list[bool], gradients: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the squared gradient norm of all parameters, of the embeddings, of each block.

        Each is this rank's share of the sum over all ranks: 0-d, 0-d, and [blocks].
        """
        zero = torch.zeros((), dtype=self.dtype, device=self.weights.device)
        block_sq = zero.new_zeros(len(self.blocks))
        if not gradients:
            return zero, zero, block_sq
        squares = torch.stack(compute_norms(gradients)).to(self.dtype) ** 2
        embedded, blocks = self._embedding_index, self._block_index
        if all(present):
            squares = squares * self.weights
        else:
            chosen = _true_indices(present).to(zero.device, non_blocking=True)
            squares = squares * self.weights[chosen]
            pairs = zip(self._is_embedding, present, strict=True)
            embedded = _true_indices([is_embedding for is_embedding, there in pairs if there])
            embedded = embedded.to(zero.device, non_blocking=True)
            if self.blocks:
                blocks = blocks[chosen]
        if self.blocks:
            block_sq.index_add_(0, blocks, squares)
        return squares.sum(), squares[embedded].sum(), block_sq

    def _squares(self, vector: Tensor) -> Tensor:
        """Return the squared norms of gradient, embedding gradient, blocks and last update.

        All ranks use the roots that torch takes of them on the device: the square roots of two
        libraries may differ in the last bit.
        """
        head, layout = HEAD_SLOTS["grad_sq"], self._layout
        update = vector[:0]
        if UPDATE_NORM in self.named:
            update = vector[layout.ranks_start - 2 : layout.ranks_start - 1]
        blocks = vector[layout.blocks_start : layout.named_start]
        return torch.cat([vector[head : head + 2], blocks, update])

    def _enter_named(
        self, host: np.ndarray, named: Mapping[str, Tensor | float], update_square: Tensor | None
    ) -> dict[int, Tensor]:
        """Write further numbers into `host`; return those that are on the device, by slot."""
        unknown = named.keys() - set(self.named)
        if unknown:
            known = ", ".join(self.named) or "none"
            raise UsageError(
                f"step.finish got signal {min(unknown)!r}, which is not in guard.extra_signals "
                f"({known}). Add it there."
            )
        given: dict[str, Tensor | float] = {}
        if self._counting:
            given.update(named)
        if update_square is not None:
            given[UPDATE_NORM] = update_square
        tensors: dict[int, Tensor] = {}
        for name, value in given.items():
            slot = self._layout.named_slot(self.named.index(name))
            host[slot + 1] = 1.0
            if isinstance(value, Tensor):
                tensors[slot] = value
            else:
                host[slot] = float(value)
        return tensors

    def take_lacking_names(self) -> list[str]:
        """Return the names of the parameters that `ReducedStep.lacking` counts; each once."""
        return self.gradients.take_names()

    def expect_gradients(self, without: Collection[str]) -> None:
        """Treat every parameter as one that has had a gradient, except those in `without`."""
        self.gradients.expect_all(without)

    def frozen_names(self) -> list[str]:
        """Return the names of the parameters of the model that are not trained now."""
        return sorted(self._names[id(p)] for p in self._model_parameters if not p.requires_grad)

    def names_without_gradient(self) -> list[str]:
        """Return the names of the parameters that have had no gradient in any step so far."""
        return self.gradients.names_without_gradient()

    def discard(self) -> None:
        """Drop what the hooks have summed: the gradients of this step are not reduced."""
        self.own_norms.clear()

    def unpack(
        self, values: list[float], nominal_tokens: float | None, loss_scale: float | None
    ) -> ReducedStep:
        """Return the numbers of the packed vector, which is on the host; see `VectorReader`."""
        return self._reader.unpack(values, nominal_tokens, loss_scale)

    def unpack_on_device(
        self, vector: Tensor, nominal_tokens: float | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what `unpack` computes, without waiting for the device; see `VectorReader`."""
        return self._reader.unpack_on_device(vector, nominal_tokens)

    def find_nonfinite_gradients(self) -> list[str]:
        """Return the names of the parameters whose local gradient holds NaN or Inf.

        For incidents only: it reads each gradient and waits for the device each time.
        """
        names: list[str] = []
        for parameter in self.parameters:
            if parameter.grad is None:
                continue
            if not bool(torch.isfinite(to_local(parameter.grad)).all()):
                names.append(self._names[id(parameter)])
        return names


def _true_indices(flags: Sequence[bool]) -> Tensor:
    """Return the indices of the flags that are set, int64, on the host."""
    return torch.tensor([i for i, flag in enumerate(flags) if flag], dtype=torch.long)


def _agree_on_blocks(own_blocks: Sequence[str], world: int) -> list[str]:
    """Return the blocks of all ranks in natural order: stages of a pipeline hold different ones."""
    blocks: set[str] = set().union(*gather_objects(set(own_blocks), world))
    return sorted(blocks, key=_natural_key)


def _natural_key(name: str) -> list[tuple[bool, int | str]]:
    """Return a sort key by which layers.9 comes before layers.10."""
    key: list[tuple[bool, int | str]] = []
    for part in re.split(r"(\d+)", name):
        if part.isdigit():
            key.append((True, int(part)))
        else:
            key.append((False, part))
    return key


def _unwrapped_name(name: str) -> str:
    """Return the parameter's name without what DDP and torch.compile put into it."""
    for prefix in ("module.", foreach.COMPILE_PREFIX):
        name = name.replace(prefix, "")
    return name
