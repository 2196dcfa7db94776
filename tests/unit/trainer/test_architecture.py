"""Every choice of [model] against torch's own layers, and the formulas written out where torch has
none.
"""

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guardrail.core.errors import ConfigError
from tests.support.random_weights import draw_weights
from trainer.config.config import ModelSection
from trainer.config.sizes import parameter_count
from trainer.model import Decoder, EncoderDecoder
from trainer.model.attention import Attention, AttentionMask
from trainer.model.block import Block
from trainer.model.positions import Alibi, RelativeBias, SinusoidalPositions

V, T = 37, 12
CHOICES: dict[str, dict[str, object]] = {
    "post-ln": {"norm": "layer", "norm_place": "post", "bias": True},
    "sandwich": {"norm_place": "sandwich"},
    "layer without bias": {"norm": "layer"},
    "embedding norm": {"embedding_norm": True, "norm": "layer", "bias": True},
    "relu": {"activation": "relu"},
    "gelu with bias": {"activation": "gelu", "bias": True},
    "geglu": {"activation": "geglu"},
    "learned": {"positions": "learned"},
    "sinusoidal": {"positions": "sinusoidal"},
    "alibi": {"positions": "alibi", "heads": 6},
    "t5": {"positions": "t5"},
    "no positions": {"positions": "none"},
    "qk norm": {"qk_norm": True},
    "grouped": {"kv_heads": 1},
    "parallel": {"parallel": True},
    "prefix": {"kind": "prefix", "blank_positions": True},
    "encoder-decoder": {"kind": "encoder-decoder", "encoder_layers": 1, "positions": "t5"},
    "encoder-decoder, sandwich, grouped": {
        "kind": "encoder-decoder",
        "norm_place": "sandwich",
        "kv_heads": 1,
    },
    "encoder-decoder, post, learned": {
        "kind": "encoder-decoder",
        "norm_place": "post",
        "norm": "layer",
        "bias": True,
        "positions": "learned",
    },
}


def section(**changes: object) -> ModelSection:
    made = ModelSection(**{"layers": 2, "width": 24, "heads": 3, **changes})
    made.check(base=Path())
    return made


def build(**changes: object) -> Decoder:
    made = section(**changes)
    kind = EncoderDecoder if made.kind == "encoder-decoder" else Decoder
    return draw_weights(kind(made, vocabulary=V, sequence_length=T, seed=7))


def tokens(seed: int = 1, length: int = T) -> Tensor:
    return torch.randint(0, V, (2, length), generator=torch.Generator().manual_seed(seed))


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("changes", CHOICES.values(), ids=CHOICES)
def test_every_choice_has_its_size_looks_at_no_later_token_and_uses_all_of_its_weights(
    changes: dict[str, object],
) -> None:
    model = build(**changes)
    assert parameter_count(model.section, V, sequence_length=T) == sum(
        p.numel() for p in model.parameters()
    )
    ids = tokens()
    source = {"source_BS": tokens(2)} if isinstance(model, EncoderDecoder) else {}
    before = model(ids, **source)
    before.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if not name.startswith(("embedding.", "blank_positions.", "bias.", "encoder_bias.")):
            assert bool((parameter.grad != 0).any()), name
    ids[:, 6] = (ids[:, 6] + 1) % V
    after = model(ids, **source)
    # Masked scores take part as zeros, but kernels may sum rows of another length in another order.
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=1e-5, atol=1e-5)
    assert (before[:, 6] - after[:, 6]).abs().max() > 1e-3


