"""What TensorBoard's own reader makes of the exported files: the present timeline, once, whatever
happens.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import (
    STORE_EVERYTHING_SIZE_GUIDANCE,
    EventAccumulator,
)
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as PluginAccumulator,
)

from guardrail.backtest.importers.sources import find_sources
from guardrail.core.events.kinds import BY_KIND
from guardrail.core.records.signals import COLUMNS, METRIC_COLUMNS
from guardrail.core.records.spans import Span
from guardrail.core.records.verdicts import Action
from guardrail.rundir.run_directory import RunDirectory
from guardrail.trackers import sink, tfevents
from guardrail.trackers.sink import Sink, follow_run, write_once
from guardrail.trackers.tensorboard import TensorBoard

SKIP = float(list(Action).index(Action.SKIP))
ROLLBACK = float(list(Action).index(Action.ROLLBACK))
CONFIG = "[run]\nname = 'demo'\n[optim]\nlr = 0.001\n[data]\nsources = ['a', 'b']\n"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path, "demo", CONFIG)


def write(
    run: RunDirectory, *rows: tuple[int, int, float], verdict: float = 0.0, **values: float
) -> None:
    """Rows of (step, timeline, loss)."""
    with run.metrics_writer() as writer:
        for step, timeline, loss in rows:
            writer.append(
                {
                    "step": step,
                    "timeline": timeline,
                    "time": 1000.0 + writer.rows,
                    "loss": loss,
                    "grad_norm": 0.5,
                    "lr": 0.1,
                    "tokens": 100,
                    "step_time": 0.5,
                    "verdict": verdict,
                    **values,
                }
            )


def read(run: RunDirectory) -> EventAccumulator:
    found = EventAccumulator(
        str(run.tensorboard), STORE_EVERYTHING_SIZE_GUIDANCE, purge_orphaned_data=True
    )
    return found.Reload()


def serve(run: RunDirectory) -> PluginAccumulator:
    """As TensorBoard's server reads it: it has its own idea of a restart."""
    return PluginAccumulator(
        str(run.tensorboard), {"tensors": 0}, purge_orphaned_data=True
    ).Reload()


def scalars(run: RunDirectory, tag: str = "train/loss") -> list[tuple[int, float]]:
    found, served = read(run), serve(run)
    if tag not in found.Tags()["scalars"]:
        assert tag not in served.Tags()["tensors"] or not served.Tensors(tag)
        return []
    points = [(e.step, round(e.value, 4)) for e in found.Scalars(tag)]
    assert [e.step for e in served.Tensors(tag)] == [step for step, _ in points]
    return points


def texts(run: RunDirectory, *tags: str) -> list[tuple[int, str]]:
    """(step, text) of `tags`, in the run directory's event files of whatever folder.

    TensorBoard's two readers purge differently; both find the same texts in the same order.
    """
    served, loaded = [], []
    for folder, _, names in os.walk(run.tensorboard):
        if any("tfevents" in name for name in names):
            server = PluginAccumulator(folder, {"tensors": 0}, purge_orphaned_data=True).Reload()
            loader = EventAccumulator(
                folder, STORE_EVERYTHING_SIZE_GUIDANCE, purge_orphaned_data=True
            ).Reload()
            for tag in tags or ("guard/incident",):
                served += server.Tensors(tag) if tag in server.Tags()["tensors"] else []
                loaded += loader.Tensors(tag) if tag in loader.Tags()["tensors"] else []
    found = [(e.step, e.tensor_proto.string_val[0].decode()) for e in served]
    assert [(e.step, e.tensor_proto.string_val[0].decode()) for e in loaded] == found
    return found


def event_files(run: RunDirectory) -> list[str]:
    return sorted(name for name in os.listdir(run.tensorboard) if "tfevents" in name)


def test_each_column_has_its_own_curves() -> None:
    curves = [column.curve for column in COLUMNS if column.curve]
    rejected = [column.rejected_curve for column in COLUMNS if column.rejected_curve]
    assert len(set(curves + rejected)) == len(curves + rejected) == 12
    by_name = {column.name: column for column in COLUMNS}
    assert by_name["lr"] == ("lr", "train/lr", "", False)
    assert by_name["loss"] == ("loss", "train/loss", "guard/rejected_loss", True)
    assert METRIC_COLUMNS == tuple(by_name)


