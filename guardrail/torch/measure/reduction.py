"""Tensors -> one packed float64 vector -> ONE all-reduce a step.

The vector carries everything that a step has to agree on: loss and token sums, squared norms,
finite flags and step times of each rank, a pending command, a stop signal. After the sum every rank
holds the same numbers.

Layout: `HEAD` sums, then (where asked for) squares of each block of the model and (sum, ranks that
gave it) of each further number, then one block of `PER_RANK` slots for each rank, in which only
that rank writes. A NaN therefore poisons the sums that it belongs to and nothing else; flags stay
finite and name their rank.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from guardrail.core.errors import UsageError
from guardrail.core.records import (
    EMBED_GRAD_NORM,
    EMBED_SHARE,
    GRAD_NORM,
    LOSS,
    LOSS_SCALE,
    UPDATE_NORM,
)

HEAD = (
    "loss_sum",
    "tokens",
    "grad_sq",
    "embed_sq",
    "command_kind",
    "command_value",
    "stop",
    "incomplete",
    "graded",
    "lacking",
)
_HALVES = (torch.float16, torch.bfloat16)
_MANY = 4096  # small tensors kept before they are added up, in a long window of micro-batches
FLAGS = ("nonfinite_loss", "nonfinite_grad", "nonfinite_local")
PER_RANK = (*FLAGS, "step_time", "failed_save")


def local(tensor: Tensor) -> Tensor:
    """The local storage of a parameter or gradient, sharded or not."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copies(parameter: Tensor, world: int) -> int:
    """How many ranks hold the same shard, so that squares summed over all ranks count each element
    once.
    """
    if not isinstance(parameter, DTensor):
        return world
    shards = 1
    for size, placement in zip(parameter.device_mesh.shape, parameter.placements, strict=True):
        if not placement.is_replicate():
            shards *= size
    return world // shards