@pytest.mark.parametrize("changes", CHOICES.values(), ids=CHOICES)
def test_every_choice_starts_near_the_uniform_distribution_and_recomputes_to_the_same_bits(
    changes: dict[str, object],
) -> None:
    made = section(**{"dropout": 0.1, **changes})
    kind = EncoderDecoder if made.kind == "encoder-decoder" else Decoder
    model = kind(made, vocabulary=V, sequence_length=T, seed=7)
    results = []
    for recompute in (False, True):
        model.set_recompute(recompute)
        model.zero_grad()
        torch.manual_seed(0)
        loss = F.cross_entropy(model(tokens()).flatten(0, 1), tokens(5).flatten())
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    # Post-norm leaves rows of unit size in front of a small output matrix; all others are as close.
    assert results[0][0].item() == pytest.approx(math.log(V), rel=0.1)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("place", "activation"), itertools.product(["pre", "post"], ["relu", "gelu"])
)
def test_a_block_is_torchs_encoder_layer(place: str, activation: str) -> None:
    made = section(
        norm="layer",
        norm_place=place,
        bias=True,
        activation=activation,
        positions="none",
        hidden=40,
    )
    block = draw_weights(Block(made))
    theirs = nn.TransformerEncoderLayer(
        24, 3, 40, dropout=0.0, activation=activation, batch_first=True, norm_first=place == "pre"
    )
    copy_in(block.attention, theirs.self_attn)
    copy(block.attention.out, theirs.self_attn.out_proj)
    copy(block.feed_forward.up, theirs.linear1)
    copy(block.feed_forward.down, theirs.linear2)
    copy(block.attention_norm, theirs.norm1)
    copy(block.feed_forward_norm, theirs.norm2)
    x = rows(2, T, 24)
    mask = nn.Transformer.generate_square_subsequent_mask(T)
    torch.testing.assert_close(
        block(x, AttentionMask()), theirs(x, src_mask=mask), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        block(x, AttentionMask(causal=False)), theirs(x), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("place", ["pre", "post"])
def test_a_block_with_cross_attention_is_torchs_decoder_layer(place: str) -> None:
    made = section(
        norm="layer", norm_place=place, bias=True, activation="relu", positions="none", hidden=40
    )
    block = draw_weights(Block(made, cross=True))
    theirs = nn.TransformerDecoderLayer(
        24, 3, 40, dropout=0.0, batch_first=True, norm_first=place == "pre"
    )
    assert block.cross is not None
    copy_in(block.attention, theirs.self_attn)
    copy(block.attention.out, theirs.self_attn.out_proj)
    copy_in(block.cross, theirs.multihead_attn)
    copy(block.cross.out, theirs.multihead_attn.out_proj)
    copy(block.feed_forward.up, theirs.linear1)
    copy(block.feed_forward.down, theirs.linear2)
    for mine, other in zip(
        (block.attention_norm, block.cross_norm, block.feed_forward_norm),
        (theirs.norm1, theirs.norm2, theirs.norm3),
        strict=True,
    ):
        copy(mine, other)
    x, memory = rows(2, T, 24), rows(2, 7, 24, seed=1)
    mask = nn.Transformer.generate_square_subsequent_mask(T)
    expected = theirs(x, memory, tgt_mask=mask)
    torch.testing.assert_close(
        block(x, AttentionMask(memory_BSD=memory)), expected, rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def copy(module: nn.Module, weight: object, bias: Tensor | None = None) -> None:
    """Give torch's layer the weights of ours."""
    if isinstance(weight, nn.Module):
        weight, bias = weight.weight, weight.bias
    assert isinstance(weight, Tensor)
    weight.copy_(module.weight)
    if bias is not None:
        bias.copy_(module.bias)


def copy_in(attention: Attention, theirs: nn.MultiheadAttention) -> None:
    """Give torch's fused input projection the weights of ours."""
    for index, project in enumerate((attention.q, attention.k, attention.v)):
        own = slice(24 * index, 24 * (index + 1))
        copy(project, theirs.in_proj_weight[own], theirs.in_proj_bias[own])


def test_sandwich_and_parallel_blocks_are_their_formulas() -> None:
    x = rows(2, T, 24)
    block = draw_weights(Block(section(norm_place="sandwich", positions="none")))
    y = x + block.attention_after(block.attention(block.attention_norm(x), AttentionMask()))
    y = y + block.feed_forward_after(block.feed_forward(block.feed_forward_norm(y)))
    assert torch.equal(block(x, AttentionMask()), y)
    block = draw_weights(Block(section(parallel=True, positions="none")))
    normed = block.attention_norm(x)
    assert torch.equal(
        block(x, AttentionMask()),
        x + block.attention(normed, AttentionMask()) + block.feed_forward(normed),
    )


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_queries_are_full_attention_with_repeated_keys_and_values(kv_heads: int) -> None:
    made = section(width=32, heads=4, kv_heads=kv_heads, positions="none")
    grouped, full = (
        draw_weights(Attention(made)),
        Attention(section(width=32, heads=4, positions="none")),
    )
    with torch.no_grad():
        full.q.weight.copy_(grouped.q.weight)
        for shared, own in ((grouped.k, full.k), (grouped.v, full.v)):
            rows_of_heads = shared.weight.unflatten(0, (kv_heads, 8)).repeat_interleave(
                4 // kv_heads, 0
            )
            own.weight.copy_(rows_of_heads.flatten(0, 1))
        full.out.weight.copy_(grouped.out.weight)
    x = rows(2, T, 32)
    torch.testing.assert_close(
        grouped(x, AttentionMask()), full(x, AttentionMask()), rtol=1e-5, atol=1e-5
    )


def test_qk_norm_bounds_the_scores() -> None:
    attention = Attention(section(qk_norm=True, positions="none"))
    for project in (attention.q, attention.k, attention.v):
        nn.init.normal_(project.weight, std=50.0)
    nn.init.normal_(attention.out.weight)
    attention.peaks_H = torch.zeros(3)
    attention(rows(2, T, 24), AttentionMask())
    assert attention.peaks_H.max() <= math.sqrt(8) * 1.001  # |q| = |k| = sqrt(K), over sqrt(K)


def test_peaks_are_the_largest_visible_scores() -> None:
    attention = draw_weights(Attention(section(kv_heads=1, positions="none")))
    attention.peaks_H = torch.zeros(3)
    x = rows(2, T, 24)
    attention(x, AttentionMask())
    q, k, _ = (y.detach() for y in attention._heads(x, AttentionMask()))
    for head in range(3):
        scores = [
            float(q[b, t, head] @ k[b, s, 0]) / math.sqrt(8)
            for b, t in itertools.product(range(2), range(T))
            for s in range(t + 1)
        ]
        assert attention.peaks_H[head].item() == pytest.approx(max(scores), rel=1e-5)
    before = attention.peaks_H.clone()
    attention.eval()(100 * x, AttentionMask())
    assert torch.equal(attention.peaks_H, before)


def test_alibi_slopes_are_the_published_ones() -> None:
    def slopes(heads: int) -> list[float]:
        alibi = Alibi(heads=heads)
        alibi.reset_parameters()
        return [float(s) for s in alibi.slopes_H]

    assert slopes(8) == [2.0**-n for n in range(1, 9)]
    assert slopes(16) == pytest.approx([2 ** (-n / 2) for n in range(1, 17)])
    # 12 heads: those of 8, and every second of 16.
    assert slopes(12) == pytest.approx(
        [2.0**-n for n in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    )
    alibi = Alibi(heads=2)
    alibi.reset_parameters()
    assert alibi(5)[1, 4].tolist() == pytest.approx([-(2.0**-8) * d for d in (4, 3, 2, 1, 0)])


def test_sinusoidal_table_is_the_formula() -> None:
    table = SinusoidalPositions(length=40, width=6)
    table.reset_parameters()
    for t, i in itertools.product((0, 1, 17, 39), range(3)):
        angle = t / 10000 ** (2 * i / 6)
        assert table(40)[t, 2 * i : 2 * i + 2].tolist() == pytest.approx(
            [math.sin(angle), math.cos(angle)], abs=1e-6
        )


def test_t5_buckets_are_exact_near_by_and_shared_far_away() -> None:
    causal = RelativeBias(heads=1, buckets=32, distance=128, both=False)
    distances = torch.arange(400)
    buckets = causal.bucket(-distances)
    assert buckets[:16].tolist() == list(range(16)) and buckets[128:].unique().tolist() == [31]
    assert (buckets.diff() >= 0).all() and (causal.bucket(distances) == 0).all()
    both = RelativeBias(heads=1, buckets=32, distance=128, both=True)
    assert both.bucket(distances[1:]).min() == 17 and both.bucket(-distances).max() == 15


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 16)])
def test_t5_buckets_are_the_published_formula(buckets: int, distance: int, both: bool) -> None:
    """Raffel et al. 2020, section 2.1: exact up to half of the buckets, logarithmic up to the
    distance, then one.
    """
    bias = RelativeBias(heads=1, buckets=buckets, distance=distance, both=both)
    here = buckets // 2 if both else buckets
    for offset in range(-3 * distance, 3 * distance + 1):
        away = abs(offset) if both else max(0, -offset)
        far = here // 2 + math.log(max(away, 1) / (here // 2)) / math.log(
            distance / (here // 2)
        ) * (here - here // 2)
        if away >= here // 2 and abs(far - round(far)) < 1e-6:
            continue  # on the edge of a bucket: rounding decides
        expected = away if away < here // 2 else min(int(far), here - 1)
        expected += here if both and offset > 0 else 0
        assert int(bias.bucket(torch.tensor(offset))) == expected, offset


def test_geglu_and_swiglu_are_their_formulas() -> None:
    """Shazeer 2020, equation 6: (act(x W) * x V) W2, with the exact GELU and SiLU."""
    x = rows(2, T, 24).double()
    for activation, function in (
        ("geglu", lambda y: y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))),
        ("swiglu", lambda y: y / (1 + torch.exp(-y))),
    ):
        block = (
            draw_weights(Block(section(activation=activation, positions="none")))
            .double()
            .feed_forward
        )
        gated = function(x @ block.gate.weight.T) * (x @ block.up.weight.T)
        torch.testing.assert_close(block(x), gated @ block.down.weight.T)


