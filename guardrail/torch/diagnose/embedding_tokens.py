"""Which tokens pull hardest on the embedding: the longest rows of its gradient, asked of a rejected
step only.

The gradient that was judged is still at hand then, reduced, and only read. Each rank looks at the
rows that it holds: all of them, a shard under fsdp, the token ids of its own under tensor
parallelism. With tied weights a row's gradient is also that of the token as an output, so that what
a model wrongly expects is named beside what it was shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from guardrail.core.records import Verdict
from guardrail.decide.remedies import embedding_concerned
from guardrail.torch.measure.gradient_norms import to_local
from guardrail.torch.measure.reduced_step import ReducedStep

MOST = 8  # tokens that are named of one step

# (token ids, sample ids of the batch) -> of each token what is known of it: "text", and "count" in
# these samples.
DescribeTokens = Callable[[Sequence[int], Sequence[int]], list[dict[str, Any]]]


@torch.no_grad()
def longest_rows(
    embedding: Sequence[Tensor], gathered: Callable[[Any], list[Any]]
) -> list[tuple[int, float]]:
    """(Token id, norm of its row of the gradient at hand), longest first, at most MOST; equal on
    every rank.

    A collective, also for a rank that holds no embedding.

    Args:
        embedding: weights of embeddings, of which the one with the most rows is that of the tokens.
    """
    table = max(embedding, key=lambda weight: weight.shape[0], default=None)
    mine = _of_shard(table.grad) if table is not None and table.grad is not None else []
    # Replicas name the same rows with the same norms: each counts once.
    found = {row: norm for rows in gathered(mine) for row, norm in rows}
    return sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST]


def _of_shard(gradient: Tensor) -> list[tuple[int, float]]:
    first = 0
    if isinstance(gradient, DTensor):
        chunk = gradient.__create_chunk_list__()[0]  # the protocol of torch.distributed.checkpoint
        first = int(chunk.offsets[0])
        if chunk.sizes[1:] != gradient.shape[1:]:
            return []  # cut by columns: no rank knows the norm of a row
    here = to_local(gradient)
    if not here.numel():
        return []
    norms = torch.linalg.vector_norm(here, dim=1, dtype=torch.float32)
    longest = norms.topk(min(MOST, len(norms)))
    pairs = zip(longest.indices.tolist(), longest.values.tolist(), strict=True)
    return [(first + row, norm) for row, norm in pairs if norm > 0]


def token_evidence(
    verdict: Verdict,
    reduced: ReducedStep,
    *,
    embedding: Sequence[Tensor],
    samples: Sequence[int],
    gathered: Callable[[Any], list[Any]],
    describe: DescribeTokens | None,
) -> dict[str, Any]:
    """`tokens` of a verdict's journal line: id, norm (as embed_grad_norm), share (of its square),
    text and count.

    Empty unless the step was rejected with something found of the embedding. A collective where it
    is not: what it hangs on is equal on every rank.

    Args:
        reduced: of the step, whose gradients are at hand.
        embedding: see `longest_rows`.
        samples: ids of the global batch.
        describe: on rank 0, where a tokenizer is at hand.
    """
    if not embedding_concerned(verdict):
        return {}
    rows = longest_rows(embedding, gathered)
    if not rows:
        return {}
    whole = reduced.embed_grad_norm
    tokens: list[dict[str, Any]] = [
        {
            "id": row,
            "norm": norm * reduced.scale,
            "share": (norm * reduced.scale / whole) ** 2 if whole else 0.0,
        }
        for row, norm in rows
    ]
    if describe is not None:
        for token, known in zip(tokens, describe([row for row, _ in rows], samples), strict=True):
            token |= known
    return {"tokens": tokens}
