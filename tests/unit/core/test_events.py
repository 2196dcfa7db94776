"""One contract for all kinds of journal lines: to disk and back, a sentence, what the screen shows."""

from __future__ import annotations

import json
import random
import typing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from guardrail.core.events.event import FIXED, Event
from guardrail.core.events.kinds import (
    BY_KIND,
    EVENT_CLASSES,
    fields_to_write,
    make_event,
    own_fields,
    with_data,
)
from guardrail.core.events.old_names import OLD_COMMANDS
from guardrail.core.sections import NotifySection
from guardrail.decide.control_commands.registry import old_names
from guardrail.rundir.journal import parse
from guardrail.rundir.run_directory import RunDirectory

TONES = ("plain", "good", "warn", "bad")
SPAN = {"first": 8, "last": 16, "cause": "rejected", "step": 3}
REMEDY = {"kind": "lr", "value": 0.5, "from_step": 4, "hold_steps": 20, "ramp_steps": 40}
FINDING = {
    **{"signal": "loss", "step": 3, "kind": "loss_spike", "severity": "reject", "value": "nan"},
    **{"baseline": 2.0, "score": 9.0, "threshold": 8.0, "onset": 3},
}
CURVE = {"middle": 1.0, "level": 0.5, "slope": -0.1, "noise": 0.01, "spread": 3.0, "count": 20}
SPECIAL: dict[str, Any] = {
    "span": SPAN,
    "spans": [SPAN],
    "remedies": [REMEDY],
    "findings": [FINDING],
    "curve": CURVE,
    "evidence": {"label_order": {"here": 0.1, "normal": 2.0}},
    "documents": [{"path": "a.txt"}],
    "pardons": [[8, 16]],
}
SIMPLE: dict[Any, Any] = {int: 7, float: 0.5, str: "text", bool: True}


def value_of(name: str, annotation: Any) -> Any:
    """A value of a field, as it stands on disk."""
    if name in SPECIAL:
        return SPECIAL[name]
    if typing.get_origin(annotation) is typing.Annotated:
        return 7
    if annotation in SIMPLE:
        return SIMPLE[annotation]
    arguments = [one for one in typing.get_args(annotation) if one is not type(None)]
    if typing.get_origin(annotation) is dict:
        return {"0": "text"}
    if typing.get_origin(annotation) is tuple:
        return [value_of("", one) for one in arguments if one is not Ellipsis]
    if annotation is Any:
        return {"id": 3}
    return value_of("", arguments[0])


def full_line(cls: type[Event]) -> dict[str, Any]:
    """A line of a kind with all of its fields, and one that this version does not know."""
    fields = {key: value_of(name, kind) for name, (key, kind) in own_fields(cls).items()}
    fixed = {"seq": 1, "time": 2.5, "step": 3, "timeline": 1, "kind": cls().kind, "message": "so"}
    return {**fixed, **fields, "of_a_newer_version": [1, 2]}


@pytest.fixture(params=EVENT_CLASSES, ids=[cls.__name__ for cls in EVENT_CLASSES])
def cls(request: pytest.FixtureRequest) -> type[Event]:
    return request.param  # type: ignore[no-any-return]


def test_kinds_are_unique() -> None:
    assert len(BY_KIND) == len(EVENT_CLASSES)


def test_a_line_is_read_in_the_class_of_its_kind(cls: type[Event]) -> None:
    line = full_line(cls)
    (event,), _ = parse(json.dumps(line).encode() + b"\n")
    assert type(event) is cls and event.unreadable == ()
    assert {name: getattr(event, name) for name in FIXED} == {name: line[name] for name in FIXED}
    assert event.data == {name: value for name, value in line.items() if name not in FIXED}
    defaults = cls()
    for name in own_fields(cls):
        assert getattr(event, name) != getattr(defaults, name), name