def test_each_kind_of_line_has_its_tag(run: RunDirectory) -> None:
    for at, kind in enumerate([*BY_KIND, "kind_of_a_newer_version"], 1):
        run.append(kind, f"of kind {kind}", step=at)
    write_once(TensorBoard(run))
    assert [text.split()[-1] for _, text in texts(run, "guard/command")] == ["command"]
    found = {text.split()[-1].replace("\\", "") for _, text in texts(run)}
    not_written = {"started", "resume_check", "eval", "checkpoint", "note", "notified"}
    assert found == set(BY_KIND) - not_written - {"command"}


def test_curves_carry_the_columns(run: RunDirectory) -> None:
    write(
        run,
        (1, 0, 3.0),
        (2, 0, 2.5),
        embed_grad_norm=0.25,
        embed_share=0.25,
        loss_threshold=9.0,
        guard_time=0.005,
    )
    write(run, (3, 0, 2.0), eval_loss=2.25)
    write_once(TensorBoard(run))
    assert scalars(run) == [(1, 3.0), (2, 2.5), (3, 2.0)]
    for tag, value in [
        ("train/grad_norm", 0.5),
        ("train/embed_grad_norm", 0.25),
        ("train/embed_share", 0.25),
        ("train/lr", 0.1),
        ("train/tokens_per_second", 200.0),
        ("guard/loss_threshold", 9.0),
        ("guard/time_share", 0.01),
        ("guard/verdict", 0.0),
        ("timeline", 0.0),
    ]:
        assert scalars(run, tag)[0] == (1, value), tag
    assert scalars(run, "eval/loss") == [(3, 2.25)]
    assert len(scalars(run, "train/embed_grad_norm")) == 2, (
        "NaN means that there was nothing to measure"
    )
    assert read(run).Scalars("train/loss")[0].wall_time == 1000.0


def test_odd_values_do_not_stop_it(run: RunDirectory) -> None:
    write(
        run,
        (1, 0, math.nan),
        (2, 0, math.inf),
        (3, 0, 1e300),
        (4, 0, 1.0),
        step_time=0.0,
        time=math.nan,
    )
    write_once(TensorBoard(run))
    values = [value for _, value in scalars(run)]
    assert math.isnan(values[0]) and values[1] == values[2] == math.inf and values[3] == 1.0


def test_a_rejected_step_is_one_point_and_its_value_stands_apart(run: RunDirectory) -> None:
    write(run, (1, 0, 3.0))
    write(run, (2, 0, 11.5), (2, 0, math.nan), verdict=SKIP)
    write(run, (2, 0, 2.5), (3, 0, 2.4))
    write_once(TensorBoard(run))
    assert scalars(run) == [(1, 3.0), (2, 2.5), (3, 2.4)]
    rejected = scalars(run, "guard/rejected_loss")
    assert rejected[0] == (2, 11.5) and math.isnan(rejected[1][1])
    assert scalars(run, "guard/verdict") == [(1, 0), (2, SKIP), (2, SKIP), (3, 0)]


def rollback(run: RunDirectory, *, step: int, to: int, timeline: int, **data: Any) -> None:
    run.append(
        "rollback",
        f"rolled back from step {step} to {to}",
        step=step,
        timeline=timeline - 1,
        to_step=to,
        new_timeline=timeline,
        **data,
    )


@pytest.mark.parametrize("live", [True, False])
def test_after_rollbacks_and_a_restart_only_the_present_is_shown(
    run: RunDirectory, live: bool
) -> None:
    exporter = Sink(TensorBoard(run))

    def look() -> None:
        if live:
            exporter.write_new()

    write(run, *[(s, 0, 3.0) for s in range(1, 8)])
    look()
    write(run, (8, 0, 50.0), verdict=ROLLBACK)
    rollback(run, step=7, to=4, timeline=1)
    look()
    if live:
        assert scalars(run) == [(s, 3.0) for s in (1, 2, 3, 4)], (
            "purged before a new point is there"
        )
    write(run, (5, 1, 2.0), (6, 1, 2.0))
    look()
    rollback(run, step=6, to=2, timeline=2)
    write(run, (3, 2, 1.0), (4, 2, 1.0))
    look()
    write(run, (4, 3, 0.5))  # a restart from step 3 that the journal lost
    run.append("restarted", "again", step=4, timeline=4)
    write(run, (5, 4, 0.25))
    exporter.write_new()
    assert scalars(run) == [(1, 3.0), (2, 3.0), (3, 1.0), (4, 0.5), (5, 0.25)]
    assert scalars(run, "timeline") == [(1, 0), (2, 0), (3, 2), (4, 3), (5, 4)]
    assert scalars(run, "guard/rejected_loss") == []
    assert len(event_files(run)) == 1


