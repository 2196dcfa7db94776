"""ZClip, StableAdamW's update clipping, QK-clip and z-loss against their formulas."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from guardrail.torch.measure.update_gate import Gate
from tests.support.ranks import run_ranks
from trainer.config.config import ModelSection, OptimSection
from trainer.config.schedule import Schedule
from trainer.model import Decoder, EncoderDecoder
from trainer.objectives.loss import IGNORED, loss_sum, z_penalty
from trainer.optim.registry import build_optimizers
from trainer.stabilisers.qk_clip import QKClip
from trainer.stabilisers.scheduler import Scheduler
from trainer.stabilisers.update_clipping import UpdateClipping
from trainer.stabilisers.zclip import ZClip

# -- ZClip


def warmed(clip: float = 0.0) -> ZClip:
    zclip = ZClip(z_limit=2.5, clip=clip)
    for index in range(ZClip.WARMUP):
        assert zclip(1.0 + 0.1 * (index % 2)) == (clip or math.inf)
    return zclip


def test_zclip_cuts_a_spike_to_its_formula_and_learns_what_is_left() -> None:
    zclip = warmed()
    norms = [1.0 + 0.1 * (index % 2) for index in range(25)]
    mean, deviation = statistics.fmean(norms), statistics.pstdev(norms)
    assert zclip(1.05) == math.inf  # within 2.5 sigmas: left alone
    mean, variance = 0.97 * mean + 0.03 * 1.05, 0.97 * deviation**2
    variance += 0.03 * (1.05 - mean) ** 2
    score = (9.0 - mean) / (variance**0.5 + 1e-6)
    limit = zclip(9.0)
    assert limit == pytest.approx(mean + 2.5**2 * variance**0.5 / score)
    assert mean < limit < mean + 2.5 * variance**0.5
    assert zclip.mean == pytest.approx(0.97 * mean + 0.03 * limit)


def test_zclip_stays_beneath_the_fixed_norm_and_learns_nothing_from_a_nan() -> None:
    zclip = warmed(clip=0.5)
    before = zclip.state_dict()
    assert zclip(math.nan) == zclip(math.inf) == 0.5
    assert zclip.state_dict() == before
    assert zclip(1.0) == 0.5
    assert ZClip(z_limit=2.5, clip=0.0)(math.nan) == math.inf


def test_the_gate_clips_to_what_zclip_says() -> None:
    from types import SimpleNamespace

    layer = nn.Linear(1, 1, bias=False)
    gate = Gate(
        [torch.optim.SGD(layer.parameters())],
        parameters=[layer.weight],
        embedding=[],
        clip=warmed(),
    )
    calm = SimpleNamespace(grad_norm=1.05, embed_grad_norm=0.0, scale=2.0)
    assert gate.factor(calm) == 2.0  # type: ignore[arg-type]
    wild = SimpleNamespace(grad_norm=40.0, embed_grad_norm=0.0, scale=2.0)
    assert gate.factor(wild) * 40.0 / 2.0 == pytest.approx(1.05, rel=0.02)  # type: ignore[arg-type]


def test_zclips_state_travels_with_the_schedulers() -> None:
    layer = nn.Linear(1, 1)
    schedule = Schedule.from_section(OptimSection(), steps=200)
    one, other = (
        Scheduler(build_optimizers(layer, OptimSection())[0], schedule, zclip=z)
        for z in (warmed(), ZClip(z_limit=2.5, clip=0))
    )
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.zclip is not None and one.zclip is not None
    assert [other.zclip(norm) for norm in (1.0, 7.0, 1.1)] == [
        one.zclip(norm) for norm in (1.0, 7.0, 1.1)
    ]


# -- StableAdamW


def gradient(step: int, shape: torch.Size) -> Tensor:
    """Falling for a while, then suddenly a hundred times as large: v lags behind g."""
    wild = torch.randn(shape, generator=torch.Generator().manual_seed(step))
    return wild if step >= 4 else wild.sign() * 0.01 / step


STABLE = OptimSection(lr=1e-2, beta1=0.8, beta2=0.99, eps=1e-6, weight_decay=0.3, stable=True)


@pytest.mark.parametrize("implementation", ["fused", "foreach", "loop"])
def test_update_clipping_is_stable_adamw(implementation: str) -> None:
    section = OptimSection(
        **{f: getattr(STABLE, f) for f in STABLE.__struct_fields__}
        | {"implementation": implementation}
    )
    layer, plain = nn.Linear(5, 3, bias=False), nn.Linear(5, 3, bias=False)
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
    optimizer, untouched = build_optimizers(layer, section)[0], build_optimizers(plain, section)[0]
    UpdateClipping(optimizer)
    w = layer.weight.detach().double()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    cut = []
    for step in range(1, 8):
        layer.weight.grad = gradient(step, layer.weight.shape)
        plain.weight.grad = layer.weight.grad.clone()
        g = layer.weight.grad.double()
        m, v = 0.8 * m + 0.2 * g, 0.99 * v + 0.01 * g * g
        corrected = v / (1 - 0.99**step)
        rms = (g * g / corrected.clamp(min=1e-12)).mean().sqrt().item()
        rate = 1e-2 / max(1.0, rms)
        w = w - rate * 0.3 * w - rate * m / (1 - 0.8**step) / (corrected.sqrt() + 1e-6)
        optimizer.step()
        untouched.step()
        torch.testing.assert_close(layer.weight.double(), w, rtol=1e-5, atol=1e-6)
        cut.append(rms > 1 + 1e-5)
        if not any(cut):
            assert torch.equal(layer.weight, plain.weight)  # AdamW's own bits
    assert cut[3] and not cut[2]
    assert (layer.weight - plain.weight).norm() > 0.01


def _sharded(rank: int) -> Tensor:
    torch.manual_seed(0)
    layer = nn.Linear(5, 3, bias=False)
    fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = build_optimizers(layer, STABLE)[0]
    UpdateClipping(optimizer)
    weight = layer.weight
    assert isinstance(weight, DTensor)
    for step in range(1, 8):
        weight.grad = distribute_tensor(
            gradient(step, weight.shape), weight.device_mesh, weight.placements
        )
        optimizer.step()
    return weight.full_tensor().detach()


def test_update_clipping_measures_whole_tensors_under_sharding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 3, bias=False)
    optimizer = build_optimizers(layer, STABLE)[0]
    UpdateClipping(optimizer)
    for step in range(1, 8):
        layer.weight.grad = gradient(step, layer.weight.shape)
        optimizer.step()
    for result in run_ranks(_sharded, 2, folder=tmp_path):
        torch.testing.assert_close(result, layer.weight.detach(), rtol=1e-5, atol=1e-7)


# -- QK-clip

KINDS = {
    "plain": {},
    "bias": {"bias": True, "norm": "layer"},
    "grouped": {"kv_heads": 1},
    "encoder-decoder": {"kind": "encoder-decoder", "positions": "t5"},
}


def model(**changes: object) -> Decoder:
    section = ModelSection(**{"layers": 2, "width": 24, "heads": 3, **changes})
    made = (EncoderDecoder if section.kind == "encoder-decoder" else Decoder)(
        section, vocabulary=37, sequence_length=12, seed=7
    )
    with torch.no_grad():
        for attention in (m for m in made.modules() if hasattr(m, "peaks_H")):
            for project in (attention.q, attention.k):
                project.weight.mul_(30.0)
                if project.bias is not None:
                    project.bias.normal_(generator=torch.Generator().manual_seed(1))
    return made


def tokens(seed: int) -> Tensor:
    return torch.randint(0, 37, (4, 12), generator=torch.Generator().manual_seed(seed))


def peaks(clip: QKClip, made: nn.Module, ids: Tensor) -> Tensor:
    clip.forget_scores()
    made(ids)
    return torch.stack([a.peaks_H.clone() for a in clip.attentions])  # type: ignore[union-attr]


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_heads_beyond_the_limit_are_scaled_to_it_and_no_others(changes: dict[str, object]) -> None:
    made = model(**changes)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.0)
    first = QKClip(made, torch.optim.SGD(made.parameters(), lr=0.0), limit=1.0).attentions[0]
    made(tokens(0))
    assert first.peaks_H is not None
    limit = first.peaks_H.sort().values[1].item()  # beyond it, one head of the first block
    clip = QKClip(made, optimizer, limit=limit)
    before = peaks(clip, made, tokens(0))
    optimizer.step()
    # The first block's input has not changed; what later ones see has.
    after = peaks(clip, made, tokens(0))[0]
    torch.testing.assert_close(after, before[0].clamp(max=limit), rtol=1e-4, atol=1e-5)
    assert (before[0] > limit).sum() == 1


def test_what_a_left_out_batch_showed_is_forgotten_and_a_calm_one_changes_no_bit() -> None:
    made = model()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.0)
    clip = QKClip(
        made,
        optimizer,
        limit=peaks(QKClip(made, optimizer, limit=1e9), made, tokens(0)).max().item() * 1.01,
    )
    weights = [p.detach().clone() for p in made.parameters()]
    made.get_parameter("embedding.weight").data.mul_(100)
    made(tokens(1))
    made.get_parameter("embedding.weight").data.copy_(weights[0])
    clip.forget_scores()
    made(tokens(0))
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights, made.parameters(), strict=True))


def _ranks(rank: int, sharded: bool) -> list[Tensor]:
    made = model()
    if sharded:
        for block in made.blocks:
            fully_shard(block, mesh=init_device_mesh("cpu", (2,)))
        fully_shard(made, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(made.parameters(), lr=0.0)
    clip = QKClip(made, optimizer, limit=0.05)
    clip.forget_scores()
    made(tokens(rank)).sum().backward()
    optimizer.step()
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach() for p in made.parameters()]


@pytest.mark.parametrize("sharded", [False, True])
def test_ranks_agree_on_the_largest_score_of_all(sharded: bool, tmp_path: Path) -> None:
    made = model()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.0)
    clip = QKClip(made, optimizer, limit=0.05)
    clip.forget_scores()
    for rank in range(2):
        made(tokens(rank))
    optimizer.step()
    for result in run_ranks(_ranks, 2, sharded, folder=tmp_path):
        for ours, whole in zip(result, made.parameters(), strict=True):
            torch.testing.assert_close(ours, whole.detach(), rtol=1e-5, atol=1e-7)


# -- z-loss


def test_z_penalty_is_the_squared_log_of_the_normaliser_over_label_tokens() -> None:
    logits = torch.randn(
        2,
        3,
        11,
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,
        requires_grad=True,
    )
    labels = torch.tensor([[1, IGNORED, 3], [4, 5, IGNORED]])
    penalty = z_penalty(logits, labels, 1e-2)
    counted = [logits[b, t].exp().sum().log() ** 2 for b, t in ((0, 0), (0, 2), (1, 0), (1, 1))]
    assert penalty.item() == pytest.approx(1e-2 * sum(x.item() for x in counted))
    (penalty + loss_sum(logits, labels)[0]).backward()
    assert logits.grad is not None and logits.grad[0, 1].abs().sum() == 0
    assert z_penalty(logits.detach().bfloat16(), labels, 1.0).dtype == torch.float32
