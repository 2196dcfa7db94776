"""Data of which nothing is usable ends a run of two ranks at once, with words and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.ranks import wait_ranks
from tests.support.running import new_run, of_kind, start_run, tiny
from tests.support.texts import numbers_in

CONTENTS = {
    "no text field": '{"text": 3}\n',
    "broken JSON": '{"text": "cut off\n',
    "empty": "",
}


@pytest.mark.parametrize("what", CONTENTS)
def test_no_rank_waits_for_a_corpus_that_cannot_be(tmp_path: Path, what: str) -> None:
    (tmp_path / "bad.jsonl").write_text(CONTENTS[what], encoding="utf-8")
    run = new_run(tiny(tmp_path, world=2, data={"sources": [str(tmp_path / "bad.jsonl")]}))
    # Deliberate ends exit with 0, or torch elastic would try again. Without the fix rank 1 waits
    # half an hour.
    assert wait_ranks(start_run(run, 2), seconds=60) == [0, 0]
    (ended,) = of_kind(run, "ended")
    assert (ended.data["phase"], ended.data["exit_code"]) == ("failed", 2)
    first = ended.message.splitlines()[0]
    assert str(tmp_path / "bad.jsonl") in first and numbers_in(first)[-1] == 1, "files read"
