"""Runs that older versions have left are read, shown and resumed; their configuration loads.

tests/cases/old_runs holds a run directory of each version, stopped at step 118 of 140 (record.py
made them), and expected.json: what `facts_of` found in them when they were stored. Where a value
is renamed on purpose, expected.json follows; the run directories never change.
"""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from guardrail.cli.main import main
from guardrail.core.config import build_config
from guardrail.core.events.event import Event
from guardrail.core.records.status import Phase
from guardrail.core.toml_file import dump_toml, read_toml
from guardrail.launch.launcher import prepare_resume
from guardrail.report.output import report_as_dict
from guardrail.report.quarantine import quarantine_lines
from guardrail.rundir.checkpoint_folders import checkpoint_dirs
from guardrail.rundir.run_directory import RunDirectory
from guardrail.rundir.verification import verify
from guardrail.tui.app.app import GuardrailApp
from guardrail.tui.model.pane_state import PaneState
from guardrail.tui.model.run_reader import RunReader
from guardrail.tui.model.view import View
from guardrail.tui.panes.table import PANES
from tests.support.fake_run import FakeReader
from tests.support.lab import Lab
from tests.support.places import TESTS
from tests.support.running import assert_whole, final, of_kind, table, train

CASES = TESTS / "cases" / "old_runs"
RECORDED_IN = "/tmp/old_runs"  # where the sources lay; stands in config.toml
RUNS = ("59cf01d", "before_rename")
STEPS, STOPPED_AT, WORLD = 140, 118, 2
PEAK_RATE, LAST_SHARE, RATE_FACTOR = (
    5e-3,
    0.2,
    0.7,
)  # the last is of the command that waits for step 130


class Old(NamedTuple):
    """A copy of a stored run, and what is expected of it."""

    run: RunDirectory
    root: Path
    expected: dict[str, Any]


def copy_run(name: str, folder: Path) -> RunDirectory:
    """As a user moves a run: copied with its sources, and the paths in config.toml rewritten."""
    run = folder / "runs" / "old" / "2026-11-30-01"
    shutil.copytree(CASES / "sources", folder / "sources")
    shutil.copytree(CASES / name, run)
    config = run / "config.toml"
    config.write_text(config.read_text().replace(RECORDED_IN, str(folder)))
    return RunDirectory.open(run)


@pytest.fixture(params=RUNS)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Old:
    expected = json.loads((CASES / "expected.json").read_text())[request.param]
    return Old(copy_run(request.param, tmp_path), tmp_path / "runs", expected)


# -- what is compared


def facts_of(run: RunDirectory, report: dict[str, Any]) -> dict[str, Any]:
    """Kinds and numbers of a run directory that every later version must find in it."""
    view = run.metrics()
    kept = (
        "state",
        "step",
        "total_steps",
        "timeline",
        "exit_code",
        "world",
        "mode",
        "tokens",
        "loss",
        "eval_loss",
    )
    counted = ("applied", "rejected", "samples_skipped", "unresolved")
    return {
        "events": dict(sorted(Counter(event.kind for event in run.events()).items())),
        "columns": list(view.columns),
        "rows": len(view),
        "report": {name: report[name] for name in (*kept, *counted)},
        "incidents": [facts_of_incident(incident) for incident in report["incidents"]],
        "by_person": fields_of(report["by_person"], "action", "step", "window"),
        "commands": fields_of(report["commands"], "step", "command", "value", "effect"),
        "restarts": fields_of(report["restarts"], "step", "timeline", "steps_lost"),
        "checkpoints": fields_of(report["checkpoints"], "name", "state"),
        "quarantine": quarantine_lines(run),
    }


def fields_of(entries: list[dict[str, Any]], *names: str) -> list[list[Any]]:
    return [[entry[name] for name in names] for entry in entries]


def facts_of_incident(incident: dict[str, Any]) -> dict[str, Any]:
    kept = {name: incident[name] for name in ("number", "state", "onset", "cause", "closed_step")}
    return {
        **kept,
        "findings": fields_of(incident["findings"], "signal", "kind", "step"),
        "actions": fields_of(incident["actions"], "action", "step", "to_step", "window"),
        "samples": incident["samples"],
        "steps_lost": incident["cost"]["steps"],
        "rejected": incident["cost"]["rejected"],
    }


def as_written(facts: dict[str, Any]) -> Any:
    return json.loads(json.dumps(facts))


