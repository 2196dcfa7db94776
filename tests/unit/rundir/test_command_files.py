"""The inbox obeys its owner, answers everything, and stumbles over nothing that lies in it."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import pytest

from guardrail.core.errors import RunDirectoryError
from guardrail.core.events.event import Event
from guardrail.core.files import as_float
from guardrail.core.records.commands import Command
from guardrail.decide.control_commands.registry import find_command
from guardrail.rundir.command_files import MAX_ID, Inbox, check_command, find_interrupted
from guardrail.rundir.mailbox import CommandPoller
from guardrail.rundir.run_directory import RunDirectory
from tests.support.events import make_line
from tests.support.lab import wait_for


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "runs", "demo", "[run]\nname = 'demo'\n")


def test_commands_arrive_oldest_first_and_leave_when_answered(run: RunDirectory) -> None:
    sent = [
        Command(id="a", kind="pause", who="me", time=5.0),
        Command(id="b", kind="rollback", value=math.nan),
        Command(id="c", kind="lr", value=0.5, at_step=9),
    ]
    for command in sent:
        run.send(command)
    pending = run.commands_pending()
    assert [c.id for c in pending] == ["a", "b", "c"]
    assert pending[0] == sent[0] and pending[2] == sent[2] and math.isnan(pending[1].value)
    run.answer(pending[0], applied=True, step=4, timeline=1)
    run.command_done("b")
    assert [c.id for c in RunDirectory.open(run.path).commands_pending()] == ["c"]
    answer = run.events()[0]
    assert (answer.kind, answer.step, answer.data["id"], answer.data["effect"]) == (
        "command",
        4,
        "a",
        "applied",
    )
    run.command_done("never sent")
    assert len(os.listdir(run.commands)) == 1


def test_an_answered_command_is_not_obeyed_again_after_a_crash(run: RunDirectory) -> None:
    run.send(Command(id="once", kind="rollback", value=3))
    run.append("command", id="once", effect="applied")  # and dies before it can remove the file
    assert RunDirectory.open(run.path).commands_pending() == []
    assert os.listdir(run.commands) == []


# The content of a file -> (the check that refuses it, the kind of the command as it was read).
BAD_COMMANDS = {
    "empty": (b"", "not_json", ""),
    "half": (b'{"kind": "pau', "not_json", ""),
    "binary": (b"\xff\x00\x1b[2J", "not_json", ""),
    "deep": (b"[" * 30_000, "not_json", ""),
    "list": (b'["pause"]', "not_an_object", ""),
    "kind": (b'{"kind": "explode"}', "unknown_kind", "explode"),
    "no-kind": (b'{"value": 1}', "unknown_kind", ""),
    "kind-type": (b'{"kind": ["pause"]}', "unknown_kind", "(list)"),
    "value-type": (b'{"kind": "lr", "value": "much"}', "wrong_type", "lr"),
    "value-huge": (b'{"kind": "skip", "value": 1e999}', "not_json", ""),
    "step-type": (b'{"kind": "pause", "at_step": "soon"}', "wrong_type", "pause"),
    "step-huge": (b'{"kind": "pause", "at_step": 99999999999999999999}', "out_of_range", "pause"),
    "lr-zero": (b'{"kind": "lr", "value": 0}', "out_of_range", "lr"),
    "lr-nan": (b'{"kind": "lr", "value": "nan"}', "out_of_range", "lr"),
    "alpha": (b'{"kind": "embed-alpha", "value": 1.5}', "out_of_range", "shrink-embedding"),
    "skip": (b'{"kind": "skip", "value": 2.5}', "out_of_range", "skip"),
    "rollback": (b'{"kind": "rollback", "value": -3}', "out_of_range", "rollback"),
    "policy": (b'{"kind": "policy", "value": 7}', "out_of_range", "mode"),
    "answer": (b'{"kind": "answer", "value": 3}', "out_of_range", "answer"),
    "pause": (b'{"kind": "pause", "value": 5}', "out_of_range", "pause"),
    "id": (b'{"kind": "pause", "id": "../../etc"}', "out_of_range", "pause"),
    "large": (b" " * 70_000, "too_large", ""),
}


# What the reason names, if it is not the range of the command's argument.
LIMITS = {"id": str(MAX_ID), "step-huge": "at_step"}


@pytest.mark.parametrize("name", BAD_COMMANDS)
def test_bad_commands_are_refused_with_a_reason(run: RunDirectory, name: str) -> None:
    content, problem, kind = BAD_COMMANDS[name]
    (run.commands / f"{name}.json").write_bytes(content)
    run.send(Command(id="good", kind="pause"))
    assert [c.id for c in run.commands_pending()] == ["good"]
    (refusal,) = run.commands_refused()
    assert (refusal.problem, refusal.kind) == (problem, kind), refusal.reason
    assert refusal.id == name and refusal.reason and refusal.reason.isprintable()
    if problem == "out_of_range":
        assert LIMITS.get(name, find_command(kind).argument.expected) in refusal.reason
    run.answer(refusal, applied=False, step=3)
    assert run.commands_refused() == [] and [c.id for c in run.commands_pending()] == ["good"]
    answer = run.events()[-1]
    assert (
        answer.data["effect"] == "refused"
        and answer.data["reason"] == refusal.reason
        and answer.data["id"] == name
    )


def test_a_rollback_without_a_value_means_the_newest_good_state(run: RunDirectory) -> None:
    (run.commands / "by-hand.json").write_text('{"kind": "rollback", "new": true}')
    (run.commands / "null.json").write_text('{"kind": "rollback", "value": null}')
    pending = run.commands_pending()
    assert sorted(c.id for c in pending) == ["by-hand", "null"] and all(
        math.isnan(c.value) for c in pending
    )


def test_links_pipes_and_folders_in_the_inbox_are_refused_and_removed(
    run: RunDirectory, tmp_path: Path
) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text('{"kind": "stop"}')
    (run.commands / "link.json").symlink_to(secret)
    (run.commands / "dangling.json").symlink_to(tmp_path / "nowhere")
    os.mkfifo(run.commands / "pipe.json")
    (run.commands / "folder.json").mkdir()
    (run.commands / "full.json").mkdir()
    (run.commands / "full.json" / "x").touch()
    (run.commands / ".tmp-half-written").write_text("{")
    assert run.commands_pending() == []
    refused = run.commands_refused()
    assert sorted(r.id for r in refused) == ["dangling", "folder", "full", "link", "pipe"]
    assert {r.problem for r in refused} == {"no_file"}
    for refusal in refused:
        run.command_done(refusal.id)
    assert secret.exists() and run.commands_refused() == []
    assert sorted(os.listdir(run.commands)) == [".tmp-half-written", "full.json"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to give a file to another user")
def test_a_command_of_another_user_is_refused(run: RunDirectory) -> None:
    run.send(Command(id="theirs", kind="stop"))
    (file,) = run.commands.iterdir()
    os.chown(file, 12345, 12345)
    assert run.commands_pending() == []
    (refusal,) = run.commands_refused()
    assert refusal.problem == "other_owner"
    assert re.findall(r"\d+", refusal.reason) == ["12345", str(os.geteuid())]


def test_only_the_owner_of_the_run_counts(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.send(Command(id="mine", kind="stop"))
    run.inbox.owner += 1
    assert run.commands_pending() == []
    assert [refusal.problem for refusal in run.commands_refused()] == ["other_owner"]
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(RunDirectoryError) as caught:
        run.send(Command(id="other", kind="stop"))
    assert caught.value.kind == "other_owner"


def test_an_inbox_that_is_not_there_is_empty(run: RunDirectory) -> None:
    run.commands.rmdir()
    assert run.commands_pending() == [] and run.commands_refused() == []
    run.send(Command(id="a", kind="pause"))
    assert len(run.commands_pending()) == 1


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("pause", [0.0], [1.0, math.nan, math.inf]),
        ("resume", [0.0], [-1.0]),
        ("checkpoint", [0.0], [2.0]),
        ("stop", [0.0], [2.0]),
        ("rollback", [0.0, 17.0, math.nan], [-1.0, 0.5, math.inf, -math.inf, 1e300]),
        ("skip", [1.0, 500.0], [0.0, -1.0, 1.5, math.nan, math.inf, 1e9]),
        ("lr", [0.5, 1.0, 1e-9], [0.0, -0.1, math.nan, math.inf, 101.0]),
        ("shrink-embedding", [0.1, 1.0], [0.0, 1.1, -0.1, math.nan]),
        ("mode", [0.0, 3.0], [4.0, -1.0, 0.5, math.nan]),
        ("answer", [0.0, 1.0, 2.0], [3.0, -1.0, math.nan, math.inf]),
    ],
)
def test_each_command_has_its_range(kind: str, good: list[float], bad: list[float]) -> None:
    for value in good:
        assert check_command(Command(id="x", kind=kind, value=value)) is None
    for value in bad:
        assert check_command(Command(id="x", kind=kind, value=value)), value


def test_a_command_that_can_never_be_obeyed_is_not_even_sent(run: RunDirectory) -> None:
    for command in (
        Command(id="a", kind="lr", value=-1),
        Command(id="a/b", kind="pause"),
        Command(id="a", kind="pause", at_step=-1),
        Command(id="a", kind="pause", time=math.nan),
    ):
        with pytest.raises(RunDirectoryError) as caught:
            run.send(command)
        assert caught.value.kind == "wrong_command"
    assert os.listdir(run.commands) == []


def line(seq: int, kind: str, step: int = 0, **data: Any) -> Event:
    return make_line(seq=seq, time=0.0, step=step, timeline=0, kind=kind, data=data)


def test_what_was_answered_and_not_done_is_due_where_it_was_said_to_take_effect() -> None:
    def answer(seq: int, id: str, command: str, effect: str = "applied") -> Event:
        return line(seq, "command", seq, id=id, command=command, effect=effect)

    positions = {"first": 8, "last": 16, "step": 1}
    by_guard = {"span": {**positions, "cause": "rejected"}}
    by_user = {"span": {**positions, "cause": "user"}}
    events = [
        answer(1, "a", "skip"),
        line(2, "skipped", **by_guard),
        line(3, "skipped", **by_user),
        answer(4, "b", "rollback"),
        line(5, "rollback", **by_user),
        answer(6, "c", "undo", "refused"),
        answer(7, "d", "lr"),
        answer(8, "e", "undo"),
        line(9, "rollback", **by_guard),
    ]
    assert find_interrupted(events) == {"e": 8}
    assert find_interrupted(events[:1]) == find_interrupted(events[:2]) == {"a": 1}
    assert find_interrupted([*events, line(10, "undo")]) == {}


def test_a_command_whose_action_a_death_has_prevented_is_still_waiting(run: RunDirectory) -> None:
    run.send(Command(id="back", kind="rollback", value=3.0))
    run.send(Command(id="rate", kind="lr", value=0.5))
    for id, command in (("back", "rollback"), ("rate", "lr")):
        run.append("command", "answered", step=17, id=id, command=command, effect="applied")
    (left,) = RunDirectory(run.path).commands_pending()
    assert (left.id, left.at_step) == ("back", 17)


# -- hostile files


def deep(brackets: int) -> bytes:
    return b"[" * brackets + b"]" * brackets


HOSTILE: dict[str, bytes] = {
    "digits": b'{"id":"big","kind":"skip","value":' + b"9" * 400 + b"}",
    "negative": b'{"id":"big","kind":"skip","value":-' + b"9" * 400 + b"}",
    "more-digits": b'{"kind":"skip","value":' + b"9" * 5000 + b"}",
    "step-digits": b'{"kind":"pause","at_step":' + b"9" * 400 + b"}",
    "time-digits": b'{"kind":"pause","time":' + b"9" * 400 + b"}",
    "kind-digits": b'{"kind":' + b"9" * 4000 + b"}",
    "who-deep": b'{"kind":"dance","who":' + deep(900) + b"}",
    "kind-deep": b'{"kind":' + deep(900) + b"}",
    "value-deep": b'{"kind":"skip","value":' + deep(900) + b"}",
    "very-deep": b'{"kind":"skip","value":' + deep(3000) + b"}",
    "nan": b'{"kind":"skip","value":NaN}',
    "infinity": b'{"kind":"skip","value":Infinity}',
    "latin": b'{"kind":"skip","who":"\xe9","value":1}',
    "surrogate": b'{"kind":"lr","value":"\\ud800"}',
    "types": b'{"id":7,"kind":"skip","value":[1],"who":{"a":1},"time":"x","at_step":null}',
    "large": b"7" * (1 << 20),
}


def plant(run: RunDirectory, tmp_path: Path) -> set[str]:
    """All hostile files at once, with a link, a pipe, a folder and 100 MB of nothing; the names of
    all.
    """
    for name, content in HOSTILE.items():
        (run.commands / f"{name}.json").write_bytes(content)
    (run.commands / "link.json").symlink_to(tmp_path / "nowhere")
    os.mkfifo(run.commands / "pipe.json")
    (run.commands / "folder.json").mkdir()
    with (run.commands / "sparse.json").open("wb") as file:
        file.truncate(100 << 20)
    return {*HOSTILE, "link", "pipe", "folder", "sparse"}


@pytest.mark.fault("R4")
def test_hostile_files_are_answered_and_a_command_after_them_is_read(
    run: RunDirectory, tmp_path: Path
) -> None:
    names = plant(run, tmp_path)
    mailbox = CommandPoller(run, seconds=0.01)
    try:
        wait_for(lambda: len(of_command(run)) >= len(names), what="an answer to each file")
        run.send(Command(id="after", kind="pause"))
        wait_for(lambda: mailbox.next(1) is not None, what="the command after them")
    finally:
        mailbox.close()
    answers = of_command(run)
    assert {answer.data["effect"] for answer in answers} == {"refused"}
    assert all(answer.data["reason"].isprintable() for answer in answers)
    assert len(answers) == len(names), "each is answered once"
    assert [name for name in os.listdir(run.commands) if "after" not in name] == []


def of_command(run: RunDirectory) -> list[Event]:
    return [event for event in run.events() if event.kind == "command"]


@pytest.mark.fault("R4")
def test_the_mailbox_outlives_whatever_goes_wrong_in_a_look(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so while it lasts, and reads on afterwards."""
    mailbox = CommandPoller(run, seconds=0.01)
    scan = Inbox.scan

    def failing(self: Inbox) -> Any:
        raise ZeroDivisionError("a mistake")

    try:
        monkeypatch.setattr(Inbox, "scan", failing)
        wait_for(lambda: getattr(mailbox, "problem", "") == "ZeroDivisionError: a mistake")
        monkeypatch.setattr(Inbox, "scan", scan)
        wait_for(lambda: mailbox.problem == "")
        run.send(Command(id="after", kind="pause"))
        wait_for(lambda: mailbox.next(1) is not None)
    finally:
        mailbox.close()


