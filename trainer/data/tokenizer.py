"""Text <-> token ids: raw bytes, a BPE trained on the sources, or a tokenizer.json.

A long text is cut at line ends and encoded in pieces. A huge document therefore does not delay a
stop request, and does not take a multiple of its size in memory. The ids of a text are those of its
pieces, whichever method encodes it.
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
            that is part of a character has the span of that character.
    """

    ids: np.ndarray
    spans: Callable[[np.ndarray], np.ndarray]


class Tokenizer(ABC):
    """Converts text to token ids and back.

    Attributes:
        name: value of `data.tokenizer`.
        identity: what the ids depend on; equal identities give equal ids.
        vocabulary: number of ids, with special ones and unused ones.
        eos: id that ends each document.
        pad: id that is ignored as a label; None: there is none.
        content: of the tokenizer.json; "": there is none.
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
        """Return the ids of `text`, without special tokens: one-dimensional, of `dtype`."""
        pieces = self.encode_pieces(list(split_text(text)))
        if not pieces:
            return np.empty(0, self.dtype)
        return np.concatenate([piece.ids for piece in pieces])

    @abstractmethod
    def encode_pieces(self, texts: Sequence[str]) -> list[Encoded]:
        """Encode texts of at most `PIECE` characters, each by itself."""

    @abstractmethod
    def decode(self, ids: np.ndarray) -> str:
        """Return the text of ids, without special tokens; wrong UTF-8 becomes U+FFFD."""

    def spell_token(self, token: int) -> str:
        """Return a token as text for the user; "" for an id that is no token.

        A special token is given by its name, a byte that is no complete character as <0xE2>.
        """
        text = self.decode(np.array([token]))
        if text and "\ufffd" not in text:
            return text
        return self._name(token)

    @abstractmethod
    def _name(self, token: int) -> str:
        """Return the name of a token without a text; "" for an id that is no token."""

    def save(self, folder: Path) -> None:
        """Write what `load_saved` needs, if anything."""
        if self.content:
            (folder / "tokenizer.json").write_text(self.content, encoding="utf-8")


def id_dtype(vocabulary: int) -> np.dtype:
    """Return the type in which ids of a vocabulary are stored."""
    if vocabulary <= 1 << 16:
        return np.dtype("<u2")
    return np.dtype("<u4")


def split_text(text: str) -> Iterator[str]:
    """Cut a text into pieces of at most `PIECE` characters.

    The cut is after the last line end of a piece, else before its last space, else at its end.
    """
    start = 0
    while len(text) - start > PIECE:
        limit = start + PIECE
        cut = text.rfind("\n", start, limit) + 1
        if not cut:
            cut = text.rfind(" ", start + 1, limit)
        if cut <= start:
            cut = limit
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
        if token < 256:
            return f"<0x{token:02X}>"
        return _BYTE_NAMES.get(token, "")


def _one_byte(positions: np.ndarray) -> np.ndarray:
    return positions[:, None] + np.array([0, 1])


class JsonTokenizer(Tokenizer):
    """A Hugging Face tokenizer. Text that looks like a special token is encoded as plain text.

    Args:
        content: of a tokenizer.json.
        name: value of `data.tokenizer`.
        source: names the file in errors.

    Raises:
        DataError: it is no tokenizer, or has no end-of-text token.
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
        # Not get_vocab_size(): a few vocabularies have unused ids.
        self.vocabulary = max(backend.get_vocab(with_added_tokens=True).values(), default=0) + 1
        eos = _first_id(backend, _EOS_NAMES)
        if eos is None:
            raise DataError(
                f"{source}: no end-of-text token; expected one of {', '.join(_EOS_NAMES)}"
            )
        self.eos, self.pad = eos, _first_id(backend, _PAD_NAMES)
        if self.pad == eos:
            self.pad = None

    def encode_pieces(self, texts: Sequence[str]) -> list[Encoded]:
        # A batch runs on all cores, and other Python threads continue meanwhile.
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [
            Encoded(np.array(encoding.ids, dtype=self.dtype), _CharacterSpans(text, encoding))
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def decode(self, ids: np.ndarray) -> str:
        return self._backend.decode(np.asarray(ids).tolist(), skip_special_tokens=True)

    def _name(self, token: int) -> str:
        return self._backend.id_to_token(token) or ""


def _first_id(backend: tokenizers.Tokenizer, names: Sequence[str]) -> int | None:
    """Return the id of the first of these tokens that the vocabulary has."""
    for name in names:
        token: int | None = backend.token_to_id(name)
        if token is not None:
            return token
    return None


class _CharacterSpans:
    """Positions of tokens -> byte spans, from the character offsets of an encoding."""

    def __init__(self, text: str, encoding: tokenizers.Encoding) -> None:
        self._text, self._encoding = text, encoding

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        # None: a token without characters in the text.
        spans = [self._encoding.token_to_chars(int(position)) or (0, 0) for position in positions]
        characters = np.array(spans, dtype=np.int64).reshape(-1, 2)
        if self._text.isascii():
            return characters
        return _byte_offsets(self._text)[characters]


def _byte_offsets(text: str) -> np.ndarray:
    """Return the offset in UTF-8 of each character, and of the end: int64 [characters + 1]."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    width = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    return np.concatenate([[0], np.cumsum(width)])


def load_saved(folder: Path, name: str) -> Tokenizer:
    """Return the tokenizer that `save` wrote into `folder`."""
    if name == "bytes":
        return ByteTokenizer()
    return load_tokenizer(folder / "tokenizer.json", name=name)


def load_tokenizer(path: Path, *, name: str) -> JsonTokenizer:
    """Return the tokenizer of a tokenizer.json. Raises DataError if it cannot be read."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(f"{path}: not a readable tokenizer.json ({reason})") from error
    return JsonTokenizer(content, name=name, source=str(path))
