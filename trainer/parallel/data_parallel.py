"""Processes, devices, and how a model is distributed over them: ddp or fsdp, on gloo and NCCL.

Accelerate provides process state, device and DDP. On a CPU it has no FSDP2 (it uses DDP without a
message), so `fully_shard` is applied here on a DeviceMesh of torch. It refuses fp16 on a CPU too, so
autocast is torch's.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from guardrail.core.errors import WorkersFailed
from guardrail.decide.sample_order import mix64
from guardrail.rundir.processes import cores
from trainer.config.config import Config
from trainer.config.layout import Layout
from trainer.model import Decoder
from trainer.objectives.loss import loss_sum
from trainer.parallel import tensor_parallel
from trainer.parallel.pipeline import OtherStage, StagePosition, cut_model
from trainer.parallel.process_group import (
    check_own_gpu,
    cuda_device_of_rank,
    join_process_group,
    set_timeouts,
)
from trainer.parallel.tensor_parallel import LossSum

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make_accelerator(config: Config) -> Accelerator:
    """Join the process group and choose the device.

    Accelerate reads two dozen environment variables, and some of them override arguments. The
    result is compared with the configuration: a run on half of its processes looks healthy.

    Raises:
        WorkersFailed: the processes, device or precision are not the configured ones.
    """
    device = config.launch.device
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise WorkersFailed(
            'launch.device = "cuda": torch finds no CUDA device in this process. Check the driver and '
            'CUDA_VISIBLE_DEVICES, or set launch.device = "cpu"'
        )
    if config.train.deterministic:
        _be_deterministic()
    on_cpu = device == "cpu" or not cuda
    if on_cpu:
        torch.set_num_threads(cpu_threads(config))
        # Without this variable Accelerate sets the threads itself, with a warning.
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
        join_process_group(torch.device("cpu"), timeout=config.launch.collective_timeout)
    else:
        own_device = cuda_device_of_rank()
        torch.cuda.set_device(own_device)
        join_process_group(own_device, timeout=config.launch.collective_timeout)
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision="no",
        # Accelerator.backward divides by num_steps; trainer.objectives.loss scales the loss itself.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=1, sync_with_dataloader=False
        ),
        dynamo_backend="no",
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
    )
    _check_accelerator(accelerator, config, on_cpu=on_cpu)
    set_timeouts(config.launch.collective_timeout)
    check_own_gpu(accelerator.device)
    return accelerator


def _be_deterministic() -> None:
    """Set what torch's notes on reproducibility ask for.

    New memory is not filled, which is slow: every kernel here writes its complete output.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def cpu_threads(config: Config) -> int:
    """Return the intra-op threads of one CPU rank.

    They are launch.threads, else OMP_NUM_THREADS, else this rank's share of the cores.
    """
    if config.launch.threads:
        return config.launch.threads
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if given.isdigit() and int(given):
        return int(given)
    return max(1, cores() // config.launch.processes)


def _check_accelerator(accelerator: Accelerator, config: Config, *, on_cpu: bool) -> None:
    if accelerator.num_processes != config.world:
        raise WorkersFailed(
            f"{accelerator.num_processes} process(es) take part, the configuration has "
            f"{config.launch.processes} x {config.launch.nodes} node(s) = {config.world}. Start the "
            "run with `guardrail launch`, or torchrun with the same numbers (`accelerate launch --cpu` "
            "starts one process)"
        )
    device = "cuda"
    if on_cpu:
        device = "cpu"
    found = {
        "device": (accelerator.device.type, device),
        "mixed precision": (accelerator.mixed_precision, "no"),
        "accumulation": (accelerator.gradient_accumulation_steps, 1),
        "plugin": (
            accelerator.distributed_type.value.removeprefix("MULTI_"),
            _plain_type(accelerator),
        ),
    }
    for what, (is_, should) in found.items():
        if is_ != should:
            variables = sorted(name for name in os.environ if name.startswith("ACCELERATE_"))
            raise WorkersFailed(
                f"Accelerate chose {what} {is_!r}, the configuration asks for {should!r}. Unset the "
                f"ACCELERATE_ variables of this process: {', '.join(variables) or 'none'}"
            )


def _plain_type(accelerator: Accelerator) -> str:
    if not accelerator.use_distributed and accelerator.distributed_type.value == "NO":
        return "NO"
    if accelerator.device.type == "cpu":
        return "CPU"
    return "GPU"


def distribute_model(model: Decoder, config: Config, accelerator: Accelerator) -> nn.Module:
    """Distribute a new model over the ranks; every rank passes the same weights.

    Build the optimizer from the returned model. It maps tokens [B, T] to fp32 logits; with tensor
    parallelism to those of this rank's part of the vocabulary. `find_loss_sum` returns the loss for
    them.

    Returns:
        With ddp a DistributedDataParallel, or the model itself in a single process. With fsdp the
        same Decoder with DTensor parameters.
    """
    model.set_recompute(config.train.activation_checkpointing)
    if config.train.compile:
        _compile(model, config.train.compile_backend)
    if config.layout.sharded:
        return _shard(model, config, accelerator)
    _autocast(model, config, accelerator.device)
    with warnings.catch_warnings():
        # torch 2.13 renamed the argument; Accelerate uses the old name. No buffer needs it: the
        # rotary table is the same on all ranks.
        warnings.filterwarnings(
            "ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning
        )
        # Under torchrun Accelerate wraps a single CPU process in DDP too. This flag prevents it.
        prepared = cast(
            nn.Module, accelerator.prepare_model(model, evaluation_mode=config.world == 1)
        )
    _settle_buckets(prepared, accelerator.device)
    return prepared


def _compile(model: Decoder, backend: str) -> None:
    """Compile the blocks, in place; modules, parameters and their names do not change.

    The blocks are alike, so one is compiled and all use it. Each shape gets its own graph. With
    dynamic shapes torch would compile again at the second shape, and a step would depend on the
    steps before it.
    """
    for block in model.blocks:
        block.compile(backend=backend, dynamic=False)


def _autocast(model: nn.Module, config: Config, device: torch.device) -> None:
    """Compute in 16 bits where torch's autocast allows it; the logits are fp32."""
    dtype = HALVES.get(config.train.precision)
    if dtype is None:
        return
    forward = model.forward

    def cast_forward(*inputs: Any, **named: Any) -> Tensor:
        with torch.autocast(device.type, dtype):
            logits_BTV: Tensor = forward(*inputs, **named)
        return logits_BTV.float()

    model.forward = cast_forward


def make_scaler(config: Config, device: torch.device) -> torch.amp.GradScaler:
    """Return the scaler of the loss; except with fp16 it is switched off and changes nothing."""
    train = config.train
    return torch.amp.GradScaler(
        device.type,
        init_scale=train.loss_scale,
        growth_interval=train.loss_scale_steps,
        enabled=train.precision == "fp16",
    )


def _shard(model: Decoder, config: Config, accelerator: Accelerator) -> Decoder:
    """Shard a model with FSDP2: one group for each block, and one for the rest, the root.

    Embedding, last norm and head are in the root's group, so a tied matrix is gathered once and
    stays one parameter. Parameters, moments and the reduction are fp32. Only computation and
    gathering are in 16 bits.
    """
    # A single process uses a mesh of one rank, so that it runs the same code.
    if not dist.is_initialized():
        backend = "nccl"
        if accelerator.device.type == "cpu":
            backend = "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    section = config.parallel
    policy, root_policy = _precision_policies(config)
    mesh = _mesh(config.layout, accelerator.device)
    set_timeouts(config.launch.collective_timeout, mesh=mesh)
    if config.layout.tp > 1:
        loss = tensor_parallel.split_model(model, mesh["tp"], sequence=config.layout.sequence)
        model.loss_sum = loss  # type: ignore[assignment]
    if config.layout.pp > 1:
        place = StagePosition(
            stage=mesh.get_local_rank("pp"),
            stages=config.layout.pp,
            chunks=config.layout.chunks,
            group=mesh.get_group("pp"),
        )
        model.place = place  # type: ignore[assignment]
        cut_model(model, place)
    # The ranks that average gradients: replicas of shards (HSDP), or shards alone.
    data = mesh["dp_shard"]
    if config.layout.dp_replicate > 1:
        data = mesh["dp_replicate", "dp_shard"]
    options: dict[str, Any] = {"mesh": data}
    if section.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=accelerator.device.type == "cuda")
    for block in model.blocks:
        if isinstance(block, OtherStage):
            continue
        fully_shard(
            block, mp_policy=policy, reshard_after_forward=section.reshard_after_forward, **options
        )
    # torch keeps the root's parameters gathered: the backward pass needs them first.
    return cast(Decoder, fully_shard(model, mp_policy=root_policy, **options))


