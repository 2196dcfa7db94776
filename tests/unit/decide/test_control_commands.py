"""What holds for every command, and that a command of one file needs one line."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from guardrail.cli import ctl
from guardrail.core.errors import UsageError
from guardrail.core.events.run_state import CommandAnswered
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.commands import Command
from guardrail.core.records.status import Phase
from guardrail.core.records.verdicts import Mode
from guardrail.decide.control_commands import registry
from guardrail.decide.control_commands.accept import Accept
from guardrail.decide.control_commands.answer import Answer
from guardrail.decide.control_commands.base import ControlCommand, HoldsFor, ReplayTarget
from guardrail.decide.control_commands.lr import ScaleLearningRate
from guardrail.decide.control_commands.mode import ChangeMode
from guardrail.decide.control_commands.old_kinds import CommandKind
from guardrail.decide.control_commands.shrink_embedding import ShrinkEmbedding
from guardrail.decide.run_history import RunHistory
from guardrail.operate import control
from guardrail.operate.preview import preview_command, preview_in_run
from guardrail.operate.run_state import RunState
from guardrail.rundir.command_files import check_command
from guardrail.rundir.run_directory import RunDirectory
from guardrail.tui.screens import keys
from tests.support.events import make_line
from tests.support.examples.damp_command import FACTOR, Damp
from tests.support.fake_run import FakeRun
from tests.support.places import ROOT
from tests.unit.torch.test_guard import Loop

EVERY = pytest.mark.parametrize("kind", registry.COMMANDS, ids=registry.command_names())
# A value that can be carried out, and texts that no run accepts.
GOOD: dict[str, float] = {
    "rollback": math.nan,
    "skip": 3,
    "lr": 0.5,
    "shrink-embedding": 0.1,
    "mode": 1,
    "undo": math.nan,
    "answer": 1,
}
WRONG = ("much", "-1", "0.5.5", "1e999")


def made(kind: type[ControlCommand]) -> ControlCommand:
    return kind(GOOD.get(kind.name, 0.0))


class Effects(ReplayTarget):
    """What a command line changes, as a list."""

    def __init__(self) -> None:
        self.changes: list[tuple[Any, ...]] = []

    def set_factor(self, factor: str, from_step: int, value: float) -> None:
        self.changes.append((factor, from_step, value))

    def set_mode(self, mode: Mode) -> None:
        self.changes.append((mode,))

    def accept_incidents(self, step: int, batch: tuple[int, int]) -> None:
        self.changes.append((step, batch))


def line(command: ControlCommand, effect: str = "applied", **data: Any) -> CommandAnswered:
    """The journal line of a command at step 7."""
    fields = {"command": command.name, "value": command.value, "effect": effect, **data}
    event = make_line(
        seq=1, time=0.0, step=7, timeline=0, kind="command", message=command.describe(), data=fields
    )
    assert isinstance(event, CommandAnswered)
    return event


# -- every command ---------------------------------------------------------------------------------


def test_names_and_keys_are_unique() -> None:
    names = [name for kind in registry.COMMANDS for name in (kind.name, *kind.aliases)]
    assert len(names) == len(set(names))
    pressed = [key for line in keys.KEYS for key in line.keys.split(",")]
    assert len(pressed) == len(set(pressed))


@EVERY
def test_it_says_what_it_does(kind: type[ControlCommand]) -> None:
    assert kind.help[0].isupper() and kind.help.endswith(".")
    assert kind.__doc__ and re.fullmatch(r"[a-z-]+", kind.name)
    shown = CliRunner().invoke(ctl.command, ["--help"]).output
    usage = f"{kind.name} {kind.argument.metavar}".rstrip()
    assert re.search(rf"^  {re.escape(usage)}  +{re.escape(kind.help)}$", shown, re.MULTILINE)
    guide = (ROOT / "docs" / "operators-guide.md").read_text(encoding="utf-8")
    (row,) = [
        row for row in guide.splitlines() if re.search(rf"^\| `.` \| .*`{kind.name}[ `]", row)
    ]
    if kind.key is not None:
        assert row.startswith(f"| `{kind.key.key}` |")
        assert any(key.help == kind.key.help and key.control for key in keys.KEYS)


@EVERY
def test_a_wrong_value_is_refused_with_the_name_and_what_is_expected(
    kind: type[ControlCommand],
) -> None:
    refused = [text for text in WRONG if not kind.argument.accepts(_read(kind, text))]
    assert len(refused) >= 2
    for text in refused:
        with pytest.raises(UsageError) as raised:
            control.parse_command(kind.name, text)
        assert kind.name in str(raised.value) and kind.argument.expected in str(raised.value)
        problem = check_command(Command(id="x", kind=kind.name, value=_read(kind, text)))
        assert problem is not None and kind.argument.expected in problem
    if kind.argument.omitted is None:
        with pytest.raises(UsageError, match="needs"):
            control.parse_command(kind.name, None)
    else:
        assert control.parse_command(kind.name, None).kind == kind.name


def _read(kind: type[ControlCommand], text: str) -> float:
    try:
        return kind.argument.read(text)
    except ValueError:
        return -0.5  # no command takes it


@EVERY
def test_what_it_writes_can_be_read_again(kind: type[ControlCommand]) -> None:
    command = made(kind)
    name, _, text = command.write().partition(" ")
    again = control.parse_command(name, text or None)
    assert (again.kind, repr(again.value)) == (kind.name, repr(float(command.value)))
    assert command.describe() and command.label()


@EVERY
def test_it_travels_to_the_other_ranks_as_two_numbers(kind: type[ControlCommand]) -> None:
    number, value = registry.numbers_of(made(kind))
    again = registry.command_of(number, value)
    assert type(again) is kind and repr(again.value) == repr(made(kind).value)


@EVERY
def test_its_file_is_read_under_every_name(kind: type[ControlCommand], tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "files", "")
    value = msgspec.json.encode(made(kind).value).decode()
    for name in (kind.name, *kind.aliases):
        (run.commands / f"{name}.json").write_text(f'{{"kind": "{name}", "value": {value}}}')
    waiting = run.commands_pending()
    assert [command.kind for command in waiting] == [kind.name] * (1 + len(kind.aliases))
    assert type(registry.command_from(waiting[0])) is kind


@EVERY
def test_a_preview_sends_nothing_and_changes_nothing(
    kind: type[ControlCommand], tmp_path: Path
) -> None:
    run = FakeRun().begin().advance(300).spike().write(tmp_path)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    command = Command(id="x", kind=kind.name, value=made(kind).value)
    assert preview_in_run(run, command).sentence().startswith(kind.name)
    state = RunState.read(run)
    history = (
        list(state.history.lr.changes),
        list(state.history.alpha.changes),
        state.history.mode,
    )
    preview_command(state, command)
    assert history == (state.history.lr.changes, state.history.alpha.changes, state.history.mode)
    after = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert before == after and not run.commands_pending()


@EVERY
def test_its_effect_survives_a_restart(kind: type[ControlCommand], tmp_path: Path) -> None:
    given = line(made(kind), batch=[40, 44])
    live = Effects()
    registry.replay_line(given, live)
    run = RunDirectory.create(tmp_path, "restarted", "")
    for name in (kind.name, *kind.aliases):
        run.append("command", "", step=given.step, **{**given.data, "command": name})
    read = Effects()
    for event in run.events():
        assert isinstance(event, CommandAnswered)
        registry.replay_line(event, read)
    assert read.changes == live.changes * (1 + len(kind.aliases))
    refused = Effects()
    registry.replay_line(line(made(kind), "refused"), refused)
    assert refused.changes == []
    expected = {ScaleLearningRate, ShrinkEmbedding, ChangeMode, Accept}
    assert bool(live.changes) == (kind in expected)


@pytest.mark.parametrize("value", [{}, {"value": None}, {"value": "text"}], ids=str)
@pytest.mark.parametrize("name", ["lr", "shrink-embedding", "mode"])
def test_a_line_without_its_value_sets_nothing(name: str, value: dict[str, Any]) -> None:
    fields = {"command": name, "effect": "applied", **value}
    event = make_line(seq=4, time=0.0, step=7, timeline=0, kind="command", data=fields)
    history = RunHistory.from_events([event])
    assert (history.unread, history.mode) == (1, None)
    assert history.lr.changes == history.alpha.changes == []


@pytest.mark.parametrize(
    ("fields", "seed"),
    [
        ({"order_seed": 5}, 5),
        ({"seed": 5}, 5),  # the name in older versions
        ({}, 0),
        ({"order_seed": "text"}, None),
    ],
    ids=str,
)
def test_the_sample_order_of_a_run_has_the_seed_of_its_journal(
    fields: dict[str, Any], seed: int | None, tmp_path: Path
) -> None:
    run = RunDirectory.create(tmp_path, "ordered", "")
    run.append("started", "begins", samples=100, **fields)
    order = RunState.read(run).order
    assert (None if order is None else order.order.seed) == seed


def test_what_a_command_replaces_is_what_the_history_holds() -> None:
    history = RunHistory()
    for kind in registry.COMMANDS:
        command = made(kind)
        history.add(line(command))
        facts: Any = SimpleNamespace(step=7, mode=history.mode, setting_of=history.setting_of)
        setting = command.current_setting(facts)
        assert (setting is not None) == (kind.holds_for is HoldsFor.SETTING)
        if setting is not None:
            assert setting.value == command.value


def test_the_old_names_are_those_of_the_commands() -> None:
    assert {one.value for one in CommandKind} <= set(registry.command_names())
    assert CommandKind("embed-alpha") is CommandKind.SHRINK_EMBEDDING


def test_an_answer_is_a_word_or_as_before_a_number() -> None:
    for index, word in enumerate(("accept", "continue", "stop")):
        assert control.parse_command("answer", word).value == index
        assert control.parse_command("answer", str(index)).value == index
        assert Answer(float(index)).describe() == f"answer {word}"
    with pytest.raises(UsageError):
        control.parse_command("mode", "0")


# -- a command of one file -------------------------------------------------------------------------


@pytest.fixture
def extended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line in the registry."""
    monkeypatch.setattr(registry, "COMMANDS", (*registry.COMMANDS, Damp))


