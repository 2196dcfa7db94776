"""A model small enough for a test that has what real ones have: tied weights, dropout, a buffer,
odd sizes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

VOCABULARY, WIDTH = 13, 6  # odd, so that two ranks get shards of different sizes
BATCH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(F.silu(self.linear(x)), 0.2, self.training)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)
        self.seen: Tensor

    def forward(self, tokens: Tensor) -> Tensor:
        self.seen += 1
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "tensor-lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "groups": lambda p: torch.optim.AdamW(
        [
            {"params": [q for q in p if q.ndim > 1], "weight_decay": 0.3},
            {"params": [q for q in p if q.ndim < 2]},
        ],
        lr=0.01,
    ),
    "muon+adamw": lambda p: [
        torch.optim.Muon([q for q in p if q.ndim == 2 and q.shape[0] == WIDTH], lr=0.01),
        torch.optim.AdamW([q for q in p if not (q.ndim == 2 and q.shape[0] == WIDTH)], lr=0.01),
    ],
}


class Setup:
    """Model, optimizers, schedules on this rank. kind: "plain", "ddp", "fsdp" (needs a process
    group but for plain).
    """

    def __init__(
        self, kind: str = "plain", optimizer: str = "adamw-foreach", *, seed: int = 0
    ) -> None:
        torch.manual_seed(seed)
        model = Tiny()
        self.inner = model
        self.model: nn.Module = wrap(model, kind)
        self.rank, self.world = (
            (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        )
        made: Any = OPTIMIZERS[optimizer](list(self.model.parameters()))
        self.optimizers: list[Optimizer] = made if isinstance(made, list) else [made]
        self.schedulers = [
            torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=50) for o in self.optimizers
        ]

    def step(self, number: int, *, bad: bool = False) -> float:
        """One update; data and dice are functions of (number, rank). A bad one has huge
        gradients.
        """
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, VOCABULARY, (BATCH, 5), generator=generator)
        tokens = tokens.chunk(self.world)[self.rank]
        torch.manual_seed(1000 * number + self.rank)
        logits = self.model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        (loss * (1e6 if bad else 1.0)).backward()
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        return loss.item()

    def steps(self, first: int, last: int, *, bad: bool = False) -> list[float]:
        """The losses of the updates first .. last - 1."""
        return [self.step(number, bad=bad) for number in range(first, last)]


def wrap(model: nn.Module, kind: str) -> nn.Module:
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model
