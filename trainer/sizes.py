"""How large a model of a configuration is, without building it and without torch.

`guardrail launch` needs the numbers to refuse a snapshot ring that the machine's memory cannot hold.
"""

from __future__ import annotations

from trainer.config import ModelSection

_HIDDEN_MULTIPLE = 32
_ADAMW_MOMENTS = 2


def hidden_width(section: ModelSection) -> int:
    """Width of the SwiGLU block: 8/3 of the model's keeps the parameters of a 4x MLP (Shazeer 2020, section 2)."""
    if section.hidden:
        return section.hidden
    return -(-8 * section.width // (3 * _HIDDEN_MULTIPLE)) * _HIDDEN_MULTIPLE


def parameter_count(section: ModelSection, vocabulary: int) -> int:
    """Trainable numbers of `trainer.model.Decoder`; a tied matrix counts once."""
    width, hidden = section.width, hidden_width(section)
    attention = 4 * width * width  # query, key, value, output
    feed_forward = 3 * width * hidden  # gate, up, down
    norms = 2 * width
    embeddings = vocabulary * width * (1 if section.tied else 2)
    return embeddings + section.layers * (attention + feed_forward + norms) + width


def state_bytes(section: ModelSection, vocabulary: int, *, shards: int = 1) -> int:
    """Bytes of one rank's parameters and AdamW moments, as one snapshot holds them (all fp32).

    Args:
        shards: ranks that share the state: the world size under fsdp, 1 under ddp.
    """
    numbers = parameter_count(section, vocabulary) * (1 + _ADAMW_MOMENTS)
    return -(-4 * numbers // shards)
