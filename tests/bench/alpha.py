"""What a factor on the embedding's gradients does under AdamW: the size of the embedding's updates.

    python -m tests.bench.alpha [--warm 400] [--seeds 3]

GLM-130B (Zeng et al. 2022) trains with emb = a emb + (1 - a) stop_gradient(emb), a = 0.1: the
embedding's gradients times a. Adam divides a gradient by the root of its mean square. A constant
factor therefore cancels once the moments hold only gradients with it.

This program measures what is left. A small byte-level model trains on real text, then continues
from the same state with other factors, through the guard's gate (clipping included). A figure is
the norm of the embedding's update without weight decay, relative to the same steps with a = 1;
medians over seeds. "Dropped" has the factor for 20 steps only. Its later updates are larger than
usual as long as the mean square contains the small gradients.

Results (200 steps before, three seeds, two CPU cores): the first update is smaller by 3 to 10 % for
every factor, since it is nine tenths momentum. The factor therefore cannot limit the present
update; a skip can. After 20 steps a factor of 0.1 leaves 0.20 to 0.43 of the update. Then AdamW
compensates: with beta2 = 0.95 completely within 200 steps; with 0.999 the updates are still at 0.23
to 0.34. If the factor returns to 1 at once, updates are up to 13 % too large for a while; so it
returns over `ramp_steps`. With tied weights the same happens to the output matrix.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import statistics
import textwrap

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guardrail.torch.measure.reduction import StepReduction
from guardrail.torch.measure.update_gate import Gate
from tests.support.bench_options import make_parser

BATCH, LENGTH, WIDTH = 16, 64, 64
MOMENTS = (1, 5, 20, 25, 40, 60, 200)  # steps after the factor was set
DROP = 20
CASES = {"0.5": (0.5, None), "0.1": (0.1, None), f"0.1 for {DROP} steps": (0.1, DROP)}


class Model(nn.Module):
    """A byte-level model: one block of attention; `tied`: the embedding is the output matrix."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.block = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [batch, length, 256] of tokens [batch, length]."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.norm(self.block(self.embed(tokens), src_mask=mask, is_causal=True)))


class Run:
    """One model and its AdamW; a copy continues from the same state with the same batches."""

    def __init__(self, text: Tensor, *, tied: bool, beta2: float, seed: int) -> None:
        torch.manual_seed(seed)
        self.text, self.seed, self.step = text, seed, 0
        self.model = Model(tied=tied)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, betas=(0.9, beta2), weight_decay=0.0
        )

    def train(self, steps: int, *, alpha: float = 1.0, until: int | None = None) -> list[float]:
        """Train; return the norms of the embedding's updates."""
        probes = StepReduction(self.model, rank=0, world=1)
        gate = Gate(
            [self.optimizer], parameters=probes.parameters, embedding=probes.embedding, clip=1.0
        )
        sizes = []
        for index in range(steps):
            self.step += 1
            dice = torch.Generator().manual_seed(1_000_003 * self.seed + self.step)
            starts = torch.randint(0, len(self.text) - LENGTH - 1, (BATCH,), generator=dice)
            tokens = torch.stack(
                [self.text[start : start + LENGTH + 1] for start in starts.tolist()]
            )
            loss = F.cross_entropy(
                self.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
            )
            loss.backward()
            now = alpha if until is None or index < until else 1.0
            reduced = probes.reduce(loss, 1.0, nominal_tokens=None, step_time=0.0)
            before = self.model.embed.weight.detach().clone()
            gate.apply(gate.factor(reduced, embed_alpha=now), embed_alpha=now)
            sizes.append(float((self.model.embed.weight.detach() - before).norm()))
        return sizes


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--warm", type=int, default=400, help="steps before the factor is set")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    source = inspect.getsource(textwrap) + inspect.getsource(argparse)
    text = torch.tensor(list(source.encode()), dtype=torch.long)
    print(
        f"{'embedding':10} {'beta2':>6}  {'factor':18}"
        + "".join(f"{f'step {at}':>10}" for at in MOMENTS)
    )
    for tied in (False, True):
        for beta2 in (0.95, 0.999):
            found: dict[str, list[list[float]]] = {name: [] for name in CASES}
            for seed in range(arguments.seeds):
                run = Run(text, tied=tied, beta2=beta2, seed=seed)
                run.train(arguments.warm)
                plain = copy.deepcopy(run).train(max(MOMENTS))
                for name, (alpha, until) in CASES.items():
                    sizes = copy.deepcopy(run).train(max(MOMENTS), alpha=alpha, until=until)
                    found[name].append([sizes[at - 1] / plain[at - 1] for at in MOMENTS])
            for name, rows in found.items():
                medians = [statistics.median(column) for column in zip(*rows, strict=True)]
                figures = "".join(f"{value:>10.2f}" for value in medians)
                print(f"{'tied' if tied else 'untied':10} {beta2:>6}  {name:18}{figures}")


if __name__ == "__main__":
    main()