def embedding_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Weights of every nn.Embedding; under tied embeddings that is the output matrix too."""
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            weight = module.get_parameter("weight")
            found[id(weight)] = weight
    return list(found.values())


def block_of(name: str) -> str:
    """The part of a model that a parameter belongs to: "layers.3" of "layers.3.attention.q.weight",
    else its module.
    """
    numbered = re.match(r"(.*?\.\d+)\.", name)
    return numbered[1] if numbered else name.rpartition(".")[0] or name


@dataclass(frozen=True, kw_only=True, slots=True)
class ReducedStep:
    """The sums of one step, equal on every rank.

    Attributes:
        loss: mean over the label tokens of the global batch, nats; NaN when there is none.
        tokens: label tokens of the global batch.
        grad_norm, embed_grad_norm: L2 norms of the gradient of the mean loss, before clipping.
        embed_share: embed_grad_norm^2 / grad_norm^2.
        scale: factor that turns the accumulated gradients into the gradient of the mean loss.
        loss_scale: what the loss was multiplied by on the way to the gradients; None: nothing
        scales it.
        overflow: under a loss scale, every loss is finite and a gradient is not.
        nonfinite_loss, nonfinite_grad: ranks that saw NaN or Inf themselves (before the reduction,
        where known).
        step_times: seconds of this step that each rank has worked itself, without waiting for
        others (`Pace`).
        command_kind: 0, or 1 + index in COMMANDS; command_value its argument.
        stop, incomplete: ranks that were asked to stop; ranks that left micro-batches out because
        of it.
        failed_saves: by rank, the number of its last save that failed, counting from 1; 0: none.
        graded, lacking: ranks on which some parameter has a gradient; ranks on which one has none
        that had one before.
        further: signal -> value, of what is measured besides; a number that no rank gave is not
        there.
    """

    loss: float
    tokens: int
    grad_norm: float
    embed_grad_norm: float
    embed_share: float
    scale: float
    loss_scale: float | None
    overflow: bool
    nonfinite_loss: tuple[int, ...]
    nonfinite_grad: tuple[int, ...]
    step_times: tuple[float, ...]
    command_kind: int
    command_value: float
    stop: int
    incomplete: int
    failed_saves: tuple[int, ...] = ()
    graded: int = 1
    lacking: int = 0
    further: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_request(self) -> bool:
        """Whether a command or a stop came with the step."""
        return bool(self.command_kind or self.stop)

    def signals(self) -> dict[str, float]:
        return {
            LOSS: self.loss,
            GRAD_NORM: self.grad_norm,
            EMBED_GRAD_NORM: self.embed_grad_norm,
            EMBED_SHARE: self.embed_share,
            **({} if self.loss_scale is None else {LOSS_SCALE: self.loss_scale}),
            **self.further,
        }


class StepReduction:
    """Measures the gradients of `parameters` and agrees on them with all other ranks.

    Args:
        model: unwrapped or wrapped; its nn.Embedding weights are the embedding parameters.
        rank, world: of the default process group; without one, 0 and 1.
        device: that computes, and on which the ranks reduce; None: where the parameters lie.
        holders: ranks that hold the same part of the model as this one; None: all.
        counting: whether this rank's loss and tokens enter the sums. Of ranks that compute the
        same, one counts.
        locate: with several ranks, watch each rank's own gradients before the reduction, so that a
            NaN or Inf can be traced to the rank that produced it. Costs one more read of the
            gradients.
        layers: measure the gradient norm of each block too. The ranks agree on the blocks here, in
        a collective.
        named: further numbers that `reduce` takes.
        updates: also reduce the squared norm of the last update, which `reduce` takes.
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
        embeddings = {id(p) for p in embedding_parameters(model)}
        self.embedding = [p for p in self.parameters if id(p) in embeddings]
        self._is_embedding = [id(p) in embeddings for p in self.parameters]
        wrappers = ("module.", "_orig_mod.")
        self._names = {id(p): _without(name, wrappers) for name, p in model.named_parameters()}
        self._model_parameters = list(model.parameters())
        self.all_names = frozenset(self._names.values())
        if not self.parameters:
            raise UsageError(
                "no parameter of the model requires a gradient: is everything frozen, or is this another model?"
            )
        home = local(self.parameters[0]).device  # the host, for offloaded parameters
        self.device = device = home if device is None else device
        # Apple's MPS has no float64; there the sums are float32.
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        held = world if holders is None else len(holders)
        self._weights = torch.tensor(
            [1.0 / copies(p, held) for p in self.parameters], dtype=self.dtype, device=home
        )
        self._embedding_index = torch.tensor(
            [i for i, e in enumerate(self._is_embedding) if e], dtype=torch.long, device=home
        )
        self.weights = self._weights
        own_blocks = [block_of(self._names[id(p)]) for p in self.parameters] if layers else []
        self.blocks = _agreed(own_blocks, world) if layers else []
        self._block_index = torch.tensor(
            [self.blocks.index(b) for b in own_blocks], dtype=torch.long, device=home
        )
        self._block_names = tuple(f"{GRAD_NORM}/{block}" for block in self.blocks)
        self.named = (*named, UPDATE_NORM) if updates else tuple(named)
        # In the order of `on_device`.
        self.signal_names = (
            LOSS,
            GRAD_NORM,
            EMBED_GRAD_NORM,
            EMBED_SHARE,
            *self._block_names,
            *self.named,
        )
        self._block_slots = len(HEAD)
        self._named_slots = self._block_slots + len(self.blocks)
        self._rank_slots = self._named_slots + 2 * len(self.named)
        self._length = self._rank_slots + world * len(PER_RANK)  # roots stand behind it
        self._own_slots = self._rank_slots + rank * len(PER_RANK)
        self._graded = [False] * len(self.parameters)  # whether each has had a gradient
        self.lacking: list[int] = []  # parameters that had one and have none now
        self._named_lacking: set[int] = set()
        self._own_norms: list[Tensor] = []  # of gradients that no rank has reduced yet; fp32, 0-d
        # Of the last reduction, on the device: this rank's loss sum, the squared norm of its
        # (shards of the) reduced gradients, and the sum of its parameters' gradient norms from
        # before the ranks reduced them.
        self.own = torch.zeros(3, dtype=self.dtype, device=device)
        self._hooks: list[RemovableHandle] = []
        if locate and world > 1:
            self._watch(model)

    def _watch(self, model: nn.Module) -> None:
        """Add up each rank's own gradient norms during backward, before DDP or FSDP reduce them.

        Hooks sit on the parameters that take part in the forward pass: under FSDP2 those are the
        gathered ones, which stay the same objects from their first gathering on, so each group is
        gathered once here, a collective. They are not hung in by the forward pass: torch.compile
        would trace that.

        A hook may keep nothing of what it is given: autograd would copy a gradient that somebody
        else still holds, instead of taking it over. And it is short, because it runs once a
        parameter.
        """
        hooked: set[int] = set()
        for group, modules in _groups(model):
            if group is not None:
                group.unshard()
            for module in modules:
                for parameter in module._parameters.values():
                    if (
                        parameter is not None
                        and parameter.requires_grad
                        and id(parameter) not in hooked
                    ):
                        hooked.add(id(parameter))
                        self._hooks.append(parameter.register_hook(self._add_own))
            if group is not None:
                group.reshard()

    def _add_own(self, gradient: Tensor) -> None:
        # Added up at the end: an addition for each costs as much as the reading itself.
        self._own_norms.append(norm_of(local(gradient).detach()))
        if len(self._own_norms) >= _MANY:
            self._own_norms = [self._own_norm()]

    def close(self) -> None:
        """Take the hooks off the model; harmless when called again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _own_norm(self) -> Tensor:
        """Sum of this rank's own gradient norms so far."""
        if not self._own_norms:
            return torch.zeros((), dtype=torch.float32, device=self.device)
        return torch.stack([norm.float() for norm in self._own_norms]).sum()

    def reduce(
        self,
        *numbers: Any,
        nominal_tokens: float | None,
        loss_scale: float | None = None,
        **more: Any,
    ) -> ReducedStep:
        """`launch`, and `unpack` of what comes back: waits for the device."""
        return self.unpack(self.launch(*numbers, **more).tolist(), nominal_tokens, loss_scale)

    @torch.no_grad()
    def launch(
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
        """The one all-reduce: the packed vector with the roots of its squares, on the device, the
        same on every rank. Waits for nothing there.

        Args:
            loss_sum: sum of this rank's token losses over the window, 0-d.
            tokens: label tokens behind it.
            failed_save: number of this rank's last save that failed, counting from 1; 0: none.
            named: further numbers of this rank, 0-d; the mean over the counting ranks that give one
            is the signal.
            update_square: of `UpdateNorm`; None: no update is known.
            replayed: the gradients are those of a replay, so that nothing is concluded from one
            that is missing.

        Raises:
            UsageError: a number that was not announced: ranks must agree on what they reduce.
        """
        device = self.device
        present = [p.grad is not None for p in self.parameters]
        gradients = [local(p.grad) for p in self.parameters if p.grad is not None]
        zero = torch.zeros((), dtype=self.dtype, device=self._weights.device)
        grad_sq = embed_sq = zero
        block_sq = zero.new_zeros(len(self.blocks))
        if gradients:
            squares = torch.stack(norms(gradients)).to(self.dtype) ** 2
            blocks = self._block_index
            if all(present):
                squares, embedded = squares * self._weights, self._embedding_index
            else:
                chosen = torch.tensor([at for at, p in enumerate(present) if p]).to(
                    zero.device, non_blocking=True
                )
                squares = squares * self._weights[chosen]
                marks = [e for e, p in zip(self._is_embedding, present, strict=True) if p]
                embedded = torch.tensor([at for at, e in enumerate(marks) if e], dtype=torch.long)
                embedded = embedded.to(zero.device, non_blocking=True)
                blocks = blocks[chosen] if self.blocks else blocks
            grad_sq, embed_sq = squares.sum(), squares[embedded].sum()
            if self.blocks:
                block_sq.index_add_(0, blocks, squares)
        grad_sq, embed_sq = grad_sq.to(device), embed_sq.to(device)
        loss_sum = loss_sum.detach().to(self.dtype)
        # Host numbers travel in one copy, device numbers join them there: no wait on a device
        # before the reduction.
        host = [0.0] * self._length
        host[HEAD.index("command_kind")], host[HEAD.index("command_value")] = (
            float(command[0]),
            command[1],
        )
        host[HEAD.index("graded")] = float(bool(gradients))
        host[HEAD.index("lacking")] = float(
            not (incomplete or replayed) and self._lacks_gradients(present)
        )
        host[HEAD.index("stop")], host[HEAD.index("incomplete")] = float(stop), float(incomplete)
        host[self._own_slots + PER_RANK.index("step_time")] = step_time
        host[self._own_slots + PER_RANK.index("failed_save")] = float(failed_save)
        tensors = self._enter(host, named or {}, update_square)
        vector = torch.tensor(host, dtype=self.dtype).to(device, non_blocking=True)
        for slot, value in tensors.items():
            vector[slot] = value.detach().to(device, self.dtype)
        if self.blocks:
            vector[self._block_slots : self._named_slots] = block_sq.to(device)
        sums = [
            loss_sum,
            torch.as_tensor(tokens, dtype=self.dtype, device=device),
            grad_sq,
            embed_sq,
        ]
        if not self._counting:
            sums[:2] = torch.zeros_like(loss_sum), torch.zeros_like(loss_sum)
        self.own = torch.stack([loss_sum, grad_sq, self._own_norm().to(self.dtype)])
        flags = ~torch.isfinite(self.own)
        vector[: len(sums)] = torch.stack(sums)
        vector[self._own_slots : self._own_slots + len(flags)] = flags.to(self.dtype)
        self._own_norms = []
        if self.world > 1:
            dist.all_reduce(vector)
        return torch.cat([vector, self._squares(vector).sqrt()])

    def _squares(self, vector: Tensor) -> Tensor:
        """Of the gradient, the embedding, the blocks and the update. Their roots, taken here, are
        the ones that count: a library's square root and another's may differ in the last bit."""
        at = HEAD.index("grad_sq")
        update = (
            vector[self._rank_slots - 2 : self._rank_slots - 1]
            if UPDATE_NORM in self.named
            else vector[:0]
        )
        return torch.cat(
            [vector[at : at + 2], vector[self._block_slots : self._named_slots], update]
        )

    def _lacks_gradients(self, present: list[bool]) -> bool:
        """Whether a parameter that had a gradient in some step has none now, and has not been named
        for it yet.
        """
        if present == self._graded:
            return False
        pairs = list(zip(self._graded, present, strict=True))
        lost = {at for at, (before, now) in enumerate(pairs) if before and not now}
        self.lacking = sorted(lost - self._named_lacking)
        self._graded = [before or now for before, now in pairs]
        return bool(self.lacking)

    def take_lacking(self) -> list[str]:
        """Names of the parameters that `ReducedStep.lacking` is about; each is given once."""
        names = [self._names[id(self.parameters[at])] for at in self.lacking]
        self._named_lacking.update(self.lacking)
        self.lacking = []
        return names

    def expect_gradients(self, without: Collection[str]) -> None:
        """Take it that every parameter but these has had a gradient, as in the run that is
        resumed.
        """
        self._graded = [self._names[id(p)] not in without for p in self.parameters]

    def frozen(self) -> list[str]:
        """Names of the parameters of the model that are not trained now."""
        return sorted(self._names[id(p)] for p in self._model_parameters if not p.requires_grad)

    def without_gradient(self) -> list[str]:
        """Names of the parameters that have had no gradient in any step so far."""
        return [
            self._names[id(p)]
            for p, graded in zip(self.parameters, self._graded, strict=True)
            if not graded
        ]

    def forget(self) -> None:
        """The gradients of this step will not be reduced: drop what the hooks have added up of
        them.
        """
        self._own_norms = []

    def on_device(
        self, vector: Tensor, nominal_tokens: float | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `unpack` makes of the vector, by the same operations, without a wait; for a loss
        that nothing scales.

        Returns:
            (values of `signal_names`; which of them are known; whether all is finite, labelled and
            complete, 0-d; the scale, 0-d). Flags are bool, numbers as in the vector.
        """
        head = dict(zip(HEAD, vector[: len(HEAD)].unbind(), strict=True))
        tokens, grad_sq, embed_sq = head["tokens"], head["grad_sq"], head["embed_sq"]
        # A number over a tensor is, in torch, the number times 1 / tensor: another last bit.
        scale = (
            torch.ones_like(tokens)
            if nominal_tokens is None
            else torch.full_like(tokens, nominal_tokens) / tokens
        )
        roots = vector[self._length :]
        norms = roots[: 2 + len(self.blocks)] * scale
        usual = [head["loss_sum"] / tokens, norms[0], norms[1], embed_sq / grad_sq]
        totals, given = vector[self._named_slots : self._rank_slots].view(-1, 2).unbind(1)
        further = totals / given
        if UPDATE_NORM in self.named:
            further = torch.cat([further[:-1], roots[-1:]])
        values = torch.cat([torch.stack(usual), norms[2:], further])
        known = torch.ones_like(values, dtype=torch.bool)
        known[len(values) - len(given) :] = given > 0
        flags = vector[self._rank_slots : self._length].view(-1, len(PER_RANK))[:, : len(FLAGS)]
        sound = (tokens > 0) & (head["incomplete"] == 0) & (flags == 0).all()
        return values, known, sound, scale

    def _enter(
        self, host: list[float], named: Mapping[str, Tensor | float], update_square: Tensor | None
    ) -> dict[int, Tensor]:
        """Write further numbers that are on the host into `host`; returns the others by slot."""
        given = dict(named) if self._counting else {}
        if unknown := named.keys() - set(self.named):
            known = ", ".join(self.named) or "none"
            raise UsageError(
                f"step.finish got a signal {min(unknown)!r}; guard.extra_signals announces {known}"
            )
        if update_square is not None:
            given[UPDATE_NORM] = update_square
        tensors: dict[int, Tensor] = {}
        for name, value in given.items():
            slot = self._named_slots + 2 * self.named.index(name)
            host[slot + 1] = 1.0
            if isinstance(value, Tensor):
                tensors[slot] = value
            else:
                host[slot] = float(value)
        return tensors

    def _further(self, values: list[float], scale: float) -> dict[str, float]:
        roots = values[self._length :]
        further = {name: roots[2 + at] * scale for at, name in enumerate(self._block_names)}
        for index, name in enumerate(self.named):
            total, ranks = values[self._named_slots + 2 * index : self._named_slots + 2 * index + 2]
            if ranks:
                further[name] = roots[-1] if name == UPDATE_NORM else total / ranks
        return further

    def unpack(
        self, values: list[float], nominal_tokens: float | None, loss_scale: float | None
    ) -> ReducedStep:
        """The packed vector on the host -> what it says.

        Args:
            nominal_tokens: what the losses were divided by before backward, summed over the ranks:
                the gradients are those of loss_sum / nominal_tokens. None: they are those of the
                mean already.
            loss_scale: what the losses were multiplied by before backward besides, equal on all
            ranks; None: nothing.
        """
        sums = dict(zip(HEAD, values, strict=False))
        blocks = [
            values[i : i + len(PER_RANK)]
            for i in range(self._rank_slots, self._length, len(PER_RANK))
        ]

        def ranks(slot: str) -> tuple[int, ...]:
            at = PER_RANK.index(slot)
            return tuple(rank for rank, block in enumerate(blocks) if block[at])

        tokens = sums["tokens"]
        scale = 1.0 if nominal_tokens is None or not tokens else nominal_tokens / tokens
        scale /= loss_scale or 1.0
        grad_sq, embed_sq = sums["grad_sq"], sums["embed_sq"]
        share = embed_sq / grad_sq if grad_sq > 0 else (0.0 if grad_sq == 0 else float("nan"))
        # After the reduction a bad gradient stands on every rank; the rank that made it is known
        # from before.
        culprits = ranks("nonfinite_local") or ranks("nonfinite_grad")
        losses = ranks("nonfinite_loss")
        return ReducedStep(
            loss=sums["loss_sum"] / tokens if tokens else float("nan"),
            tokens=int(tokens),
            grad_norm=values[self._length] * scale,
            embed_grad_norm=values[self._length + 1] * scale,
            embed_share=share,
            scale=scale,
            loss_scale=loss_scale,
            overflow=loss_scale is not None and bool(culprits) and not losses,
            nonfinite_loss=losses,
            nonfinite_grad=culprits,
            step_times=tuple(block[PER_RANK.index("step_time")] for block in blocks),
            command_kind=int(sums["command_kind"]),
            command_value=sums["command_value"],
            stop=int(sums["stop"]),
            incomplete=int(sums["incomplete"]),
            failed_saves=tuple(int(block[PER_RANK.index("failed_save")]) for block in blocks),
            graded=int(sums["graded"]),
            lacking=int(sums["lacking"]),
            further=self._further(values, scale),
        )

    def names_of_nonfinite(self) -> list[str]:
        """Parameters whose local gradient holds NaN or Inf. For incidents only: one read and one
        wait each.
        """
        return [
            self._names[id(p)]
            for p in self.parameters
            if p.grad is not None and not bool(torch.isfinite(local(p.grad)).all())
        ]


def _groups(model: nn.Module) -> list[tuple[FSDPModule | None, list[nn.Module]]]:
    """The modules of each FSDP2 group, those that belong to none with None; a module stands with
    its nearest one.
    """
    found: dict[int, tuple[FSDPModule | None, list[nn.Module]]] = {}

    def visit(module: nn.Module, group: FSDPModule | None) -> None:
        group = module if isinstance(module, FSDPModule) else group
        found.setdefault(id(group), (group, []))[1].append(module)
        for child in module.children():
            visit(child, group)

    visit(model, None)
    return list(found.values())


def norms(tensors: list[Tensor]) -> list[Tensor]:
    """L2 norm of each, at least in fp32: the norm of finite fp16 numbers is often no fp16
    number.
    """
    if any(tensor.dtype in _HALVES for tensor in tensors):
        return list(torch._foreach_norm(tensors, 2, torch.float32))
    return list(torch._foreach_norm(tensors))


def norm_of(tensor: Tensor) -> Tensor:
    """`norms` of one, without the lists."""
    dtype = torch.float32 if tensor.dtype in _HALVES else None
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=dtype)
    return norm


def _agreed(blocks: Sequence[str], world: int) -> list[str]:
    """All ranks' blocks in natural order: stages of a pipeline hold different ones."""
    known = set(blocks)
    if world > 1:
        everyone: list[Any] = [None] * world
        dist.all_gather_object(everyone, known)
        known = set().union(*everyone)
    return sorted(
        known,
        key=lambda name: [
            (part.isdigit(), int(part) if part.isdigit() else part)
            for part in re.split(r"(\d+)", name)
        ],
    )


def _without(name: str, prefixes: Sequence[str]) -> str:
    for prefix in prefixes:
        name = name.replace(prefix, "")
    return name
