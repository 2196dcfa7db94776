"""Per sample of a batch: its loss, and the norm of its gradient at the embedding.

Once a batch has been run, weights have the sum of all samples' gradients, and the gradient of one
sample no longer exists. What enters the first block belongs to one sample, under every kind of
sharding. A hook reads the norm of its gradient there: how strongly this sample changes everything
below its loss.
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

# Of each micro-batch of this rank, in the order in which the model got them: (positions, loss sums
# [B], label tokens [B]). Rows that only fill up a micro-batch come last and have no position. On a
# rank that has no loss (a pipeline stage that is not the last) the tensors are empty.
Rows = list[tuple[Sequence[int], Tensor, Tensor]]


@contextlib.contextmanager
def record_embedding_gradients(model: nn.Module) -> Iterator[list[Tensor]]:
    """Record the norms [B] of the rows' gradients at the embedding's output.

    The embedding is the nn.Embedding with the most rows.

    Yields:
        A list, filled at the end of the block: one tensor per call of the embedding, in the order
        of the calls. Empty if there is no embedding, or if it is not trained.
    """
    by_call: dict[int, Tensor] = {}
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
            by_call[number] = to_local(gradient).detach().flatten(1).float().norm(dim=1)

        if output.requires_grad:
            output.register_hook(keep)

    handle = max(tables, key=lambda table: table.num_embeddings).register_forward_hook(watch)
    try:
        yield norms
    finally:
        handle.remove()
        norms += [by_call[number] for number in sorted(by_call)]


def build_samples(rows: Rows, norms: Sequence[Tensor]) -> list[Sample]:
    """Return this rank's rows as samples.

    Args:
        norms: of `record_embedding_gradients`; the model may call the embedding several times per
            micro-batch.
    """
    calls = 0
    if rows and len(norms) % len(rows) == 0:
        calls = len(norms) // len(rows)
    samples: list[Sample] = []
    for index, (positions, losses, tokens) in enumerate(rows):
        gradients = _combine_calls(norms[index * calls : (index + 1) * calls])
        sums, counts = losses.double().tolist(), tokens.tolist()
        for row, position in enumerate(positions):
            sample = Sample(position=position)
            if row < len(sums):
                count = int(counts[row])
                loss = sums[row] / count if count else float("nan")
                sample = structs.replace(sample, loss=loss, tokens=count)
            if row < len(gradients):
                sample = structs.replace(sample, gradient=gradients[row])
            samples.append(sample)
    return samples


def merge_samples(samples: Iterable[Sample]) -> list[Sample]:
    """Return one sample per position, ascending.

    Of several ranks one may know the loss of a sample, and another its gradient.
    """
    merged: dict[int, Sample] = {}
    for sample in samples:
        known = merged.get(sample.position)
        if known is None:
            merged[sample.position] = sample
            continue
        if not known.tokens:
            known = structs.replace(known, loss=sample.loss, tokens=sample.tokens)
        if known.gradient != known.gradient:
            known = structs.replace(known, gradient=sample.gradient)
        merged[sample.position] = known
    return [merged[position] for position in sorted(merged)]


def _combine_calls(norms: Sequence[Tensor]) -> list[float]:
    """Return one norm per row over all calls of the embedding in a micro-batch."""
    if not norms or len({norm.shape for norm in norms}) > 1:
        return []
    return [float(value) for value in torch.stack(list(norms)).norm(dim=0).tolist()]
