"""Which documents are held out for evaluation: a hash of their origin, so that it never depends on
the order.
"""

from __future__ import annotations

import hashlib

import numpy as np

SPACE = 1 << 64


def origin_hash(key: str, record: int) -> int:
    """64 bits of a document's name: `key` below its source, and its line."""
    name = f"{key}\0{record}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def hash_threshold(fraction: float) -> int:
    """Documents whose hash is below it are held out."""
    return int(fraction * SPACE)


def balance_splits(hashes: np.ndarray, tokens: np.ndarray, limit: int, *, sample: int) -> int:
    """The threshold next to `limit` with which neither split is empty.

    At least one document is held out and one is not; more are held out until they fill a sample, as
    long as the others do; if need be fewer, because training comes first. One single document is
    never held out.

    Args:
        hashes: uint64 [documents], tokens: tokens of each.
        limit: the threshold that the fraction alone gives.
        sample: tokens of one sample.
    """
    documents = len(hashes)
    if documents < 2:
        return 0
    order = np.argsort(hashes, kind="stable")
    # tokens held out with the k smallest hashes
    held = np.concatenate([[0], np.cumsum(tokens[order])])
    left = held[-1] - held
    count = int(
        np.clip(np.count_nonzero(hashes < np.uint64(min(limit, SPACE - 1))), 1, documents - 1)
    )
    while count < documents - 1 and held[count] < sample and left[count + 1] >= sample:
        count += 1
    while count > 1 and left[count] < sample:
        count -= 1
    return int(hashes[order[count - 1]]) + 1
