"""The header and the line of facts: which state a run is in, and that nothing is shown as if it
lived or were well.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.cells import cell_len

from guardrail.core.records.status import Phase, SnapshotInfo, Status
from guardrail.core.records.verdicts import Mode
from guardrail.core.sections import LaunchSection
from guardrail.launch.supervisor_journal import SupervisorJournal
from guardrail.tui.model.pane_state import PaneState
from guardrail.tui.model.view import Snapshot, View
from guardrail.tui.panes import log, snapshots
from guardrail.tui.screens import header_footer as panels
from tests.support.fake_run import FakeRun, example, snapshot_of
from tests.unit.tui.test_panels import text


def look(
    fake: FakeRun | None = None, *, silence: float = 0.4, read_only: bool = False, **status: Any
) -> View:
    """A run as a viewer sees it, `silence` seconds after its last heartbeat."""
    fake = fake or example()
    snapshot = snapshot_of(fake)
    before = snapshot.status or Status(run="a/b", phase=Phase.STEP)
    changed = msgspec.structs.replace(before, **status)
    return View(replace(snapshot, status=changed), fake.time + silence, read_only=read_only)


def header(view: View, width: int = 120) -> str:
    shown = text(panels.header_rows(view, width, 1))
    assert cell_len(shown) <= width
    return shown


def facts(view: View, width: int = 160) -> str:
    return text(panels.status_rows(view, width, 1))


def footer(view: View, width: int = 120) -> str:
    return text(panels.footer_rows(view, width, 1))


# -- a run that does not respond


@pytest.mark.fault("T13")
@pytest.mark.parametrize(
    ("silence", "age"),
    [(2 * 86400.0 + 79200, "2 d"), (3 * 3600.0, "3 h"), (700.0, "11 min"), (11.0, "11 s")],
)
def test_a_dead_run_says_for_how_long_and_shows_no_speed(silence: float, age: str) -> None:
    shown = header(look(silence=silence))
    assert shown.startswith(f" ? NOT RESPONDING for {age} ")
    assert "– tok/s" in shown and "–:--:--" in shown and "34.1k" not in shown, shown
    assert "34.1k tok/s" in header(look()), "as while it lives"


@pytest.mark.fault("T13")
def test_a_dead_run_has_no_control_keys() -> None:
    assert "p pause" in footer(look()) and "p pause" in footer(look(silence=20.0)), (
        "a slow disk is no death"
    )
    dead = footer(look(silence=86400.0))
    assert "p pause" not in dead and "roll" not in dead and "q leave" in dead


def test_of_an_ended_run_no_heartbeat_is_due() -> None:
    assert header(look(silence=1e6, phase=Phase.FINISHED)).startswith(" ✓ FINISHED")


# -- a resumed run


@pytest.mark.fault("T16")
@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.SETUP])
def test_a_resumed_run_in_set_up_shows_nothing_of_its_dead_processes(phase: Phase) -> None:
    fake = FakeRun().begin().advance(400).spike(under_way=True)
    view = look(fake, phase=phase)
    shown = header(view)
    assert shown.startswith(" ○ STARTING"), "an incident that was open says nothing of now"
    assert "– tok/s" in shown and "–:--:--" in shown
    states = text(snapshots.PANE.build(view, 60, 12, PaneState()))
    assert "memory" not in states and "■" in states, "what was in memory is gone with the processes"


@pytest.mark.fault("T16")
def test_a_new_start_writes_nothing_of_the_dead_processes(tmp_path: Path) -> None:
    """`ctl --preview` reads the status as well: it must not offer a state in memory that is
    gone.
    """
    run = example().write(tmp_path)
    before = run.read_status()
    assert before is not None and {one.tier for one in before.snapshots} == {"memory", "disk"}
    SupervisorJournal(run, LaunchSection(), "vm", Mode.AUTO).write_starting_status(restarts=1)
    status = run.read_status()
    assert status is not None and status.phase is Phase.STARTING and status.step == before.step
    assert {one.tier for one in status.snapshots} == {"disk"}
    assert status.tokens_per_second == status.eta_seconds == 0.0


def test_an_ended_run_has_no_states_in_memory() -> None:
    assert "memory" not in text(snapshots.PANE.build(look(phase=Phase.FAILED), 60, 12, PaneState()))


# -- who acts


@pytest.mark.fault("T6")
def test_advise_says_that_no_one_acts() -> None:
    fake = FakeRun().begin().advance(100)
    fake.event("incident", "incident 1: open", number=1, state="open", onset=101)
    assert header(look(fake, mode=Mode.ADVISE)).startswith(" ▲ UNSTABLE, no action (advise)")
    assert header(look(fake, mode=Mode.AUTO)).startswith(" ▲ RECOVERING")
    assert header(look(fake, phase=Phase.ROLLBACK)).startswith(" ▲ ROLLING BACK")


@pytest.mark.fault("T6")
def test_what_is_advised_stands_in_the_journal_once_an_incident() -> None:
    fake = FakeRun().begin().advance(100)

    def advise(would: str, step: int, incident: int) -> None:
        data = {"action": "apply", "would": would, "incident": incident, "at_step": step}
        fake.event("verdict", f"would {would} {step}", **data)

    for step in range(101, 131):
        advise("skip" if step < 103 else "rollback", step, incident=1)
    fake.event("incident", "incident 1: recovered", number=1, state="recovered")
    advise("skip", 200, incident=2)
    shown = text(log.PANE.build(look(fake), 80, 40, PaneState()))
    lines = [line.split() for line in shown.splitlines() if "would" in line]
    assert [line[-3:] for line in lines] == [
        ["would", "skip", "101"],
        ["would", "rollback", "103"],
        ["would", "skip", "200"],
    ]


@pytest.mark.fault("T1")
def test_nothing_is_green_over_damage_that_no_one_has_dealt_with() -> None:
    standing = {"incident": 1, "since": 400, "let_pass": "advise", "loss": 10.3, "expected": 1.8}
    shown = header(look_at(standing))
    assert shown.startswith(" ▲ LOSS +8.5 since 400 "), shown
    tones = {
        tone for piece, tone in panels.header_rows(look_at(standing), 120, 1)[0] if "LOSS" in piece
    }
    assert tones == {"warn"}
    unresolved = look_at(standing).status.unresolved
    assert unresolved is not None and unresolved.sentence() in facts(look_at(standing))
    assert re.findall(r"\d[\d.]*", unresolved.sentence()) == ["400", "10.3", "8.5"]
    assert header(look_at({**standing, "is_open": True})).startswith(
        " ▲ UNSTABLE, no action (advise)"
    )
    assert header(look_at({**standing, "is_open": True, "acted": True})).startswith(" ▲ RECOVERING")
    assert header(look_at({"incident": 1, "since": 400})).startswith(" ▲ UNSTABLE since 400")
    assert header(look_at(standing, phase="finished")).startswith(
        " ▲ FINISHED, LOSS +8.5 since 400"
    )
    assert header(look_at(standing, phase="halted")).startswith(" ✗ HALTED")
    assert header(look()).startswith(" ● HEALTHY")


def look_at(unresolved: dict[str, Any], **status: Any) -> View:
    """A run whose status, as it stands in its file, names an incident that is not over."""
    fake = example()
    fields = msgspec.to_builtins(fake.status) | {"unresolved": unresolved, **status}
    read = msgspec.convert(fields, Status)
    return View(replace(snapshot_of(fake), status=read), fake.time + 0.4)


def test_a_question_counts_down() -> None:
    fake = example().ask("why")
    left = header(look(fake, deadline=fake.time + 1792, silence=1.0))
    assert left.startswith(" ◆ NEEDS ANSWER 29:51 ")
    assert header(look(fake, deadline=fake.time + 7200, silence=0.0)).startswith(
        " ◆ NEEDS ANSWER 2:00:00 "
    )
    assert header(look(fake)).startswith(" ◆ NEEDS ANSWER  ")
    other_clock = replace(look(fake, deadline=fake.time + 60).snapshot, heard=fake.time + 1000)
    assert header(View(other_clock, fake.time + 1010)).startswith(" ◆ NEEDS ANSWER 0:50 "), (
        "clocks may differ"
    )


def test_a_pause_says_by_whom() -> None:
    fake = example()
    fake.event("command", "pause applied", id="a", command="pause", effect="applied", who="ann@vm")
    fake.event("paused", "paused")
    assert header(look(fake, phase=Phase.PAUSED)).startswith(" ‖ PAUSED by ann ")
    fake.event("resumed", "")
    assert header(look(fake, phase=Phase.PAUSED)).startswith(" ‖ PAUSED  ")


# -- what acts on the updates


@pytest.mark.fault("B2", "T14")
def test_the_embedding_factor_has_a_mark_with_its_number() -> None:
    fake = example()
    fake.event("command", "shrink-embedding x0.1", id="a", command="shrink-embedding", value=0.1,
               effect="applied", who="ann@vm")  # fmt: skip
    assert (1284, "×0.1") in snapshot_of(fake).story.marks["!"]


@pytest.mark.fault("T14")
def test_a_standing_factor_is_shown_with_since_by_and_until() -> None:
    fake = example()
    assert "×" not in facts(look(fake))
    fake.event(
        "command",
        "shrink-embedding x0.1",
        id="a",
        command="shrink-embedding",
        value=0.1,
        effect="applied",
        who="ann@vm",
    )
    assert "embedding ×0.1 since 1,285 by ann" in facts(look(fake))
    fake.event(
        "command",
        "shrink-embedding x1",
        id="b",
        command="shrink-embedding",
        value=1.0,
        effect="applied",
        who="ann@vm",
    )
    assert "embedding" not in facts(look(fake))
    clip = {"kind": "clip", "value": 0.5, "from_step": 1280, "hold_steps": 20, "ramp_steps": 10}
    span = {"first": 0, "last": 16, "cause": "rejected", "step": 1280}
    fake.event("skipped", "skipped", span=span, incident=3, remedies=[clip])
    (factor,) = re.findall(r"clip ×[^·]*", facts(look(fake)))
    assert factor.split()[1::2] == ["×0.5", "1,280", "guard", "1,310"]
    assert "clip ×0.682 since" in facts(look(fake, step=1302)), "on its way back"
    assert "clip" not in facts(look(fake, step=1310))
    fake.event(
        "undo", "undone", spans=[span], rollbacks=[], pardons=[], to_step=1279, new_timeline=2
    )
    assert "clip" not in facts(look(fake))


# -- little room


@pytest.mark.fault("T20")
@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_the_countdown_is_the_last_to_go(width: int) -> None:
    fake = example().ask("why")
    shown = header(look(fake, deadline=fake.time + 600, silence=0.0), width)
    assert "NEEDS ANSWER 10:00" in shown and ("step 1,284" in shown)


@pytest.mark.parametrize(
    ("width", "read_only"),
    [
        pytest.param(100, False, marks=pytest.mark.fault("T20")),
        pytest.param(100, True, marks=pytest.mark.fault("T20")),
        (120, True),
    ],
)
def test_the_name_of_the_run_stays(width: int, read_only: bool) -> None:
    shown = header(look(read_only=read_only), width)
    assert "quickstart/20" in shown and ("read-only" in shown) == read_only
    assert "quickstart/2026-11-25-01" in shown or "…" in shown, "nothing is cut without a sign"


@pytest.mark.fault("T20")
@pytest.mark.parametrize("width", [36, 40, 44, 60])
def test_ages_of_states_are_short_and_complete(width: int) -> None:
    info = SnapshotInfo(
        step=1200, cursor=0, timeline=0, tier="disk", state="good", time=100.0, bytes=41_000_000
    )
    status = msgspec.structs.replace(
        example().status, snapshots=(info,), heartbeat=100.0 + 3 * 86400
    )
    view = View(Snapshot("a/b", status=status, heard=status.heartbeat), status.heartbeat)
    shown = text(snapshots.PANE.build(view, width, 4, PaneState())).splitlines()[1]
    assert shown.rstrip().endswith("3 d") and "good" in shown and cell_len(shown) <= width, shown