def test_what_happened_is_written_as_text(run: RunDirectory) -> None:
    document = {
        "path": "/data/a*b.txt",
        "record": 3,
        "first_byte": 10,
        "last_byte": 90,
        "excerpt": "\x1b[31mÃ‚Â",
    }
    run.append("started", "begins")
    reason = "loss 11.5 (normal 2.3)"
    run.append("verdict", f"step 5: skip: {reason}", step=4, findings=[])
    span = Span(first=10, last=14, origin="rejected", step=5)
    run.append("skipped", "4 samples", step=4, span=span, documents=[document], documents_total=3)
    run.append("command", "pause applied", step=6, id="a", command="pause", effect="applied")
    write(run, (1, 0, 3.0))
    write_once(TensorBoard(run))
    journal = EventAccumulator(str(run.tensorboard / "journal")).Reload()
    assert journal.SummaryMetadata("guard/incident").plugin_data.plugin_name == "text"
    ((seq, text),) = texts(run)
    assert seq == 3 and text.startswith("*step 4, timeline 0*")
    assert reason in text and "4 samples" in text
    assert (
        "/data/a\\*b.txt:3 bytes 10-90  Ã‚Â" in text
        and "2 more documents" in text
        and "\x1b" not in text
    )
    assert texts(run, "guard/command") == [(4, "*step 6, timeline 0*\n\n**command** pause applied")]


def test_texts_of_abandoned_steps_stay(run: RunDirectory) -> None:
    exporter = Sink(TensorBoard(run))
    write(run, *[(s, 0, 3.0) for s in range(1, 7)])
    run.append("verdict", "step 3: skip", step=2)
    run.append("verdict", "step 7: skip", step=6)
    exporter.write_new()
    rollback(run, step=6, to=4, timeline=1)
    write(run, (5, 1, 2.0))
    exporter.write_new()
    run.append("verdict", "step 6: skip", step=5, timeline=1)
    exporter.write_new()
    shown = [event.message for event in run.events() if event.kind in ("verdict", "rollback")]
    assert [text.split("** ")[1] for _, text in texts(run)] == shown
    assert len(shown) == 4


@pytest.mark.fault("T18")
@pytest.mark.parametrize("again", ["the same exporter", "another", "another without position"])
def test_each_text_is_written_once_and_in_order_through_rollbacks(
    run: RunDirectory, again: str
) -> None:
    exporter = Sink(TensorBoard(run))

    def look() -> None:
        nonlocal exporter
        if again != "the same exporter":
            exporter.close()
            exporter = Sink(TensorBoard(run))
        if again == "another without position":
            (run.tensorboard / "position.json").unlink(missing_ok=True)
            exporter = Sink(TensorBoard(run))
        exporter.write_new()

    write(run, *[(s, 0, 3.0) for s in range(1, 7)])
    run.append("verdict", "first", step=2)
    run.append("command", "second", step=5)
    run.append("verdict", "third", step=6)
    look()
    run.append("verdict", "fourth", step=6)  # of a step that has a text already
    look()
    rollback(run, step=6, to=1, timeline=1)
    write(run, *[(s, 1, 2.0) for s in range(2, 5)])
    look()
    run.append("command", "fifth", step=3, timeline=1)
    run.append("verdict", "sixth", step=4, timeline=1)
    look()
    rollback(run, step=4, to=2, timeline=2)
    write(run, (3, 2, 1.0))
    look()
    found = texts(run, "guard/incident", "guard/command")
    for words in (
        "first",
        "second",
        "third",
        "fourth",
        "from step 6 to 1",
        "fifth",
        "sixth",
        "from step 4 to 2",
    ):
        assert sum(words in text for _, text in found) == 1, words
    for tag in ("guard/incident", "guard/command"):
        steps = [step for step, _ in texts(run, tag)]
        assert steps == sorted(set(steps)), "a step that goes back makes readers drop texts"
    assert len(texts(run, "config")) == 1
    assert scalars(run) == [(1, 3.0), (2, 2.0), (3, 1.0)]


