"""Where a configuration differs from published runs, with the source. Imports no torch.

These are remarks, not rules: a good reason overrides each of them. Sizes are compared from 10 M
parameters, since no recipe for smaller models is published.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from trainer.config.sizes import parameter_count

if TYPE_CHECKING:
    from trainer.config.config import Config

SMALLEST = 10_000_000  # parameters from which sizes are compared

# (Parameters, tokens per batch, learning rate): Brown et al. 2020 (GPT-3), table 2.1.
GPT3 = (
    (125e6, 0.5e6, 6.0e-4),
    (350e6, 0.5e6, 3.0e-4),
    (760e6, 0.5e6, 2.5e-4),
    (1.3e9, 1e6, 2.0e-4),
    (2.7e9, 1e6, 1.6e-4),
    (6.7e9, 2e6, 1.2e-4),
    (13e9, 2e6, 1.0e-4),
    (175e9, 3.2e6, 0.6e-4),
)


def remarks(config: Config) -> list[str]:
    """Return what is unusual about a configuration, the largest effect first; [] if nothing is."""
    parameters = _parameters(config)
    found = [_clipping(config), _placement(config), _beta2(config)]
    if parameters >= SMALLEST:
        found = [_learning_rate(config, parameters), *found]
        found += [_batch(config, parameters), _tokens_per_parameter(config, parameters)]
    found += [_warmup(config), _last_rate(config)]
    return [remark for remark in found if remark]


def _parameters(config: Config) -> int:
    """Return the number of parameters; 0 if it is not known, as of a Hugging Face model."""
    return parameter_count(
        config.model, config.vocabulary, sequence_length=config.data.sequence_length
    )


def _batch_tokens(config: Config) -> int:
    return config.train.batch_size * config.data.sequence_length


def published_recipe(parameters: int) -> tuple[float, float]:
    """Return (tokens per batch, learning rate) that GPT-3 would use for a model of this size.

    Interpolated between its published sizes on logarithmic scales.
    """
    size = min(max(float(parameters), GPT3[0][0]), GPT3[-1][0])
    for (low, low_batch, low_rate), (high, high_batch, high_rate) in itertools.pairwise(GPT3):
        if size <= high:
            share = math.log(size / low) / math.log(high / low)
            batch = low_batch * (high_batch / low_batch) ** share
            rate = low_rate * (high_rate / low_rate) ** share
            return batch, rate
    raise AssertionError("the size was clamped to the table")


def _learning_rate(config: Config, parameters: int) -> str:
    if config.optim.spec.lr_is_relative:
        return ""
    usual = published_recipe(parameters)[1]
    ratio = config.optim.lr / usual
    if 1 / 5 <= ratio <= 5:
        return ""
    source = (
        f"GPT-3 used about {usual:.1e} for {_format_count(parameters)} parameters "
        "(Brown et al. 2020, table 2.1)"
    )
    if ratio > 1:
        return (
            f"optim.lr = {config.optim.lr:g} is {ratio:.0f} times the usual rate: {source}. "
            "A rate that is too high is the most frequent cause of spikes"
        )
    return f"optim.lr = {config.optim.lr:g} is {1 / ratio:.0f} times below the usual rate: {source}"


def _clipping(config: Config) -> str:
    clip = config.optim.clip
    if 0 < clip <= 1 or config.optim.zclip:
        return ""
    usual = "GPT-3, PaLM, BLOOM, LLaMA and GLM-130B all clip at 1.0"
    if not clip:
        return f"optim.clip = 0: gradients are not clipped. {usual}"
    return f"optim.clip = {clip:g} is above the usual limit. {usual}"


def _placement(config: Config) -> str:
    model = config.model
    if model.hf:
        return ""
    if model.norm_place == "post":
        return (
            'model.norm_place = "post": gradients near the output are large at the start. It needs '
            "a longer warm-up and a lower rate, and deep models diverge (Xiong et al. 2020). "
            "Published large models put norms before the blocks"
        )
    if model.norm_place == "sandwich":
        return (
            'model.norm_place = "sandwich": CogView needed it in fp16 (Ding et al. 2021); GLM-130B '
            "tried it and diverged (Zeng et al. 2022)"
        )
    if model.embedding_norm:
        return (
            "model.embedding_norm: it made BLOOM's training stable, and models with it were worse "
            "at zero-shot tasks (Le Scao et al. 2022, What Language Model to Train If You Have One "
            "Million GPU Hours?)"
        )
    return ""


def _beta2(config: Config) -> str:
    optim = config.optim
    if not optim.spec.uses_betas:
        return ""
    steps, memory = config.train.steps, 1 / (1 - optim.beta2)
    if 0 < steps < memory:
        return (
            f"optim.beta2 = {optim.beta2:g} averages over {memory:.0f} steps, and the run has "
            f"{steps}: the second moment is nearly the mean since step 1, whose gradients are the "
            "largest. No curve shows it"
        )
    # For batches of few tokens a long average is better (Porian et al. 2024).
    if optim.beta2 > 0.99 and _batch_tokens(config) >= 1 << 17:
        return (
            f"optim.beta2 = {optim.beta2:g} averages over {memory:.0f} steps, so the scale is out of "
            "date when gradients grow suddenly: GPT-3, LLaMA, BLOOM and GLM-130B use 0.95 "
            "(Wortsman et al. 2023 on the spikes of 0.999)"
        )
    if optim.beta2 < 0.9:
        return (
            f"optim.beta2 = {optim.beta2:g} averages over {memory:.0f} steps; published runs use "
            "0.95 to 0.99"
        )
    return ""


def _batch(config: Config, parameters: int) -> str:
    usual, tokens = published_recipe(parameters)[0], _batch_tokens(config)
    if usual / 10 <= tokens <= usual * 8:
        return ""
    amount, effect = "many", "it needs more tokens for the same loss"
    if tokens < usual:
        amount, effect = "few", "noisy gradients need a lower rate"
    return (
        f"a batch has {_format_count(tokens)} tokens, {amount} for {_format_count(parameters)} "
        f"parameters: GPT-3 used {_format_count(usual)} at this size (Brown et al. 2020, "
        f"table 2.1); {effect} (McCandlish et al. 2018)"
    )


def _tokens_per_parameter(config: Config, parameters: int) -> str:
    if not config.train.steps:
        return ""  # with train.epochs the data decides
    tokens = config.batch_plan.samples_in(config.train.steps) * config.data.sequence_length
    ratio = tokens / parameters
    if 5 <= ratio <= 2500:
        return ""
    amount = f"{_format_count(tokens)} tokens for {_format_count(parameters)} parameters"
    if ratio < 5:
        return (
            f"{amount} are {ratio:.2g} per parameter: about 20 are best for a given amount of "
            "computation (Hoffmann et al. 2022). A smaller model would reach a lower loss"
        )
    return (
        f"{amount} are {ratio:,.0f} per parameter: LLaMA 3 used about 1,900 (Dubey et al. 2024), "
        "and more gains little"
    )


def _warmup(config: Config) -> str:
    steps = config.train.steps
    warmup = config.schedule(steps=steps).warmup
    if not warmup:
        return (
            "no warm-up: in the first steps Adam's second moment averages over a few gradients only "
            "(Liu et al. 2020)"
        )
    if not steps:
        return ""
    share = warmup / steps
    if share > 0.1 and warmup > 100:
        return (
            f"the warm-up takes {share:.0%} of the run: published ones take 0.1 to 1 % (GPT-3 "
            "0.125 % of its tokens, GLM-130B 0.5 %)"
        )
    if share < 0.001 and warmup < 100:
        return (
            f"the warm-up takes {warmup} steps, {share:.2%} of the run: published ones take 0.1 to "
            "1 %, LLaMA's 2000 steps"
        )
    return ""


def _last_rate(config: Config) -> str:
    optim = config.optim
    if optim.schedule == "cosine" and optim.min_lr_share > 0.3:
        return (
            f"optim.min_lr_share = {optim.min_lr_share:g}: the cosine ends high. GPT-3, LLaMA and "
            "BLOOM end at 0.1 of the peak"
        )
    return ""


def _format_count(count: float) -> str:
    """Return a number as 1.3 G, 350 M or 12 K."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"
