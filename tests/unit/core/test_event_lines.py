"""The fields of a journal line in the order in which they are written, and its sentence."""

from __future__ import annotations

from typing import Any

import pytest

from guardrail.core.events.event import Event
from guardrail.core.events.faults import Notified, RankFailed, RankHung
from guardrail.core.events.kinds import with_data
from guardrail.core.events.run_state import (
    CheckpointChanged,
    CommandAnswered,
    Ended,
    Note,
    Paused,
    Resumed,
)

QUESTION: dict[str, Any] = {
    "proposals": ({"choice": 0, "action": "rollback"},),
    "asks": True,
    "findings": (),
    "incident": None,
    "onset": None,
    "end": 16,
    "deadline": 0.0,
    "default": "",
}
SAVE: dict[str, Any] = {
    "path": "step-5",
    "state": "candidate",
    "cp_step": 5,
    "bytes": 0,
    "seconds": 0.0,
    "reason": "",
}
ANSWER: dict[str, Any] = {
    "id": "a",
    "command": "lr",
    "value": 0.5,
    "who": "ann",
    "question": 0,
    "effect": "applied",
    "reason": "",
}
FAILED: dict[str, Any] = {
    "rank": 1,
    "exit": 1,
    "error": "",
    "host": "vm",
    "log": "logs/rank-1.log",
}
HUNG: dict[str, Any] = {
    "rank": None,
    "phase": "step",
    "seconds": 60.5,
    "host": "vm",
    "stacks": ("logs/rank-1.stacks",),
}
SENT: dict[str, Any] = {
    "of": 7,
    "event": "paused",
    "way": "webhook",
    "ok": True,
    "reason": "",
    "seconds": 0.25,
}
ENDED: dict[str, Any] = {"phase": "failed", "exit_code": 4, "reason": "no disk"}
SAVED: dict[str, Any] = {"phase": "halted", "reason": "no", "saved": False, "planned": "halted"}


@pytest.mark.parametrize(
    ("event", "fields"),
    [
        (Paused.by_user("ann"), {"proposals": (), "asks": False}),
        (Paused(message="?", asks=False), {"proposals": (), "asks": False}),
        (Paused(**QUESTION), QUESTION),
        (Resumed(), {}),
        (Resumed.after_question("go_on", question=0, who=""), {"question": 0, "who": ""}),
        (Resumed(question=3, who="ann"), {"question": 3, "who": "ann"}),
        (Resumed(answer="stop"), {"answer": "stop", "incident": None}),
        (CheckpointChanged(**SAVE), SAVE),
        (
            CheckpointChanged(path="step-5", state="good", cp_step=5),
            {"path": "step-5", "state": "good", "cp_step": 5},
        ),
        (
            CheckpointChanged(path="step-5", state="foreign", reason="no id"),
            {"path": "step-5", "state": "foreign", "reason": "no id"},
        ),
        (CommandAnswered(**ANSWER), ANSWER),
        (CommandAnswered(**ANSWER, batch=(8, 16)), {**ANSWER, "batch": (8, 16)}),
        (Ended(**ENDED), ENDED),
        (Ended(**SAVED), SAVED),
        (RankFailed(**FAILED), FAILED),
        (RankHung(**HUNG), HUNG),
        (Notified(**SENT), SENT),
        (Note(message="so", data={"size": 3}), {"size": 3}),
    ],
)
def test_fields_are_written_in_this_order(event: Event, fields: dict[str, Any]) -> None:
    written = with_data(event).data
    assert list(written.items()) == list(fields.items())


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (Paused.by_user("ann@vm"), "paused by ann@vm"),
        (Paused.by_user(""), "paused by a command"),
        (Resumed(), "training continues"),
        (
            Resumed.after_question("as_proposed", question=3, who="ann"),
            "training continues: as proposed",
        ),
        (CheckpointChanged(**SAVE), "checkpoint step-5: candidate"),
        (
            CheckpointChanged(state="failed", cp_step=5, seconds=1.0, reason="no room"),
            "checkpoint of step 5: failed (no room)",
        ),
        (CheckpointChanged(path="step-5", state="good"), "checkpoint step-5 is good"),
        (
            CheckpointChanged(path="step-5", state="suspect"),
            "checkpoint step-5 is suspect: it holds steps that were discarded",
        ),
        (
            CheckpointChanged(path="step-5", state="suspect", seconds=1.0, reason="why"),
            "checkpoint step-5: suspect (why)",
        ),
        (
            CheckpointChanged(path="step-5", state="invalid", reason="a file is missing"),
            "checkpoint step-5 is not used: a file is missing",
        ),
        (
            CheckpointChanged.withdrawn("step-5", cp_step=5, since=3),
            "checkpoint step-5 is a candidate again: the incident since step 3 is not over",
        ),
        (CommandAnswered(command="lr", effect="applied"), "lr applied"),
        (CommandAnswered(effect="refused", reason="not JSON"), "command refused: not JSON"),
        (
            CommandAnswered(step=7, command="lr", effect="applied").with_words("lr x0.5"),
            "lr x0.5 takes effect after step 7",
        ),
        (
            CommandAnswered(command="lr", effect="refused", reason="no").with_words("lr x0.5"),
            "lr x0.5 refused: no",
        ),
        (RankFailed(rank=1, exit=1, host="vm"), "rank 1 exited with 1 on vm"),
        (
            RankFailed(rank=0, exit=1, error="E: x", host="vm"),
            "rank 0 exited with 1 (E: x) on vm",
        ),
        (RankFailed(rank=0, exit=-9, host="vm"), "rank 0 was killed by SIGKILL on vm"),
        (RankFailed(rank=0, exit=-77, host="vm"), "rank 0 was killed by signal 77 on vm"),
        (Notified(of=7, event="paused", way="webhook"), "paused of line 7 by webhook: sent"),
        (
            Notified(of=7, event="paused", way="webhook", reason="no route"),
            "paused of line 7 by webhook: failed: no route",
        ),
    ],
)
def test_the_sentence_of_a_line(event: Event, said: str) -> None:
    assert event.sentence() == said
    assert with_data(event).message == said
