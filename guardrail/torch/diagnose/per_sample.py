"""What each sample of a batch shows in a pass: its loss, and the norm of its gradient at the
embedding.

The gradient of a sample alone does not exist once a batch has been run: weights get the sum. What
enters the first block does belong to one sample, under every way of sharding, so that its
gradient's norm is read there by a hook: how hard this sample pulls on everything below its loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from msgspec import structs
from torch import Tensor, nn

from guardrail.decide.sample_outliers import Sample
from guardrail.torch.measure.gradient_norms import to_local

# Of each micro-batch of this rank, in the order in which the model was given them: (positions, loss
# sums [B], label tokens [B]). Rows that only fill up a micro-batch come last and have no position.
# On a rank that sees no loss (a stage that is not the last) the tensors are empty.
Rows = list[tuple[Sequence[int], Tensor, Tensor]]


@contextlib.contextmanager
def embedding_gradients(model: nn.Module) -> Iterator[list[Tensor]]:
    """The norms [B] of the rows' gradients at the embedding's output, one tensor for each call of
    it, in their order.

    The embedding is the nn.Embedding with the most rows; a list without an entry where there is
    none, or where it is not trained.
    """
    found: dict[int, Tensor] = {}
    norms: list[Tensor] = []
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if not tables:
        yield norms
        return
    calls = 0

    def watch(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        nonlocal calls
        number, calls = calls, calls + 1

        def keep(gradient: Tensor) -> None:
            found[number] = to_local(gradient).detach().flatten(1).float().norm(dim=1)

        if output.requires_grad:
            output.register_hook(keep)

    handle = max(tables, key=lambda table: table.num_embeddings).register_forward_hook(watch)
    try:
        yield norms
    finally:
        handle.remove()
        norms += [found[number] for number in sorted(found)]


def samples_of(rows: Rows, norms: Sequence[Tensor]) -> list[Sample]:
    """This rank's rows as samples; the embedding may have been called several times a
    micro-batch.
    """
    calls = len(norms) // len(rows) if rows and len(norms) % len(rows) == 0 else 0
    found = []
    for index, (positions, losses, tokens) in enumerate(rows):
        pulls = _joined(norms[index * calls : (index + 1) * calls])
        sums, counts = losses.double().tolist(), tokens.tolist()
        for row, position in enumerate(positions):
            sample = Sample(position=position)
            if row < len(sums):
                count = int(counts[row])
                sample = structs.replace(
                    sample, loss=sums[row] / count if count else float("nan"), tokens=count
                )
            if row < len(pulls):
                sample = structs.replace(sample, gradient=pulls[row])
            found.append(sample)
    return found


def merged(rows: Iterable[Sample]) -> list[Sample]:
    """Samples by position, joined from what several ranks know of them: the loss of one, the
    gradient of another.
    """
    found: dict[int, Sample] = {}
    for row in rows:
        known = found.get(row.position)
        if known is None:
            found[row.position] = row
            continue
        if not known.tokens:
            known = structs.replace(known, loss=row.loss, tokens=row.tokens)
        if known.gradient != known.gradient:
            known = structs.replace(known, gradient=row.gradient)
        found[row.position] = known
    return [found[position] for position in sorted(found)]


def _joined(norms: Sequence[Tensor]) -> list[float]:
    if not norms or len({norm.shape for norm in norms}) > 1:
        return []
    return [float(value) for value in torch.stack(list(norms)).norm(dim=0).tolist()]
