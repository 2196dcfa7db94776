"""The values in a sentence, for tests that do not depend on its words."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"(?<![\w./-])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?(?![\w])")


def numbers_in(text: str) -> list[float]:
    """Return the numbers of a text in their order: [31, 1000, 0.03] for "31 of 1,000 (0.03)".

    A number that is part of a word, as in "step-00000060", "/tmp/33" or "x0.5", is not one of them.
    """
    return [float(number.replace(",", "")) for number in _NUMBER.findall(text)]
