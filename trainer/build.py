"""Builds the parts of a run from its configuration: objective, model, stabilisers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import nn
from torch.optim import Optimizer

from trainer.config.config import Config
from trainer.model import Decoder, EncoderDecoder, HuggingFace
from trainer.objectives.blank_filling import BlankFilling
from trainer.objectives.examples import LanguageModelling, Objective, PrefixLM, SpanDenoising
from trainer.stabilisers.qk_clip import QKClip
from trainer.stabilisers.update_clipping import UpdateClipping
from trainer.stabilisers.zclip import ZClip


def build_objective(config: Config, *, vocabulary: int) -> Objective:
    """Return the objective that train.objective names.

    Args:
        vocabulary: token ids of the tokenizer; those of the objective follow.
    """
    train, model = config.train, config.model
    length, encoder = config.data.sequence_length, model.kind == "encoder-decoder"
    match train.objective:
        case "prefix-lm":
            return PrefixLM(seed=train.seed, length=length, encoder=encoder)
        case "span":
            return SpanDenoising(
                seed=train.seed,
                length=length,
                first_id=vocabulary,
                noise=train.noise,
                span_length=train.span_length,
                encoder=encoder,
            )
        case "blank":
            return BlankFilling(
                seed=train.seed,
                length=length,
                first_id=vocabulary,
                noise=train.noise,
                span_length=train.span_length,
                tail_share=train.tail_share,
                two_dimensional=model.blank_positions,
            )
    return LanguageModelling()


def build_model(config: Config, *, vocabulary: int) -> Decoder:
    """Return the model. Its weights are drawn from torch's RNG: seed it alike on every rank.

    Args:
        vocabulary: token ids of the tokenizer and of the objective.
    """
    length = config.data.sequence_length
    if config.model.hf:
        # Not a Decoder, but it has the part of its interface that a run uses.
        return cast(
            Decoder, HuggingFace(config.model, vocabulary=vocabulary, sequence_length=length)
        )
    kind: type[Decoder] = Decoder
    if config.model.kind == "encoder-decoder":
        kind = EncoderDecoder
    return kind(config.model, vocabulary=vocabulary, sequence_length=length)


def build_clip(config: Config) -> float | ZClip:
    """Return the clipping of the guard: a global norm (0: none), or ZClip with that norm."""
    optim = config.optim
    if optim.zclip:
        return ZClip(z_limit=optim.zclip, clip=optim.clip)
    return optim.clip


def attach_stabilisers(
    model: nn.Module, optimizers: Sequence[Optimizer], config: Config
) -> QKClip | None:
    """Attach the configured stabilisers to the optimizers; return QK-clip if it is one of them."""
    if config.optim.stable:
        UpdateClipping(optimizers[0])
    if config.optim.qk_clip:
        return QKClip(model, optimizers[-1], limit=config.optim.qk_clip)
    return None
