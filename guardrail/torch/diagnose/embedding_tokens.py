"""The tokens that dominate the embedding gradient: its longest rows, for a rejected step only.

The gradient that was judged is still there, reduced, and is only read. Each rank reads the rows
that it holds: all of them, a shard under FSDP, its own token ids under tensor parallelism. With
tied weights a row's gradient also counts the token as an output: a token that the model wrongly
expects is named beside those that it read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from guardrail.core.records.verdicts import Verdict
from guardrail.decide.embedding_lead import concerns_embedding
from guardrail.torch.measure.gradient_norms import to_local
from guardrail.torch.measure.reduced_step import ReducedStep
from guardrail.torch.state import foreach

MAX_TOKENS = 8  # that are named for one step

# (token ids, sample ids of the batch) -> of each token "text", and "count" in these samples.
DescribeTokens = Callable[[Sequence[int], Sequence[int]], list[dict[str, Any]]]


@torch.no_grad()
def find_longest_rows(
    embedding: Sequence[Tensor], gather: Callable[[Any], list[Any]]
) -> list[tuple[int, float]]:
    """Return the longest rows of the embedding gradient, at most `MAX_TOKENS`, longest first.

    A collective, also for a rank that holds no embedding.

    Args:
        embedding: weights of embeddings; the one with the most rows is that of the tokens.
        gather: returns every rank's value, by rank.

    Returns:
        (token id, norm of its row), equal on every rank.
    """
    table = max(embedding, key=lambda weight: weight.shape[0], default=None)
    own_rows: list[tuple[int, float]] = []
    if table is not None and table.grad is not None:
        own_rows = _longest_own_rows(table.grad)
    # Replicas give the same rows with the same norms, so each row counts once.
    norms: dict[int, float] = {}
    for rows in gather(own_rows):
        norms.update(rows)
    return sorted(norms.items(), key=lambda pair: (-pair[1], pair[0]))[:MAX_TOKENS]


def _longest_own_rows(gradient: Tensor) -> list[tuple[int, float]]:
    first = 0
    if isinstance(gradient, DTensor):
        offsets, sizes = foreach.shard_place(gradient)
        first = int(offsets[0])
        if sizes[1:] != tuple(gradient.shape[1:]):
            return []  # sharded by columns: no rank knows the norm of a row
    own = to_local(gradient)
    if not own.numel():
        return []
    norms = torch.linalg.vector_norm(own, dim=1, dtype=torch.float32)
    longest = norms.topk(min(MAX_TOKENS, len(norms)))
    pairs = zip(longest.indices.tolist(), longest.values.tolist(), strict=True)
    return [(first + row, norm) for row, norm in pairs if norm > 0]


def build_token_evidence(
    verdict: Verdict,
    reduced: ReducedStep,
    *,
    embedding: Sequence[Tensor],
    samples: Sequence[int],
    gather: Callable[[Any], list[Any]],
    describe: DescribeTokens | None,
) -> dict[str, Any]:
    """Return `tokens` for a verdict's journal line: id, norm, share of the square, text and count.

    Empty unless the step was rejected for something in the embedding; then it is a collective. The
    condition is equal on every rank.

    Args:
        reduced: of the step whose gradients are still there.
        embedding: see `find_longest_rows`.
        samples: ids of the global batch.
        describe: on rank 0, if there is a tokenizer.
    """
    if not concerns_embedding(verdict):
        return {}
    rows = find_longest_rows(embedding, gather)
    if not rows:
        return {}
    total = reduced.embed_grad_norm
    tokens: list[dict[str, Any]] = []
    for row, unscaled in rows:
        norm = unscaled * reduced.scale
        share = (norm / total) ** 2 if total else 0.0
        tokens.append({"id": row, "norm": norm, "share": share})
    if describe is not None:
        ids = [row for row, _ in rows]
        for token, description in zip(tokens, describe(ids, samples), strict=True):
            token |= description
    return {"tokens": tokens}
