"""Every key of the table is pressed; what it sends is looked at; nothing destructive happens by a
slip.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from types import MappingProxyType

import msgspec
import pytest
from textual import events
from textual.app import App
from textual.pilot import Pilot
from textual.strip import Strip

from guardrail.core.errors import ExitCode
from guardrail.core.records.commands import Command, Shown
from guardrail.core.records.status import Phase
from guardrail.core.records.verdicts import Mode
from guardrail.decide.control_commands.base import ControlCommand
from guardrail.decide.control_commands.lr import ScaleLearningRate
from guardrail.decide.control_commands.registry import shown_in
from guardrail.decide.control_commands.rollback import Rollback
from guardrail.decide.control_commands.skip import Skip
from guardrail.operate.preview import Preview
from guardrail.rundir.command_files import check_command
from guardrail.tui.app.app import GuardrailApp
from guardrail.tui.chart.chart import Chart
from guardrail.tui.draw.lines import Lines
from guardrail.tui.model import sent_commands as controls
from guardrail.tui.model.run_story import CommandAnswer
from guardrail.tui.model.view import Snapshot, View, signal_label
from guardrail.tui.panes.incident_evidence import NOT_OVER
from guardrail.tui.panes.incidents import NO_OPEN_INCIDENT
from guardrail.tui.screens import dialog as dialogs
from guardrail.tui.screens import keys
from guardrail.tui.screens.choice_dialogs import Choose, Confirm, Palette, Toggle
from guardrail.tui.screens.command_keys import NO_QUESTION, NO_STATE, WORKING
from guardrail.tui.screens.dashboard import VIEWER_CHOICES, Dashboard
from guardrail.tui.screens.dialog import Dialog
from guardrail.tui.screens.input_dialogs import Number, Text
from guardrail.tui.screens.pager import Pager
from guardrail.tui.screens.question_dialog import Evidence, Question
from guardrail.tui.screens.question_keys import ANSWERS, PROPOSALS
from tests.support.fake_run import FakeReader, FakeRun, example, snapshot_of

Script = Callable[[Pilot[None], FakeReader], Awaitable[None]]


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Outcome:
    """What the keys did: commands sent, the message line, the screen on top, the exit code if the
    screen was left.
    """

    sent: list[Command]
    message: str
    top: type[object]
    left: int | None


async def act(
    *presses: str,
    fake: FakeRun | None = None,
    script: Script | None = None,
    read_only: bool = False,
    foresees: bool = True,
) -> Outcome:
    """Press keys on the screen of a run, then let `script` look at it."""
    fake = fake or example()
    reader = FakeReader(snapshot_of(fake))
    reader.foresees = foresees
    app = GuardrailApp(reader, clock=Clock(fake.time + 0.4), read_only=read_only)
    async with app.run_test(size=(120, 32)) as pilot:
        await pilot.pause()
        for press in presses:
            await pilot.press(press)
            await pilot.pause()
        if script is not None:
            await script(pilot, reader)
        return Outcome(reader.sent, message(app), type(app.screen), app.return_code)


async def show(pilot: Pilot[None], reader: FakeReader, snapshot: Snapshot) -> None:
    """Let the screen show what has been read of the run."""
    reader.put(snapshot)
    await pilot.pause(0.3)


def message(app: App[None]) -> str:
    dashboard = app.screen_stack[0]
    assert isinstance(dashboard, Dashboard)
    return dashboard.view.message[0]


def only(sent: list[Command]) -> tuple[str, float]:
    """The one command that was sent; it makes sense to the run and says who sent it."""
    assert len(sent) == 1
    assert check_command(sent[0]) is None and "@" in sent[0].who and sent[0].time > 0
    return sent[0].kind, sent[0].value


def asking(*, known: bool = False) -> FakeRun:
    fake = FakeRun().begin().advance(300).spike()
    if known:
        fake.weigh()
    fake.ask("loss 11.5 against 2.39: proposed: rollback")
    return fake


def paused() -> FakeRun:
    fake = example()
    fake.phase = Phase.PAUSED
    return fake


# What each control key sends in the end: keys, then kind and value.
SENDS: dict[str, tuple[list[str], str, float]] = {
    "p": (["p"], "pause", 0.0),
    "r": (["r", "enter", "y"], "rollback", 1270.0),
    "s": (["s", "2", "5", "enter", "y"], "skip", 25.0),
    "l": (["l", "0", "full_stop", "2", "5", "enter", "y"], "lr", 0.25),
    "e": (["e", "enter", "y"], "shrink-embedding", 0.1),
    "u": (["u", "y"], "undo", math.nan),
    "A": (["A", "y"], "accept", 0.0),
    "c": (["c"], "checkpoint", 0.0),
    "m": (["m", "down", "enter"], "mode", float(list(Mode).index(Mode.ASK))),
    "a": (["escape", "a", "down", "enter"], "answer", 1.0),
    "S": (["S", "y"], "stop", 0.0),
}


@pytest.mark.parametrize("key", [key.keys for key in keys.KEYS if key.control and key.keys != "n"])
async def test_every_control_key_sends_its_command(key: str) -> None:
    presses, kind, value = SENDS[key]
    done = await act(*presses, fake=asking() if key == "a" else None)
    sent = only(done.sent)
    assert sent[0] == kind and (sent[1] == value or (math.isnan(sent[1]) and math.isnan(value)))


async def test_a_note_goes_into_the_journal_with_a_name() -> None:
    async def written(pilot: Pilot[None], reader: FakeReader) -> None:
        assert (
            len(reader.notes) == 1 and reader.notes[0].startswith("qp (") and "@" in reader.notes[0]
        )

    assert not (await act("n", "q", "p", "enter", script=written)).sent


def test_why_a_key_did_nothing_is_said_for_ten_seconds() -> None:
    """It said for a minute that there is no state to restore, beside a list of four."""
    fake = FakeRun().begin()
    commands = controls.SentCommands(FakeReader(snapshot_of(fake)), lambda: fake.time)
    commands.show_notice(NO_STATE)
    view = View(snapshot_of(fake), fake.time)
    assert commands.message(replace(view, now=fake.time + 9.0)) == (NO_STATE, "warn")
    assert commands.message(replace(view, now=fake.time + 11.0)) == ("", "plain")


async def test_a_preview_says_what_is_lost_before_anything_is_sent() -> None:
    async def look(pilot: Pilot[None], reader: FakeReader) -> None:
        assert isinstance(pilot.app.screen, Confirm)
        assert WORKING in text_of(pilot.app.screen.query(Lines).first())
        preview = Preview(
            command="rollback",
            to_step=1270,
            tier="memory",
            state="good",
            steps_lost=14,
            seconds_lost=130.0,
            samples=224,
            lr_before=1e-3,
            lr=5e-4,
        )
        await show(
            pilot, reader, replace(reader.snapshot, previews={reader.previewed[0].id: preview})
        )
        shown = text_of(pilot.app.screen.query(Lines).first())
        assert all(line in shown for line in controls.preview_lines(preview))
        for value in ("14 steps", "2 min 10 s", "224 samples", "0.0005", "0.001", "▸ No"):
            assert value in shown
        assert reader.previewed[0].kind == "rollback" and reader.previewed[0].value == 1270.0

    assert not (await act("r", "enter", script=look, foresees=False)).sent


@pytest.mark.parametrize("yes", [["y"], ["down", "enter"]])
@pytest.mark.parametrize("then", [[], ["escape"]])
async def test_a_yes_before_the_preview_is_complete_waits_for_it(
    yes: list[str], then: list[str]
) -> None:
    """It was ignored without a word: a dialog that had been answered stayed open."""

    async def look(pilot: Pilot[None], reader: FakeReader) -> None:
        assert WORKING in text_of(pilot.app.screen.query(Lines).first())
        pressing = asyncio.create_task(pilot.press(*yes, *then))
        await pilot.pause(1.0)
        assert not reader.sent, "what it costs does not stand there yet"
        known = {"to_step": 1270, "tier": "memory", "state": "good", "steps_lost": 14}
        preview = Preview(command="rollback", **known)
        reader.put(replace(reader.snapshot, previews={reader.previewed[0].id: preview}))
        await pressing
        await pilot.pause(0.3)
        assert not isinstance(pilot.app.screen, Confirm)

    done = await act("r", "enter", script=look, foresees=False)
    assert [sent.kind for sent in done.sent] == ([] if then else ["rollback"])


async def test_a_command_that_would_be_refused_says_so_first() -> None:
    async def look(pilot: Pilot[None], reader: FakeReader) -> None:
        refused = Preview(command="undo", possible=False, refusal="no line 9")
        previews = {reader.previewed[0].id: refused}
        await show(pilot, reader, replace(reader.snapshot, previews=previews))
        shown = text_of(pilot.app.screen.query(Lines).first())
        assert any("✗" in line and refused.refusal in line for line in shown.splitlines())

    assert not (await act("u", script=look)).sent


def seen(app: App[None]) -> tuple[object, ...]:
    """What the screen is like, for the viewer's part."""
    dashboard = app.screen_stack[0]
    assert isinstance(dashboard, Dashboard)
    shown = replace(dashboard.view, snapshot=Snapshot("any"), message=("", ""))
    return repr(shown.states), repr(replace(shown, states={})), type(app.screen), app.theme