@pytest.mark.usefixtures("extended")
def test_an_example_command_takes_effect(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "damped", "")
    for at_step in (5, 9):
        run.send(control.parse_command("damp", None, at_step=at_step))
    loop = Loop(run=run, steps=20).train()
    assert loop.guard.phase is Phase.FINISHED
    answers = [event.data["effect"] for event in run.events() if event.kind == "command"]
    assert answers == ["applied", "refused"]
    rows = run.metrics()
    rate = dict(zip(rows.column("step"), rows.column("lr"), strict=True))
    assert rate[7] / rate[5] == pytest.approx(FACTOR * (1 + 0.05 * 4) / (1 + 0.05 * 6))
    assert RunHistory.from_events(run.events()).effects(20, GuardOptions()).lr == FACTOR


@pytest.mark.usefixtures("extended")
def test_an_example_command_is_in_the_help_and_on_the_screen(tmp_path: Path) -> None:
    assert "damp  " in CliRunner().invoke(ctl.command, ["--help"]).output
    assert ctl.complete_action(None, None, "da") == ["damp"]  # type: ignore[arg-type]
    assert "command('damp')" in [key.action for key in keys.command_keys()]
    run = FakeRun().begin().advance(300).write(tmp_path)
    shown = preview_in_run(run, Command(id="x", kind="damp"))
    assert shown.possible and shown.lr == pytest.approx(shown.lr_before * FACTOR)
