"""The sections [data], [train] and [[faults]] of the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from guardrail.core.errors import ConfigError
from guardrail.core.section import (
    Fraction,
    Natural,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
)
from trainer.config.recipe import Objective
from trainer.sources.python_library import BUILTIN

# Values of data.tokenizer that need no file.
TRAINED = ("bytes", "bpe")
BYTE_IDS = 259  # 256 bytes and three special tokens


class DataSection(Section, frozen=True, kw_only=True):
    """[data]: the text, how it is cut into samples, and in which order they are read."""

    # Where the text comes from, one or more entries.
    sources: Annotated[tuple[str, ...], Meta(min_length=1)] = (BUILTIN,)
    # Field of a JSONL record that holds the text.
    text_field: str = "text"
    # "bytes" (259 ids), "bpe" (trained on the sources once, then cached), or the path of a
    # tokenizer.json.
    tokenizer: str = "bytes"
    # Size of the vocabulary that "bpe" trains.
    vocabulary: Annotated[int, Meta(ge=260)] = 8192
    # Tokens of one sample. One more is stored, for the labels.
    sequence_length: Annotated[int, Meta(ge=2)] = 256
    # "shuffled": a new permutation in each epoch; "stream": in the order of the documents.
    order: Literal["shuffled", "stream"] = "shuffled"
    # Seed of the permutation.
    seed: Natural = 0
    # Share of the documents that is held out for evaluation, chosen by a hash of their origin.
    eval_fraction: Annotated[float, Meta(ge=0, lt=1)] = 0.02
    # File with one sample id per line (ID or ID@EPOCH). These samples are skipped from the first
    # step. "": none.
    quarantine: str = ""
    # Folder in which tokenised text is kept between runs; "": $XDG_CACHE_HOME/guardrail.
    cache: str = ""
    # A document with more bytes than this is a bad record.
    max_document_bytes: Positive = 64 * 1024 * 1024


class BatchRampSection(Section, frozen=True, kw_only=True):
    """[train.batch_ramp]: smaller batches at the start (GPT-3)."""

    # Samples per batch at the start; 0: no ramp.
    start: Natural = 0
    # Samples by which the batch grows each time; 0: the smallest possible number.
    increment: Natural = 0
    # The batch grows linearly with the tokens read. After this many it has its full size.
    tokens: Natural = 0


class TrainSection(Section, frozen=True, kw_only=True):
    """[train]: length of the run, batch, precision, distribution."""

    RENAMED: ClassVar = {
        "ramp_from": "batch_ramp.start",
        "ramp_by": "batch_ramp.increment",
        "ramp_tokens": "batch_ramp.tokens",
    }

    # Applied updates of the run; 0: train.epochs decides.
    steps: Natural = 0
    # Epochs of the training split; used if steps is 0.
    epochs: Natural = 0
    # Samples per update, over all ranks and micro-batches.
    batch_size: Positive = 16
    # Samples of one forward and backward pass of one rank. 0: batch_size / data-parallel ranks,
    # which means no accumulation.
    micro_batch_size: Natural = 0
    # Growth of the batch at the start.
    batch_ramp: BatchRampSection = BatchRampSection()
    # Seed of the initial weights, of dropout and of the objective's random choices.
    seed: Natural = 0
    # What the model learns. "lm": each next token. "prefix-lm": the tokens after a prefix of random
    # length. "span": denoising with sentinels (T5). "blank": autoregressive blank filling (GLM).
    objective: Objective = "lm"
    # For "span" and "blank": share of the tokens that are removed from a sample, and mean length of a
    # removed span (GLM: lambda of the Poisson distribution).
    noise: Annotated[float, Meta(gt=0, lt=1)] = 0.15
    span_length: Annotated[float, Meta(ge=1)] = 3.0
    # For "blank": share of the samples with one blank at the end (GLM's [gMASK]) instead of several
    # short ones.
    tail_share: Fraction = 0.5
    # Weight of log(Z)^2 of the output softmax (PaLM: 1e-4). It is trained on, but it is not part of
    # the logged loss.
    z_loss: NonNegativeFloat = 0.0
    # Number format of the computation; the weights are fp32 in any case. With fp16 the loss is
    # multiplied by a scale, which falls after an overflow and rises without one.
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    # For fp16: the scale at the start, and the number of applied updates without an overflow after
    # which it doubles.
    loss_scale: PositiveFloat = 65536.0
    loss_scale_steps: Positive = 2000
    # "ddp": parameters are replicated. "fsdp": parameters, gradients and optimizer state are sharded
    # (FSDP2). Used for the ranks that [parallel] does not assign.
    strategy: Literal["ddp", "fsdp"] = "ddp"
    # Compile each block with torch.compile, and the backend for it. "eager" and "aot_eager" generate
    # no code and are for tests.
    compile: bool = False
    compile_backend: Literal["inductor", "aot_eager", "eager"] = "inductor"
    # Use only algorithms that give the same bits each time; torch raises an error where it has none.
    # Exact rollbacks and replays on a GPU need it. On a CPU it changes nothing.
    deterministic: bool = False
    # Recompute the activations of each block in the backward pass, to save memory.
    activation_checkpointing: bool = False
    # Steps between two evaluations on the held-out documents; 0: no evaluation.
    eval_every: Natural = 0
    # Batches per evaluation.
    eval_batches: Positive = 8


class FaultSection(Section, frozen=True, kw_only=True):
    """[[faults]]: faults that the trainer injects on purpose, for tests and demonstrations."""

    # In the numbers of a pass: nan_loss; spike_loss (the loss times `value`); spike_grad (the
    # gradient times `value`); spike_embedding (the gradient of the embedding's output times
    # `value`); inf_grad and nan_grad (one entry, before the reduction); inf_grad_reduced (one entry,
    # after the reduction, as on a broken rank); garbage_grad (noise with `value` times the norm, new
    # noise each time, as of broken hardware); overflow (an infinite gradient while the loss scale is
    # above `value`).
    # In the data: ignore_labels; and, for the samples of [first, last) only, noise_tokens
    # (mis-decoded text), repeat_tokens (one n-gram repeated) and shuffle_labels, the same each time
    # the sample is used.
    # In the state, before the step and until a rollback (give `times`, or each attempt damages it
    # again): scale_weights (all, by `value`); scale_row (row `entry` of the embedding, by `value`);
    # flip_weight and flip_moment (bit `value` of entry `entry` of the first matrix of the blocks, or
    # of its first moment); zero_moments.
    # In the step: scale_lr (the learning rate times `value`; schedule and guard do not see it).
    # Of the process: hang, exit, raise.
    kind: Literal[
        "nan_loss",
        "spike_loss",
        "spike_grad",
        "spike_embedding",
        "inf_grad",
        "nan_grad",
        "inf_grad_reduced",
        "garbage_grad",
        "overflow",
        "ignore_labels",
        "noise_tokens",
        "repeat_tokens",
        "shuffle_labels",
        "scale_weights",
        "scale_row",
        "flip_weight",
        "flip_moment",
        "zero_moments",
        "scale_lr",
        "hang",
        "exit",
        "raise",
    ]
    # Positions [first, last) of the sample order: the fault is injected into batches that use one.
    first: Natural = 0
    last: Natural = 0
    # Steps [step, step + steps): the fault is injected into each attempt at one; 0: by position. If
    # both are given, both must hold. `times` limits how often, per process.
    step: Natural = 0
    steps: Positive = 1
    times: Positive = 1_000_000_000
    # Rank on which it is injected; -1: all.
    rank: Annotated[int, Meta(ge=-1)] = -1
    # Strength: a factor, seconds of a hang, an exit status, the largest loss scale that does not
    # overflow, or a bit (of a float32, 30 is the highest of the exponent).
    value: float = 100.0
    # Row of the embedding, or entry of the matrix, that a fault of the state changes; counted modulo
    # their number.
    entry: Natural = 0
    # Micro-batch of the step into which it is injected; -1: all.
    micro: Annotated[int, Meta(ge=-1)] = -1


def check_faults(faults: Sequence[FaultSection], *, world: int) -> None:
    """Raise ConfigError for a fault that cannot be injected."""
    for index, fault in enumerate(faults):
        key = f"faults[{index}]"
        if fault.rank >= world:
            raise ConfigError(
                f"-1 (all ranks), or a rank from 0 to {world - 1}",
                key=f"{key}.rank",
                value=fault.rank,
            )
        if not fault.step and fault.last <= fault.first:
            raise ConfigError(
                f"more than {key}.first ({fault.first}), or {key}.step for a fault at one step",
                key=f"{key}.last",
                value=fault.last,
                hint="the fault would never be injected",
            )
        if fault.kind in ("flip_weight", "flip_moment") and fault.value not in range(32):
            raise ConfigError("a bit from 0 to 31", key=f"{key}.value", value=fault.value)
        if fault.kind == "scale_lr" and fault.value <= 0:
            raise ConfigError("a factor above 0", key=f"{key}.value", value=fault.value)
