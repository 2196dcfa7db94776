"""What is trained and how: the sections of the configuration for architecture and optimizer, and
what they exclude.

Imports no torch. Each choice names its source; `configs/presets` puts them together as published
models did.
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

# Which objectives a kind of model can be given.
OBJECTIVES: dict[str, tuple[Objective, ...]] = {
    "decoder": ("lm",),
    "prefix": ("lm", "prefix-lm", "span", "blank"),
    "encoder-decoder": ("prefix-lm", "span"),
}


class ModelSection(Section, frozen=True, kw_only=True):
    """[model]: as it stands, a causal decoder with RMSNorm before each block, RoPE and SwiGLU."""

    # Published recipe whose values hold wherever the file sets none (configs/presets); "": none.
    preset: str = ""
    # Folder or config.json of a Hugging Face causal language model, which replaces all keys below;
    # "": none.
    hf: str = ""
    # Start from the weights in that folder instead of from scratch.
    pretrained: bool = False
    # "decoder": causal; "prefix": sees a prefix in both directions (GLM, T5 section 3.2.1); or
    # encoder and decoder.
    kind: Literal["decoder", "prefix", "encoder-decoder"] = "decoder"
    # Blocks (at most 10,000), width of the residual stream, attention heads (each of width / heads).
    layers: Annotated[int, Meta(ge=1, le=10_000)] = 4
    width: Positive = 128
    heads: Positive = 4
    # Layers of the encoder; 0: as many as `layers`.
    encoder_layers: Natural = 0
    # Heads of keys and values, each shared by heads / kv_heads queries (Ainslie et al. 2023); 0: as
    # many as heads.
    kv_heads: Natural = 0
    # Width of the feed-forward block; 0: 8/3 of the width for a gated one, rounded up to a multiple
    # of 32, else 4x.
    hidden: Natural = 0
    # swiglu and geglu are gated (Shazeer 2020).
    activation: Literal["swiglu", "geglu", "gelu", "relu"] = "swiglu"
    norm: Literal["rms", "layer"] = "rms"
    # "pre": before each block; "post": after the sum (Vaswani et al. 2017); "sandwich": before and
    # after it (CogView).
    norm_place: Literal["pre", "post", "sandwich"] = "pre"
    # Apply a norm to the output of the embedding (BLOOM).
    embedding_norm: bool = False
    # Attention and feed-forward both read the output of one norm (GPT-J, PaLM).
    parallel: bool = False
    # How the model knows the position of a token.
    positions: Literal["rope", "learned", "sinusoidal", "alibi", "t5", "none"] = "rope"
    # T5's relative bias: number of buckets, and the distance from which on all share the last one.
    t5_buckets: Annotated[int, Meta(ge=4)] = 32
    t5_distance: Annotated[int, Meta(ge=8)] = 128
    # A learned table that counts inside each blank: the second dimension of GLM's positions.
    blank_positions: bool = False
    # RMSNorm of each head's queries and keys (Dehghani et al. 2023; Qwen3).
    qk_norm: bool = False
    # Biases of projections and of LayerNorm.
    bias: bool = False
    # Input and output embeddings share one matrix.
    tied: bool = True
    # Share that is dropped of the attention weights and of what each half of a block adds.
    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    # Base of the rotation angles (RoPE), and what is added under the root of the norms.
    rope_base: PositiveFloat = 10000.0
    norm_eps: PositiveFloat = 1e-5
    # Standard deviation of the initial weights; output projections are scaled by 1/sqrt(2 layers)
    # (GPT-2).
    init_std: PositiveFloat = 0.02

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def groups(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    def check(self, *, base: Path) -> None:
        """Refuse what cannot be built; `base` resolves a relative path. Raises ConfigError."""
        if self.hf:
            self._check_path(base / os.path.expanduser(self.hf))
            return
        if self.pretrained:
            raise ConfigError("false, or a folder in model.hf", key="model.pretrained", value=True)
        self._check_heads()
        self._check_blocks()

    def _check_path(self, path: Path) -> None:
        if not (os.path.isfile(path) or os.path.isfile(path / "config.json")):
            fetch = "models are not fetched: save one with save_pretrained, or download its folder"
            raise ConfigError(
                "a folder with a config.json, or the path of one",
                key="model.hf",
                value=self.hf,
                hint=why_unreachable(path) or fetch,
            )

    def _check_heads(self) -> None:
        pairs = 2 if self.positions == "rope" else 1
        multiple = pairs * self.heads
        if self.width % multiple:
            raise ConfigError(
                f"a multiple of {'2 * ' * (pairs - 1)}model.heads{' (RoPE turns pairs)' * (pairs - 1)}",
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
    """[optim]: as it stands, AdamW, linear warm-up, cosine decay, clipping."""

    # The optimizer.
    name: OptimizerName = "adamw"
    # How torch steps: "fused" one kernel (fastest here), "foreach" lists of tensors, "loop" one
    # tensor after another.
    implementation: Literal["fused", "foreach", "loop"] = "fused"
    # Peak of the learning rate.
    lr: PositiveFloat = 1e-3
    # Decay of the two moments, and what is added to the root of the second.
    beta1: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Meta(ge=0, lt=1)] = 0.95
    eps: PositiveFloat = 1e-8
    # Momentum of muon (Nesterov).
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.95
    # On matrices only; norms, biases and one-dimensional parameters have none. "adam" adds it to
    # the gradient.
    weight_decay: NonNegativeFloat = 0.1
    # Behind the warm-up: half a cosine; a line; constant, then a line over the last decay_share
    # (WSD); constant.
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    # Linear warm-up in steps; warmup_tokens or warmup_share (of all steps), where above 0, take its
    # place.
    warmup_steps: Natural = 100
    warmup_tokens: Natural = 0
    warmup_share: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    # The decay ends at this share of the peak.
    min_lr_share: Fraction = 0.1
    # Part of the run that "wsd" decays in.
    decay_share: Annotated[float, Meta(gt=0, le=1)] = 0.2
    # Global norm to which gradients are clipped; 0: no clipping.
    clip: NonNegativeFloat = 1.0
    # z-score from which on ZClip cuts a gradient norm (published: 2.5), before `clip` does; 0: off.
    zclip: NonNegativeFloat = 0.0
    # Divide a tensor's learning rate by the RMS of g / sqrt(v) where that is above 1 (StableAdamW).
    stable: bool = False
    # Largest attention logit, beyond which a head's queries and keys are scaled down after the step
    # (MuonClip: 100).
    qk_clip: NonNegativeFloat = 0.0

    @property
    def spec(self) -> OptimizerSpec:
        """What the trainer knows of the optimizer."""
        return find_optimizer(self.name)

    def check(self, model: ModelSection, *, strategy: str) -> None:
        """Refuse what does not go together. Raises ConfigError."""
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
            why = (
                "queries and keys of a Hugging Face model are not watched"
                if model.hf
                else "qk_norm bounds the logits"
            )
            raise ConfigError("0", key="optim.qk_clip", value=self.qk_clip, hint=why)


def check_objective(objective: Objective, model: ModelSection) -> None:
    """Refuse an objective that the model cannot be given. Raises ConfigError."""
    kind = "decoder" if model.hf else model.kind
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
            hint="a filled blank has the position of its mask, which a bias by distance in the row cannot express",
        )


def nearest_multiple(value: int, multiple: int) -> int:
    """The multiple, at least 1x, that lies nearest to `value`."""
    return max(multiple, round(value / multiple) * multiple)
