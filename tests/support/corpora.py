"""Small corpora for tests: written into a temporary folder and prepared there."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from trainer.config.sections import DataSection
from trainer.data.corpus import Corpus, Split
from trainer.data.prepare import prepare_corpus


def section(folder: Path, **settings: Any) -> DataSection:
    """[data] of `folder`/text with a cache of its own; held-out documents only when asked for."""
    defaults: dict[str, Any] = {
        "sources": (str(folder / "text"),),
        "sequence_length": 8,
        "eval_fraction": 0.0,
    }
    return DataSection(**{**defaults, "cache": str(folder / "cache"), **settings})


def prepared(data: DataSection, **options: Any) -> Corpus:
    return Corpus.open(
        prepare_corpus(data, progress=lambda text, share: None, stop=lambda: False, **options)
    )


def write(path: Path, content: str | bytes) -> Path:
    """Compressed as the name says."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = zstandard.ZstdCompressor().compress(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def stream(split: Split) -> np.ndarray:
    """All tokens of a split: the samples one after another, each without what it shares with the
    next.
    """
    rows = split.tokens(range(len(split)))
    assert (rows[1:, 0] == rows[:-1, -1]).all()
    return np.concatenate([rows[:, :-1].reshape(-1), rows[-1, -1:]])
