"""Journal lines that older versions have written are read in the words of this version."""

from __future__ import annotations

import json
from typing import Any

import pytest

from guardrail.core.records import Cause, Event, Remedy, Span
from guardrail.decide.run_history import RunHistory
from guardrail.rundir.journal import parse

OLD_SPAN = {"first": 8, "last": 16, "cause": "rejected", "step": 3}
OLD_REMEDY = {"kind": "lr", "value": 0.5, "from_step": 4, "hold": 20, "back": 40}


def read(kind: str, **data: Any) -> Event:
    """One line, as it is read from a file."""
    line = {"seq": 1, "time": 2.0, "step": 3, "timeline": 0, "kind": kind, "message": "", **data}
    (event,), _ = parse(json.dumps(line).encode() + b"\n")
    return event


def test_span_and_remedies_of_an_old_line_are_read() -> None:
    past = RunHistory.of([read("left_out", span=OLD_SPAN, remedies=[OLD_REMEDY])])
    span = Span(first=8, last=16, origin="rejected", step=3)
    remedy = Remedy(kind="lr", value=0.5, from_step=4, hold_steps=20, ramp_steps=40)
    assert (past.spans, past.remedies, past.unread) == ([span], [(span, remedy)], 0)


@pytest.mark.parametrize(
    ("old", "new"),
    [("data x state", Cause.DATA_AND_STATE), ("hardware or nondeterminism", Cause.HARDWARE)],
)
def test_old_words_of_causes_are_read(old: str, new: Cause) -> None:
    assert read("cause", cause=old).data["cause"] == new.value
    assert Cause(old) is new


@pytest.mark.parametrize("remedies", ["text", 3, [3, None, "text"], {"hold": 1}])
def test_remedies_that_make_no_sense_do_not_raise(remedies: object) -> None:
    assert read("left_out", span=OLD_SPAN, remedies=remedies).kind == "left_out"
