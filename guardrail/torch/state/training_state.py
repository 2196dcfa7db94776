"""The training state as named tensors and plain numbers: what a snapshot copies and a checkpoint
stores.

    model/FQN        parameters, tied ones once
    buffer/FQN       persistent buffers (a buffer that is not persistent is, by torch's definition, not state)
    optim/FQN/KEY    tensors of the optimizer, by the parameter's name, never by its index

Works on local tensors: a DTensor (FSDP2) stands for this rank's shard of it, and its `Box` says
which part that is. Parameters never change identity and `.grad` is never part of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from guardrail.core.errors import CheckpointInvalid, UsageError
from guardrail.rundir.manifest import BUFFER, MODEL, OPTIM, Box, Shape
from guardrail.torch.state import foreach
from guardrail.torch.state import json_codec as plain
from guardrail.torch.state import optimizer_state as moments
from guardrail.torch.state.digests import component_digests
from guardrail.torch.state.tensor_shards import box_of, local, replica
from guardrail.torch.state.wrappers import accelerated, plain_name, unwrap, unwrap_model

# How to compute an update, not which one: it belongs to the machine that trains now, not to the one
# that saved.
_IMPLEMENTATION = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})
_NAMED = 3  # differences that a message names; the rest is counted


class TrainingState:
    """Model, optimizers and schedules as one thing that can be copied, compared and put back bit by
    bit.

    Args:
        model: plain, compiled, DDP, FSDP2 (`fully_shard`), or what Accelerate's `prepare` returned.
        optimizer: one torch.optim optimizer or several, of parameters of the model, each in one of
        them.
        scheduler: anything with state_dict and load_state_dict, several, or None.
        holders: the ranks that hold the same part of the model as this one, a contiguous stretch;
            None: all ranks. With it construction is a collective.
        scaler: a torch.amp.GradScaler, or None. One that Accelerate hung on an optimizer is found
        by itself.

    Raises:
        UsageError: something that could not be restored exactly; names it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        scheduler: Any = None,
        scaler: Any = None,
        holders: range | None = None,
    ) -> None:
        self.holders = holders
        self.model = unwrap_model(model)
        wrapped: list[Any] = (
            list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
        )
        self.optimizers: list[Optimizer] = [unwrap(item, "optimizer") for item in wrapped]
        hung = [s for item in wrapped if accelerated(item) and (s := item.scaler) is not None]
        self._scalers = list({id(s): s for s in [*hung, scaler] if s is not None}.values())
        schedulers = list(scheduler) if isinstance(scheduler, (list, tuple)) else [scheduler]
        self.schedulers = [unwrap(item, "scheduler") for item in schedulers if item is not None]
        self._refuse_unknown_sharding()
        self.settle()
        self._parameters = {
            plain_name(name): parameter for name, parameter in self.model.named_parameters()
        }
        self.names: dict[int, str] = {id(p): name for name, p in self._parameters.items()}
        self._buffers = list(_persistent_buffers(self.model))
        self._refuse_overlapping()
        self._groups = self._trained()
        self._share_names()
        self._boxes: dict[Any, Box] = {}
        self.scalars()  # refuse now what could not be saved later

    def _refuse_unknown_sharding(self) -> None:
        for module in self.model.modules():
            if isinstance(module, FullyShardedDataParallel):
                raise UsageError(
                    "the model is wrapped in FullyShardedDataParallel (FSDP1): use fully_shard (FSDP2)"
                )
        for optimizer in self.optimizers:
            if "ZeroRedundancyOptimizer" in {kind.__name__ for kind in type(optimizer).__mro__}:
                raise UsageError(
                    "ZeroRedundancyOptimizer hides which rank holds which state: use fully_shard (FSDP2)"
                )

    def _refuse_overlapping(self) -> None:
        for name, module, key in self._buffers:
            buffer = foreach.own_buffers(module)[key]
            if buffer is not None and any(
                s == 0 and n > 1 for n, s in zip(buffer.shape, buffer.stride(), strict=True)
            ):
                raise UsageError(
                    f"buffer {name} is an expanded view and cannot be restored in place: clone() it"
                )

    def _trained(self) -> dict[str, moments.Trained]:
        """By parameter name."""
        trained: dict[str, moments.Trained] = {}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    name = self.names.get(id(parameter))
                    if name is None:
                        raise UsageError(
                            f"{type(optimizer).__name__} trains a tensor of shape {tuple(parameter.shape)} that is no "
                            "parameter of the model: build the optimizer after the model was sharded or moved"
                        )
                    if name in trained:
                        raise UsageError(
                            f"{name} is trained by two optimizers; guardrail needs one for each parameter"
                        )
                    trained[name] = (parameter, optimizer, group)
        return trained

    def _share_names(self) -> None:
        """What the model and each parameter group hold on all ranks together: a stage of a pipeline
        has some of it.
        """
        names = set(self._parameters) | {name for name, _, _ in self._buffers}
        groups = [
            [sorted(self.names[id(p)] for p in g["params"]) for g in o.param_groups]
            for o in self.optimizers
        ]
        everyone: list[Any] = [(names, groups)]
        if self.holders is not None:
            everyone = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everyone, (names, groups))
        self.all_names: frozenset[str] = frozenset().union(*(theirs for theirs, _ in everyone))
        self._group_names = [
            [
                sorted({name for _, theirs in everyone for name in theirs[i][j]})
                for j in range(len(own))
            ]
            for i, own in enumerate(groups)
        ]

    def owns(self, name: str) -> bool:
        """Whether a tensor of this name has a place on this rank."""
        prefix, _, inner = name.partition("/")
        inner = inner.rpartition("/")[0] if prefix + "/" == OPTIM else inner
        return inner in self._parameters or any(inner == buffer for buffer, _, _ in self._buffers)

    # -- tensors -----------------------------------------------------------------------------------

    @property
    def sharded(self) -> bool:
        """Whether any parameter is spread over ranks."""
        return any(isinstance(p, DTensor) for p in self._parameters.values())

    @property
    def layout(self) -> str:
        """How the state lies on the ranks; two runs with the same one hold the same parts on the
        same ranks.

        "ddp": whole on every rank; "fsdp": sharded over all of them; else the mesh as well, "fsdp
        dp_replicate=2 ...".
        """
        part = "" if self.holders is None else f" of a stage on {len(self.holders)} ranks"
        meshes = {p.device_mesh for p in self._parameters.values() if isinstance(p, DTensor)}
        if not meshes:
            return "ddp" + part
        mesh = max(meshes, key=lambda mesh: mesh.ndim)
        names = mesh.mesh_dim_names or tuple(str(dimension) for dimension in range(mesh.ndim))
        sizes = " ".join(f"{name}={size}" for name, size in zip(names, mesh.shape, strict=True))
        return ("fsdp" if mesh.ndim == 1 else f"fsdp {sizes}") + part

    def settle(self) -> None:
        """Drop FSDP's gathered copies of parameters.

        After a forward pass with no backward (an evaluation) FSDP2 keeps the root's parameters
        gathered, and would compute the next step with that copy of the old values.
        """
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _entries(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._parameters.items():
            yield MODEL + name, parameter
        for name, buffer in self.buffers():
            yield BUFFER + name, buffer
        for name, (parameter, optimizer, _) in self._groups.items():
            if parameter in optimizer.state:
                for key, value in optimizer.state[parameter].items():
                    if isinstance(value, Tensor):
                        yield f"{OPTIM}{name}/{key}", value

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """The persistent buffers by name, live."""
        for name, module, key in self._buffers:
            buffer = foreach.own_buffers(module)[key]
            if buffer is not None:
                yield name, buffer

    def tensors(self) -> dict[str, Tensor]:
        """Name -> this rank's part of it, the live storage. Empty optimizer state (never stepped)
        has no names.
        """
        return {name: local(tensor) for name, tensor in self._entries()}

    def boxes(self) -> dict[str, Box]:
        """Name -> which part of the whole tensor this rank holds."""
        return {name: self._box_of(tensor) for name, tensor in self._entries()}

    def replicas(self) -> dict[str, tuple[int, int]]:
        """Name -> (index, count) of this rank among those that hold the same part; plain tensors:
        all of the world.
        """
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        holders = range(world) if self.holders is None else self.holders
        return {name: replica(tensor, holders) for name, tensor in self._entries()}

    def box(self, name: str, shape: Shape) -> Box:
        """The part that this rank holds, or would hold, of a tensor with this global shape."""
        parameter = self._parameters.get(name.split("/", 1)[1])
        if name.startswith(OPTIM):
            parameter = self._groups[name.split("/", 1)[1].rpartition("/")[0]][0]
        if (
            parameter is not None
            and isinstance(parameter, DTensor)
            and tuple(parameter.shape) == shape
        ):
            return self._box_of(parameter)
        return Box.whole(shape)

    def _box_of(self, tensor: Tensor) -> Box:
        if not isinstance(tensor, DTensor):
            return Box.whole(tensor.shape)
        key = (tensor.shape, tensor.device_mesh, tensor.placements)
        if key not in self._boxes:
            self._boxes[key] = box_of(tensor)
        return self._boxes[key]

    # -- numbers -----------------------------------------------------------------------------------

    def scalars(self) -> dict[str, Any]:
        """All that is not a tensor, JSON-able: hyperparameters by group, optimizer numbers,
        schedules, loss scale.
        """
        return {
            "groups": [
                [
                    self._group_scalars(group, names)
                    for group, names in zip(o.param_groups, all_names, strict=True)
                ]
                for o, all_names in zip(self.optimizers, self._group_names, strict=True)
            ],
            "state": moments.scalars(self._groups),
            "schedulers": [plain.encode(s.state_dict(), type(s).__name__) for s in self.schedulers],
            "scalers": [plain.encode(s.state_dict(), type(s).__name__) for s in self._scalers],
        }

    def _group_scalars(self, group: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
        values = {key: value for key, value in group.items() if key not in _IMPLEMENTATION}
        return {
            "parameters": _hash(names),
            "values": plain.encode(values, "a parameter group"),
        }

    @torch.no_grad()
    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """Put the numbers of `scalars()` back: schedules first, so that the saved learning rates
        have the last word.
        """
        self.check_scalars(scalars)
        for scheduler, saved in zip(self.schedulers, scalars["schedulers"], strict=True):
            scheduler.load_state_dict(plain.decode(saved))
        for scaler, saved in zip(self._scalers, scalars["scalers"], strict=True):
            scaler.load_state_dict(plain.decode(saved))
        for optimizer, groups in zip(self.optimizers, scalars["groups"], strict=True):
            for group, saved in zip(optimizer.param_groups, groups, strict=True):
                for key, value in plain.decode(saved["values"]).items():
                    set_group_value(group, key, value)
        for name, numbers in scalars["state"]["numbers"].items():
            if name not in self._groups:
                continue  # of another stage
            parameter, optimizer, _ = self._groups[name]
            optimizer.state[parameter].update(plain.decode(numbers))

    def check_scalars(self, scalars: Mapping[str, Any]) -> None:
        for what, live in (
            ("schedulers", self.schedulers),
            ("scalers", self._scalers),
            ("groups", self.optimizers),
        ):
            if len(scalars[what]) != len(live):
                noun = {"groups": "optimizers", "scalers": "gradient scalers"}.get(what, what)
                raise CheckpointInvalid(
                    f"saved with {len(scalars[what])} {noun}, and there are {len(live)} now"
                )
        for all_names, groups in zip(self._group_names, scalars["groups"], strict=True):
            now = [_hash(names) for names in all_names]
            if [group["parameters"] for group in groups] != now:
                raise CheckpointInvalid(
                    "the optimizer's groups held other parameters when this was saved"
                )
        strangers = sorted(set(scalars["state"]["numbers"]) - self.all_names)
        if strangers:
            raise CheckpointInvalid(
                f"optimizer state of parameters that are not trained here: {_some(strangers)}"
            )

    # -- putting back ------------------------------------------------------------------------------

    def differences(
        self, found: Mapping[str, tuple[torch.dtype, Shape]], *, weights_only: bool = False
    ) -> list[str]:
        """What keeps tensors of these types and global shapes from being loaded; nothing live is
        touched.
        """
        live = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self._entries()}
        wanted = [name for name in live if not name.startswith(OPTIM)]
        problems = [f"{name} is missing" for name in wanted if name not in found]
        for name, (dtype, shape) in found.items():
            if name.startswith(OPTIM):
                if not weights_only:
                    problems += self._moment_differences(name, dtype, shape, live.get(name))
            elif name not in live:
                problems.append(f"{name} is not in this model")
            elif live[name] != (dtype, shape):
                problems.append(
                    f"{name} is {_kind(dtype, shape)} and should be {_kind(*live[name])}"
                )
        return problems

    def _moment_differences(
        self, name: str, dtype: torch.dtype, shape: Shape, live: tuple[torch.dtype, Shape] | None
    ) -> list[str]:
        owner = name.removeprefix(OPTIM).rpartition("/")[0]
        if owner not in self._groups:
            return [f"{name} belongs to a parameter that is not trained here"]
        if live is not None and live != (dtype, shape):
            return [f"{name} is {_kind(dtype, shape)} and should be {_kind(*live)}"]
        parameter = self._groups[owner][0]
        if (
            live is None
            and isinstance(parameter, DTensor)
            and shape
            and shape != tuple(parameter.shape)
        ):
            return [f"{name} of shape {list(shape)} has no place beside the sharded {owner}"]
        return []

    @torch.no_grad()
    def load(
        self,
        tensors: Mapping[str, Tensor],
        scalars: Mapping[str, Any],
        boxes: Mapping[str, Box] | None = None,
    ) -> None:
        """Make the live state equal to a saved one, bit for bit, cold or warm.

        Optimizer state that is missing is created (type, device and sharding as the optimizer
        would), surplus state is deleted: a state from before the first step makes the optimizer a
        new one again.

        Args:
            tensors: name -> local part on any device, as `tensors()` gave it.
            scalars: as `scalars()` gave it.
            boxes: name -> part of the whole; default: plain tensors are whole, shards are as they
            lie here.

        Raises:
            CheckpointInvalid: names, shapes or types do not fit. Nothing live has been touched
            then.
        """
        boxes = boxes if boxes is not None else self._boxes_like(tensors)
        found = {name: (tensor.dtype, boxes[name].global_shape) for name, tensor in tensors.items()}
        refuse(self.differences(found) + self._part_differences(tensors, boxes))
        self.check_scalars(scalars)
        self.settle()
        moments.reshape(self._groups, found, scalars)
        live = self.tensors()
        foreach.copy_tensors([live[name] for name in tensors], list(tensors.values()))
        self.load_scalars(scalars)

    @torch.no_grad()
    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy parameters and buffers alone; optimizer and schedule stay as they are."""
        self.settle()
        live = self.tensors()
        names = [name for name in tensors if not name.startswith(OPTIM)]
        foreach.copy_tensors([live[name] for name in names], [tensors[name] for name in names])

    def _boxes_like(self, tensors: Mapping[str, Tensor]) -> dict[str, Box]:
        boxes = {}
        for name, tensor in tensors.items():
            parameter = self._parameters.get(name.split("/", 1)[1])
            if name.startswith(OPTIM):
                parameter = self._groups.get(name.removeprefix(OPTIM).rpartition("/")[0], (None,))[
                    0
                ]
            own = self._box_of(parameter) if isinstance(parameter, DTensor) else None
            boxes[name] = (
                own
                if own is not None and own.size == tuple(tensor.shape)
                else Box.whole(tensor.shape)
            )
        return boxes

    def _part_differences(
        self, tensors: Mapping[str, Tensor], boxes: Mapping[str, Box]
    ) -> list[str]:
        problems = []
        for name, tensor in tensors.items():
            box = boxes[name]
            owner = name.removeprefix(OPTIM).rpartition("/")[0]
            if name.startswith(OPTIM) and owner not in self._groups:
                continue  # named by `differences` already
            if tuple(tensor.shape) != box.size or self.box(name, box.global_shape) != box:
                problems.append(f"{name} holds another part of the whole than this rank does")
        return problems

    # -- comparing ---------------------------------------------------------------------------------

    def digests(self) -> dict[str, str]:
        """SHA-256 of each component of this rank's live state: weights, moments, schedule, buffers
        where there are.
        """
        return component_digests(self.tensors(), self.scalars())

    def stateless(self) -> bool | None:
        """Whether these optimizers keep no tensors by nature, such as SGD without momentum; None:
        no way to know.
        """
        answers = [moments.keeps_tensors(optimizer) for optimizer in self.optimizers]
        return False if True in answers else None if None in answers else True


def set_group_value(group: dict[str, Any], key: str, value: Any) -> None:
    """Change a setting of a parameter group; a tensor in place, where a compiled or captured step
    reads it.
    """
    if isinstance(group.get(key), Tensor):
        group[key].copy_(torch.as_tensor(value))
    else:
        group[key] = value


def refuse(problems: Iterable[str]) -> None:
    """Raise CheckpointInvalid that names the first problems, if there are any."""
    found = list(problems)
    if found:
        raise CheckpointInvalid(f"the saved state does not fit this model: {_some(found, '; ')}")


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, module, key) of each, not the tensor: some modules put another one in its place."""
    for prefix, module in model.named_modules():
        for key in foreach.own_buffers(module):
            if foreach.is_persistent(module, key):
                yield plain_name(f"{prefix}.{key}" if prefix else key), module, key


def _hash(names: Sequence[str]) -> str:
    return hashlib.sha256(",".join(names).encode()).hexdigest()[:16]


def _kind(dtype: torch.dtype, shape: Shape) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def _some(items: Sequence[str], separator: str = ", ") -> str:
    rest = len(items) - _NAMED
    return separator.join(items[:_NAMED]) + (f"{separator}and {rest} more" if rest > 0 else "")
