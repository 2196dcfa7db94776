"""The training state as named tensors and plain numbers: what snapshots and checkpoints hold.

    model/FQN        parameters, tied ones once
    buffer/FQN       persistent buffers (torch does not count the others as state)
    optim/FQN/KEY    tensors of the optimizer, by the parameter's name, never by its index

It works on local tensors: a DTensor (FSDP2) stands for this rank's shard, and its `Box` says which
part of the tensor that is. Parameters stay the same objects. `.grad` is never part of the state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from guardrail.core.errors import CheckpointInvalid, UsageError
from guardrail.rundir.manifest import BUFFER, MODEL, OPTIM, Box
from guardrail.rundir.safetensors_header import Shape
from guardrail.torch.state import foreach
from guardrail.torch.state.collectives import gather_objects
from guardrail.torch.state.digests import component_digests
from guardrail.torch.state.optimizer_state import (
    Trained,
    keeps_tensors,
    match_saved_keys,
    owner_of,
)
from guardrail.torch.state.state_differences import (
    TensorKind,
    find_differences,
    find_part_differences,
    name_some,
)
from guardrail.torch.state.state_numbers import StateNumbers
from guardrail.torch.state.tensor_shards import box_of, local_storage, replica_of
from guardrail.torch.state.unsupported import refuse_expanded_buffers, refuse_other_sharding
from guardrail.torch.state.wrappers import is_accelerated, plain_name, unwrap, unwrap_model


class TrainingState:
    """Model, optimizers and schedules as one object to copy, compare and restore bit by bit.

    Args:
        model: plain, compiled, DDP, FSDP2 (`fully_shard`), or what Accelerate's `prepare` returned.
        optimizer: one torch.optim optimizer or several, of parameters of the model; each parameter
            is in one of them.
        scheduler: anything with state_dict and load_state_dict, several, or None.
        scaler: a torch.amp.GradScaler, or None. One that Accelerate attached to an optimizer is
            found.
        holders: the ranks that hold the same part of the model as this one, a contiguous range;
            None: all ranks. If it is given, the construction is a collective.

    Attributes:
        names: id of a parameter -> its name.
        all_names: names of parameters and buffers on all ranks: a pipeline stage has some of them.

    Raises:
        UsageError: something could not be restored exactly; names it.
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
        wrapped = _as_list(optimizer)
        self.optimizers: list[Optimizer] = [unwrap(item, "optimizer") for item in wrapped]
        self.schedulers = [unwrap(item, "scheduler") for item in _as_list(scheduler)]
        refuse_other_sharding(self.model, self.optimizers)
        self.reshard()
        self._parameters = {
            plain_name(name): parameter for name, parameter in self.model.named_parameters()
        }
        self.names: dict[int, str] = {id(p): name for name, p in self._parameters.items()}
        self._buffers = list(_persistent_buffers(self.model))
        refuse_expanded_buffers(self.buffers())
        self._trained = self._find_trained()
        self._boxes: dict[Any, Box] = {}
        group_names = self._share_names()
        self._numbers = StateNumbers(
            self.optimizers,
            self.schedulers,
            _find_scalers(wrapped, scaler),
            trained=self._trained,
            group_names=group_names,
            all_names=self.all_names,
        )
        self.scalars()  # refuses now what could not be saved later

    def _find_trained(self) -> dict[str, Trained]:
        """Return name -> (parameter, its optimizer, its group) of all trained parameters."""
        trained: dict[str, Trained] = {}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    name = self.names.get(id(parameter))
                    if name is None:
                        raise UsageError(
                            f"{type(optimizer).__name__} trains a tensor of shape "
                            f"{tuple(parameter.shape)} that is not a parameter of the model. "
                            "Build the optimizer after the model was sharded or moved."
                        )
                    if name in trained:
                        raise UsageError(
                            f"{name} is trained by two optimizers. Give each parameter to one."
                        )
                    trained[name] = (parameter, optimizer, group)
        return trained

    def _share_names(self) -> list[list[list[str]]]:
        """Set `all_names`; return the parameter names of each group of each optimizer, of all
        ranks.
        """
        names = set(self._parameters) | {name for name, _, _ in self._buffers}
        own_groups = [self._names_of_groups(optimizer) for optimizer in self.optimizers]
        world = 1
        if self.holders is not None:
            world = torch.distributed.get_world_size()
        by_rank = gather_objects((names, own_groups), world)
        self.all_names: frozenset[str] = frozenset().union(*(theirs for theirs, _ in by_rank))
        shared: list[list[list[str]]] = []
        for optimizer, groups in enumerate(own_groups):
            shared.append([])
            for index in range(len(groups)):
                together: set[str] = set()
                for _, theirs in by_rank:
                    together.update(theirs[optimizer][index])
                shared[-1].append(sorted(together))
        return shared

    def _names_of_groups(self, optimizer: Optimizer) -> list[list[str]]:
        names: list[list[str]] = []
        for group in optimizer.param_groups:
            names.append(sorted(self.names[id(p)] for p in group["params"]))
        return names

    def owns(self, name: str) -> bool:
        """Return whether a tensor of this name has a place on this rank."""
        prefix, _, inner = name.partition("/")
        if prefix + "/" == OPTIM:
            inner = inner.rpartition("/")[0]
        return inner in self._parameters or any(inner == buffer for buffer, _, _ in self._buffers)

    # -- tensors -----------------------------------------------------------------------------------

    @property
    def sharded(self) -> bool:
        """Whether any parameter is sharded over ranks."""
        return any(isinstance(p, DTensor) for p in self._parameters.values())

    @property
    def layout(self) -> str:
        """How the state is distributed. With the same layout, ranks hold the same parts.

        "ddp": complete on every rank; "fsdp": sharded over all ranks; else the mesh too, "fsdp
        dp_replicate=2 ...".
        """
        stage = ""
        if self.holders is not None:
            stage = f" of a stage on {len(self.holders)} ranks"
        meshes = {p.device_mesh for p in self._parameters.values() if isinstance(p, DTensor)}
        if not meshes:
            return "ddp" + stage
        mesh = max(meshes, key=lambda mesh: mesh.ndim)
        if mesh.ndim == 1:
            return "fsdp" + stage
        names = mesh.mesh_dim_names or tuple(str(dimension) for dimension in range(mesh.ndim))
        sizes = [f"{name}={size}" for name, size in zip(names, mesh.shape, strict=True)]
        return " ".join(["fsdp", *sizes]) + stage

    def reshard(self) -> None:
        """Drop FSDP's gathered copies of parameters.

        After a forward pass without backward (an evaluation), FSDP2 keeps the root's parameters
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
        for name, (parameter, optimizer, _) in self._trained.items():
            if parameter in optimizer.state:
                for key, value in optimizer.state[parameter].items():
                    if isinstance(value, Tensor):
                        yield f"{OPTIM}{name}/{key}", value

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, live tensor) of the persistent buffers."""
        for name, module, key in self._buffers:
            buffer = foreach.own_buffers(module)[key]
            if buffer is not None:
                yield name, buffer

    def tensors(self) -> dict[str, Tensor]:
        """Return name -> live storage of this rank's part.

        An optimizer that has never stepped has no tensors.
        """
        return {name: local_storage(tensor) for name, tensor in self._entries()}

    def boxes(self) -> dict[str, Box]:
        """Return name -> which part of the tensor this rank holds."""
        return {name: self._box_of(tensor) for name, tensor in self._entries()}

    def replicas(self) -> dict[str, tuple[int, int]]:
        """Return name -> (index, count) of this rank among those that hold the same part."""
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        holders = range(world) if self.holders is None else self.holders
        return {name: replica_of(tensor, holders) for name, tensor in self._entries()}

    def box(self, name: str, shape: Shape) -> Box:
        """Return the part that this rank holds, or would hold, of a tensor of this global shape."""
        if name.startswith(OPTIM):
            parameter: Tensor | None = self._trained[owner_of(name)][0]
        else:
            parameter = self._parameters.get(name.split("/", 1)[1])
        if isinstance(parameter, DTensor) and tuple(parameter.shape) == shape:
            return self._box_of(parameter)
        return Box.of_shape(shape)

    def _box_of(self, tensor: Tensor) -> Box:
        if not isinstance(tensor, DTensor):
            return Box.of_shape(tensor.shape)
        key = (tensor.shape, tensor.device_mesh, tensor.placements)
        if key not in self._boxes:
            self._boxes[key] = box_of(tensor)
        return self._boxes[key]

    # -- numbers -----------------------------------------------------------------------------------

    def scalars(self) -> dict[str, Any]:
        """Return everything that is not a tensor; see `StateNumbers`."""
        return self._numbers.collect()

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """Restore what `scalars()` returned."""
        self._numbers.load(scalars)

    def check_scalars(self, scalars: Mapping[str, Any]) -> None:
        """Raise CheckpointInvalid if the numbers do not fit these optimizers and schedules."""
        self._numbers.check(scalars)

    # -- restoring ---------------------------------------------------------------------------------

    def differences(
        self, found: Mapping[str, TensorKind], *, weights_only: bool = False
    ) -> list[str]:
        """Return why tensors of these types and global shapes cannot be loaded."""
        live = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self._entries()}
        return find_differences(live, found, self._trained, weights_only=weights_only)

    @torch.no_grad()
    def load(
        self,
        tensors: Mapping[str, Tensor],
        scalars: Mapping[str, Any],
        boxes: Mapping[str, Box] | None = None,
    ) -> None:
        """Make the live state equal to a saved one, bit for bit.

        Missing optimizer tensors are created with the type, device and sharding that the optimizer
        would use. Surplus ones are deleted: a state from before the first step makes the optimizer
        a new one again.

        Args:
            tensors: name -> local part on any device, as `tensors()` returned it.
            scalars: as `scalars()` returned it.
            boxes: name -> part of the tensor. Default: plain tensors are complete, shards are those
                of this rank.

        Raises:
            CheckpointInvalid: names, shapes or types do not fit. The live state is unchanged then.
        """
        if boxes is None:
            boxes = self._boxes_like(tensors)
        found = {name: (tensor.dtype, boxes[name].global_shape) for name, tensor in tensors.items()}
        problems = self.differences(found)
        problems += find_part_differences(tensors, boxes, self._trained, self.box)
        refuse_problems(problems)
        self.check_scalars(scalars)
        self.reshard()
        match_saved_keys(self._trained, found, scalars)
        live = self.tensors()
        foreach.copy_tensors([live[name] for name in tensors], list(tensors.values()))
        self.load_scalars(scalars)

    @torch.no_grad()
    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy parameters and buffers only; optimizer and schedule stay as they are."""
        self.reshard()
        live = self.tensors()
        names = [name for name in tensors if not name.startswith(OPTIM)]
        foreach.copy_tensors([live[name] for name in names], [tensors[name] for name in names])

    def _boxes_like(self, tensors: Mapping[str, Tensor]) -> dict[str, Box]:
        """Return name -> this rank's part if the tensor has its size, else the complete tensor."""
        boxes: dict[str, Box] = {}
        for name, tensor in tensors.items():
            parameter: Tensor | None = self._parameters.get(name.split("/", 1)[1])
            if name.startswith(OPTIM):
                owner = self._trained.get(owner_of(name))
                parameter = owner[0] if owner is not None else None
            boxes[name] = Box.of_shape(tensor.shape)
            if isinstance(parameter, DTensor):
                own = self._box_of(parameter)
                if own.size == tuple(tensor.shape):
                    boxes[name] = own
        return boxes

    # -- comparing ---------------------------------------------------------------------------------

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of each component of this rank's live state.

        The components are weights, moments, schedule, and buffers if there are any.
        """
        return component_digests(self.tensors(), self.scalars())

    def stateless(self) -> bool | None:
        """Return whether these optimizers never keep tensors, as SGD without momentum; None:
        unknown.
        """
        answers = [keeps_tensors(optimizer) for optimizer in self.optimizers]
        if True in answers:
            return False
        if None in answers:
            return None
        return True


def refuse_problems(problems: Iterable[str]) -> None:
    """Raise CheckpointInvalid that names the first problems, if there are any."""
    found = list(problems)
    if found:
        raise CheckpointInvalid(
            f"the saved state does not fit this model: {name_some(found, '; ')}"
        )


def _as_list(item: Any) -> list[Any]:
    """Return the items of a list or tuple, or the one item; without None."""
    items = list(item) if isinstance(item, (list, tuple)) else [item]
    return [one for one in items if one is not None]


def _find_scalers(optimizers: Sequence[Any], scaler: Any) -> list[Any]:
    """Return the gradient scalers, each once: those that Accelerate attached, and `scaler`."""
    scalers: dict[int, Any] = {}
    for optimizer in optimizers:
        if is_accelerated(optimizer) and optimizer.scaler is not None:
            scalers[id(optimizer.scaler)] = optimizer.scaler
    if scaler is not None:
        scalers[id(scaler)] = scaler
    return list(scalers.values())


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield (name, module, key) of each, not the tensor: some modules replace it."""
    for prefix, module in model.named_modules():
        for key in foreach.own_buffers(module):
            if foreach.is_persistent(module, key):
                yield plain_name(f"{prefix}.{key}" if prefix else key), module, key
