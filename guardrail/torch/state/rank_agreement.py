"""What must be the same on all ranks, and an error that names who differs."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from guardrail.core.errors import UsageError
from guardrail.core.text import clean_text


def require_equal(facts: Mapping[str, Any], gathered: Callable[[Any], Sequence[Any]]) -> None:
    """Compare facts over the ranks; a collective, after which all ranks go on or all raise.

    Args:
        facts: name -> value that can be compared and printed, such as a fingerprint.
        gathered: every rank's value, by rank; a collective.

    Raises:
        UsageError: names the fact, and a rank and its host with each of two values.
    """
    everyone = gathered((socket.gethostname(), dict(facts)))
    host, first = everyone[0]
    for rank, (other, theirs) in enumerate(everyone):
        for name in first:
            if theirs.get(name) != first[name]:
                raise UsageError(
                    f"{name} is {first[name]} on rank 0 ({clean_text(host, 80)}) and {theirs.get(name)} on rank {rank} "
                    f"({clean_text(other, 80)}): all ranks must train on the same data in the same order. "
                    "Give every node the same files and the same configuration"
                )