@pytest.mark.fault("T18")
def test_a_text_that_was_half_written_by_a_killed_exporter_is_written_once(
    run: RunDirectory,
) -> None:
    write(run, (1, 0, 3.0))
    for name in ("first", "second", "third"):
        run.append("verdict", name, step=len(name))
        run.append("command", f"after {name}", step=len(name))
    write_once(TensorBoard(run))
    expected, commands = texts(run), texts(run, "guard/command")
    path = max(run.tensorboard.rglob("*tfevents*"), key=lambda path: path.parent.name == "journal")
    complete = path.read_bytes()
    for size in range(len(complete) - 1, complete.index(b"first"), -40):
        for other in path.parent.glob("*tfevents*"):
            other.unlink()
        path.write_bytes(complete[:size])
        (run.tensorboard / "position.json").unlink()
        write_once(TensorBoard(run))
        assert texts(run) == expected and texts(run, "guard/command") == commands, size
        assert len(texts(run, "config")) == 1


def test_a_run_whose_texts_stand_beside_the_curves_goes_on_without_a_second_copy(
    run: RunDirectory,
) -> None:
    """Event files of older versions hold the texts among the curves."""
    write(run, (1, 0, 3.0))
    run.append("verdict", "old", step=1)
    write_once(TensorBoard(run))
    for path in (run.tensorboard / "journal").iterdir():
        path.rename(run.tensorboard / f"{path.name}.old")
    run.append("verdict", "new", step=1)
    write_once(TensorBoard(run))
    found = [text for _, text in texts(run)]
    assert [sum(word in text for text in found) for word in ("old", "new")] == [1, 1]
    assert len(texts(run, "config")) == 1


def test_texts_are_no_log_of_their_own(run: RunDirectory) -> None:
    write(run, *[(s, 0, 3.0) for s in range(1, 5)])
    run.append("verdict", "step 3: skip", step=2)
    write_once(TensorBoard(run))
    (log,) = [log for source in find_sources([str(run.tensorboard)]) for log in source.read({})]
    assert log.format == "tensorboard"


def test_the_configuration_is_text_and_hparams(run: RunDirectory) -> None:
    from tensorboard.plugins.hparams import metadata

    write(run, (1, 0, 3.0))
    run.append("ended", "finished", phase="finished", step=1)
    write_once(TensorBoard(run))
    assert "lr = 0.001" in texts(run, "config")[0][1]
    found = read(run)
    content = found.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    hparams = metadata.parse_session_start_info_plugin_data(content).hparams
    assert hparams["optim.lr"].number_value == 0.001 and hparams["run.name"].string_value == "demo"
    assert hparams["data.sources"].string_value == "['a', 'b']"
    end = found.SummaryMetadata(metadata.SESSION_END_INFO_TAG).plugin_data.content
    assert metadata.parse_session_end_info_plugin_data(end).status == 1  # STATUS_SUCCESS
    run.write_config(CONFIG.replace("0.001", "0.002"))
    write_once(TensorBoard(run))
    assert "lr = 0.002" in texts(run, "config")[-1][1]


def story(run: RunDirectory) -> dict[str, list[tuple[int, float]]]:
    return {tag: scalars(run, tag) for tag in read(run).Tags()["scalars"]}


def test_exporting_again_adds_nothing(run: RunDirectory) -> None:
    write(run, (1, 0, 3.0), (2, 0, 2.0))
    run.append("verdict", "step 2: skip", step=1)
    write_once(TensorBoard(run))
    before, files = story(run), event_files(run)
    sizes = [os.path.getsize(run.tensorboard / name) for name in files]
    write_once(TensorBoard(run))
    assert len(texts(run)) == 1 and len(list((run.tensorboard / "journal").iterdir())) == 1
    assert (
        event_files(run) == files
        and [os.path.getsize(run.tensorboard / name) for name in files] == sizes
    )
    write(run, (3, 0, 1.0))
    write_once(TensorBoard(run))
    assert len(event_files(run)) == 2
    assert scalars(run) == [*before["train/loss"], (3, 1.0)] and len(texts(run)) == 1


