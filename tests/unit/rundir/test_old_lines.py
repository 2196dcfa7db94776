"""Journal lines that older versions have written are read in the words of this version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from guardrail.core.config import GuardConfig, build_config
from guardrail.core.events.decisions import HIGHER_LOSS
from guardrail.core.events.event import Event
from guardrail.core.records.spans import Span
from guardrail.core.records.verdicts import Cause, Remedy
from guardrail.core.sections import NotifySection
from guardrail.decide.run_history import RunHistory
from guardrail.rundir.journal import parse
from guardrail.rundir.run_directory import RunDirectory

OLD_SPAN = {"first": 8, "last": 16, "cause": "rejected", "step": 3}
OLD_REMEDY = {"kind": "lr", "value": 0.5, "from_step": 4, "hold": 20, "back": 40}


def read(kind: str, **data: Any) -> Event:
    """One line, as it is read from a file."""
    line = {"seq": 1, "time": 2.0, "step": 3, "timeline": 0, "kind": kind, "message": "", **data}
    (event,), _ = parse(json.dumps(line).encode() + b"\n")
    return event


def test_span_and_remedies_of_an_old_line_are_read() -> None:
    past = RunHistory.from_events([read("left_out", span=OLD_SPAN, remedies=[OLD_REMEDY])])
    span = Span(first=8, last=16, origin="rejected", step=3)
    remedy = Remedy(kind="lr", value=0.5, from_step=4, hold_steps=20, ramp_steps=40)
    assert (past.spans, past.remedies, past.unread) == ([span], [(span, remedy)], 0)


@pytest.mark.parametrize(
    ("old", "new"),
    [("data x state", Cause.DATA_AND_STATE), ("hardware or nondeterminism", Cause.HARDWARE)],
)
def test_old_words_of_causes_are_read(old: str, new: Cause) -> None:
    assert read("diagnosis", cause=old).data["cause"] == new.value
    assert Cause(old) is new


@pytest.mark.parametrize("remedies", ["text", 3, [3, None, "text"], {"hold": 1}])
def test_remedies_that_make_no_sense_do_not_raise(remedies: object) -> None:
    assert read("left_out", span=OLD_SPAN, remedies=remedies).kind == "skipped"


@pytest.mark.parametrize(
    ("kind", "data", "new_kind", "new_data"),
    [
        ("left_out", {}, "skipped", {}),
        ("cause", {"cause": "data x state"}, "diagnosis", {"cause": "data, only from this state"}),
        ("durability", {"state": "degraded"}, "disk", {"state": "failing"}),
        ("durability", {"state": "ok"}, "disk", {"state": "ok"}),
        ("ranks_failed", {"rank": 1}, "rank_failed", {"rank": 1}),
        ("hung", {"rank": 1}, "rank_hung", {"rank": 1}),
        ("incident", {"state": "recurred"}, "incident", {"state": "repeated"}),
        ("incident", {"state": "offset"}, "incident", {"state": "recovered with higher loss"}),
        ("command", {"command": "policy"}, "command", {"command": "mode"}),
        ("future", {"state": "offset"}, "future", {"state": "offset"}),
    ],
)
def test_old_kinds_and_words_are_read(
    kind: str, data: dict[str, Any], new_kind: str, new_data: dict[str, Any]
) -> None:
    event = read(kind, **data)
    assert (event.kind, event.data) == (new_kind, new_data)


@pytest.mark.parametrize("old", [{"durability": "degraded: journal: full"}, {"durability": "ok"}])
def test_the_disk_of_an_old_status_is_read(tmp_path: Path, old: dict[str, str]) -> None:
    run = RunDirectory.create(tmp_path, "demo", "")
    (run.path / "status.json").write_text(json.dumps({"run": "demo", "phase": "step", **old}))
    status = run.read_status()
    assert status is not None
    assert status.disk == old["durability"].replace("degraded", "failing")


def test_old_events_of_notify_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = {"notify": {"on": ["hung", "offset", "paused"]}}
    settings = build_config(tree, file="f", base=tmp_path, schema=GuardConfig)
    assert settings.notify.on == ("rank_hung", HIGHER_LOSS, "paused")
    assert NotifySection(on=("ranks_failed",)).on == ("rank_failed",)
    assert "rank_hung" in capsys.readouterr().err
