"""A checkpoint belongs to one run, and to what the journal of that run knows."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from guardrail.decide.run_history import RunHistory
from guardrail.rundir.manifest import MANIFEST, read_manifest, sealed
from guardrail.rundir.run_directory import RunDirectory
from tests.support.jumping import Loop
from tests.support.texts import numbers_in

NEVER = 10_000


def stopped(folder: Path, at_step: int) -> Loop:
    loop = Loop(folder, onset=NEVER, steps=60)
    loop.send("stop", at_step=at_step)
    return loop.train()


def resumed(folder: Path) -> tuple[int, RunDirectory]:
    """Go on with a run for one step; returns the step that it went on behind."""
    loop = Loop(folder, onset=NEVER, steps=60)
    loop.guard.open()
    step = loop.guard.step
    loop.guard.close()
    return step, loop.run


def foreign(run: RunDirectory) -> dict[str, str]:
    lines = [event.data for event in run.events() if event.kind == "checkpoint"]
    return {data["path"]: data["reason"] for data in lines if data["state"] == "foreign"}


def own_id(run: RunDirectory) -> str:
    return RunHistory.from_events(run.events()).run_id


@pytest.mark.fault("E6")
def test_a_checkpoint_of_another_run_is_refused_and_named_and_stays_where_it_is(
    tmp_path: Path,
) -> None:
    ours, theirs = stopped(tmp_path / "ours", 25), stopped(tmp_path / "theirs", 45)
    lost = theirs.run.checkpoints / "step-00000040"
    shutil.copytree(lost, ours.run.checkpoints / lost.name)
    step, run = resumed(tmp_path / "ours")
    assert step == 25
    theirs_id = read_manifest(lost).identity["run_id"]
    assert list(foreign(run)) == [lost.name]
    assert theirs_id in foreign(run)[lost.name] and own_id(run) in foreign(run)[lost.name]
    loop = Loop(tmp_path / "ours", onset=NEVER, steps=60).train()
    assert (run.checkpoints / lost.name).exists()
    assert loop.guard.snapshots.find_target(10**9).step == 55  # type: ignore[union-attr]  # the newest good one, none of theirs
    assert {"step-00000025", "step-00000060"} <= {path.name for path in run.checkpoints.iterdir()}


@pytest.mark.fault("E6")
def test_a_checkpoint_ahead_of_the_journal_is_refused(tmp_path: Path) -> None:
    """As where the journal comes from a copy that is older than the checkpoints: decisions since
    are not known.
    """
    run = stopped(tmp_path, 25).run
    before = run.journal_path.read_bytes()
    last_line = run.events()[-1].seq
    step, _ = resumed(tmp_path)
    assert step == 25
    Loop(tmp_path, onset=NEVER, steps=60).train()
    run.journal_path.write_bytes(before)
    step, _ = resumed(tmp_path)
    assert step == 25
    saved_after = read_manifest(run.checkpoints / "step-00000060").identity["journal_seq"]
    saved, present = numbers_in(foreign(run)["step-00000060"])
    assert saved == saved_after > present >= last_line


def test_a_crash_between_a_save_and_its_line_in_the_journal_loses_nothing(tmp_path: Path) -> None:
    run = stopped(tmp_path, 25).run
    lines = run.journal_path.read_bytes().splitlines(keepends=True)
    at = next(at for at, line in enumerate(lines) if b'"cp_step":25' in line)
    run.journal_path.write_bytes(b"".join(lines[:at]))
    assert resumed(tmp_path)[0] == 25 and not foreign(run)


def test_what_an_older_version_saved_stays_readable(tmp_path: Path) -> None:
    """Its manifests name no run. Those count that its journal names, and all of them where that
    names no run either.
    """
    run = stopped(tmp_path, 25).run
    for folder in run.checkpoints.iterdir():
        manifest = read_manifest(folder)
        del manifest.identity["run_id"], manifest.identity["journal_seq"]
        (folder / MANIFEST).write_bytes(sealed(manifest))
    assert resumed(tmp_path)[0] == 25
    old = {"config": "..."}
    assert RunHistory().why_not_of_this_run(old, timeline=0, step=25) == ""
    past = RunHistory(run_id="a", saved={10})
    assert past.why_not_of_this_run(old, timeline=0, step=10) == ""
    assert past.why_not_of_this_run(old, timeline=0, step=20)
    assert "(b;" in RunHistory().why_not_of_this_run({"run_id": "b"}, timeline=0, step=20)
    assert numbers_in(past.why_not_of_this_run(old, timeline=3, step=10)) == [3, 0]