def printed_json(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """What a command prints on stdout as JSON."""
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# -- read


def test_journal_metrics_and_report_are_read(old: Old, capsys: pytest.CaptureFixture[str]) -> None:
    report = printed_json(capsys, "report", str(old.run.path))
    found = as_written(facts_of(old.run, report))
    for name, expected in old.expected["facts"].items():
        assert found[name] == expected, name
    assert_whole(old.run)


def test_every_event_keeps_its_place(old: Old) -> None:
    lines = (old.run.path / "journal.jsonl").read_text().splitlines()
    events = old.run.events()
    written = [json.loads(line) for line in lines]
    for name in ("seq", "time", "step", "timeline"):
        assert [getattr(event, name) for event in events] == [line[name] for line in written]


def test_status_ranks_and_commands_are_read(old: Old) -> None:
    status = old.run.read_status()
    assert status is not None
    assert (status.phase, status.step, status.exit_code) == (Phase.STOPPED, STOPPED_AT, 130)
    states = {info.step: info.state for info in status.snapshots if info.tier == "disk"}
    assert states == {60: "good", 80: "good", 95: "good", 100: "good", STOPPED_AT: "candidate"}
    assert [(rank.rank, rank.phase, rank.step) for rank in old.run.read_ranks()] == [
        (0, Phase.STOPPED, STOPPED_AT),
        (1, Phase.STOPPED, STOPPED_AT),
    ]
    assert old.run.notified() == old.expected["notified"]
    waiting = [(one.kind, one.value, one.at_step) for one in old.run.commands_pending()]
    assert sorted(waiting) == sorted(map(tuple, old.expected["waiting"]))
    assert old.run.commands_refused() == []


def test_the_checkpoint_holds(old: Old) -> None:
    (newest,) = checkpoint_dirs(old.run.checkpoints)
    manifest = verify(newest)
    assert (manifest.step, manifest.timeline, manifest.world) == (STOPPED_AT, 5, WORLD)
    assert main(["verify", str(newest)]) == 0


@pytest.mark.parametrize("form", ["terminal", "markdown", "html"])
def test_reports_name_every_incident(old: Old, form: str, tmp_path: Path) -> None:
    file = tmp_path / "report"
    assert main(["report", str(old.run.path), "--format", form, "-o", str(file)]) == 0
    text = file.read_text()
    for number in range(1, len(old.expected["facts"]["incidents"]) + 1):
        in_table = re.search(rf"^ *{number} ", text, re.MULTILINE)
        assert in_table or f"incident {number}" in text.lower()
    assert str(STOPPED_AT) in text


def test_the_run_is_listed(old: Old, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = printed_json(capsys, "runs", "--root", str(old.root))
    assert {name: row[name] for name in old.expected["listed"]} == old.expected["listed"]


def test_a_backtest_judges_as_the_run_did(old: Old, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed_json(capsys, "backtest", str(old.run.path))
    assert found["summary"] == old.expected["backtest"]
    assert found["runs"][0]["differing_from_live"] == []


def test_secrets_that_an_old_version_wrote_are_not_shown(old: Old) -> None:
    assert "cat > /dev/null" not in old.run.config_text()


# -- shown


@pytest.fixture
def reader(old: Old) -> Iterator[RunReader]:
    reader = RunReader(old.run)
    reader.look()
    yield reader
    reader.close()


def test_the_reader_finds_the_story(old: Old, reader: RunReader) -> None:
    told, facts = reader.latest(), old.expected["facts"]
    assert told.loaded and told.problem == ""
    assert told.status is not None and told.status.step == STOPPED_AT
    numbers = [incident["number"] for incident in facts["incidents"]]
    assert [incident.number for incident in reversed(told.story.incidents)] == numbers
    assert told.story.question == 0
    applied = np.unique(told.series.step)
    assert applied.tolist() == list(range(1, STOPPED_AT + 1))
    timelines = facts["report"]["timeline"]
    assert len(told.series.abandoned) == timelines - 1, "the first resume has given up nothing"


def test_every_pane_has_its_rows(old: Old, reader: RunReader) -> None:
    seen = View(reader.latest(), old.expected["ended_at"])
    for pane in PANES:
        state = PaneState(focused=True)
        assert pane.build(seen, 120, 32, state), pane.name
        assert pane.count(seen, state) >= 0, pane.name


async def test_the_screen_is_drawn(old: Old, reader: RunReader) -> None:
    app = GuardrailApp(FakeReader(reader.latest()))
    async with app.run_test(size=(120, 32)) as pilot:
        await pilot.pause()
        shown = [strip.text for strip in app.screen._compositor.render_strips()]
    text = "\n".join(shown)
    assert "118" in shown[0] and "140" in shown[0]
    assert any("┤" in line for line in shown), "the axis of the loss"
    assert "grad" in text


# -- resumed


def events_after(run: RunDirectory, seq: int, kind: str) -> list[Event]:
    return [event for event in of_kind(run, kind) if event.seq > seq]


def assert_finished(old: Old) -> None:
    """The present version has gone on from step 118 to the end, and nothing of the past is lost."""
    run, facts = old.run, old.expected["facts"]
    before = sum(facts["events"].values())
    (restarted,) = events_after(run, before, "restarted")
    assert (restarted.step, restarted.timeline) == (STOPPED_AT, 6)
    (check,) = events_after(run, before, "resume_check")
    parts = {name: value for name, value in check.data.items() if isinstance(value, str)}
    assert parts and set(parts.values()) == {"ok"}
    (ended,) = events_after(run, before, "ended")
    assert (ended.step, ended.data["phase"]) == (STEPS, "finished")
    answered = [
        [event.data["command"], event.data["value"], event.data["effect"]]
        for event in events_after(run, before, "command")
    ]
    assert answered == old.expected["answered"]
    steps, rates = table(run, ("step", "lr")).T
    assert steps.tolist() == list(range(1, STEPS + 1))
    assert rates[-1] == pytest.approx(PEAK_RATE * LAST_SHARE * RATE_FACTOR)
    assert set(facts["quarantine"]) <= set(quarantine_lines(run))
    incidents = [as_written(facts_of_incident(one)) for one in report_as_dict(run)["incidents"]]
    assert incidents[: len(facts["incidents"])] == facts["incidents"]
    assert_whole(run)
    assert final(run)


def test_a_run_is_resumed_to_its_end(old: Old) -> None:
    prepared = prepare_resume(str(old.run.path), (), root=str(old.root))
    assert prepared is not None and prepared.lock is not None
    prepared.lock.release()
    assert train(old.run, WORLD) == "finished"
    assert_finished(old)


@pytest.mark.ci_slow
def test_a_run_is_resumed_by_command(old: Old, lab: Lab) -> None:
    """The same through supervisor and elastic, which go on with event files and messages."""
    done = lab.guardrail("launch", "--resume", str(old.run.path), "--headless")
    assert done.returncode == 0, done.stderr
    assert_finished(old)
    notified = old.run.notified()
    assert notified is not None and notified > old.expected["notified"]
    status = old.run.read_status()
    assert status is not None and (status.phase, status.exit_code) == (Phase.FINISHED, 0)


# -- configuration


def keys_of(tree: Any, path: str = "") -> Iterator[str]:
    """ "guard.window", "guard.escalation", "guard.escalation[].do" of a parsed file."""
    if isinstance(tree, list):
        for one in tree:
            yield from keys_of(one, f"{path}[]")
    elif isinstance(tree, dict):
        for key, value in tree.items():
            name = f"{path}.{key}" if path else key
            yield name
            yield from keys_of(value, name)


def numbers_in(tree: Any) -> Iterator[float]:
    """All numbers of a parsed file, whatever their keys are called."""
    if isinstance(tree, (dict, list)):
        for one in tree.values() if isinstance(tree, dict) else tree:
            yield from numbers_in(one)
    elif isinstance(tree, (int, float)) and not isinstance(tree, bool):
        yield float(tree)


def test_every_old_key_loads() -> None:
    file = CASES / "every_old_key.toml"
    tree = read_toml(file)
    known = set((CASES / "old_keys.txt").read_text().split())
    assert known <= set(keys_of(tree))
    settings = build_config(tree, file=str(file), base=CASES)
    lost = Counter(numbers_in(tree)) - Counter(numbers_in(tomllib.loads(dump_toml(settings))))
    assert not lost, "a number of the file that stands nowhere in the settings"


@pytest.mark.parametrize("name", RUNS)
def test_the_configuration_of_an_old_run_loads(name: str, tmp_path: Path) -> None:
    run = copy_run(name, tmp_path)
    file = run.path / "config.toml"
    settings = build_config(read_toml(file, of_run=True), file=str(file), base=tmp_path)
    assert settings.launch.processes == WORLD
    assert len(settings.guard.ladder) == 7 and settings.guard.remedies[0].from_step == 100
