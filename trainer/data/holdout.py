"""Which documents are held out for evaluation: a hash of their origin decides, never their order."""

from __future__ import annotations

import hashlib

import numpy as np

SPACE = 1 << 64


def origin_hash(key: str, record: int) -> int:
    """Return 64 bits of the hash of a document's origin.

    Args:
        key: name of its file below the source.
        record: its line; 0: the complete file.
    """
    name = f"{key}\0{record}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def hash_threshold(fraction: float) -> int:
    """Return the hash below which documents are held out."""
    return int(fraction * SPACE)


def balance_splits(hashes: np.ndarray, tokens: np.ndarray, limit: int, *, sample: int) -> int:
    """Return the threshold nearest to `limit` with which neither split is empty.

    At least one document is held out, and at least one is not. More are held out until they fill a
    sample, as long as the training split fills one too. Fewer are held out if the training split
    would not fill a sample. A single document is never held out.

    Args:
        hashes: uint64 [documents].
        tokens: number of tokens of each document.
        limit: the threshold that the fraction alone gives.
        sample: tokens of one sample.
    """
    documents = len(hashes)
    if documents < 2:
        return 0
    order = np.argsort(hashes, kind="stable")
    # held[k]: tokens of the k documents with the smallest hashes; left[k]: tokens of the others.
    held = np.concatenate([[0], np.cumsum(tokens[order])])
    left = held[-1] - held
    below = np.count_nonzero(hashes < np.uint64(min(limit, SPACE - 1)))
    count = int(np.clip(below, 1, documents - 1))
    while count < documents - 1 and held[count] < sample and left[count + 1] >= sample:
        count += 1
    while count > 1 and left[count] < sample:
        count -= 1
    return int(hashes[order[count - 1]]) + 1
