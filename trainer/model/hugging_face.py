"""Any causal language model of Hugging Face's transformers, from a folder or its config.json;
nothing is fetched.
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

    From scratch its weights are drawn from torch's global generator, and its embedding is as high
    as the vocabulary needs. Pretrained, the ids of [data] tokenizer must be those that it was
    trained with: give its tokenizer.json.

    Args:
        section: `hf` names a folder with config.json (and weights, for `pretrained`) or a
        config.json.
        vocabulary: number of token ids that it must know.
        sequence_length: most tokens of a sample.

    Raises:
        ConfigError: transformers is missing, or the model does not fit the data.
    """

    def __init__(self, section: ModelSection, *, vocabulary: int, sequence_length: int) -> None:
        super().__init__()
        self.section = section
        self.recompute = False
        self.lm = _built(section, vocabulary, sequence_length)

    @property
    def blocks(self) -> nn.ModuleList:
        """Its repeated blocks: the list of modules with most of the parameters."""
        lists = [
            module
            for module in self.lm.modules()
            if isinstance(module, nn.ModuleList) and len(module)
        ]
        if not lists:
            return nn.ModuleList()
        return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))

    @property
    def root_weight(self) -> Tensor:
        """A weight outside of the blocks that takes part in every forward pass."""
        return cast(Tensor, self.lm.get_input_embeddings().weight)

    def set_recompute(self, recompute: bool) -> None:
        """Activation checkpointing by the model's own means."""
        if recompute != self.recompute:
            # transformers 5 has renamed it, and warns about the old name.
            what = (
                "activation" if hasattr(self.lm, "activation_checkpointing_enable") else "gradient"
            )
            if recompute:
                getattr(self.lm, f"{what}_checkpointing_enable")({"use_reentrant": False})
            else:
                getattr(self.lm, f"{what}_checkpointing_disable")()
            self.recompute = recompute

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits [B, T, V] of the token that follows each of `tokens_BT`."""
        return cast(Tensor, self.lm(input_ids=tokens_BT, use_cache=False).logits)


def _built(section: ModelSection, vocabulary: int, sequence_length: int) -> Any:
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
        _check(config, section, vocabulary, sequence_length)
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


def _check(config: Any, section: ModelSection, vocabulary: int, sequence_length: int) -> None:
    if vocabulary > config.vocab_size:
        raise ConfigError(
            f"a model that knows the {vocabulary} ids of the tokenizer; it knows {config.vocab_size}",
            key=_KEY,
            value=section.hf,
            hint="set data.tokenizer to the tokenizer.json of the model",
        )
    longest = getattr(config, "max_position_embeddings", None) or sequence_length
    if sequence_length > longest:
        raise ConfigError(
            f"at most {longest}, the positions of {section.hf}",
            key="data.sequence_length",
            value=sequence_length,
        )
