"""Outside text made safe for a terminal.

Log lines, file names, excerpts of documents, host names and journal messages come from outside.
What `clean_text` returns cannot move a cursor or set a clipboard.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterable, Iterator

# Strings that a terminal takes as one command (ECMA-48, 8.3): OSC, DCS, SOS, PM, APC up to BEL or
# ST, and CSI. Of a string without an end only the introducer is removed, so no text is lost.
# Payloads exclude every control that can begin another sequence, so the match takes linear time.
_SEQUENCE = re.compile(
    r"(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x80-\x9f]*(?:\x07|\x1b\\|\x9c)"
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|\x1b[ -/]*[0-~]?"
)
# White space that is a control or a line separator becomes a space, so words stay separate.
_SPACE = re.compile("\r\n|[\t\n\v\f\r\x85\u2028\u2029]")
# C0, DEL, C1; marks, embeddings, overrides and isolates of bidirectional text (Trojan Source,
# CVE-2021-42574); deprecated format characters, interlinear annotation, byte-order mark, invisible
# tags.
_UNWANTED = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_SURROGATE = re.compile("[\ud800-\udfff]")
MASK = "(masked)"  # replaces a secret
_SHORTEST_PIECE = 8  # characters; a shorter word of a command is no token
# What follows the scheme of an address. It may hold a password, and the path of many webhooks is a
# secret.
_ADDRESS = re.compile(r"\b([a-z][a-z0-9+.-]{1,20}://)[^\s'\"<>]+", re.IGNORECASE)


def clean_text(text: str | bytes, limit: int | None = None) -> str:
    """Return one line without terminal sequences, control characters and bidi controls.

    Args:
        text: bytes are decoded as UTF-8; wrong bytes and lone surrogates become U+FFFD.
        limit: longest result in characters; a longer one ends in an ellipsis.
    """
    if isinstance(text, (bytes, bytearray, memoryview)):
        text = bytes(text).decode("utf-8", "replace")
    elif not isinstance(text, str):
        text = str(text)
    text = _SURROGATE.sub("\ufffd", text)
    text = _SEQUENCE.sub("", text)
    text = _SPACE.sub(" ", text)
    text = _UNWANTED.sub("", text)
    if limit is None or len(text) <= limit:
        return text
    return text[: limit - 1] + "…" if limit > 0 else ""


def hide_credentials(text: str) -> str:
    """Return text in which each address is masked after its scheme: "https://(masked)"."""
    return _ADDRESS.sub(rf"\g<1>{MASK}", text)


def redact_secrets(text: str, secrets: Iterable[str]) -> str:
    """Return text in which every secret, and every part of one that may be a token, is masked."""
    pieces: set[str] = set()
    for secret in secrets:
        pieces.update(_split_secret(secret))
    for piece in sorted(pieces, key=len, reverse=True):
        text = text.replace(piece, MASK)
    return text


def _split_secret(secret: str) -> Iterator[str]:
    """Yield the secret, and the parts between the separators of an address or a command."""
    for form in {secret, secret.strip(), urllib.parse.unquote(secret)}:
        if form:
            yield form
        for word in re.split(r"[\s'\"=:;,|&<>()@/?#\\]+", form):
            if len(word) >= _SHORTEST_PIECE:
                yield word
                yield urllib.parse.quote(word)


def escape_lines(text: str, width: int = 2000) -> str:
    """Return several lines in which each character that does not print is an escape sequence.

    Args:
        width: longest line in characters; a longer one ends in an ellipsis.
    """
    return "\n".join(escape_text(line, width) for line in text.split("\n"))


def escape_text(text: str, limit: int) -> str:
    """Return text in which each character that does not print is an escape sequence.

    Line ends are escaped too.

    Args:
        limit: longest result in characters; a longer one ends in an ellipsis.
    """
    escaped = [_escape_character(one) for one in text[: limit + 1]]
    return clean_text("".join(escaped), limit)


def _escape_character(character: str) -> str:
    return character if character.isprintable() else ascii(character)[1:-1]
