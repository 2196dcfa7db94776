"""How large a model of a configuration is, without building it and without torch.

`guardrail launch` needs the numbers to refuse a snapshot ring that the machine's memory cannot
hold.
"""

from __future__ import annotations

from trainer.config.recipe import GATED, ModelSection

_HIDDEN_MULTIPLE = 32
_ADAMW_MOMENTS = 2  # fp32 numbers per parameter


def hidden_width(section: ModelSection) -> int:
    """Width of the feed-forward block: 4x the model's, or 8/3 where a gate needs a third matrix,
    which keeps the number of parameters (Shazeer 2020, section 2)."""
    if section.hidden:
        return section.hidden
    if section.activation not in GATED:
        return 4 * section.width
    return -(-8 * section.width // (3 * _HIDDEN_MULTIPLE)) * _HIDDEN_MULTIPLE


def parameter_count(section: ModelSection, vocabulary: int, *, sequence_length: int = 0) -> int:
    """Trainable numbers of the model; a tied matrix counts once.

    Args:
        sequence_length: T, rows of the tables that some models have of positions.

    Returns:
        0 for a Hugging Face model, whose size only transformers knows.
    """
    if section.hf:
        return 0
    tables = (section.positions == "learned") + section.blank_positions
    embeddings = (
        vocabulary * section.width * (1 if section.tied else 2)
        + tables * sequence_length * section.width
    )
    outer = section.embedding_norm * _norm(section)
    stacks = _stack(section, section.layers, cross=section.kind == "encoder-decoder")
    if section.kind == "encoder-decoder":
        stacks += _stack(section, section.encoder_layers or section.layers, cross=False)
    return embeddings + outer + stacks


def stage_parameters(
    section: ModelSection, vocabulary: int, *, blocks: list[list[int]], sequence_length: int = 0
) -> list[int]:
    """Trainable numbers of each stage of a pipeline: the embedding is in the first one, the head in
    the last one.

    Args:
        blocks: their numbers, for each stage; one stage is the whole model.
    """
    total = parameter_count(section, vocabulary, sequence_length=sequence_length)
    if len(blocks) == 1:
        return [total]
    block = _block(section, cross=False)
    head = vocabulary * section.width + (0 if section.norm_place == "post" else _norm(section))
    counts = [len(numbers) * block for numbers in blocks]
    counts[0] += total - section.layers * block - head
    counts[-1] += head
    return counts


def _stack(section: ModelSection, layers: int, *, cross: bool) -> int:
    """Blocks, the norm behind them, and a bias table of their own."""
    last = 0 if section.norm_place == "post" else _norm(section)
    table = section.t5_buckets * section.heads if section.positions == "t5" else 0
    return layers * _block(section, cross=cross) + last + table


def _block(section: ModelSection, *, cross: bool) -> int:
    sublayers = 3 if cross else 2
    norms = {"pre": sublayers, "post": sublayers, "sandwich": 2 * sublayers}[
        section.norm_place
    ] - section.parallel
    return (1 + cross) * _attention(section) + _feed_forward(section) + norms * _norm(section)


def _norm(section: ModelSection, width: int = 0) -> int:
    return (width or section.width) * (2 if section.norm == "layer" and section.bias else 1)


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
    rows = (2 if section.activation in GATED else 1) * hidden
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
        shards: ranks that share the state: the world size under fsdp, 1 under ddp.
        sequence_length: see `parameter_count`.
    """
    numbers = parameter_count(section, vocabulary, sequence_length=sequence_length) * (
        1 + max(moments, _ADAMW_MOMENTS)
    )
    return -(-4 * numbers // shards)
