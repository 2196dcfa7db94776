"""transformers' models as references for ours, and any of them as the model of a run. Needs the
`hf` extra.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from guardrail.core.errors import ConfigError
from guardrail.torch.measure.gradient_norms import embedding_parameters
from tests.support.running import (
    BLIND,
    assert_same,
    of_kind,
    table,
    tiny,
    told,
    trained,
    write_corpus,
)
from trainer.config.config import ModelSection
from trainer.model import Decoder, EncoderDecoder
from trainer.model.attention import Attention
from trainer.model.hugging_face import HuggingFace
from trainer.model.positions import Alibi
from trainer.optim.parameter_groups import hidden_matrices

transformers = pytest.importorskip("transformers")

V, T = 37, 12


def ours(**changes: object) -> Any:
    """A model of ours with large random weights."""
    section = ModelSection(
        **{"layers": 2, "width": 32, "heads": 4, "hidden": 48, "tied": False, **changes}
    )
    section.check(base=Path())
    kind = EncoderDecoder if section.kind == "encoder-decoder" else Decoder
    model = kind(section, vocabulary=V, sequence_length=T, seed=7)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.25 if parameter.ndim > 1 else 1 + 0.3 * noise)
    return model


def tokens(seed: int = 1) -> Tensor:
    return torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(seed))


def give(target: Any, weight: Tensor, bias: Tensor | None = None) -> None:
    """Copy weights of ours into a module (or parameter) of theirs."""
    with torch.no_grad():
        (target.weight if isinstance(target, nn.Module) else target).copy_(weight)
        if bias is not None:
            target.bias.copy_(bias)


def halves(rows: Tensor, head_width: int) -> Tensor:
    """Rows of queries or keys for a RoPE that pairs i with i + K/2 where ours pairs 2i with 2i +
    1.
    """
    return rows.unflatten(0, (-1, head_width // 2, 2)).transpose(1, 2).flatten(0, 2)


def give_llama(model: Decoder, theirs: Any, *, split_pairs: bool = True) -> None:
    """Weights of a rotary, gated decoder into transformers' modules of LLaMA's names."""
    section = model.section
    turn = (lambda w: halves(w, section.head_width)) if split_pairs else (lambda w: w)
    give(theirs.model.embed_tokens, model.embedding.weight)
    give(theirs.model.norm, model.norm.weight)
    if model.head is not None:
        give(theirs.lm_head, model.head.weight)
    for block, layer in zip(model.blocks, theirs.model.layers, strict=True):
        give(layer.self_attn.q_proj, turn(block.attention.q.weight))
        give(layer.self_attn.k_proj, turn(block.attention.k.weight))
        give(layer.self_attn.v_proj, block.attention.v.weight)
        give(layer.self_attn.o_proj, block.attention.out.weight)
        give(layer.mlp.gate_proj, block.feed_forward.gate.weight)
        give(layer.mlp.up_proj, block.feed_forward.up.weight)
        give(layer.mlp.down_proj, block.feed_forward.down.weight)
        give(layer.input_layernorm, block.attention_norm.weight)
        if block.feed_forward_norm is not None:
            give(layer.post_attention_layernorm, block.feed_forward_norm.weight)
        if block.attention.query_norm is not None:
            # One weight for each pair, so that norms before the turn do not care which numbers are
            # a pair.
            give(
                layer.self_attn.q_norm,
                halves(block.attention.query_norm.weight[:, None], section.head_width)[:, 0],
            )
            give(
                layer.self_attn.k_norm,
                halves(block.attention.key_norm.weight[:, None], section.head_width)[:, 0],
            )


SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": T,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def test_the_llama_like_decoder_is_llama() -> None:
    """RMSNorm before the blocks, RoPE, grouped queries, SwiGLU."""
    model = ours(kv_heads=2)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, rms_norm_eps=1e-5)
    ).eval()
    give_llama(model, theirs)
    torch.testing.assert_close(model(tokens()), theirs(tokens()).logits, rtol=1e-4, atol=1e-4)


def test_qk_norm_is_qwen3s() -> None:
    model = ours(kv_heads=2, qk_norm=True)
    theirs = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**SIZES, head_dim=8, rms_norm_eps=1e-5)
    ).eval()
    give_llama(model, theirs)
    torch.testing.assert_close(model(tokens()), theirs(tokens()).logits, rtol=1e-4, atol=1e-4)


def test_parallel_blocks_are_coheres() -> None:
    """PaLM's block: one LayerNorm without bias, attention and SwiGLU side by side; RoPE that turns
    neighbours.
    """
    model = ours(kv_heads=2, norm="layer", parallel=True, tied=True)
    sizes = {**SIZES, "tie_word_embeddings": True}
    config = transformers.CohereConfig(
        **sizes, layer_norm_eps=1e-5, logit_scale=1.0, use_qk_norm=False
    )
    theirs = transformers.CohereForCausalLM(config).eval()
    give_llama(model, theirs, split_pairs=False)
    torch.testing.assert_close(model(tokens()), theirs(tokens()).logits, rtol=1e-4, atol=1e-4)


def test_the_gpt_like_decoder_is_gpt2() -> None:
    """LayerNorm with bias, learned positions, GELU, tied embeddings."""
    model = ours(norm="layer", bias=True, positions="learned", activation="gelu", tied=True)
    config = transformers.GPT2Config(
        vocab_size=V,
        n_positions=T,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=48,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    give(theirs.transformer.wte, model.embedding.weight)
    give(theirs.transformer.wpe, model.absolute.weight)
    give(theirs.transformer.ln_f, model.norm.weight, model.norm.bias)
    for block, layer in zip(model.blocks, theirs.transformer.h, strict=True):
        give(layer.ln_1, block.attention_norm.weight, block.attention_norm.bias)
        projections = (block.attention.q, block.attention.k, block.attention.v)
        give(
            layer.attn.c_attn,
            torch.cat([p.weight for p in projections]).T,
            torch.cat([p.bias for p in projections]),
        )
        give(layer.attn.c_proj, block.attention.out.weight.T, block.attention.out.bias)
        give(layer.ln_2, block.feed_forward_norm.weight, block.feed_forward_norm.bias)
        give(layer.mlp.c_fc, block.feed_forward.up.weight.T, block.feed_forward.up.bias)
        give(layer.mlp.c_proj, block.feed_forward.down.weight.T, block.feed_forward.down.bias)
    torch.testing.assert_close(model(tokens()), theirs(tokens()).logits, rtol=1e-4, atol=1e-4)


def test_the_t5_like_model_is_t5() -> None:
    """Encoder and decoder, relative bias, cross-attention, RMSNorm, ReLU. T5 does not scale its
    scores, and scales its logits or not by the version: what the last norm gives is compared."""
    model = ours(
        kind="encoder-decoder",
        positions="t5",
        activation="relu",
        norm_eps=1e-6,
        t5_buckets=8,
        t5_distance=16,
    )
    config = transformers.T5Config(
        vocab_size=V,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="relu",
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
    )
    theirs = transformers.T5Model(config).eval()
    give(theirs.shared, model.embedding.weight)
    for stack in (theirs.encoder, theirs.decoder):
        give(stack.embed_tokens, model.embedding.weight)
    stacks = [
        (theirs.encoder, model.blocks[:2], model.encoder_bias, model.encoder_norm),
        (theirs.decoder, model.blocks[2:], model.bias, model.norm),
    ]
    for stack, blocks, bias, norm in stacks:
        give(stack.final_layer_norm, norm.weight)
        give(stack.block[0].layer[0].SelfAttention.relative_attention_bias, bias.weight)
        for block, layer in zip(blocks, stack.block, strict=True):
            give_t5_attention(layer.layer[0].SelfAttention, block.attention)
            give(layer.layer[0].layer_norm, block.attention_norm.weight)
            if block.cross is not None:
                give_t5_attention(layer.layer[1].EncDecAttention, block.cross)
                give(layer.layer[1].layer_norm, block.cross_norm.weight)
            give(layer.layer[-1].DenseReluDense.wi, block.feed_forward.up.weight)
            give(layer.layer[-1].DenseReluDense.wo, block.feed_forward.down.weight)
            give(layer.layer[-1].layer_norm, block.feed_forward_norm.weight)
    found: list[Tensor] = []
    model.norm.register_forward_hook(lambda *call: found.append(call[2]))
    model(tokens(), source_BS=tokens(2))
    expected = theirs(input_ids=tokens(2), decoder_input_ids=tokens()).last_hidden_state
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)


def give_t5_attention(theirs: Any, ours: Attention) -> None:
    give(theirs.q, ours.q.weight / 8**0.5)
    give(theirs.k, ours.k.weight)
    give(theirs.v, ours.v.weight)
    give(theirs.o, ours.out.weight)


@pytest.mark.parametrize("heads", [4, 6, 16])
def test_alibi_is_blooms_up_to_what_a_softmax_does_not_see(heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = (
        build_alibi_tensor(torch.ones(1, T), heads, torch.float32)
        .view(heads, 1, T)
        .expand(heads, T, T)
    )
    alibi = Alibi(heads=heads)
    alibi.reset_parameters()
    scores = torch.randn(heads, T, T, generator=torch.Generator().manual_seed(0))
    later = torch.ones(T, T).triu(1).bool()
    expected = (scores + theirs).masked_fill(later, -torch.inf).softmax(-1)
    torch.testing.assert_close(
        (scores + alibi(T)).masked_fill(later, -torch.inf).softmax(-1), expected
    )


# -- theirs as the model of a run


def small(folder: Path, kind: str = "llama") -> Path:
    """A folder with config.json of a tiny model."""
    configs = {
        "llama": lambda: transformers.LlamaConfig(
            **{**SIZES, "vocab_size": 259, "max_position_embeddings": 64}
        ),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=4
        ),
    }
    configs[kind]().save_pretrained(folder / kind)
    return folder / kind


@pytest.mark.parametrize(
    ("kind", "world", "strategy"),
    [
        ("gpt2", 1, "ddp"),
        ("llama", 2, "ddp"),
        pytest.param("gpt2", 2, "fsdp", marks=pytest.mark.ci_slow),
    ],
)
def test_a_run_rolls_back_exactly(kind: str, world: int, strategy: str, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", bad=range(8, 10))
    config = tiny(
        tmp_path,
        world=world,
        strategy=strategy,
        model={"hf": str(small(tmp_path, kind))},
        train={"steps": 40},
        guard={"loss_score": 5.0, **BLIND},
    )
    a = trained(config)
    assert of_kind(a, "rollback")
    assert_same(a, trained(told(config, a)))
    assert table(a, ("embed_grad_norm",)).min() > 0  # found without being told


def test_a_config_file_is_enough_and_a_folder_gives_its_weights(tmp_path: Path) -> None:
    folder = small(tmp_path)
    section = ModelSection(hf=str(folder / "config.json"))
    section.check(base=Path())
    torch.manual_seed(0)
    model = HuggingFace(section, vocabulary=270, sequence_length=32)
    assert model(torch.zeros(1, 5, dtype=torch.int64)).shape == (1, 5, 270)  # the embedding grew
    model.lm.save_pretrained(folder)
    for hf in (folder, folder / "config.json"):
        again = HuggingFace(
            ModelSection(hf=str(hf), pretrained=True), vocabulary=259, sequence_length=32
        )
        for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b), name
    assert [p.shape for p in embedding_parameters(model)] == [(270, 32)]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_blocks_are_found_recomputed_and_given_to_muon(kind: str, tmp_path: Path) -> None:
    model = HuggingFace(
        ModelSection(hf=str(small(tmp_path, kind))), vocabulary=259, sequence_length=32
    )
    assert len(model.blocks) == 2
    inner = {id(p) for block in model.blocks for p in block.parameters() if p.ndim == 2}
    assert {id(p) for p in hidden_matrices(model)} == inner
    ids = torch.randint(0, 259, (2, 16), generator=torch.Generator().manual_seed(0))
    gradients = []
    for recompute in (False, True):
        model.set_recompute(recompute)
        model.zero_grad()
        torch.manual_seed(0)
        model(ids).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    def refused(key: str, word: str, **parts: Any) -> None:
        options = {"vocabulary": 259, "sequence_length": 32, **parts}
        with pytest.raises(ConfigError, match=word) as caught:
            HuggingFace(ModelSection(hf=str(tmp_path / "llama"), pretrained=pretrained), **options)
        assert caught.value.key == key

    folder, pretrained = small(tmp_path), True
    refused("model.hf", "5000 ids", vocabulary=5000)
    refused("data.sequence_length", "at most 64", sequence_length=65)
    refused("model.hf", "a causal language model")  # no weights
    (folder / "config.json").write_text("{}")
    refused("model.hf", "a causal language model")
    with pytest.raises(ConfigError) as caught:
        ModelSection(hf=str(tmp_path / "nothing")).check(base=Path())
    assert caught.value.key == "model.hf" and "config.json" in caught.value.expected
