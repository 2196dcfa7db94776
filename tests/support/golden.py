"""Golden files: output that must stay as it is, to the character.

    GOLDEN_UPDATE=1 python -m pytest tests/unit/report/test_golden.py

writes them anew. Read the difference before committing it.
"""

from __future__ import annotations

import difflib
import os

from tests.support.places import TESTS

GOLDEN = TESTS / "golden"
UPDATE = "GOLDEN_UPDATE"


def assert_golden(name: str, text: str) -> None:
    """Compare `text` with tests/golden/NAME, or write it there where GOLDEN_UPDATE is set."""
    file = GOLDEN / name
    if os.environ.get(UPDATE):
        GOLDEN.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return
    assert file.exists(), f"{file} is missing: {UPDATE}=1 python -m pytest writes it"
    expected = file.read_text(encoding="utf-8")
    if text != expected:
        difference = difflib.unified_diff(
            expected.splitlines(), text.splitlines(), "golden", "now", n=0, lineterm=""
        )
        shown = "\n".join(difference)[:3000]
        raise AssertionError(f"{file}: {UPDATE}=1 python -m pytest writes it anew\n{shown}")
