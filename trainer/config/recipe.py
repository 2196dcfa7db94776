"""The sections [model] and [optim], and the combinations that cannot work.

Imports no torch. Each choice names its source. `configs/presets` combines them as published models
did.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from guardrail.core.errors import ConfigError
from guardrail.core.files import why_unreachable
from guardrail.core.section import (
    Fraction,
    Natural,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
)
from trainer.optim.base import OptimizerSpec
from trainer.optim.registry import OPTIMIZERS, find_optimizer, names_of

if TYPE_CHECKING:
    OptimizerName = str
else:
    OptimizerName = Literal[tuple(spec.name for spec in OPTIMIZERS)]
Objective = Literal["lm", "prefix-lm", "span", "blank"]
GATED = ("swiglu", "geglu")

# Kind of a model -> the objectives that it can be trained with.
OBJECTIVES: dict[str, tuple[Objective, ...]] = {
    "decoder": ("lm",),
    "prefix": ("lm", "prefix-lm", "span", "blank"),
    "encoder-decoder": ("prefix-lm", "span"),
}


class ModelSection(Section, frozen=True, kw_only=True):
    """[model]: by default a causal decoder with RMSNorm before each block, RoPE and SwiGLU."""

    # Published recipe in configs/presets. Its values are the defaults of the keys that the file does
    # not set. "": none.
    preset: str = ""
    # Folder or config.json of a Hugging Face causal language model. It replaces all keys below.
    # "": none.
    hf: str = ""
    # Start from the weights in that folder instead of from random ones.
    pretrained: bool = False
    # "decoder": causal. "prefix": attends to a prefix in both directions (GLM; T5, section 3.2.1).
    # "encoder-decoder": an encoder, and a decoder that attends to it.
    kind: Literal["decoder", "prefix", "encoder-decoder"] = "decoder"
    # Blocks (at most 10,000), width of the residual stream, attention heads of width / heads each.
    layers: Annotated[int, Meta(ge=1, le=10_000)] = 4
    width: Positive = 128
    heads: Positive = 4
    # Layers of the encoder; 0: as many as `layers`.
    encoder_layers: Natural = 0
    # Heads of keys and values. Each serves heads / kv_heads heads of queries (Ainslie et al. 2023).
    # 0: as many as heads.
    kv_heads: Natural = 0
    # Width of the feed-forward block. 0: 8/3 of the width if it is gated, rounded up to a multiple of
    # 32; else 4 times the width.
    hidden: Natural = 0
    # Activation of the feed-forward block; swiglu and geglu are gated (Shazeer 2020).
    activation: Literal["swiglu", "geglu", "gelu", "relu"] = "swiglu"
    # RMSNorm or LayerNorm.
    norm: Literal["rms", "layer"] = "rms"
    # Place of the norms. "pre": before each sublayer. "post": after the sum (Vaswani et al. 2017).
    # "sandwich": before and after each sublayer (CogView).
    norm_place: Literal["pre", "post", "sandwich"] = "pre"
    # Apply a norm to the output of the embedding (BLOOM).
    embedding_norm: bool = False
    # Attention and feed-forward both read the output of one norm (GPT-J, PaLM).
    parallel: bool = False
    # How the model gets the position of a token.
    positions: Literal["rope", "learned", "sinusoidal", "alibi", "t5", "none"] = "rope"
    # For T5's relative bias: number of buckets, and the distance from which all share the last one.
    t5_buckets: Annotated[int, Meta(ge=4)] = 32
    t5_distance: Annotated[int, Meta(ge=8)] = 128
    # Learned positions inside each blank: the second dimension of GLM's positions.
    blank_positions: bool = False
    # RMSNorm of each head's queries and keys (Dehghani et al. 2023; Qwen3).
    qk_norm: bool = False
    # Projections and LayerNorm have a bias.
    bias: bool = False
    # Input and output embeddings share one matrix.
    tied: bool = True
    # Dropout of the attention weights and of the output of each sublayer.
    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    # Base of the rotation angles (RoPE), and epsilon of the norms.
    rope_base: PositiveFloat = 10000.0
    norm_eps: PositiveFloat = 1e-5
    # Standard deviation of the initial weights. Output projections are scaled by 1/sqrt(2 layers)
    # (GPT-2).
    init_std: PositiveFloat = 0.02

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def groups(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    def check(self, *, base: Path) -> None:
        """Raise ConfigError for a model that cannot be built.

        Args:
            base: folder that a relative path starts from.
        """
        if self.hf:
            self._check_path(base / os.path.expanduser(self.hf))
            return
        if self.pretrained:
            raise ConfigError("false, or a folder in model.hf", key="model.pretrained", value=True)
        self._check_heads()
        self._check_blocks()

    def _check_path(self, path: Path) -> None:
        if not (os.path.isfile(path) or os.path.isfile(path / "config.json")):
            fetch = "models are not downloaded: save one with save_pretrained, or copy its folder"
            raise ConfigError(
                "a folder with a config.json, or the path of one",
                key="model.hf",
                value=self.hf,
                hint=why_unreachable(path) or fetch,
            )

    def _check_heads(self) -> None:
        multiple, expected = self.heads, "a multiple of model.heads"
        if self.positions == "rope":
            multiple, expected = 2 * self.heads, "a multiple of 2 * model.heads (RoPE turns pairs)"
        if self.width % multiple:
            raise ConfigError(
                expected,
                key="model.width",
                value=self.width,
                hint=f"model.heads = {self.heads}; nearest: {nearest_multiple(self.width, multiple)}",
            )
        if self.heads % self.groups:
            divisors = [str(n) for n in range(1, self.heads + 1) if self.heads % n == 0]
            raise ConfigError(
                f"a divisor of model.heads ({self.heads})",
                key="model.kv_heads",
                value=self.kv_heads,
                hint=f"one of {', '.join(divisors)}, or 0 for as many as heads",
            )

    def _check_blocks(self) -> None:
        if self.parallel and (self.norm_place != "pre" or self.kind == "encoder-decoder"):
            raise ConfigError(
                'false, unless model.norm_place = "pre" in a decoder',
                key="model.parallel",
                value=True,
                hint="parallel blocks share one norm before them",
            )
        if self.encoder_layers and self.kind != "encoder-decoder":
            raise ConfigError(
                '0, unless model.kind = "encoder-decoder"',
                key="model.encoder_layers",
                value=self.encoder_layers,
            )
        if self.blank_positions and self.kind != "prefix":
            raise ConfigError(
                'false, unless model.kind = "prefix"', key="model.blank_positions", value=True
            )


class OptimSection(Section, frozen=True, kw_only=True):
    """[optim]: by default AdamW with linear warm-up, cosine decay and clipping."""

    # The optimizer.
    name: OptimizerName = "adamw"
    # How torch applies the update. "fused": one kernel, the fastest. "foreach": lists of tensors.
    # "loop": one tensor after another.
    implementation: Literal["fused", "foreach", "loop"] = "fused"
    # Peak of the learning rate.
    lr: PositiveFloat = 1e-3
    # Decay of Adam's two moments, and epsilon, which is added to the root of the second one.
    beta1: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Meta(ge=0, lt=1)] = 0.95
    eps: PositiveFloat = 1e-8
    # Momentum of muon (Nesterov).
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.95
    # Weight decay of matrices; norms, biases and other one-dimensional parameters have none. "adam"
    # adds it to the gradient.
    weight_decay: NonNegativeFloat = 0.1
    # Learning rate after the warm-up. "cosine": half a cosine. "linear": a line. "wsd": constant,
    # then a line over the last decay_share of the run. "constant": constant.
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    # Length of the linear warm-up in steps. warmup_tokens, or warmup_share of all steps, replaces it
    # if it is above 0.
    warmup_steps: Natural = 100
    warmup_tokens: Natural = 0
    warmup_share: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    # The decay ends at this share of the peak.
    min_lr_share: Fraction = 0.1
    # For "wsd": share of the run in which the rate decays.
    decay_share: Annotated[float, Meta(gt=0, le=1)] = 0.2
    # Global norm to which gradients are clipped; 0: no clipping.
    clip: NonNegativeFloat = 1.0
    # z-score above which ZClip shortens a gradient (published: 2.5). It acts before `clip`. 0: off.
    zclip: NonNegativeFloat = 0.0
    # Divide the learning rate of a tensor by the RMS of g / sqrt(v) if that is above 1 (StableAdamW).
    stable: bool = False
    # Largest attention logit. After the step, queries and keys of a head above it are scaled down
    # (MuonClip: 100). 0: off.
    qk_clip: NonNegativeFloat = 0.0

    @property
    def spec(self) -> OptimizerSpec:
        """What the trainer knows of the optimizer."""
        return find_optimizer(self.name)

    def check(self, model: ModelSection, *, strategy: str) -> None:
        """Raise ConfigError for keys that do not work together."""
        if self.warmup_tokens and self.warmup_share:
            raise ConfigError(
                "0, or optim.warmup_share = 0", key="optim.warmup_tokens", value=self.warmup_tokens
            )
        if strategy == "fsdp" and not self.spec.works_sharded:
            raise ConfigError(
                'an optimizer whose state is sharded like its parameters, or train.strategy = "ddp"',
                key="optim.name",
                value=self.name,
                hint=f"sharded: {', '.join(names_of(having='works_sharded'))}",
            )
        if self.stable and not self.spec.works_stable:
            names = " or ".join(f'"{name}"' for name in names_of(having="works_stable"))
            raise ConfigError(f"false, or optim.name = {names}", key="optim.stable", value=True)
        if self.qk_clip and (model.hf or model.qk_norm):
            why = "qk_norm already limits the logits"
            if model.hf:
                why = (
                    "it needs the trainer's own attention, which a Hugging Face model does not have"
                )
            raise ConfigError("0", key="optim.qk_clip", value=self.qk_clip, hint=why)


def check_objective(objective: Objective, model: ModelSection) -> None:
    """Raise ConfigError for an objective that the model cannot be trained with."""
    kind: str = model.kind
    if model.hf:
        kind = "decoder"
    if objective not in OBJECTIVES[kind]:
        raise ConfigError(
            f"one of {', '.join(OBJECTIVES[kind])}",
            key="train.objective",
            value=objective,
            hint=f'model.kind is "{kind}"',
        )
    if objective == "blank" and model.positions in ("alibi", "t5"):
        raise ConfigError(
            '"rope", "learned" or "sinusoidal"',
            key="model.positions",
            value=model.positions,
            hint="a filled blank has the position of its mask; a bias by distance cannot express that",
        )


def nearest_multiple(value: int, multiple: int) -> int:
    """Return the multiple of `multiple` that is nearest to `value`, at least 1 x `multiple`."""
    return max(multiple, round(value / multiple) * multiple)
