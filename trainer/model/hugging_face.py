"""Any causal language model of Hugging Face's transformers, from a folder or a config.json.

Nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from guardrail.core.errors import ConfigError
from trainer.config.recipe import ModelSection

_KEY = "model.hf"


class HuggingFace(nn.Module):
    """The interface of `trainer.model.Decoder` around an AutoModelForCausalLM.

    Without `pretrained` its weights are drawn from torch's global RNG, and its embedding has a row
    for each token id. With `pretrained`, data.tokenizer must be the tokenizer.json of the model.

    Args:
        section: `hf` names a folder with a config.json (and weights, for `pretrained`), or a
            config.json.
        vocabulary: number of token ids.
        sequence_length: largest number of tokens of a sample.

    Raises:
        ConfigError: transformers is missing, or the model does not fit the data.
    """

    def __init__(self, section: ModelSection, *, vocabulary: int, sequence_length: int) -> None:
        super().__init__()
        self.section = section
        self.recompute = False
        self.lm = _load_model(section, vocabulary, sequence_length)

    @property
    def blocks(self) -> nn.ModuleList:
        """Its repeated blocks: the list of modules with the most parameters."""
        lists = [module for module in self.lm.modules() if isinstance(module, nn.ModuleList)]
        return max(filter(len, lists), key=_parameter_count, default=nn.ModuleList())

    @property
    def root_weight(self) -> Tensor:
        """A weight outside the blocks that every forward pass uses."""
        return cast(Tensor, self.lm.get_input_embeddings().weight)

    def set_recompute(self, recompute: bool) -> None:
        """Switch the model's own activation checkpointing on or off."""
        if recompute == self.recompute:
            return
        # transformers 5 has renamed it, and warns of the old name.
        prefix = "gradient"
        if hasattr(self.lm, "activation_checkpointing_enable"):
            prefix = "activation"
        if recompute:
            getattr(self.lm, f"{prefix}_checkpointing_enable")({"use_reentrant": False})
        else:
            getattr(self.lm, f"{prefix}_checkpointing_disable")()
        self.recompute = recompute

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return logits [B, T, V] of the token after each of `tokens_BT`."""
        return cast(Tensor, self.lm(input_ids=tokens_BT, use_cache=False).logits)


def _parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _load_model(section: ModelSection, vocabulary: int, sequence_length: int) -> Any:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ConfigError(
            'transformers to be installed: pip install "guardrail[hf]"',
            key=_KEY,
            value=section.hf,
            hint=str(error),
        ) from error
    path = Path(section.hf)
    if section.pretrained and path.is_file():
        path = path.parent
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        if not section.pretrained and vocabulary > config.vocab_size:
            config.vocab_size = vocabulary
        _check_sizes(config, section, vocabulary, sequence_length)
        if not section.pretrained:
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        return AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=torch.float32, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        expected = "a folder or config.json of a causal language model"
        raise ConfigError(
            expected, key=_KEY, value=section.hf, hint=str(error).splitlines()[0]
        ) from error


def _check_sizes(config: Any, section: ModelSection, vocabulary: int, sequence_length: int) -> None:
    if vocabulary > config.vocab_size:
        raise ConfigError(
            f"a model with the {vocabulary} ids of the tokenizer; it has {config.vocab_size}",
            key=_KEY,
            value=section.hf,
            hint="set data.tokenizer to the tokenizer.json of the model",
        )
    longest = getattr(config, "max_position_embeddings", None) or sequence_length
    if sequence_length > longest:
        raise ConfigError(
            f"at most {longest}, the number of positions of {section.hf}",
            key="data.sequence_length",
            value=sequence_length,
        )
