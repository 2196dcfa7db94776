"""What a configuration needs of its machines: the mesh, shapes, memory of a rank. Imports no torch.

For `guardrail doctor --dry-run`, which checks a configuration for a cluster on a laptop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardrail.core.format import format_gib
from trainer.config.sizes import hidden_width, parameter_count, stage_parameters

if TYPE_CHECKING:
    from trainer.config.config import Config

_FP32 = 4  # bytes; parameters, gradients and moments are kept in fp32 whatever the precision


def outline(config: Config) -> list[str]:
    """Return sentences on mesh, batch, shapes and memory.

    For a Hugging Face model only mesh and batch: transformers alone knows its size.
    """
    lines = [_describe_mesh(config), _describe_batch(config)]
    if not config.model.hf:
        lines += [_describe_shapes(config), *_describe_memory(config)]
    return lines


def _describe_mesh(config: Config) -> str:
    layout = config.layout
    parts = [
        f"{layout.dp_replicate} replica(s)",
        f"{layout.dp_shard} shard(s)",
        f"{layout.tp} tensor-parallel",
    ]
    text = f"{' x '.join([*parts, f'{layout.pp} stage(s)'])} = {layout.world} ranks"
    text += f", {config.launch.processes} on each of {config.launch.nodes} node(s)"
    if layout.tp > config.launch.processes:
        text += "; a tensor-parallel group spans nodes, so its traffic crosses the network"
    return text


def _describe_batch(config: Config) -> str:
    train, length = config.train, config.data.sequence_length
    text = (
        f"{train.batch_size} samples of {length} tokens per step ({train.batch_size * length:,}): "
        f"each data rank has {config.micro_batches} micro-batch(es) of {config.micro_batch_size}"
    )
    stages = config.layout.pp
    if stages > 1:
        # Narayanan et al. 2021, sections 2.2.1 and 2.2.2: for both schedules, relative to the step.
        chunks = config.layout.chunks
        idle = (stages - 1) / (config.micro_batches * chunks + stages - 1)
        schedule: str = config.parallel.schedule
        if chunks > 1:
            schedule += f", {chunks} chunks per stage"
        text += f"; the pipeline idles {idle:.1%} of the time ({schedule})"
    return text


def _describe_shapes(config: Config) -> str:
    model, tp = config.model, config.layout.tp
    total = parameter_count(model, config.vocabulary, sequence_length=config.data.sequence_length)
    blocks = sorted({len(numbers) for numbers in config.layout.blocks_of_stages(model.layers)})
    hidden = hidden_width(model)
    return (
        f"{_format_count(total)} parameters; a stage has {' or '.join(map(str, blocks))} "
        f"of {model.layers} blocks, a rank {model.heads // tp} of {model.heads} heads, "
        f"{hidden // tp} of {hidden} hidden units "
        f"and {-(-config.vocabulary // tp)} of {config.vocabulary} token ids"
    )


def _describe_memory(config: Config) -> list[str]:
    """Return sentences on the memory of a rank of the largest stage."""
    most = max(rank_parameters(config))
    moments = config.optim.spec.moments
    state = most * _FP32 * (2 + moments)
    text = (
        f"at most {format_gib(state)} per rank for {_format_count(most)} parameters, "
        f"their gradients and {moments} moments each (fp32)"
    )
    if config.parallel.cpu_offload:
        text += ", in host memory"
    logits = (
        config.micro_batch_size
        * config.data.sequence_length
        * -(-config.vocabulary // config.layout.tp)
        * _FP32
    )
    keep = config.snapshots.keep
    copies = most * _FP32 * (1 + moments) * max(1, keep)
    purpose = "one copy while a checkpoint is written (no snapshots)"
    if keep:
        purpose = f"{keep} snapshots"
    return [
        f"{text}; the logits of a micro-batch need {format_gib(logits)} more on the ranks that "
        "compute them",
        f"host memory for {purpose}: at most {format_gib(copies)} per rank, "
        f"{format_gib(copies * config.launch.processes)} per node",
        "not included: activations, communication buffers, memory that torch and its allocator keep",
    ]


def rank_parameters(config: Config) -> list[int]:
    """Return the parameters that one rank of each stage keeps, stage by stage.

    Norms count as split over a tensor-parallel group, though each rank has all of them. They are a
    thousandth of a large model.
    """
    layout = config.layout
    of_stages = stage_parameters(
        config.model,
        config.vocabulary,
        blocks=layout.blocks_of_stages(config.model.layers),
        sequence_length=config.data.sequence_length,
    )
    return [-(-count // (layout.tp * layout.dp_shard)) for count in of_stages]


def _format_count(number: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
