"""Processes, devices and the way a model is spread over them: ddp or fsdp, on gloo and NCCL by the
same code.

Accelerate provides process state, device and DDP. It has no FSDP2 on CPU (it silently falls back to
DDP), so `fully_shard` is applied here on a DeviceMesh of torch's own; and it refuses fp16 there, so
autocast is torch's own too.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
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
from trainer.parallel.tensor_parallel import LossSum

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make_accelerator(config: Config) -> Accelerator:
    """Join the process group and take a device.

    Accelerate reads two dozen environment variables, and some of them win over arguments; what came
    out is compared with the configuration, because a run on half of its processes looks healthy.

    Raises:
        WorkersFailed: the processes, device or precision are not the configured ones.
    """
    device = config.launch.device
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise WorkersFailed(
            'launch.device is "cuda", and torch finds no CUDA device in this process'
        )
    if config.train.deterministic:
        _be_deterministic()
    on_cpu = device == "cpu" or not cuda
    if on_cpu:
        torch.set_num_threads(cpu_threads(config))
        # Accelerate sets the threads by itself, with a warning, where this is unset.
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision="no",
        # Accelerator.backward divides by this; the objective has its own arithmetic
        # (trainer.objectives.loss).
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=1, sync_with_dataloader=False
        ),
        dynamo_backend="no",
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=config.launch.collective_timeout)),
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
    )
    _check(accelerator, config, on_cpu=on_cpu)
    return accelerator


def _be_deterministic() -> None:
    """torch's notes on reproducibility. Fresh memory is not filled: every kernel here writes what
    it gives.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def cpu_threads(config: Config) -> int:
    """Intra-op threads of one CPU rank: launch.threads, else OMP_NUM_THREADS, else its share of the
    cores.
    """
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return (
        config.launch.threads
        or (int(given) if given.isdigit() else 0)
        or max(1, cores() // config.launch.processes)
    )


def _check(accelerator: Accelerator, config: Config, *, on_cpu: bool) -> None:
    if accelerator.num_processes != config.world:
        raise WorkersFailed(
            f"{accelerator.num_processes} process(es) take part, and the configuration says "
            f"{config.launch.processes} x {config.launch.nodes} node(s) = {config.world}: start the run with "
            "`guardrail launch`, or torchrun with the same numbers (`accelerate launch --cpu` starts one process)"
        )
    found = {
        "device": (accelerator.device.type, "cpu" if on_cpu else "cuda"),
        "mixed precision": (accelerator.mixed_precision, "no"),
        "accumulation": (accelerator.gradient_accumulation_steps, 1),
        "plugin": (
            accelerator.distributed_type.value.removeprefix("MULTI_"),
            _plain_type(accelerator),
        ),
    }
    for what, (is_, should) in found.items():
        if is_ != should:
            variables = (
                ", ".join(sorted(name for name in os.environ if name.startswith("ACCELERATE_")))
                or "none"
            )
            raise WorkersFailed(
                f"Accelerate chose {what} {is_!r} where the configuration means {should!r} "
                f"(ACCELERATE_ variables set here: {variables})"
            )


def _plain_type(accelerator: Accelerator) -> str:
    if not accelerator.use_distributed and accelerator.distributed_type.value == "NO":
        return "NO"
    return "CPU" if accelerator.device.type == "cpu" else "GPU"


def distribute_model(model: Decoder, config: Config, accelerator: Accelerator) -> nn.Module:
    """Spread a freshly built model over the ranks; every rank passes the same weights.

    ddp gives a DistributedDataParallel (or the model itself in a single process), fsdp the same
    Decoder with DTensor parameters. Either takes tokens [B, T] and gives fp32 logits, under tensor
    parallelism those of this rank's part of the vocabulary; `loss_of` gives the loss that goes with
    them. Build the optimizer from what is returned.
    """
    model.set_recompute(config.train.activation_checkpointing)
    if config.train.compile:
        _compile(model, config.train.compile_backend)
    if config.layout.sharded:
        return _shard(model, config, accelerator)
    _autocast(model, config, accelerator.device)
    with warnings.catch_warnings():
        # torch 2.13 renames it, and Accelerate knows the old name only. The rotary table is the
        # same everywhere.
        warnings.filterwarnings(
            "ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning
        )
        # Under torchrun Accelerate takes a single CPU process for a group of one and wraps it too;
        # this flag leaves the device, and no DDP.
        prepared = cast(
            nn.Module, accelerator.prepare_model(model, evaluation_mode=config.world == 1)
        )
    _settle_buckets(prepared, accelerator.device)
    return prepared


def _compile(model: Decoder, backend: str) -> None:
    """Compile the blocks, in place: modules, parameters and their names stay what they are.

    The blocks are alike, so one is compiled and all use it. Each shape has a graph of its own: one
    for any shape would be made when a second shape comes, and what a step computes would depend on
    what was computed before it.
    """
    for block in model.blocks:
        block.compile(backend=backend, dynamic=False)


def _autocast(model: nn.Module, config: Config, device: torch.device) -> None:
    """Compute in 16 bits where torch's autocast thinks it right; logits come back in fp32, as
    Accelerate has them.
    """
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
    """What multiplies the loss before its backward pass; switched off, it changes nothing, unless
    fp16 is trained.
    """
    train = config.train
    return torch.amp.GradScaler(
        device.type,
        init_scale=train.loss_scale,
        growth_interval=train.loss_scale_steps,
        enabled=train.precision == "fp16",
    )


def _shard(model: Decoder, config: Config, accelerator: Accelerator) -> Decoder:
    """A shard group for each block and one, the root, for the rest.

    The embedding, the last norm and the head are in the root's group, so a tied matrix is gathered
    once and stays one parameter. Parameters, moments and the reduction are fp32; only compute and
    gathering are in 16 bits.
    """
    # a single process: a mesh of one, so that one rank runs the code of many
    if not dist.is_initialized():
        backend = "gloo" if accelerator.device.type == "cpu" else "nccl"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    section = config.parallel
    dtype = HALVES.get(config.train.precision)
    if dtype is not None:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        # Logits in fp32, as ddp has them.
        root_policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32
        )
    else:
        policy = root_policy = MixedPrecisionPolicy()
    whole = _mesh(config.layout, accelerator.device)
    if config.layout.tp > 1:
        split = tensor_parallel.split_model(model, whole["tp"], sequence=config.layout.sequence)
        model.loss_sum = split  # type: ignore[assignment]
    if config.layout.pp > 1:
        layout = config.layout
        place = StagePosition(
            stage=whole.get_local_rank("pp"),
            stages=layout.pp,
            chunks=layout.chunks,
            group=whole.get_group("pp"),
        )
        model.place = place  # type: ignore[assignment]
        cut_model(model, place)
    # Replicas of shards (HSDP), or shards alone: the ranks that average gradients.
    data = (
        whole["dp_replicate", "dp_shard"] if config.layout.dp_replicate > 1 else whole["dp_shard"]
    )
    options: dict[str, Any] = {"mesh": data}
    if section.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=accelerator.device.type == "cuda")
    for block in model.blocks:
        if isinstance(block, OtherStage):
            continue
        fully_shard(
            block, mp_policy=policy, reshard_after_forward=section.reshard_after_forward, **options
        )
    # The root's own parameters are needed again as soon as the backward pass begins: torch keeps
    # them by default.
    return cast(Decoder, fully_shard(model, mp_policy=root_policy, **options))