@pytest.mark.parametrize("lost", ["position", "everything"])
def test_an_exporter_that_died_before_it_noted_its_position_repeats_nothing(
    run: RunDirectory, lost: str
) -> None:
    write(run, (1, 0, 3.0), (2, 0, 2.5))
    write(run, (3, 0, 9.0), verdict=SKIP)
    position = run.tensorboard / "position.json"
    write_once(TensorBoard(run))
    noted = position.read_bytes()
    write(run, (3, 0, 2.0), (4, 0, 1.5))
    run.append("verdict", "step 5: skip", step=4)
    write_once(TensorBoard(run))
    rollback(run, step=4, to=3, timeline=1)
    write(run, (4, 1, 1.25), (5, 1, 1.0))
    write_once(TensorBoard(run))
    expected = story(run)
    assert expected["train/loss"] == [(1, 3.0), (2, 2.5), (3, 2.0), (4, 1.25), (5, 1.0)]
    if lost == "position":
        position.write_bytes(noted)
    else:
        position.write_bytes(b"{")
    write_once(TensorBoard(run))
    assert story(run) == expected
    assert expected["guard/rejected_loss"] == [(3, 9.0)]
    assert [seq for seq, _ in texts(run)] == [1, 2]


def test_many_rows_are_written_in_pieces(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink, "CHUNK_ROWS", 7)
    write(run, *[(s, 0, float(s)) for s in range(1, 41)])
    rollback(run, step=40, to=30, timeline=1)
    write(run, *[(s, 1, float(-s)) for s in range(31, 60)])
    write_once(TensorBoard(run))
    assert scalars(run) == [(s, float(s)) for s in range(1, 31)] + [
        (s, float(-s)) for s in range(31, 60)
    ]


def test_it_follows_a_run_in_a_thread_until_it_is_stopped(run: RunDirectory) -> None:
    stop = threading.Event()
    thread = threading.Thread(
        target=follow_run, args=(TensorBoard(run),), kwargs={"stop": stop, "seconds": 0.01}
    )
    thread.start()
    write(run, (1, 0, 3.0))
    deadline = time.monotonic() + 30
    while not event_files(run):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    write_once(TensorBoard(run))  # a second exporter leaves the first one alone
    assert len(event_files(run)) == 1
    write(run, (2, 0, 2.0))
    stop.set()
    thread.join(30)
    assert not thread.is_alive() and scalars(run) == [(1, 3.0), (2, 2.0)]


def test_a_disk_that_fails_is_logged_once_and_nothing_is_lost(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = tfevents.write_all

    def half(descriptor: int, data: bytes) -> None:
        real(descriptor, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    exporter = Sink(TensorBoard(run))
    with caplog.at_level(logging.WARNING, "guardrail.trackers.sink"):
        write(run, (1, 0, 3.0))
        run.append("verdict", "step 1: skip", step=0)
        with monkeypatch.context() as patched:
            patched.setattr(tfevents, "write_all", half)
            for _ in range(3):
                exporter.try_write_new()
            assert event_files(run) == [] and len(caplog.records) == 1
            assert "No space left" in caplog.text
        exporter.try_write_new()
        write(run, (2, 0, 2.0))
        with monkeypatch.context() as patched:
            patched.setattr(tfevents, "write_all", half)
            exporter.try_write_new()
        exporter.try_write_new()
        assert len(caplog.records) == 4
    assert len(texts(run)) == 1
    assert scalars(run) == [(1, 3.0), (2, 2.0)]
    assert len(event_files(run)) == 1


def test_a_position_that_cannot_be_noted_does_not_repeat_the_story(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    exporter = Sink(TensorBoard(run))
    write(run, (1, 0, 3.0))
    with monkeypatch.context() as patched:
        patched.setattr(sink, "replace_file", fail)
        exporter.try_write_new()
        exporter.try_write_new()
    write(run, (2, 0, 2.0))
    exporter.try_write_new()
    assert scalars(run) == [(1, 3.0), (2, 2.0)]
    assert (run.tensorboard / "position.json").exists()


def test_a_run_that_has_no_files_yet_is_waited_for(tmp_path: Path) -> None:
    write_once(TensorBoard(RunDirectory(tmp_path / "not-there")))
    path = tmp_path / "young"
    path.mkdir()
    write_once(TensorBoard(RunDirectory(path)))
    assert event_files(RunDirectory(path)) == [] and not (path / "tensorboard" / "journal").exists()
