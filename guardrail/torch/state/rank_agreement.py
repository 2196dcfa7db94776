"""Facts that must be equal on all ranks, and an error that names the rank that differs."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from guardrail.core.errors import UsageError
from guardrail.core.text import clean_text


def require_equal(facts: Mapping[str, Any], gather: Callable[[Any], Sequence[Any]]) -> None:
    """Compare facts over the ranks. A collective: all ranks continue or all raise.

    Args:
        facts: name -> value that can be compared and printed, such as a fingerprint.
        gather: returns every rank's value, by rank; a collective.

    Raises:
        UsageError: names the fact, and a rank and its host with each of two values.
    """
    by_rank = gather((socket.gethostname(), dict(facts)))
    first_host, first = by_rank[0]
    for rank, (host, theirs) in enumerate(by_rank):
        for name in first:
            if theirs.get(name) != first[name]:
                raise UsageError(
                    f"{name} is {first[name]} on rank 0 ({clean_text(first_host, 80)}) and "
                    f"{theirs.get(name)} on rank {rank} ({clean_text(host, 80)}): "
                    "all ranks must train on the same data in the same order. "
                    "Give every node the same files and the same configuration."
                )
