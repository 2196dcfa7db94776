"""The sections [data], [train] and [[faults]], and the values that they may have."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

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

# Tokenizers that need no file.
TRAINED = ("bytes", "bpe")
BYTE_IDS = 259  # 256 bytes and three special tokens


class DataSection(Section, frozen=True, kw_only=True):
    """[data]: the text, how it is cut into samples, and in which order they come."""

    # Folders, globs, files (.txt .md .py ... , .jsonl, each also .gz or .zst) or "builtin:python".
    sources: Annotated[tuple[str, ...], Meta(min_length=1)] = (BUILTIN,)
    # Field of a JSONL record that holds the text.
    text_field: str = "text"
    # "bytes" (259 ids), "bpe" (trained once on the sources and cached) or the path of a
    # tokenizer.json.
    tokenizer: str = "bytes"
    # Size of the vocabulary that "bpe" trains.
    vocabulary: Annotated[int, Meta(ge=260)] = 8192
    # Tokens that the model sees of one sample; one more is stored, for the labels.
    sequence_length: Annotated[int, Meta(ge=2)] = 256
    # "shuffled": another permutation each epoch; "stream": as the documents stand.
    order: Literal["shuffled", "stream"] = "shuffled"
    # Seed of the permutation.
    seed: Natural = 0
    # Share of the documents held out for evaluation, chosen by a hash of their origin.
    eval_fraction: Annotated[float, Meta(ge=0, lt=1)] = 0.02
    # File with one sample id a line (ID or ID@EPOCH) that is skipped from the first step; "": none.
    quarantine: str = ""
    # Where tokenised shards are kept between runs; "": $XDG_CACHE_HOME/guardrail.
    cache: str = ""
    # A document larger than this many bytes counts as a bad record.
    max_document_bytes: Positive = 64 * 1024 * 1024


class BatchRampSection(Section, frozen=True, kw_only=True):
    """[train.batch_ramp]: smaller batches at the start (GPT-3)."""

    # Samples of the first batches; 0: no ramp.
    start: Natural = 0
    # Samples by which a batch grows at a time; 0: the smallest possible number.
    increment: Natural = 0
    # The batch grows linearly with the tokens read, to its full size after this many.
    tokens: Natural = 0


class TrainSection(Section, frozen=True, kw_only=True):
    """[train]: length, batch, precision, strategy."""

    RENAMED: ClassVar = {
        "ramp_from": "batch_ramp.start",
        "ramp_by": "batch_ramp.increment",
        "ramp_tokens": "batch_ramp.tokens",
    }

    # Applied updates of the whole run; 0: given by epochs.
    steps: Natural = 0
    # Passes over the training split; used when steps is 0.
    epochs: Natural = 0
    # Samples of one update, over all ranks and micro-batches.
    batch_size: Positive = 16
    # Samples of one forward and backward pass of one rank; 0: batch_size / data-parallel ranks (no
    # accumulation).
    micro_batch_size: Natural = 0
    # Batch-size ramp.
    batch_ramp: BatchRampSection = BatchRampSection()
    # Seed of the initial weights, dropout and every other draw.
    seed: Natural = 0
    # "lm": each next token; "prefix-lm": those behind a prefix of random length; "span": denoising
    # with sentinels (T5); "blank": autoregressive blank filling (GLM).
    objective: Objective = "lm"
    # "span" and "blank": share of the tokens that are taken out, and mean length of a span (GLM:
    # lambda of Poisson).
    noise: Annotated[float, Meta(gt=0, lt=1)] = 0.15
    span_length: Annotated[float, Meta(ge=1)] = 3.0
    # "blank": share of the samples with one blank at their end (GLM's [gMASK]) instead of short
    # ones.
    tail_share: Fraction = 0.5
    # Weight of log(Z)^2 of the output softmax (PaLM: 1e-4); it is trained on and not part of the
    # logged loss.
    z_loss: NonNegativeFloat = 0.0
    # bf16 and fp16 compute in 16 bits on fp32 weights. fp16 multiplies the loss by a scale that
    # follows the overflows.
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    # fp16: the scale at the start, and the applied updates without an overflow after which it
    # doubles.
    loss_scale: PositiveFloat = 65536.0
    loss_scale_steps: Positive = 2000
    # "ddp": parameters replicated; "fsdp": parameters, gradients and optimizer state sharded
    # (FSDP2). Short for a [parallel] section in which only one of the two numbers is above 1.
    strategy: Literal["ddp", "fsdp"] = "ddp"
    # Compile each block (torch.compile), with which backend: "eager" and "aot_eager" generate no
    # code, for tests.
    compile: bool = False
    compile_backend: Literal["inductor", "aot_eager", "eager"] = "inductor"
    # Let torch use only algorithms that give the same bits each time, and raise where it has none:
    # what exact rollbacks and replays need on a GPU. On a CPU they are the same ones, and there it
    # changes nothing.
    deterministic: bool = False
    # Recompute the activations of each block in the backward pass.
    activation_checkpointing: bool = False
    # Steps between two evaluations on the held-out documents; 0: none.
    eval_every: Natural = 0
    # Batches of one evaluation.
    eval_batches: Positive = 8


class FaultSection(Section, frozen=True, kw_only=True):
    """[[faults]]: faults that the trainer stages on purpose, for tests and demonstrations."""

    # In the numbers of a pass: nan_loss, spike_loss (the loss times `value`), spike_grad,
    # spike_embedding (what comes back to an embedding, times `value`), inf_grad and nan_grad (one
    # entry, before the reduction), inf_grad_reduced (after it, as a broken rank would),
    # garbage_grad (noise of `value` times the norm, other noise each time: broken hardware),
    # overflow (an infinite gradient where the loss scale is above `value`). In the data:
    # ignore_labels; in the samples of the stretch alone noise_tokens (mis-decoded text),
    # repeat_tokens (an n-gram again and again) and shuffle_labels, alike whenever the sample is
    # used. In the state, before the step and until somebody goes back (give `times`, or each
    # attempt strikes again): scale_weights (all, by `value`), scale_row (embedding row `entry`, by
    # `value`), flip_weight and flip_moment (bit `value` of entry `entry` of the first matrix of the
    # blocks, of its first moment), zero_moments. In the step: scale_lr (the learning rate times
    # `value`, unseen by schedule and guard). Of the process: hang, exit, raise.
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
    # The fault strikes a batch that covers a position in [first, last) of the order ...
    first: Natural = 0
    last: Natural = 0
    # ... or the attempts at this step (0: by position) and the `steps` - 1 that follow, or both
    # where both are given. `times` bounds how often, per process life.
    step: Natural = 0
    steps: Positive = 1
    times: Positive = 1_000_000_000
    # Rank that it strikes; -1: all.
    rank: Annotated[int, Meta(ge=-1)] = -1
    # Strength: a factor, seconds of a hang, exit status, the largest loss scale that does not
    # overflow, the bit (of a float32, 30 is the highest of the exponent).
    value: float = 100.0
    # Row of the embedding, or entry of the matrix, that a fault of the state strikes; counted
    # modulo their number.
    entry: Natural = 0
    # Micro-batch of the window that it strikes; -1: all.
    micro: Annotated[int, Meta(ge=-1)] = -1
