"""From a configuration to the parts of a run: objective, model, stabilisers."""

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
    """The objective that [train] names.

    Args:
        vocabulary: first id that the tokenizer leaves free.
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
    """The model, its weights drawn from torch's global generator: seed it alike on every rank.

    Args:
        vocabulary: token ids that it must know, those of the objective included.
    """
    length = config.data.sequence_length
    if config.model.hf:
        # No Decoder, and has the part of its interface that a run uses.
        return cast(
            Decoder, HuggingFace(config.model, vocabulary=vocabulary, sequence_length=length)
        )
    kind = EncoderDecoder if config.model.kind == "encoder-decoder" else Decoder
    return kind(config.model, vocabulary=vocabulary, sequence_length=length)


def build_clip(config: Config) -> float | ZClip:
    """What the guard clips with: a global norm (0: none), or ZClip within it."""
    optim = config.optim
    return ZClip(z_limit=optim.zclip, clip=optim.clip) if optim.zclip else optim.clip


def attach_stabilisers(
    model: nn.Module, optimizers: Sequence[Optimizer], config: Config
) -> QKClip | None:
    """Hang the configured stabilisers around the optimizers' steps."""
    if config.optim.stable:
        UpdateClipping(optimizers[0])
    return (
        QKClip(model, optimizers[-1], limit=config.optim.qk_clip) if config.optim.qk_clip else None
    )