def _mesh(layout: Layout, device: torch.device) -> DeviceMesh:
    sizes = (layout.pp, layout.dp_replicate, layout.dp_shard, layout.tp)
    return init_device_mesh(
        device.type, sizes, mesh_dim_names=("pp", "dp_replicate", "dp_shard", "tp")
    )


def _settle_buckets(model: nn.Module, device: torch.device) -> None:
    """Make DDP's buckets final before the first step.

    DDP reduces the first backward pass in buckets of registration order and every later one in
    buckets of the order in which gradients came. Where more than two ranks add, that is another
    order of addition, and a run resumed at step n would differ in its last bits from one that was
    never stopped. Two passes over two tokens, whose gradients are dropped, let it settle: buckets
    are rebuilt at the beginning of the second forward pass. That one has its backward pass too,
    because DDP reduces after the next one it sees, be it inside `no_sync`.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with forked, torch.compiler.set_stance("force_eager"):  # no graph for two tokens
        tokens = torch.zeros((1, 2), dtype=torch.int64, device=device)
        for _ in range(2):
            model(tokens).sum().backward()
            model.zero_grad(set_to_none=True)


@contextlib.contextmanager
def accumulate_gradients(model: nn.Module, *, last: bool) -> Iterator[None]:
    """Around forward and backward of one micro-batch: the ranks reduce gradients after the `last`
    one of a window.

    fsdp reduces after every micro-batch: to hold them back, each rank would have to keep the whole
    unsharded gradient in fp32, which is the memory that fsdp is chosen to save.
    """
    if last or not isinstance(model, DistributedDataParallel):
        yield
    else:
        with model.no_sync():
            yield


def unwrap_model(model: nn.Module) -> Decoder:
    """The Decoder inside DDP, or the sharded Decoder itself."""
    return cast(Decoder, model.module if isinstance(model, DistributedDataParallel) else model)


def find_loss_sum(model: nn.Module) -> LossSum:
    """The summed loss of what `model` gives; see `objectives.loss_sum`."""
    split: LossSum | None = getattr(unwrap_model(model), "loss_sum", None)
    return split or loss_sum


def find_stage_position(model: nn.Module) -> StagePosition | None:
    """Where this rank stands in its pipeline; None without one."""
    place: StagePosition | None = getattr(unwrap_model(model), "place", None)
    return place


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def seed_micro_batch(seed: int, position: int, rank: int, part: int = 0) -> None:
    """Make every draw of the next forward pass a function of (seed, position of its first sample,
    data rank, part).

    `torch.manual_seed` would do the same, and takes a stack trace to remember for a CUDA that is
    not there: 0.1 ms.
    """
    value = mix64(seed, position, rank, part) if part else mix64(seed, position, rank)
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(value)
