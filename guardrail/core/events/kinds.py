"""All kinds of journal lines: name -> class, and what makes a line of one kind from its fields."""

from __future__ import annotations

import functools
import typing
from collections.abc import Mapping
from typing import Any

import msgspec

from guardrail.core.events import decisions, faults, run_state
from guardrail.core.events.event import FIXED, SENSELESS, Event
from guardrail.core.events.old_names import OLD_KINDS, OLD_WORDS, use_present_names

EVENT_CLASSES: tuple[type[Event], ...] = (
    decisions.FindingNoted,
    decisions.VerdictGiven,
    decisions.Skipped,
    decisions.RolledBack,
    decisions.Undone,
    decisions.RemedyUsed,
    decisions.IncidentChanged,
    decisions.Diagnosed,
    run_state.Started,
    run_state.Restarted,
    run_state.Ended,
    run_state.ResumeChecked,
    run_state.Evaluated,
    run_state.Paused,
    run_state.Resumed,
    run_state.CommandAnswered,
    run_state.CheckpointChanged,
    run_state.Note,
    faults.RankFailed,
    faults.RankHung,
    faults.DiskChanged,
    faults.Notified,
)
BY_KIND: Mapping[str, type[Event]] = {cls().kind: cls for cls in EVENT_CLASSES}


def make_event(fields: dict[str, Any]) -> Event:
    """Return the event of a journal line, in the class of its kind.

    A field that holds no value of its type has its default, and is named in `unreadable`. A list
    keeps those of its items that can be read.

    Args:
        fields: all fields of the line, as on disk or as live records. Becomes the `data` of the
            event: the fixed ones are taken out of it.

    Raises:
        msgspec.ValidationError: a fixed field is damaged.
    """
    kind = fields.get("kind")
    if not isinstance(kind, str):
        raise msgspec.ValidationError("the kind of a line is no text")
    if kind in OLD_KINDS or kind in OLD_WORDS or "remedies" in fields:
        use_present_names(fields)
        kind = fields["kind"]
    cls = BY_KIND.get(kind, Event)
    if cls is Event or "data" in fields or "unreadable" in fields:
        return _make_from_readable(cls, fields)
    try:
        event = msgspec.convert(fields, cls, strict=False)
    except SENSELESS:
        return _make_from_readable(cls, fields)
    for name in FIXED:
        fields.pop(name, None)
    msgspec.structs.force_setattr(event, "data", fields)
    return event


def _make_from_readable(cls: type[Event], fields: dict[str, Any]) -> Event:
    """Return the event as `make_event` does, converting each field by itself."""
    fixed = {name: fields.pop(name) for name in FIXED if name in fields}
    base = msgspec.convert({**fixed, "data": fields}, Event)
    if cls is Event:
        return base
    values: dict[str, Any] = {}
    unreadable = []
    for name, (key, annotation) in own_fields(cls).items():
        if key not in fields:
            continue
        try:
            values[name] = msgspec.convert(fields[key], annotation, strict=False)
        except SENSELESS:
            unreadable.append(name)
            kept = _readable_items(fields[key], annotation)
            if kept is not None:
                values[name] = kept
    head = {name: getattr(base, name) for name in FIXED}
    return cls(**head, data=fields, unreadable=tuple(unreadable), **values)


def _readable_items(value: Any, annotation: Any) -> tuple[Any, ...] | None:
    """Return the items of a list that can be read; None where the field holds no list."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is not tuple or arguments[-1] is not Ellipsis:
        return None
    if not isinstance(value, (list, tuple)):
        return None
    kept = []
    for item in value:
        try:
            kept.append(msgspec.convert(item, arguments[0], strict=False))
        except SENSELESS:
            continue
    return tuple(kept)


@functools.cache
def own_fields(cls: type[Event]) -> dict[str, tuple[str, Any]]:
    """Return the fields of a kind beside the fixed ones: name -> (key on disk, type)."""
    hints = typing.get_type_hints(cls, include_extras=True)
    keys = dict(zip(cls.__struct_fields__, cls.__struct_encode_fields__, strict=True))
    names = [name for name in cls.__struct_fields__ if name not in Event.__struct_fields__]
    return {name: (keys[name], hints[name]) for name in names}


def with_data(event: Event) -> Event:
    """Return an event that was built from its fields, with its `data` and its `message`."""
    return msgspec.structs.replace(event, data=fields_to_write(event), message=event.sentence())


def fields_to_write(event: Event) -> dict[str, Any]:
    """Return the fields of an event beside the fixed ones, by their keys on disk.

    They are its `data` and its own fields, without those that it may omit and that have their
    defaults.
    """
    cls = type(event)
    defaults = cls()
    found = dict(event.data)
    for name, (key, _) in own_fields(cls).items():
        value = getattr(event, name)
        if value != getattr(defaults, name) or not event.may_omit(name):
            found[key] = value
    return found
