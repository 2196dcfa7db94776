"""A journal line that another version has written, or that is damaged, changes nothing and stops
nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from guardrail.backtest.rejudge import Rejudge
from guardrail.core.events.event import Event
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.verdicts import Mode
from guardrail.decide.controller import Controller
from guardrail.decide.run_history import RunHistory
from guardrail.rundir.run_directory import RunDirectory
from tests.support.events import make_line
from tests.support.jumping import Loop

WRONG: tuple[Any, ...] = (None, "x", [], [1], {}, -1, 1e300, float("nan"), "absent")


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Loop:
    return Loop(
        tmp_path_factory.mktemp("run"), bad=range(480, 540), mode=Mode.AUTO, max_skipped_share=1.0
    ).train()


@pytest.fixture(scope="module")
def events(loop: Loop) -> list[Event]:
    """Of a run with verdicts, a rollback, an undo, an accepted incident and a command."""
    found = loop.run.events()
    kinds = {event.kind for event in found}
    assert {"verdict", "rollback", "incident", "checkpoint"} <= kinds, kinds
    seq = len(found)
    rollback = next(event for event in found if event.kind == "rollback")
    more: list[tuple[str, dict[str, Any]]] = [
        ("undo", {"rollbacks": [1], "pardons": [[480, 488]], "to_step": 30, "new_timeline": 2}),
        (
            "diagnosis",
            {
                "cause": "data",
                "incident": 1,
                "at_step": 61,
                "batch": [480, 488],
                "onset": 61,
                "signals": ["loss"],
            },
        ),
        ("command", {"command": "accept", "effect": "applied", "value": 0.0, "batch": [480, 488]}),
        ("command", {"command": "mode", "effect": "applied", "value": 1.0}),
        ("command", {"command": "lr", "effect": "applied", "value": 0.5}),
        ("resumed", {"answer": "go_on"}),
        ("ended", {"phase": "stopped"}),
    ]
    for kind, data in more:
        seq += 1
        found.append(
            make_line(seq=seq, time=0.0, step=rollback.step, timeline=1, kind=kind, data=data)
        )
    return found


def damaged(events: list[Event]) -> Iterator[tuple[str, list[Event]]]:
    """Each field of the first line of each kind, wrong in each way."""
    seen: set[tuple[str, str, str]] = set()
    for at, event in enumerate(events):
        for key in event.data:
            # A line differs by its command, its action or its state.
            which = (
                event.kind,
                key,
                str(
                    event.data.get("command") or event.data.get("action") or event.data.get("state")
                ),
            )
            if which in seen:
                continue
            seen.add(which)
            for value in WRONG:
                other = copy.deepcopy(events)
                if value == "absent":
                    del other[at].data[key]
                else:
                    other[at].data[key] = value
                yield f"{which} = {value!r}", other


def test_a_run_goes_on_after_it(
    loop: Loop, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0
    for what, lines in damaged(events):
        try:
            past = RunHistory.from_events(lines)
            controller = Controller(GuardOptions())
            controller.rebuild(lines)
            controller.memory.load_rollbacks(past.rollbacks)
            past.effects(70, GuardOptions())
            monkeypatch.setattr(RunDirectory, "events", lambda _, lines=lines: lines)
            again = Rejudge(loop.run, GuardOptions(), own=True)
            if count % 20 == 0:
                list(again)
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error
        count += 1
    assert count > 300
