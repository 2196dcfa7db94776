"""What a configuration asks of its machines, worked out without them: the mesh, shapes, memory of a
rank. No torch.

For `guardrail doctor --dry-run`: a layout for a cluster can be looked at on a laptop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardrail.core.format import format_gib
from trainer.config.sizes import hidden_width, parameter_count, stage_parameters

if TYPE_CHECKING:
    from trainer.config.config import Config

_FP32 = 4  # bytes; parameters, gradients and moments are kept in fp32 whatever the precision


def outline(config: Config) -> list[str]:
    """Sentences on mesh, batch, shapes and memory; fewer for a Hugging Face model, whose size
    nobody knows here.
    """
    said = [_mesh(config), _batch(config)]
    if not config.model.hf:
        said += [_shapes(config), *_memory(config)]
    return said


def _mesh(config: Config) -> str:
    layout = config.layout
    parts = [
        f"{layout.dp_replicate} replica(s)",
        f"{layout.dp_shard} shard(s)",
        f"{layout.tp} tensor-parallel",
    ]
    text = f"{' x '.join([*parts, f'{layout.pp} stage(s)'])} = {layout.world} ranks"
    text += f", {config.launch.processes} on each of {config.launch.nodes} node(s)"
    if layout.tp > config.launch.processes:
        text += "; a tensor-parallel group is spread over nodes, which its traffic will feel"
    return text


def _batch(config: Config) -> str:
    train, length = config.train, config.data.sequence_length
    text = (
        f"{train.batch_size} samples of {length} tokens a step ({train.batch_size * length:,}): each data rank has "
        f"{config.micro_batches} micro-batch(es) of {config.micro_batch_size}"
    )
    stages = config.layout.pp
    if stages > 1:
        # Narayanan et al. 2021, sections 2.2.1 and 2.2.2: of either schedule, relative to the
        # whole.
        chunks = config.layout.chunks
        idle = (stages - 1) / (config.micro_batches * chunks + stages - 1)
        schedule = config.parallel.schedule + (f", {chunks} chunks a stage" if chunks > 1 else "")
        text += f"; the pipeline idles {idle:.1%} of the time ({schedule})"
    return text


def _shapes(config: Config) -> str:
    model, tp = config.model, config.layout.tp
    total = parameter_count(model, config.vocabulary, sequence_length=config.data.sequence_length)
    blocks = sorted({len(numbers) for numbers in config.layout.blocks_of_stages(model.layers)})
    hidden = hidden_width(model)
    return (
        f"{_count(total)} parameters; a stage has {' or '.join(map(str, blocks))} of {model.layers} blocks, a rank "
        f"{model.heads // tp} of {model.heads} heads, {hidden // tp} of {hidden} hidden units "
        f"and {-(-config.vocabulary // tp)} of {config.vocabulary} token ids"
    )


def _memory(config: Config) -> list[str]:
    """Of the stage that has most."""
    most = max(rank_parameters(config))
    moments = config.optim.spec.moments
    state = most * _FP32 * (2 + moments)
    text = (
        f"at most {format_gib(state)} a rank for {_count(most)} parameters, "
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
    what = f"{keep} snapshots" if keep else "a copy while a save is written, and for no snapshots"
    return [
        f"{text}; the logits of a micro-batch take {format_gib(logits)} more where they are computed",
        f"host memory for {what}: at most {format_gib(copies)} a rank, "
        f"{format_gib(copies * config.launch.processes)} a node",
        "not worked out: activations, buffers of the communication, what torch and the allocator keep",
    ]


def rank_parameters(config: Config) -> list[int]:
    """Parameters that one rank of each stage keeps, stage by stage. Norms count as shared out,
    though a tensor-parallel group has all of them on each rank: a thousandth of a large model."""
    layout = config.layout
    of_stages = stage_parameters(
        config.model,
        config.vocabulary,
        blocks=layout.blocks_of_stages(config.model.layers),
        sequence_length=config.data.sequence_length,
    )
    return [-(-count // (layout.tp * layout.dp_shard)) for count in of_stages]


def _count(number: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