def test_the_norm_of_the_embedding_stands_before_the_first_block() -> None:
    """BLOOM (Le Scao et al. 2022, section 3.2.4): a LayerNorm right behind the embedding."""
    model = build(embedding_norm=True, norm="layer", bias=True, positions="none")
    x = F.embedding(tokens(), model.embedding.weight)
    assert model.embedding_norm is not None
    weight, bias = model.embedding_norm.weight, model.embedding_norm.bias
    centred = x - x.mean(-1, keepdim=True)
    expected = (
        centred / (x.var(-1, unbiased=False, keepdim=True) + model.section.norm_eps).sqrt() * weight
        + bias
    )
    torch.testing.assert_close(model.embed(tokens()), expected, rtol=1e-5, atol=1e-5)


def test_a_prefix_is_seen_in_both_directions_and_no_further() -> None:
    model = build(kind="prefix")
    prefix = torch.tensor([5, 0])
    ids = tokens()
    before = model(ids, prefix_B=prefix)
    torch.testing.assert_close(before[1], model(ids)[1], rtol=1e-5, atol=1e-5)  # no prefix: causal
    ids[:, 4] = (ids[:, 4] + 1) % V
    changed = (model(ids, prefix_B=prefix) - before).abs().amax(-1) > 1e-4
    assert changed[0].all()  # all see the last token of the prefix
    assert changed[1].tolist() == [t >= 4 for t in range(T)]
    ids = tokens()
    ids[:, 7] = (ids[:, 7] + 1) % V
    changed = (model(ids, prefix_B=prefix) - before).abs().amax(-1) > 1e-4
    assert changed[0].tolist() == [t >= 7 for t in range(T)]


