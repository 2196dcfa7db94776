"""Samples, documents and tokens as text, for the journal of an incident."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from guardrail.core.text import escape_text
from trainer.data.corpus import Corpus

MAX_DESCRIBED = 20_000  # samples of one journal line whose documents are looked up
EXCERPT_CHARACTERS = 120
TOKEN_CHARACTERS = 40


class SampleTexts:
    """The hooks `describe_samples`, `sample_texts` and `describe_tokens`, over the training split."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus, self._split = corpus, corpus.train

    def describe_samples(self, sample_ids: Sequence[int]) -> tuple[list[dict[str, Any]], int]:
        """Return the documents of samples, the first ones with an excerpt, and how many they are."""
        documents, total = self._split.documents_of(sample_ids[:MAX_DESCRIBED])
        described = []
        for document in documents:
            excerpt = self._split.excerpt(document, limit=EXCERPT_CHARACTERS)
            described.append(msgspec.to_builtins(document) | {"excerpt": excerpt})
        return described, total

    def sample_texts(self, sample_ids: Sequence[int]) -> list[str]:
        """Return the complete text of each sample."""
        rows = self._split.tokens(list(sample_ids))
        return [self._corpus.tokenizer.decode(row) for row in rows]

    def describe_tokens(
        self, token_ids: Sequence[int], sample_ids: Sequence[int]
    ) -> list[dict[str, Any]]:
        """Return the text of each token and how often it occurs in the samples.

        Counted in the samples as stored, before an objective takes tokens out of them.
        """
        rows = self._split.tokens(list(sample_ids))[:, :-1]
        described = []
        for token in token_ids:
            text = escape_text(self._corpus.tokenizer.spell_token(token), TOKEN_CHARACTERS)
            described.append({"text": text, "count": int((rows == token).sum())})
        return described
