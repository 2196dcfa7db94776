"""The decoder against a straightforward one written out head by head, and its promises about seeds
and memory.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.random_weights import draw_weights
from trainer.config.config import ModelSection
from trainer.config.sizes import hidden_width, parameter_count, state_bytes
from trainer.model import Decoder, Rotary
from trainer.objectives.loss import loss_sum

V, T = 37, 11


def section(**changes: object) -> ModelSection:
    return ModelSection(**{"layers": 2, "width": 24, "heads": 3, **changes})


def decoder(**changes: object) -> Decoder:
    return Decoder(section(**changes), vocabulary=V, sequence_length=T, seed=7)


def tokens(batch: int = 2, length: int = T) -> Tensor:
    return torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(1))


def reference_norm(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    assert norm.eps is not None
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + norm.eps) * norm.weight


def reference_turn(x: Tensor, base: float) -> Tensor:
    """RoPE of one head [T, K] as the rotation matrices of the paper, position by position."""
    length, width = x.shape
    rows = []
    for t in range(length):
        matrix = torch.zeros(width, width, dtype=x.dtype)
        for i in range(width // 2):
            angle = t * base ** (-2 * i / width)
            c, s = math.cos(angle), math.sin(angle)
            matrix[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = torch.tensor(
                [[c, -s], [s, c]], dtype=x.dtype
            )
        rows.append(matrix @ x[t])
    return torch.stack(rows)


def reference(model: Decoder, ids: Tensor) -> Tensor:
    """Logits [T, V] of one sample [T], one head after the other, no fused anything."""
    width = model.section.width
    head_width = width // model.section.heads
    x = model.embedding.weight[ids]
    for block in model.blocks:
        normed = reference_norm(x, block.attention_norm)
        query, key, value = (
            project.weight for project in (block.attention.q, block.attention.k, block.attention.v)
        )
        heads = []
        for h in range(model.section.heads):
            rows = slice(h * head_width, (h + 1) * head_width)
            q = reference_turn(normed @ query[rows].T, model.section.rope_base)
            k = reference_turn(normed @ key[rows].T, model.section.rope_base)
            scores = q @ k.T / math.sqrt(head_width)
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ (normed @ value[rows].T))
        x = x + torch.cat(heads, -1) @ block.attention.out.weight.T
        normed = reference_norm(x, block.feed_forward_norm)
        gate, up = block.feed_forward.gate.weight, block.feed_forward.up.weight
        gated = normed @ gate.T
        x = x + (gated / (1 + (-gated).exp()) * (normed @ up.T)) @ block.feed_forward.down.weight.T
    output = model.embedding.weight if model.head is None else model.head.weight
    return reference_norm(x, model.norm) @ output.T


@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_gradients_match_the_model_written_out(tied: bool) -> None:
    model = draw_weights(decoder(tied=tied)).double()
    ids = tokens()
    logits = model(ids)
    expected = torch.stack([reference(model, sample) for sample in ids])
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    weights = torch.randn(
        logits.shape, generator=torch.Generator().manual_seed(5), dtype=logits.dtype
    )
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours = torch.autograd.grad((logits * weights).sum(), parameters)
    theirs = torch.autograd.grad((expected * weights).sum(), parameters)
    for name, a, b in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_rotary_matches_the_rotation_matrices_and_sees_only_distances() -> None:
    rotary = Rotary(head_width=8, sequence_length=T, base=100.0)
    rotary.reset_parameters()
    x = torch.randn(1, T, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = rotary(x)
    for h in range(2):
        torch.testing.assert_close(
            turned[0, :, h], reference_turn(x[0, :, h], 100.0), rtol=1e-6, atol=1e-6
        )
    same = x[:, :1].expand(1, T, 2, 8)  # one vector at every position
    products = torch.einsum("thk,shk->hts", rotary(same)[0], rotary(same)[0])
    for distance in range(T):
        diagonal = products.diagonal(distance, 1, 2)
        torch.testing.assert_close(
            diagonal, diagonal[:, :1].expand_as(diagonal), rtol=1e-6, atol=1e-6
        )


def test_rotary_keeps_the_dtype_and_turns_bf16_in_fp32() -> None:
    rotary = Rotary(head_width=8, sequence_length=1024, base=10000.0)
    rotary.reset_parameters()
    x = torch.randn(1, 1024, 1, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    turned = rotary(x)
    assert turned.dtype == torch.bfloat16
    # One rounding at the end, not one of the angle: bitwise the rounded fp32 result.
    assert torch.equal(turned, rotary(x.float()).bfloat16())


def test_no_token_sees_a_later_one() -> None:
    model = draw_weights(decoder())
    ids = tokens()
    before = model(ids)
    ids[:, 6] = (ids[:, 6] + 1) % V
    after = model(ids)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.equal(before[:, 6], after[:, 6])


def test_a_shorter_sample_gives_the_same_logits_as_the_beginning_of_a_long_one() -> None:
    model = draw_weights(decoder())
    torch.testing.assert_close(model(tokens()[:, :5]), model(tokens())[:, :5], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("hidden", [0, 48])
@pytest.mark.parametrize("width", [24, 36])
def test_sizes_without_torch_are_those_of_the_model(tied: bool, hidden: int, width: int) -> None:
    model = decoder(tied=tied, hidden=hidden, width=width)
    count = sum(p.numel() for p in model.parameters())
    assert parameter_count(model.section, V) == count
    optimizer = torch.optim.AdamW(model.parameters())
    loss_sum(model(tokens()), tokens())[0].backward()
    optimizer.step()
    moments = sum(
        s[key].nbytes for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")
    )
    assert state_bytes(model.section, V) == moments + sum(p.nbytes for p in model.parameters())
    assert state_bytes(model.section, V, shards=2) * 2 >= state_bytes(model.section, V)


def test_hidden_width_is_eight_thirds_rounded_up_to_32() -> None:
    assert [hidden_width(section(width=w)) for w in (24, 96, 768)] == [64, 256, 2048]
    assert hidden_width(section(width=100)) == 288
    assert hidden_width(section(hidden=5)) == 5


def test_initial_weights_have_gpt2_statistics() -> None:
    model = Decoder(
        section(width=120, layers=8, init_std=0.05, tied=False),
        vocabulary=500,
        sequence_length=T,
        seed=0,
    )
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            assert torch.equal(weight, torch.ones_like(weight)), name
        else:
            residual = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
            expected = 0.05 / 4 if residual else 0.05
            assert weight.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(weight.mean().item()) < expected * 0.05, name


def test_initial_weights_are_a_function_of_the_seed_and_move_no_dice() -> None:
    state = torch.get_rng_state()
    first = decoder()
    torch.rand(3)
    second = decoder()
    other = Decoder(section(), vocabulary=V, sequence_length=T, seed=8)
    for (name, a), b, c in zip(
        first.named_parameters(), second.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert a.ndim == 1 or not torch.equal(a, c), name
    torch.set_rng_state(state)
    decoder()
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_seed_the_global_one_decides() -> None:
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(Decoder(section(), vocabulary=V, sequence_length=T))
    weights = [model.embedding.weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_model_from_the_meta_device_is_the_same_model() -> None:
    with torch.device("meta"):
        model = decoder(tied=False)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    model.reset_parameters(7)
    built = decoder(tied=False)
    for (name, a), b in zip(model.named_parameters(), built.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(model(tokens()), built(tokens()))


def test_tied_embeddings_are_one_parameter_with_both_gradients() -> None:
    model = draw_weights(decoder(tied=True))
    assert model.head is None
    loss_sum(model(tokens()), tokens())[0].backward()
    gradient = model.embedding.weight.grad
    assert gradient is not None
    unseen = torch.tensor(sorted(set(range(V)) - set(tokens().flatten().tolist())))
    # only the output side reaches those rows
    assert len(unseen) and (gradient[unseen].norm(dim=-1) > 0).all()


def test_dropout_is_a_function_of_the_seed_and_silent_in_evaluation() -> None:
    model = draw_weights(decoder(dropout=0.3))
    outputs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        outputs.append(model(tokens()))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    model.eval()
    without = draw_weights(decoder(dropout=0.0))
    torch.testing.assert_close(model(tokens()), without(tokens()))


def test_dropout_acts_on_embedding_attention_and_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    drop, attend = F.dropout, F.scaled_dot_product_attention

    def counted_drop(x: Tensor, p: float, training: bool) -> Tensor:
        calls.append("drop")
        assert p == 0.3 and training
        return drop(x, p, training)

    def counted_attend(*args: Tensor, dropout_p: float, is_causal: bool) -> Tensor:
        calls.append("attend")
        assert dropout_p == 0.3
        return attend(*args, dropout_p=dropout_p, is_causal=is_causal)

    monkeypatch.setattr(F, "dropout", counted_drop)
    monkeypatch.setattr(F, "scaled_dot_product_attention", counted_attend)
    decoder(dropout=0.3)(tokens())
    assert calls == ["drop"] + ["attend", "drop", "drop"] * 2


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("tied", [True, False])
def test_recomputed_activations_give_the_same_gradients_bit_for_bit(
    dropout: float, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    passes = 0
    model = draw_weights(decoder(dropout=dropout, tied=tied))
    normal_forward = type(model.blocks[0])._forward

    def counted(*args: object) -> Tensor:
        nonlocal passes
        passes += 1
        return normal_forward(*args)

    monkeypatch.setattr(type(model.blocks[0]), "_forward", counted)
    for recompute in (False, True):
        passes = 0
        model.set_recompute(recompute)
        torch.manual_seed(11)
        model.zero_grad()
        loss, _ = loss_sum(model(tokens()), tokens())
        loss.backward()
        runs.append((loss, [p.grad for p in model.parameters()], torch.get_rng_state()))
        assert passes == (4 if recompute else 2)
    assert torch.equal(runs[0][0], runs[1][0])
    for a, b in zip(runs[0][1], runs[1][1], strict=True):
        assert a is not None and b is not None and torch.equal(a, b)
    assert torch.equal(runs[0][2], runs[1][2])


def test_evaluation_recomputes_nothing() -> None:
    model = decoder()
    model.set_recompute(True)
    with torch.no_grad():
        assert not model(tokens()).requires_grad


def test_bf16_autocast_is_close_to_fp32() -> None:
    model = decoder()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens())
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(tokens()), rtol=0.05, atol=0.01)


def test_it_learns_a_short_text_by_heart() -> None:
    model = decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = tokens(1, T)
    losses = []
    for _ in range(60):
        total, count = loss_sum(model(ids[:, :-1]), ids[:, 1:])
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((total / count).item())
    assert losses[0] == pytest.approx(math.log(V), rel=0.05)
    assert losses[-1] < 0.05
