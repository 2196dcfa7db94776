"""What holds for every importer, and that a new one is a file and a line in the list."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from guardrail.backtest.importers import registry
from guardrail.backtest.importers.base import Importer, Scope
from guardrail.backtest.importers.log_file import LogFile
from guardrail.backtest.importers.recorded_log import Log
from guardrail.backtest.importers.registry import IMPORTERS, format_table, list_formats
from guardrail.backtest.importers.sources import find_sources
from guardrail.cli.backtest import command
from guardrail.core.errors import DataError
from guardrail.core.packages import EXTRA_OF
from guardrail.trackers.tfevents import EventFile, encode_scalars
from tests.support.examples.mlflow_importer import MlflowMetrics
from tests.support.places import TESTS

NAN = float("nan")
ALL = pytest.mark.parametrize("importer", [*IMPORTERS, MlflowMetrics()], ids=lambda each: each.name)
RUN = TESTS / "cases" / "old_runs" / "before_rename"


def a_log_for(importer: Importer, folder: Path) -> Path:
    """Write a short log of this importer's format, and return its path."""
    path = folder / "log"
    match importer.name:
        case "run_directory":
            return RUN
        case "tensorboard":
            file = EventFile(folder)
            for step in range(1, 9):
                file.append(encode_scalars({"train/loss": 2.5}, step=step, at=NAN))
            return next(folder.iterdir())
        case "wandb":
            path.write_bytes(b":W&B" + bytes(20))
        case "trainer_state":
            history = [{"step": step, "loss": 2.5} for step in range(1, 9)]
            path.write_text(json.dumps({"log_history": history}))
        case "jsonl":
            path.write_text("".join(f'{{"step": {step}, "loss": 2.5}}\n' for step in range(1, 9)))
        case "csv":
            path.write_text("step,loss\n" + "".join(f"{step},2.5\n" for step in range(1, 9)))
        case "text":
            path.write_text("".join(f"step {step} loss 2.5\n" for step in range(1, 9)))
        case "mlflow":
            path = folder / "loss"
            path.write_text("".join(f"{1700000000000 + n} 2.5 {n}\n" for n in range(1, 9)))
    return path


@ALL
def test_it_says_what_it_reads(importer: Importer) -> None:
    assert [other.name for other in IMPORTERS].count(importer.name) <= 1
    assert importer.name.isidentifier()
    for text in (importer.reads, importer.recognised_by):
        assert text and "|" not in text and "\n" not in text and not text.endswith(".")
    assert importer.package in ("", *EXTRA_OF)


@ALL
def test_it_recognises_its_own_format_alone(importer: Importer, tmp_path: Path) -> None:
    path = a_log_for(importer, tmp_path)
    if path.is_dir():
        assert [each.name for each in IMPORTERS if each.recognises_folder(path)] == [importer.name]
        return
    file = LogFile.open(path, is_named=False)
    others = [each for each in IMPORTERS if each.name != importer.name]
    assert importer.recognises(file)
    assert not any(each.recognises(file) for each in others)
    assert not importer.recognises_folder(tmp_path)


@ALL
def test_it_recognises_no_foreign_file(importer: Importer, tmp_path: Path) -> None:
    contents = (b"", b"\x7fELF\2\1\1\0\0\0", b"hello\nworld\n", b'{"name": "ada"}\n', b"a,b\n1,2\n")
    for number, content in enumerate(contents):
        path = tmp_path / f"file-{number}"
        path.write_bytes(content)
        assert not importer.recognises(LogFile.open(path, is_named=False)), content


@ALL
def test_it_reads_a_log_or_refuses_with_its_path(importer: Importer, tmp_path: Path) -> None:
    path = a_log_for(importer, tmp_path)
    if importer.name == "wandb":  # no record in it
        with pytest.raises(DataError, match="shown"):
            importer.read(path, "shown", {})
        return
    (log,) = importer.read(path, "shown", {})
    assert log.path == "shown" and log.format
    assert len(log) >= 8 and set(log.columns) >= {"loss"}
    if path.is_file():
        path.write_bytes(path.read_bytes()[:-3])
        (cut,) = importer.read(path, "shown", {})
        assert 0 < len(cut) <= len(log)


@ALL
def test_a_folder_of_its_files_gives_its_runs(importer: Importer, tmp_path: Path) -> None:
    """Only the importers of the list are asked."""
    if importer.scope is not Scope.FOLDER or importer not in IMPORTERS:
        return
    a_log_for(importer, tmp_path)
    (source,) = find_sources([str(tmp_path)])
    (log,) = source.read({})
    assert source.path == log.path == str(tmp_path)


def test_the_last_importer_takes_any_text_that_the_user_named(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("hello\n")
    assert [each.name for each in IMPORTERS if each.recognises(LogFile.open(path, is_named=True))]
    assert IMPORTERS[-1].name == "text"


def test_the_help_lists_every_format() -> None:
    text = " ".join(CliRunner().invoke(command, ["--help"]).output.split())
    for importer in IMPORTERS:
        assert importer.reads.replace("`", "") in text


# -- the example


def test_a_line_in_the_list_is_all_that_a_new_importer_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = tmp_path / "mlruns" / "0" / "4f2a" / "metrics"
    metrics.mkdir(parents=True)
    steps = range(1, 301)
    losses = {step: 2.5 + 0.01 * (step % 7) for step in steps}
    losses[200] = 12.0
    for name, values in (("loss", losses), ("grad_norm", dict.fromkeys(steps, 1.0))):
        lines = [f"{1700000000000 + step} {value} {step}\n" for step, value in values.items()]
        (metrics / name).write_text("".join(lines))
    with pytest.raises(DataError) as caught:
        read_all(tmp_path)
    assert caught.value.kind == "no_run"
    monkeypatch.setattr(registry, "IMPORTERS", (MlflowMetrics(), *registry.IMPORTERS))
    (log,) = read_all(tmp_path)
    assert (log.format, log.path, len(log)) == ("mlflow", str(metrics), 300)
    assert set(log.columns) == {"loss", "grad_norm"}
    result = CliRunner().invoke(command, [str(tmp_path), "--json"], standalone_mode=False)
    (run,) = json.loads(result.output)["runs"]
    assert run["format"] == "mlflow"
    assert [alarm["step"] for alarm in run["alarms"]] == [200]
    assert "MLflow" in list_formats() and "MLflow" in format_table()


def read_all(path: Path) -> list[Log]:
    return [log for source in find_sources([str(path)]) for log in source.read({})]
