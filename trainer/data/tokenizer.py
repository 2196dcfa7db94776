"""Text <-> token ids: raw bytes, a BPE trained on the sources, or a tokenizer.json.

A long text is encoded in pieces cut at line ends, so that one huge document neither blocks a stop
nor takes a multiple of its size in memory. A piece is the unit of meaning: `encode` gives the same
ids on every way to them.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from guardrail.core.errors import DataError

if TYPE_CHECKING:
    import tokenizers

PIECE = 1 << 15  # characters

# Names of the end-of-text token in public tokenizers, the most specific first.
_EOS_NAMES = (
    "<|eos|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|im_end|>",
    "<｜end▁of▁sentence｜>",
    "[EOS]",
    "[SEP]",
)
_BYTE_NAMES = {256: "<|bos|>", 257: "<|eos|>", 258: "<|pad|>"}
_PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<｜▁pad▁｜>")


@dataclass(frozen=True, slots=True)
class Encoded:
    """One encoded piece.

    Attributes:
        ids: token ids, one-dimensional.
        spans: positions in `ids` [k] -> byte spans [k, 2] (first, last) within the piece. A token
            that is a part of a character has the span of the whole character.
    """

    ids: np.ndarray
    spans: Callable[[np.ndarray], np.ndarray]


class Tokenizer(ABC):
    """Attributes:
    name: what `[data] tokenizer` says.
    identity: what the ids depend on, as a string; equal identities give equal ids.
    vocabulary: number of ids, special ones and holes included.
    eos: id that ends each document.
    pad: id that is ignored as a label, None if there is none.
    content: of the tokenizer.json, "" if there is none.
    """

    name: str
    identity: str
    vocabulary: int
    eos: int
    pad: int | None
    content: str = ""

    @property
    def dtype(self) -> np.dtype:
        return id_dtype(self.vocabulary)

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, without special tokens: one-dimensional, `dtype`."""
        return np.concatenate(
            [e.ids for e in self.encode_pieces(list(split_text(text)))] or [np.empty(0, self.dtype)]
        )

    @abstractmethod
    def encode_pieces(self, texts: Sequence[str]) -> list[Encoded]:
        """Each text of at most `PIECE` characters on its own."""

    @abstractmethod
    def decode(self, ids: np.ndarray) -> str:
        """The text of the ids; special tokens are left out, wrong UTF-8 becomes U+FFFD."""

    def spell_token(self, token: int) -> str:
        """One token for a person: its text, else its name; a byte that is no text by itself as
        <0xE2>. "": no token.
        """
        text = self.decode(np.array([token]))
        return text if text and "\ufffd" not in text else self._name(token)

    @abstractmethod
    def _name(self, token: int) -> str:
        """Of a token that stands for no text of its own; "" for an id that is none."""

    def save(self, folder: Path) -> None:
        """Write what `saved` needs, if anything."""
        if self.content:
            (folder / "tokenizer.json").write_text(self.content, encoding="utf-8")


def id_dtype(vocabulary: int) -> np.dtype:
    """How ids of a vocabulary lie on disk."""
    return np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")


def split_text(text: str) -> Iterator[str]:
    """Cuts behind the last line end (else before the last space, else anywhere) of each `PIECE`
    characters.
    """
    start = 0
    while len(text) - start > PIECE:
        window = start + PIECE
        cut = text.rfind("\n", start, window) + 1 or text.rfind(" ", start + 1, window) or window
        cut = cut if cut > start else window
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, then BOS, EOS, PAD."""

    name = identity = "bytes"
    bos, eos, pad = 256, 257, 258
    vocabulary = 259

    def encode_pieces(self, texts: Sequence[str]) -> list[Encoded]:
        return [
            Encoded(np.frombuffer(text.encode("utf-8"), np.uint8).astype(self.dtype), _one_byte)
            for text in texts
        ]

    def decode(self, ids: np.ndarray) -> str:
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", "replace")

    def _name(self, token: int) -> str:
        return f"<0x{token:02X}>" if token < 256 else _BYTE_NAMES.get(token, "")


def _one_byte(positions: np.ndarray) -> np.ndarray:
    return positions[:, None] + np.array([0, 1])


class JsonTokenizer(Tokenizer):
    """A Hugging Face tokenizer. Text that looks like a special token is encoded as the text that it
    is.

    Args:
        content: of a tokenizer.json.
        name: what `[data] tokenizer` says.
        source: names the file in errors.

    Raises DataError when it is no tokenizer or has no end-of-text token.
    """

    def __init__(self, content: str, *, name: str, source: str) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            backend = Backend.from_str(content)
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"{source}: not a tokenizer.json ({error})") from error
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend, self.content, self.name = backend, content, name
        self.identity = "tokenizer.json:" + hashlib.sha256(content.encode("utf-8")).hexdigest()
        # Not get_vocab_size(): a few vocabularies have holes.
        self.vocabulary = max(backend.get_vocab(with_added_tokens=True).values(), default=0) + 1
        eos = next((i for i in map(backend.token_to_id, _EOS_NAMES) if i is not None), None)
        if eos is None:
            raise DataError(
                f"{source}: no end-of-text token; expected one of {', '.join(_EOS_NAMES)}"
            )
        pad = next((i for i in map(backend.token_to_id, _PAD_NAMES) if i is not None), None)
        self.eos, self.pad = eos, None if pad == eos else pad

    def encode_pieces(self, texts: Sequence[str]) -> list[Encoded]:
        # The batch runs on all cores and lets other threads of Python run.
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [
            Encoded(np.array(encoding.ids, dtype=self.dtype), _CharacterSpans(text, encoding))
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def decode(self, ids: np.ndarray) -> str:
        return self._backend.decode(np.asarray(ids).tolist(), skip_special_tokens=True)

    def _name(self, token: int) -> str:
        return self._backend.id_to_token(token) or ""


class _CharacterSpans:
    """Positions of tokens -> byte spans, from the character offsets of an encoding."""

    def __init__(self, text: str, encoding: tokenizers.Encoding) -> None:
        self._text, self._encoding = text, encoding

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        # None: a token that stands for nothing in the text.
        spans = [self._encoding.token_to_chars(int(position)) or (0, 0) for position in positions]
        characters = np.array(spans, dtype=np.int64).reshape(-1, 2)
        return characters if self._text.isascii() else _byte_offsets(self._text)[characters]


def _byte_offsets(text: str) -> np.ndarray:
    """Character index [0, n] -> offset of that character in UTF-8."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    width = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    return np.concatenate([[0], np.cumsum(width)])


def load_saved(folder: Path, name: str) -> Tokenizer:
    """The tokenizer that `save` wrote into `folder`."""
    if name == "bytes":
        return ByteTokenizer()
    return load_tokenizer(folder / "tokenizer.json", name=name)


def load_tokenizer(path: Path, *, name: str) -> JsonTokenizer:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(f"{path}: not a readable tokenizer.json ({reason})") from error
    return JsonTokenizer(content, name=name, source=str(path))