def test_what_is_written_is_read_again(cls: type[Event], tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "demo", "")
    (read,), _ = parse(json.dumps(full_line(cls)).encode() + b"\n")
    own = {name: getattr(read, name) for name in own_fields(cls)}
    built = with_data(cls(message="so", **own))
    run.append(built.kind, built.message, step=3, timeline=1, **built.data)
    (back,) = run.events()
    assert type(back) is cls and back.unreadable == () and back.message == "so"
    same = [name for name in own if name not in ("findings", "tokens")]
    assert [getattr(back, name) for name in same] == [own[name] for name in same]


def test_defaults_are_read_again(cls: type[Event]) -> None:
    """Fields that are not optional always stand on the line."""
    event = with_data(cls())
    keys = {name: key for name, (key, _) in own_fields(cls).items()}
    assert set(fields_to_write(cls())) == {keys[name] for name in keys if name not in cls.optional}
    line = msgspec.to_builtins({"seq": 1, "time": 0.0, "kind": event.kind, **event.data})
    again = make_event(line)
    assert type(again) is cls and again.unreadable == ()
    assert [getattr(again, name) for name in keys] == [getattr(event, name) for name in keys]


def test_the_screen_and_the_notifier_know_it(cls: type[Event]) -> None:
    event = make_event(full_line(cls))
    assert len(event.symbol) == 1 and event.tone in TONES and event.sentence() == "so"
    words = typing.get_args(typing.get_args(typing.get_type_hints(NotifySection)["on"])[0])
    if cls.__name__ in ("RankFailed", "RankHung", "RolledBack", "Undone", "Paused", "DiskChanged"):
        assert event.notice in words
    assert isinstance(cls().sentence(), str)


VALUES: tuple[Any, ...] = (
    *(None, "", "text", "nan", -1, 7, 10**30, 2.5, True, [], [1], [1, 2], [None], [{}], {}),
    *({"a": 1}, [[1, 2], [3]], [{"first": "x"}], {"first": 1}, "\x1b[2J", 1e300),
)


def test_a_damaged_line_never_raises(cls: type[Event]) -> None:
    generator = random.Random(7)
    names = [*(key for key, _ in own_fields(cls).values()), "data", "unreadable"]
    for _ in range(300):
        chosen = generator.sample(names, min(len(names), 4))
        damage = {name: generator.choice(VALUES) for name in chosen}
        event = make_event({"seq": 1, "time": 0.0, "kind": cls().kind, **damage})
        assert type(event) is cls
        assert event.tone in TONES and isinstance(event.notice, str)
        assert isinstance(event.sentence(), str)
        assert (
            event.data == damage or "remedies" in damage or cls().kind in ("command", "diagnosis")
        )


def test_a_list_keeps_the_items_that_can_be_read() -> None:
    line = {"seq": 1, "time": 0.0, "kind": "undo", "spans": [{"first": "x"}, SPAN], "lines": [3]}
    event = make_event(line)
    assert event.unreadable == ("spans",)
    with pytest.raises(ValueError, match="spans"):
        event.check_readable("lines", "spans")
    event.check_readable("lines")
    assert [span.first for span in event.spans] == [8]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "change", [{"seq": 2**63}, {"step": -(2**63) - 1}, {"time": "x"}, {"kind": 3}, {"message": 3}]
)
def test_a_line_whose_fixed_fields_are_damaged_is_none(change: dict[str, Any]) -> None:
    line = {"seq": 1, "time": 0.0, "kind": "note", **change}
    assert parse(json.dumps(line).encode() + b"\n")[0] == []


def test_a_kind_of_another_version_is_an_event_with_its_data() -> None:
    event = make_event({"seq": 1, "time": 0.0, "kind": "novel", "a": 1, "data": 3})
    assert type(event) is Event and event.data == {"a": 1, "data": 3}


def test_old_names_of_commands_are_those_of_the_command_classes() -> None:
    assert old_names() == OLD_COMMANDS