def _precision_policies(config: Config) -> tuple[MixedPrecisionPolicy, MixedPrecisionPolicy]:
    """Return the policies of the blocks and of the root; the root returns fp32 logits, as ddp."""
    dtype = HALVES.get(config.train.precision)
    if dtype is None:
        return MixedPrecisionPolicy(), MixedPrecisionPolicy()
    blocks = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    root = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32
    )
    return blocks, root


def _mesh(layout: Layout, device: torch.device) -> DeviceMesh:
    sizes = (layout.pp, layout.dp_replicate, layout.dp_shard, layout.tp)
    return init_device_mesh(
        device.type, sizes, mesh_dim_names=("pp", "dp_replicate", "dp_shard", "tp")
    )


def _settle_buckets(model: nn.Module, device: torch.device) -> None:
    """Make DDP's buckets final before the first step.

    DDP reduces the first backward pass in buckets by order of registration, and later ones in
    buckets by order of the gradients. With more than two ranks that is another order of addition. A
    run resumed at step n would then differ in the last bits from one that was never stopped. Two
    passes over two tokens settle the buckets; their gradients are dropped. DDP rebuilds its buckets
    at the start of the second forward pass. That pass needs its backward pass too: DDP reduces after
    the next one, even inside `no_sync`.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    devices = []
    if device.type == "cuda":
        devices = [device]
    with (
        torch.random.fork_rng(devices=devices),
        torch.compiler.set_stance("force_eager"),
    ):  # no graph for two tokens
        tokens = torch.zeros((1, 2), dtype=torch.int64, device=device)
        for _ in range(2):
            model(tokens).sum().backward()
            model.zero_grad(set_to_none=True)


@contextlib.contextmanager
def accumulate_gradients(model: nn.Module, *, last: bool) -> Iterator[None]:
    """Run forward and backward of one micro-batch; ddp reduces gradients only after the `last` one.

    fsdp reduces after every micro-batch. To accumulate, each rank would have to keep the unsharded
    gradient in fp32, which is the memory that fsdp saves.
    """
    if last or not isinstance(model, DistributedDataParallel):
        yield
    else:
        with model.no_sync():
            yield


def unwrap_model(model: nn.Module) -> Decoder:
    """Return the Decoder inside DDP, or the sharded Decoder itself."""
    if isinstance(model, DistributedDataParallel):
        return cast(Decoder, model.module)
    return cast(Decoder, model)


def find_loss_sum(model: nn.Module) -> LossSum:
    """Return the function for the summed loss of the model's logits; see `objectives.loss`."""
    split: LossSum | None = getattr(unwrap_model(model), "loss_sum", None)
    return split or loss_sum


def find_stage_position(model: nn.Module) -> StagePosition | None:
    """Return this rank's position in its pipeline; None without a pipeline."""
    place: StagePosition | None = getattr(unwrap_model(model), "place", None)
    return place


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP2 holds the model."""
    return isinstance(model, FSDPModule)


def seed_micro_batch(seed: int, position: int, rank: int, part: int = 0) -> None:
    """Set the RNG state of the next forward pass from these four numbers.

    `torch.manual_seed` would do the same. Without CUDA it also records a stack trace: 0.1 ms.

    Args:
        position: of its first sample.
        rank: the data rank.
        part: see `Layout.rng_part`.
    """
    numbers = [seed, position, rank]
    if part:
        numbers.append(part)
    value = mix64(*numbers)
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(value)