# Before some keys others are pressed, so that they have something to do.
BEFORE = {"home": ["2", "down", "down"], "pageup": ["2", "end"], "up": ["2", "end"], "slash": ["2"], "enter": ["2"],
          "pagedown": ["2", "down"], "end": ["2"], "escape": ["2", "down"], "1": ["2"], "right": ["left", "left"],
          "minus": ["plus", "plus"], "less_than_sign": ["plus"], "full_stop": ["left"],
          "greater_than_sign": ["plus", "plus", "less_than_sign", "less_than_sign"],
          "right_square_bracket": ["left_square_bracket", "left_square_bracket"]}  # fmt: skip
LEAVING = ("q", "ctrl+c", "ctrl+q")


async def test_every_other_key_sends_nothing_and_does_something(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All keys in one session; before each the viewer looks at everything as at first."""
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)

    async def look(pilot: Pilot[None], reader: FakeReader) -> None:
        app = pilot.app
        dashboard = app.screen_stack[0]
        assert isinstance(dashboard, Dashboard)
        fresh = {name: getattr(View(reader.snapshot, 0.0), name) for name in VIEWER_CHOICES}
        theme = app.theme
        for key in [name for one in keys.KEYS if not one.control for name in one.keys.split(",")]:
            if key in LEAVING:
                continue
            while len(app.screen_stack) > 1:
                await app.pop_screen()
            app.theme = theme
            dashboard.change_view(**fresh)
            await pilot.press(*BEFORE.get(key, []))
            before = seen(app)
            await pilot.press(key)
            await pilot.pause()
            assert seen(app) != before, f"{key} does nothing"

    assert not (await act(script=look)).sent


@pytest.mark.parametrize("key", LEAVING)
async def test_leaving_stops_nothing(key: str) -> None:
    codes: list[object] = []

    async def look(pilot: Pilot[None], reader: FakeReader) -> None:
        codes.append(pilot.app.return_code)

    assert not (await act(key, script=look)).sent and codes == [0]


async def test_curves_are_chosen_and_their_rows_are_asked_for() -> None:
    async def look(pilot: Pilot[None], reader: FakeReader) -> None:
        dashboard = pilot.app.screen_stack[0]
        assert isinstance(dashboard, Dashboard)
        shown = [chart for chart in dashboard.query(Chart) if chart.display]
        assert [chart.signal for chart in shown] == ["grad_norm", "embed_grad_norm", "embed_share"]
        assert dashboard.view.big == "grad_norm", "the enlarged one was taken out"
        assert reader.chosen == (("grad_norm", "embed_grad_norm", "embed_share"), "tokens")
        await pilot.press("escape", "v", *["down"] * 20, "space", "escape", *["up"])
        await pilot.pause()
        assert dashboard.view.charts[-1] == dashboard.view.big == "loss_scale", "once round"
        assert [chart.signal for chart in dashboard.query(Chart) if chart.display][
            -1
        ] == "loss_scale"
        assert "loss_scale" in reader.chosen[0]

    assert not (await act("b", "v", "enter", script=look)).sent


def test_every_key_has_help_and_its_own_place() -> None:
    names = [name for key in keys.KEYS for name in key.keys.split(",")]
    assert len(names) == len(set(names))
    for key in keys.KEYS:
        assert len(key.help) > 10 and key.help.endswith("."), f"{key.shown} has no help"
        assert key.shown and len(key.label) <= 10
        name = key.action.partition("(")[0]
        assert callable(getattr(Dashboard, f"action_{name}", None)), (
            f"{key.shown}: no action_{name}"
        )


def test_every_binding_of_the_screen_is_in_the_table() -> None:
    """A binding that was added beside the table would have no help."""
    bound = {binding.key for binding in Dashboard.BINDINGS}  # type: ignore[union-attr]
    assert bound == {key.keys for key in keys.KEYS}
    extra = {name for binding in GuardrailApp.BINDINGS for name in binding.key.split(",")}  # type: ignore[union-attr]
    assert extra <= {name for key in keys.KEYS for name in key.keys.split(",")}


def test_every_binding_of_a_dialog_is_explained() -> None:
    explained = " ".join(f"{shown} {text}" for shown, text in keys.DIALOG_KEYS)
    named = re.split(r"[\s,().;]+", explained)
    words = {"up": "↑", "down": "↓", "enter": "Enter", "escape": "Esc", "pageup": "PgUp", "pagedown": "PgDn",
             "ctrl+p": "Ctrl+P", "home": "Home", "end": "End", "space": "Space", "question_mark": "?"}  # fmt: skip
    for dialog in (
        Dialog,
        Choose,
        Toggle,
        Confirm,
        Number,
        Text,
        Palette,
        Pager,
        Question,
        Evidence,
    ):
        for binding in dialog.BINDINGS:
            for name in binding.key.split(","):  # type: ignore[union-attr]
                assert words.get(name, name) in named, (
                    f"{dialog.__name__}: {name} is not in DIALOG_KEYS"
                )


async def test_help_shows_every_key() -> None:
    shown: list[str] = []

    async def look(pilot: Pilot[None], reader: FakeReader) -> None:
        for _ in range(4):
            shown.extend(text_of(lines) for lines in pilot.app.screen.query(Lines))
            await pilot.press("pagedown")
            await pilot.pause()

    await act("question_mark", script=look)
    for key in keys.KEYS:
        assert key.help in "\n".join(shown)


def text_of(lines: Lines) -> str:
    return "\n".join("".join(text for text, _ in row) for row in lines.rows)


def test_footer_keeps_what_matters_on_narrow_terminals() -> None:
    wide = "".join(text for text, _ in keys.footer_keys(120))
    narrow = "".join(text for text, _ in keys.footer_keys(40))
    assert "p pause" in wide and "j journal" in wide and "answer" not in wide
    assert "q leave" in narrow and "? help" in narrow
    assert keys.footer_keys(0) == ()
    assert "a answer" in "".join(text for text, _ in keys.footer_keys(80, asking=True))
    assert "pause" not in "".join(text for text, _ in keys.footer_keys(120, controls=False))


def test_the_table_for_the_readme() -> None:
    lines = keys.keys_as_markdown().splitlines()
    assert len(lines) == len(keys.KEYS) + 2 and all(line.startswith("|") for line in lines)


# -- nothing happens by a slip


@pytest.mark.parametrize(
    "presses",
    [
        ["S", "enter"],
        ["S", "n"],
        ["S", "escape"],
        ["S", "q"],
        ["r", "enter", "enter"],
        ["r", "enter", "n"],
        ["r", "escape"],
        ["r", "q"],
        ["s", "escape"],
        ["l", "escape"],
        ["m", "escape"],
        ["m", "enter"],  # the mode it has already
        ["question_mark", "p", "escape"],
        ["j", "S", "y", "escape"],
    ],
    ids="-".join,
)
async def test_the_default_is_no(presses: list[str]) -> None:
    done = await act(*presses)
    assert not done.sent and done.left is None


@pytest.mark.parametrize(
    ("presses", "kind", "given"),
    [
        (["s", "0", "enter"], Skip, "0"),
        (["s", "1", "full_stop", "5", "enter"], Skip, "1.5"),
        (["s", "minus", "3", "enter"], Skip, "-3"),
        (["s", "1", "e", "9", "enter"], Skip, "1e9"),
        (["s", *"9999999", "enter"], Skip, "9999999"),
        (["l", "n", "a", "n", "enter"], ScaleLearningRate, "nan"),
        (["l", "0", "enter"], ScaleLearningRate, "0"),
        (["l", "x", "enter"], ScaleLearningRate, "x"),
        (["l", "1", "e", "9", "enter"], ScaleLearningRate, "1e9"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
async def test_a_number_that_makes_no_sense_is_said(
    presses: list[str], kind: type[ControlCommand], given: str
) -> None:
    async def look(pilot: Pilot[None], reader: FakeReader) -> None:
        assert isinstance(pilot.app.screen, Number)
        reason = controls.parse_value(given, kind)
        assert isinstance(reason, str) and reason.endswith(f" {given}")
        assert kind.argument.expected in reason
        assert reason in text_of(pilot.app.screen.query(Lines).first())

    assert not (await act(*presses, script=look)).sent


async def test_the_preview_of_a_rollback_says_what_it_costs() -> None:
    async def look(pilot: Pilot[None], reader: FakeReader) -> None:
        shown = text_of(pilot.app.screen.query(Lines).first())
        assert "84 steps" in shown and "1,488 samples" in shown and "▸ No" in shown
        assert f"{Rollback(1200.0).label()}?" in shown and "1,200" in Rollback(1200.0).label()

    assert not (await act("r", "down", "down", "down", "enter", script=look, foresees=False)).sent


async def test_a_suspect_state_is_called_so() -> None:
    fake = FakeRun().begin().advance(1206).spike(back_to=1000)

    async def look(pilot: Pilot[None], reader: FakeReader) -> None:
        await pilot.press("r", "home")
        await pilot.pause()
        shown = text_of(pilot.app.screen.query(Lines).first())
        warning, _, why = controls.STATE_WARNINGS["suspect"].partition(": ")
        assert warning.startswith("▲ ") and "suspect" in warning and why
        assert f"{warning}: " in shown

    await act(script=look, fake=fake)


async def test_rollback_without_any_snapshot() -> None:
    fake = FakeRun().begin().advance(5)
    done = await act("r", fake=fake)
    assert not done.sent and done.message == NO_STATE


async def test_p_goes_on_with_a_paused_run() -> None:
    assert only((await act("p", fake=paused())).sent) == ("resume", 0.0)


async def test_p_again_takes_a_pause_back_that_has_no_answer_yet() -> None:
    sent = (await act("p", "p", "p")).sent
    assert [command.kind for command in sent] == ["pause", "resume", "pause"]


@pytest.mark.parametrize("key", [key.keys for key in keys.KEYS if key.control])
async def test_read_only_answers_so(key: str) -> None:
    done = await act(key, "enter", "y", fake=asking(), read_only=True)
    assert not done.sent and "read-only" in done.message


@pytest.mark.parametrize("key", [key.keys for key in keys.KEYS if key.control])
async def test_a_run_that_has_ended_is_not_controlled(key: str) -> None:
    fake = example().end(Phase.FINISHED, ExitCode.FINISHED)
    done = await act(key, "enter", "y", fake=fake)
    assert not done.sent and done.message == controls.why_refused(fake.status, read_only=False)


@pytest.mark.fault("T4")
@pytest.mark.parametrize("presses", [["S"], ["r"], ["r", "enter"], ["l"], ["m"], ["u"], ["s"]])
async def test_a_dialog_that_controls_a_run_closes_when_the_run_ends(presses: list[str]) -> None:
    fake = example()

    async def ends(pilot: Pilot[None], reader: FakeReader) -> None:
        assert isinstance(pilot.app.screen, Dialog)
        fake.end(Phase.STOPPED, ExitCode.INTERRUPTED)
        await show(pilot, reader, snapshot_of(fake))
        assert isinstance(pilot.app.screen, Dashboard)
        await pilot.press("enter")

    done = await act(*presses, fake=fake, script=ends)
    assert not done.sent and done.message == controls.why_refused(fake.status, read_only=False)
    assert Phase.STOPPED.value in done.message


async def test_a_click_only_marks() -> None:
    async def click(pilot: Pilot[None], reader: FakeReader) -> None:
        body = pilot.app.screen.query_one(".body", Lines)
        yes = next(
            y for y, row in enumerate(body.rows) if "Yes" in "".join(text for text, _ in row)
        )
        await pilot.click(offset=(body.region.x + 6, body.region.y + yes))
        await pilot.pause()
        assert "▸ Yes" in text_of(body)

    assert not (await act("S", script=click)).sent


# -- the guard asks


async def test_a_question_comes_up_by_itself_once() -> None:
    async def look(pilot: Pilot[None], reader: FakeReader) -> None:
        assert isinstance(pilot.app.screen, Choose)
        shown = text_of(pilot.app.screen.query(Lines).first())
        assert reader.snapshot.status.question in shown
        assert ANSWERS[0] + PROPOSALS["rollback"] in shown
        await pilot.press("escape")
        await show(pilot, reader, replace(reader.snapshot, heard=reader.snapshot.heard + 1))
        assert isinstance(pilot.app.screen, Dashboard), "it was put aside, and stays there"

    assert not (await act(script=look, fake=asking())).sent


@pytest.mark.parametrize(
    ("presses", "value"), [(["enter"], 0.0), (["down", "enter"], 1.0), (["end", "enter"], 2.0)]
)
async def test_answers(presses: list[str], value: float) -> None:
    """In a dialog that a key has opened; one that opened by itself takes no Enter at first."""
    fake = asking()
    done = await act("escape", "a", *presses, fake=fake)
    assert only(done.sent) == ("answer", value)
    assert done.sent[0].question == fake.events[-1].seq, "it says which question it is for"


async def test_p_brings_the_question_back() -> None:
    done = await act("escape", "p", fake=asking())
    assert not done.sent and done.top is Question


async def test_a_question_that_another_user_has_answered_goes_away() -> None:
    fake = asking()

    async def answered(pilot: Pilot[None], reader: FakeReader) -> None:
        fake.phase, fake.question = Phase.STEP, ""
        await show(pilot, reader, snapshot_of(fake))
        assert isinstance(pilot.app.screen, Dashboard)

    assert not (await act(fake=fake, script=answered)).sent


async def test_v_shows_the_evidence_while_the_question_stands() -> None:
    async def look(pilot: Pilot[None], reader: FakeReader) -> None:
        assert isinstance(pilot.app.screen, Evidence)
        status = reader.snapshot.status
        assert status is not None
        patient = msgspec.structs.replace(status, deadline=status.heartbeat + 90.4)
        await show(pilot, reader, replace(reader.snapshot, status=patient))
        shown = "\n".join(text_of(lines) for lines in pilot.app.screen.query(Lines))
        for value in ("→ 11.5, score 37 (limit 8)", signal_label("embed_grad_norm"), 'token 195 "Ã"', "data: ", "1,190",
                      "repeats 0.98", "0037.txt", "1–26 of 28", "1 min 30 s left"):  # fmt: skip
            assert value in shown
        await pilot.press("end")
        await pilot.pause()
        assert NOT_OVER in text_of(pilot.app.screen.query(Lines).first())
        await pilot.press("enter")  # what closes a page answers nothing
        await pilot.pause()
        assert isinstance(pilot.app.screen, Question) and not reader.sent
        await pilot.press("escape", "a", "down", "v", "v", "enter")
        await until(pilot, lambda: reader.sent)

    done = await act("v", fake=asking(known=True), script=look)
    assert only(done.sent) == ("answer", 1.0) and done.top is Dashboard


async def test_a_question_that_is_answered_elsewhere_takes_its_evidence_along() -> None:
    fake = asking(known=True)

    async def answered(pilot: Pilot[None], reader: FakeReader) -> None:
        assert isinstance(pilot.app.screen, Evidence)
        fake.phase, fake.question = Phase.STEP, ""
        await show(pilot, reader, snapshot_of(fake))
        assert isinstance(pilot.app.screen, Dashboard)

    assert not (await act("v", fake=fake, script=answered)).sent


async def test_a_question_without_an_incident_has_no_evidence() -> None:
    async def look(pilot: Pilot[None], reader: FakeReader) -> None:
        assert NO_OPEN_INCIDENT in text_of(pilot.app.screen.query(Lines).first())

    await act("v", fake=example().ask("proposed: halt"), script=look)


async def test_a_without_a_question() -> None:
    done = await act("a")
    assert not done.sent and done.message == NO_QUESTION


async def test_another_dialog_is_not_torn_away_by_a_question() -> None:
    fake = example()

    async def asked(pilot: Pilot[None], reader: FakeReader) -> None:
        fake.ask("proposed: rollback")
        await show(pilot, reader, snapshot_of(fake))
        assert isinstance(pilot.app.screen, Number)
        await pilot.press("escape")
        await show(pilot, reader, snapshot_of(fake))
        assert isinstance(pilot.app.screen, Choose)

    await act("s", fake=fake, script=asked)


def again(fake: FakeRun, question: str, *, line: int | None = None) -> Snapshot:
    """The run asks; its journal line is read up to number `line`, None: all of it is."""
    fake.phase, fake.question = Phase.PAUSED, question
    snapshot = snapshot_of(fake)
    assert snapshot.status is not None
    if not hasattr(snapshot.status, "question_number"):
        return snapshot  # a run of an older version does not say it
    number = fake.events[-1].seq + (line is not None)
    return replace(
        snapshot, status=msgspec.structs.replace(snapshot.status, question_number=number)
    )


@pytest.mark.fault("T2")
async def test_a_question_shows_no_choices_of_another_and_takes_no_enter_until_its_own_are_there() -> (
    None
):
    fake, question = asking(), "the loss stays up: proposed: halt"

    async def next_question(pilot: Pilot[None], reader: FakeReader) -> None:
        unread = again(fake, question, line=0).status
        reader.put(replace(snapshot_of(fake), status=unread))
        await pilot.pause(0.5)
        await pilot.press("escape", "a")
        await pilot.pause(0.3)
        shown = text_of(pilot.app.screen.query(Lines).first())
        assert isinstance(pilot.app.screen, Question) and question in shown
        assert PROPOSALS["rollback"] not in shown, "that is what the question before it proposed"
        await pilot.press("enter")
        await pilot.pause(0.3)
        assert isinstance(pilot.app.screen, Question) and not reader.sent
        fake.event("paused", question, proposals=["halt", "go on", "stop"])
        reader.put(again(fake, question))
        await pilot.pause(0.5)
        shown = text_of(pilot.app.screen.query(Lines).first())
        assert ANSWERS[0] + PROPOSALS["halt"] in shown
        await pilot.press("enter")
        await pilot.pause(0.3)
        assert [command.question for command in reader.sent] == [fake.events[-1].seq]

    await act(fake=fake, script=next_question)


async def test_an_answer_carries_what_its_question_said_that_it_would_do() -> None:
    fake = example()
    proposal = {
        "action": "rollback",
        "command": "rollback",
        "to_step": 1270,
        "tier": "memory",
        "steps_lost": 14,
    }
    fake.phase, fake.question = Phase.PAUSED, "the loss stays up: proposed: rollback"
    fake.event(
        "paused", fake.question, proposals=[proposal, {"action": "go_on"}, {"action": "stop"}]
    )
    (sent,) = (await act("escape", "a", "enter", fake=fake)).sent
    assert sent.question == fake.events[-1].seq
    assert sent.shown == Shown(to_step=1270, tier="memory", steps_lost=14, steps_lost_most=14)
    (other,) = (await act("escape", "a", "down", "enter", fake=fake)).sent
    assert other.shown is None


@pytest.mark.fault("T2")
async def test_a_second_question_closes_the_dialog_of_the_first_and_has_its_own() -> None:
    fake = asking()

    async def next_question(pilot: Pilot[None], reader: FakeReader) -> None:
        reader.put(again(fake, fake.question))
        await pilot.pause(0.5)
        await pilot.press("escape", "a")
        await pilot.pause(0.3)
        first = pilot.app.screen
        assert isinstance(first, Question)
        fake.event("resumed", "continued")
        # in the very same words
        fake.event("paused", fake.question, proposals=["halt", "go on", "stop"])
        reader.put(again(fake, fake.question))
        await pilot.pause(0.5)
        assert isinstance(pilot.app.screen, Question) and pilot.app.screen is not first
        await pilot.press("enter")
        await pilot.pause(0.3)
        assert not reader.sent, "it has opened by itself"

    await act(fake=fake, script=next_question)


@pytest.mark.fault("T3")
async def test_a_question_that_opens_takes_no_key_that_was_meant_for_something_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = example()

    async def asked(pilot: Pilot[None], reader: FakeReader) -> None:
        fake.ask("proposed: rollback")
        await show(pilot, reader, snapshot_of(fake))
        assert isinstance(pilot.app.screen, Question)
        await pilot.press("enter")
        await pilot.pause()
        early = events.Key("down", None)
        early.time -= 60.0  # pressed before the dialog was drawn
        await pilot.app.on_event(early)
        await pilot.pause()
        assert (
            isinstance(pilot.app.screen, Question)
            and pilot.app.screen.cursor == 0
            and not reader.sent
        )
        monkeypatch.setattr(dialogs, "SETTLED_SECONDS", 0.0)  # as if a second had passed
        await pilot.press("enter")
        await pilot.pause(0.3)
        assert [command.value for command in reader.sent] == [0.0]

    await act("2", fake=fake, script=asked)


async def until(pilot: Pilot[None], true: Callable[[], object]) -> None:
    """Let the screen work until something is true, which takes long on a busy machine alone."""
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline, f"never happened; on top is {pilot.app.screen}"
        await pilot.pause(0.02)


def burst(app: App[None], *keys: str) -> None:
    """Keys as they come when a user types faster than the screen draws."""
    assert app._driver is not None
    for key in keys:
        event = events.Key(key, key if len(key) == 1 else None)
        event.set_sender(app)
        app._driver.send_message(event)


@pytest.mark.fault("T10")
async def test_keys_typed_ahead_go_to_the_dialogs_that_they_open() -> None:
    async def type_fast(pilot: Pilot[None], reader: FakeReader) -> None:
        burst(pilot.app, "s", "7", "enter")
        await until(pilot, lambda: isinstance(pilot.app.screen, Confirm))
        assert isinstance(pilot.app.screen, Confirm) and pilot.app.screen.label == "skip 7 batches?"
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(pilot.app.screen, Dashboard))
        burst(pilot.app, "s", "1", "2", "enter", "y", "2", "c")
        await until(pilot, lambda: len(reader.sent) == 2)
        assert [(command.kind, command.value) for command in reader.sent] == [
            ("skip", 12.0),
            ("checkpoint", 0.0),
        ]
        dashboard = pilot.app.screen
        assert isinstance(dashboard, Dashboard) and dashboard.view.focus == "incidents"

    await act(script=type_fast)


@pytest.mark.fault("T10")
async def test_keys_that_wait_for_a_dialog_never_keep_escape_waiting() -> None:
    async def type_fast(pilot: Pilot[None], reader: FakeReader) -> None:
        burst(pilot.app, "u", "y", "escape", "c")
        await until(pilot, lambda: reader.sent)
        assert isinstance(pilot.app.screen, Dashboard)
        assert [command.kind for command in reader.sent] == ["checkpoint"]

    await act(script=type_fast, foresees=False)


@pytest.mark.fault("T11")
async def test_yes_is_taken_only_when_its_text_stands() -> None:
    async def look(pilot: Pilot[None], reader: FakeReader) -> None:
        await pilot.press("y")
        await pilot.press("down", "enter")
        await pilot.pause(0.3)
        assert isinstance(pilot.app.screen, Confirm) and not reader.sent
        preview = Preview(
            command="undo",
            value=8.0,
            to_step=1270,
            tier="memory",
            steps_lost=14,
            steps_lost_most=24,
        )
        await show(
            pilot, reader, replace(reader.snapshot, previews={reader.previewed[0].id: preview})
        )
        await pilot.press("y")
        await pilot.pause(0.3)
        assert len(reader.sent) == 1

    await act("u", script=look, foresees=False)


@pytest.mark.fault("T11")
async def test_a_dialog_is_never_painted_without_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    painted: dict[int, str] = {}
    render_line = Lines.render_line

    def watched(self: Lines, y: int) -> Strip:
        strip = render_line(self, y)
        if y == 0 and self.has_class("body"):
            painted.setdefault(id(self), strip.text)
        return strip

    monkeypatch.setattr(Lines, "render_line", watched)
    for key in ("r", "s", "S", "m", "question_mark"):
        painted.clear()
        await act(key)
        assert painted and all(text.strip(" ─") for text in painted.values()), key


@pytest.mark.fault("T4")
async def test_a_preview_is_renewed_and_the_command_carries_the_one_that_was_seen_last() -> None:
    async def look(pilot: Pilot[None], reader: FakeReader) -> None:
        clock = pilot.app._clock  # type: ignore[attr-defined]
        id = reader.previewed[0].id
        preview = Preview(
            command="undo", value=8.0, to_step=1270, tier="memory", steps_lost=4, steps_lost_most=14
        )
        await show(pilot, reader, replace(reader.snapshot, previews={id: preview}))
        clock.now += 1.1
        await show(pilot, reader, replace(reader.snapshot, heard=clock.now))
        assert len(reader.previewed) == 2 and reader.previewed[1].id == id
        preview = msgspec.structs.replace(
            preview, to_step=1141, tier="disk", steps_lost=129, steps_lost_most=139, timeline=2
        )
        await show(pilot, reader, replace(reader.snapshot, previews={id: preview}))
        assert "129 steps" in text_of(pilot.app.screen.query(Lines).first())
        await pilot.press("y")
        await pilot.pause(0.3)
        (sent,) = reader.sent
        assert sent.value == 8.0, "the line that was shown, not the newest decision of a later time"
        assert (
            sent.shown == shown_in(preview)
            and sent.shown.to_step == 1141
            and sent.shown.timeline == 2
        )

    await act("u", script=look, foresees=False)


# -- answers to commands


async def answers(
    answer: CommandAnswer | None, *, unsent: str = "", later: float = 0.0, silent: bool = False
) -> str:
    """The message line after `c` and an answer."""
    texts: list[str] = []

    async def reply(pilot: Pilot[None], reader: FakeReader) -> None:
        clock = pilot.app._clock  # type: ignore[attr-defined]
        clock.now += later
        command = reader.sent[0].id
        story = reader.snapshot.story
        if answer is not None:
            story = replace(story, answers=MappingProxyType({command: answer}))
        reader.put(
            replace(
                reader.snapshot,
                story=story,
                unsent={command: unsent} if unsent else {},
                heard=reader.snapshot.heard if silent else clock.now,
            )
        )
        await pilot.pause(0.3)
        texts.append(message(pilot.app))

    await act("c", script=reply)
    return texts[0]


async def test_an_answer_is_shown_with_its_step() -> None:
    said = await answers(CommandAnswer(True, 1290, ""))
    assert said.startswith("✓ checkpoint: ") and said.endswith("step 1,290")


async def test_a_refusal_is_shown_with_its_reason() -> None:
    reason = "the disk is full"
    said = await answers(CommandAnswer(False, 1290, reason))
    assert said == f"✗ refused: {reason} (checkpoint, step 1,290)"


async def test_no_answer_yet_is_said() -> None:
    said = await answers(None, later=12.0)
    assert said.startswith("… checkpoint: ") and said.endswith("(12 s)")


async def test_no_answer_and_no_sign_of_life() -> None:
    said = await answers(None, later=30.0, silent=True)
    assert said.startswith("… checkpoint: ") and "(30 s; " in said


async def test_no_answer_because_the_run_has_ended() -> None:
    fake = example()

    async def end(pilot: Pilot[None], reader: FakeReader) -> None:
        await show(pilot, reader, snapshot_of(fake.end(Phase.FAILED, ExitCode.WORKERS_FAILED)))

    done = await act("c", fake=fake, script=end)
    assert done.message == f"✗ checkpoint: {controls.ENDED_BEFORE}"


async def test_a_command_that_could_not_be_handed_in() -> None:
    said = await answers(None, unsent="E13")
    assert said.startswith("✗ checkpoint: ") and said.endswith(": E13")


async def test_waiting_commands_are_counted() -> None:
    done = await act("c", "p", "c")
    assert done.message.startswith("… checkpoint: ")
    assert re.findall(r"\d+ command", done.message) == ["2 command"]


async def test_an_answer_leaves_the_line_after_a_while() -> None:
    async def wait(pilot: Pilot[None], reader: FakeReader) -> None:
        clock = pilot.app._clock  # type: ignore[attr-defined]
        story = replace(
            reader.snapshot.story, answers={reader.sent[0].id: CommandAnswer(True, 1, "")}
        )
        await show(pilot, reader, replace(reader.snapshot, story=story))
        assert message(pilot.app).startswith("✓")
        clock.now += 61
        await show(pilot, reader, replace(reader.snapshot, heard=clock.now))
        assert message(pilot.app) == ""

    await act("c", script=wait)


def test_a_view_knows_its_silence() -> None:
    snapshot = snapshot_of(example())
    assert View(snapshot, snapshot.heard + 11).health.word.startswith("NOT RESPONDING")
    assert View(snapshot, snapshot.heard - 50).silence == 0.0, (
        "a clock that was set back is no silence"
    )
