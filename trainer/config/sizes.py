"""The number of parameters of a configuration, without building the model and without torch.

`guardrail launch` needs it to refuse more snapshots than the machine's memory can hold.
"""

from __future__ import annotations

from trainer.config.recipe import GATED, ModelSection

_HIDDEN_MULTIPLE = 32
_ADAMW_MOMENTS = 2  # fp32 numbers per parameter


def hidden_width(section: ModelSection) -> int:
    """Return the width of the feed-forward block.

    4x the model's width; 8/3 where a gate needs a third matrix, which keeps the number of
    parameters (Shazeer 2020, section 2).
    """
    if section.hidden:
        return section.hidden
    if section.activation not in GATED:
        return 4 * section.width
    return -(-8 * section.width // (3 * _HIDDEN_MULTIPLE)) * _HIDDEN_MULTIPLE


def parameter_count(section: ModelSection, vocabulary: int, *, sequence_length: int = 0) -> int:
    """Return the number of trainable parameters of the model; a tied matrix counts once.

    Args:
        sequence_length: T, rows of a learned table of positions.

    Returns:
        0 for a Hugging Face model, whose size only transformers knows.
    """
    if section.hf:
        return 0
    vocabulary_matrices = 2 - section.tied
    tables = (section.positions == "learned") + section.blank_positions
    embeddings = (vocabulary_matrices * vocabulary + tables * sequence_length) * section.width
    outer = section.embedding_norm * _norm(section)
    stacks = _stack(section, section.layers, cross=section.kind == "encoder-decoder")
    if section.kind == "encoder-decoder":
        stacks += _stack(section, section.encoder_layers or section.layers, cross=False)
    return embeddings + outer + stacks


def stage_parameters(
    section: ModelSection, vocabulary: int, *, blocks: list[list[int]], sequence_length: int = 0
) -> list[int]:
    """Return the number of parameters of each stage of a pipeline.

    The first stage has the embedding, the last one the head.

    Args:
        blocks: numbers of the blocks of each stage; one stage is the complete model.
    """
    total = parameter_count(section, vocabulary, sequence_length=sequence_length)
    if len(blocks) == 1:
        return [total]
    block = _block(section, cross=False)
    head = vocabulary * section.width + _last_norm(section)
    counts = [len(numbers) * block for numbers in blocks]
    counts[0] += total - section.layers * block - head
    counts[-1] += head
    return counts


def _stack(section: ModelSection, layers: int, *, cross: bool) -> int:
    """Count blocks, the norm after them, and the bias table of the stack."""
    count = layers * _block(section, cross=cross) + _last_norm(section)
    if section.positions == "t5":
        count += section.t5_buckets * section.heads
    return count


def _last_norm(section: ModelSection) -> int:
    """Count the norm after the blocks; post-norm blocks end in their own."""
    if section.norm_place == "post":
        return 0
    return _norm(section)


def _block(section: ModelSection, *, cross: bool) -> int:
    norms = 2 + cross
    if section.norm_place == "sandwich":
        norms *= 2
    norms -= section.parallel
    return (1 + cross) * _attention(section) + _feed_forward(section) + norms * _norm(section)


def _norm(section: ModelSection, width: int = 0) -> int:
    has_bias = section.norm == "layer" and section.bias
    return (width or section.width) * (1 + has_bias)


def _attention(section: ModelSection) -> int:
    rows = (section.heads + 2 * section.groups) * section.head_width
    norms = 2 * section.qk_norm * _norm(section, section.head_width)
    return (
        rows * (section.width + section.bias)
        + section.width * (section.width + section.bias)
        + norms
    )


def _feed_forward(section: ModelSection) -> int:
    hidden = hidden_width(section)
    rows = hidden
    if section.activation in GATED:
        rows = 2 * hidden
    return rows * (section.width + section.bias) + section.width * (hidden + section.bias)


def state_bytes(
    section: ModelSection,
    vocabulary: int,
    *,
    moments: int = _ADAMW_MOMENTS,
    shards: int = 1,
    sequence_length: int = 0,
) -> int:
    """Return the bytes of one rank's parameters and moments in one snapshot (all fp32).

    At least AdamW's two moments are counted. That is an upper bound for optimizers that keep less:
    muon keeps one moment of the matrices, adafactor sums over rows and columns.

    Args:
        moments: numbers that the optimizer keeps per parameter.
        shards: ranks that share the state: the world size with fsdp, 1 with ddp.
        sequence_length: see `parameter_count`.
    """
    numbers = parameter_count(section, vocabulary, sequence_length=sequence_length) * (
        1 + max(moments, _ADAMW_MOMENTS)
    )
    return -(-4 * numbers // shards)