@pytest.mark.parametrize("positions", ["rope", "learned", "sinusoidal"])
def test_given_positions_are_those_that_count(positions: str) -> None:
    model = build(positions=positions)
    ids = tokens(length=6)
    counted = torch.arange(6).expand(2, 6)
    torch.testing.assert_close(model(ids, positions_BT=counted), model(ids), rtol=1e-5, atol=1e-5)
    shifted = model(ids, positions_BT=counted + 3)
    if positions == "rope":  # sees distances only
        torch.testing.assert_close(shifted, model(ids), rtol=1e-4, atol=1e-4)
        shifted = model(ids, positions_BT=counted * 2)
    assert (shifted - model(ids)).abs().max() > 1e-3


def test_places_in_blanks_are_a_second_dimension() -> None:
    model = build(kind="prefix", blank_positions=True)
    blanks = torch.zeros(2, T, dtype=torch.int64)
    assert torch.equal(model(tokens(), blanks_BT=blanks), model(tokens()))
    blanks[:, 3] = 2
    changed = (model(tokens(), blanks_BT=blanks) - model(tokens())).abs().amax(-1) > 1e-4
    assert changed[0].tolist() == [t >= 3 for t in range(T)]


def test_the_encoder_sees_all_of_its_source() -> None:
    model = build(kind="encoder-decoder")
    assert isinstance(model, EncoderDecoder)
    source = tokens(2)
    before = model.encode(source)
    source[:, -1] = (source[:, -1] + 1) % V
    assert ((model.encode(source) - before).abs().amax(-1) > 1e-4).all()
    assert model.norm is not None and model.root_weight is model.norm.weight
    post = build(norm_place="post")
    assert post.norm is None and post.root_weight is post.embedding.weight


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"width": 25}, "model.width"),
        ({"width": 27}, "model.width"),  # an odd width of a head cannot be turned
        ({"kv_heads": 2}, "model.kv_heads"),
        ({"parallel": True, "norm_place": "post"}, "model.parallel"),
        ({"parallel": True, "kind": "encoder-decoder"}, "model.parallel"),
        ({"encoder_layers": 2}, "model.encoder_layers"),
        ({"blank_positions": True}, "model.blank_positions"),
        ({"pretrained": True}, "model.pretrained"),
    ],
)
def test_what_cannot_be_built_is_refused(changes: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        section(**changes)
    assert caught.value.key == key


def test_an_odd_head_is_no_trouble_without_turns() -> None:
    assert build(width=27, positions="alibi")(tokens()).shape == (2, T, V)
