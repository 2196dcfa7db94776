"""Input that nobody means: values for every kind of setting, and files with something wrong in
them.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

from hypothesis import strategies as st

# What a message may not hold: anything that moves a cursor, hides text, or is far too long.
RAW = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

TEXTS = st.one_of(
    st.sampled_from(
        [
            "",
            " ",
            "nan",
            "-inf",
            "1e999",
            "0x10",
            "auto",
            "../../etc/passwd",
            "/dev/null",
            "~nobody/x",
            "x" * 5000,
            "\x00",
            "a\x00b",
            "\x1b]0;title\x07",
            "\x1b[2J",
            "\u202egnp.exe",
            "a\nb",
            "\ud800",
            "\udcff",
            "[" * 3000,
            "**/*",
            "{}",
            "%s%n",
            "http://user:pw@host/x",
        ]
    ),
    st.text(max_size=30),
)
NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from(
        [0, -1, 1, 2, 3, 7, 10**9, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 10**400]
    ),
    st.floats(),
    st.sampled_from([0.0, -0.0, 1e-320, 1e308, float("nan"), float("inf")]),
)
SCALARS = st.one_of(TEXTS, NUMBERS, st.booleans(), st.none())
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=5,
)


def check_message(message: str, *, longest: int = 3000) -> None:
    """One sentence and at most one hint, without anything raw, and short."""
    assert message and not RAW.search(message), ascii(message[:500])
    assert len(message) <= longest, len(message)
    assert "Traceback" not in message and message.count("\n") <= 1


_SWAPS = [
    *(
        b"nan",
        b"inf",
        b"-1",
        b"0",
        b"1e400",
        b"9" * 400,
        b"true",
        b'""',
        b"[]",
        b"{}",
        b"[[",
        b"]]",
        b"'",
        b'"',
        b"=",
    ),
    *(
        b"\x00",
        b"\xff\xfe",
        b"\x1b[2J",
        b"\xe2\x80\xae",
        b"\n",
        b"[" * 3000,
        b'"' + b"x" * 5000 + b'"',
        b"1979-05-27",
    ),
    *(
        b"{ env = 'NO_SUCH_NAME' }",
        b"0xdeadbeef",
        b"1.5",
        b"-0.0",
        b"'''",
        b"\xf0\x9f\x92\xa5",
        b"a.b.c = 1\n",
    ),
]


def mutated(content: bytes, seed: int) -> bytes:
    """The content with one to three things wrong: a piece swapped, lost, doubled, cut off, or a
    value replaced.
    """
    chance = random.Random(seed)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(content) + 1)
        to = min(len(content), at + chance.choice([0, 1, 2, 8, 40]))
        way = chance.randrange(6)
        if way == 0:
            content = content[:at] + chance.choice(_SWAPS) + content[to:]
        elif way == 1:
            content = content[:at] + content[to:]
        elif way == 2:
            content = content[:at] + content[at:to] * 2 + content[to:]
        elif way == 3 and chance.random() < 0.2:
            content = content[:at]
        elif way == 4:
            content = content[:at] + bytes([chance.randrange(256)]) + content[at + 1 :]
        else:
            content = _with_another_value(content, chance)
    return content


def _with_another_value(content: bytes, chance: random.Random) -> bytes:
    lines = content.split(b"\n")
    settings = [
        at for at, line in enumerate(lines) if b"=" in line and not line.lstrip().startswith(b"#")
    ]
    if settings:
        at = chance.choice(settings)
        lines[at] = lines[at].partition(b"=")[0] + b"= " + chance.choice(_SWAPS)
    return b"\n".join(lines)


def mutations(file: Path, count: int) -> list[bytes]:
    """So many mutations of a file, the same each time."""
    content = file.read_bytes()
    return [mutated(content, seed) for seed in range(count)]