def test_a_mailbox_that_cannot_read_its_folder_says_so(run: RunDirectory, tmp_path: Path) -> None:
    run.commands.rmdir()
    mailbox = CommandPoller(run, seconds=0.01)
    try:
        assert mailbox.problem == "", "a folder that is not there holds no command"
        run.commands.symlink_to(tmp_path)
        wait_for(lambda: "commands/ cannot be opened" in mailbox.problem)
        run.commands.unlink()
        wait_for(lambda: mailbox.problem == "")
    finally:
        mailbox.close()


def test_of_two_files_with_one_id_the_older_counts_and_the_other_is_answered(
    run: RunDirectory,
) -> None:
    run.send(Command(id="same", kind="pause"))
    run.send(Command(id="same", kind="stop"))
    (command,), (refusal,) = run.commands_waiting()
    assert command.kind == "pause"
    assert refusal.problem == "used_id" and "same" in refusal.reason
    run.answer(refusal, applied=False)
    run.answer(command, applied=True)
    assert [event.data["effect"] for event in of_command(run)] == ["refused", "applied"]
    assert os.listdir(run.commands) == []


@pytest.mark.fault("R4")
def test_a_number_from_a_file_never_overflows() -> None:
    from guardrail.core.files import as_int

    assert as_float(10**400) == math.inf and as_float(-(10**400)) == -math.inf
    assert as_float("nan") != as_float("nan") and as_float([1]) != as_float([1])
    assert (
        as_int(10**400, 7),
        as_int(3.9),
        as_int(True, 7),
        as_int("3", 7),
        as_int(math.inf, 7),
    ) == (7, 3, 7, 7, 7)


@pytest.mark.parametrize(
    ("old", "kind", "value"),
    [("embed-alpha", "shrink-embedding", 0.5), ("policy", "mode", 1.0)],
)
def test_old_words_in_files_and_in_the_journal_are_read(
    run: RunDirectory, old: str, kind: str, value: float
) -> None:
    (run.commands / "old.json").write_text(f'{{"id": "old", "kind": "{old}", "value": {value}}}')
    assert [(c.kind, c.value) for c in run.commands_pending()] == [(kind, value)]
    run.append("command", "", id="old", command=old, value=value, effect="applied")
    assert [event.data["command"] for event in run.events()] == [kind]
