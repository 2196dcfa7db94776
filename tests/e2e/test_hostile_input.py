"""Bad input on every surface gives one sentence and exit code 2, never a traceback."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from guardrail.backtest.importers.sources import find_sources
from guardrail.cli.main import COMMANDS, main
from guardrail.core.config import ask_trainer, build_config, load_trainer_config
from guardrail.core.errors import ConfigError, DataError, WorkersFailed
from guardrail.core.records.status import Phase, Status
from guardrail.core.schema import _fields, _structs_in
from guardrail.core.sections import LaunchSection
from guardrail.core.toml_file import dump_toml, read_toml
from guardrail.launch import doctor, supervisor_process
from guardrail.rundir.run_directory import RunDirectory
from tests.support.hostile import SCALARS, TEXTS, VALUES, check_message, mutated, mutations
from tests.support.places import ROOT
from trainer.config.config import Config

CONFIGS = sorted((ROOT / "configs").rglob("*.toml"))
QUICK = settings(
    max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


def keys_of(schema: type[msgspec.Struct] = Config) -> list[tuple[str, str]]:
    """(section, key) of every setting."""
    found = []
    for section, annotation in _fields(schema).items():
        for struct in _structs_in(annotation):
            found += [(section, key) for key in _fields(struct)]
    return sorted(set(found))


def check_settings(tree: dict[str, Any]) -> None:
    """Refused in one sentence; or taken, and then everything can be asked of it and it survives its
    own dump.
    """
    try:
        config = build_config(tree, file="c.toml", base=Path.cwd())
    except ConfigError as error:
        check_message(str(error))
        return
    ask_trainer(config, "remarks")
    ask_trainer(config, "outline")
    with contextlib.suppress(ConfigError):
        config.check_machine()
    assert load_text(dump_toml(config)) == msgspec.structs.replace(
        config, notify=load_text(dump_toml(config)).notify
    )


def load_wrong_file(folder: Path, content: bytes) -> str:
    """Load a file that is refused; returns the message."""
    file = folder / "c.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_trainer_config(file)
    message = str(caught.value)
    check_message(message)
    return message


def load_text(text: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "c.toml"
        file.write_text(text, encoding="utf-8")
        return load_trainer_config(file)


# -- the configuration


@pytest.mark.fault("R11")
@QUICK
@given(st.sampled_from(keys_of()), VALUES)
def test_any_value_for_any_setting(key: tuple[str, str], value: Any) -> None:
    tree: dict[str, Any] = {"train": {"steps": 300}}
    section, name = key
    if section == "faults":
        tree["faults"] = [{"kind": "hang", "step": 1, name: value}]
    elif key != ("launch", "trainer"):  # its package is imported
        tree.setdefault(section, {})[name] = value
    if section == "train" and name == "epochs":
        del tree["train"]["steps"]
    check_settings(tree)


@pytest.mark.fault("R11")
@QUICK
@given(
    st.lists(
        st.sampled_from(["guard", "train", "notify", "data", "optim", "no"]), min_size=1, max_size=2
    ),
    VALUES,
)
def test_any_value_for_a_section(names: list[str], value: Any) -> None:
    check_settings({"train": {"steps": 300}, **dict.fromkeys(names, value)})


@pytest.mark.fault("R11")
@QUICK
@given(
    st.one_of(TEXTS, st.sampled_from([f"{a}.{b}" for a, b in keys_of() if b != "trainer"])), TEXTS
)
@example("guard.window", "[" * 3000)
@example("guard.escalation", "[{do = 'halt'" + "}" * 3000)
@example(".".join("a" * 5000), "1")
@example("run.name", "a\x00b")
@example("guard.window", "9" * 5000)
def test_any_override(key: str, value: str) -> None:
    try:
        build_config(
            {"train": {"steps": 300}}, file="c.toml", overrides=[f"{key}={value}"], base=Path.cwd()
        )
    except ConfigError as error:
        check_message(str(error))


@pytest.mark.fault("R11")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x = " + b"[" * 3000, "c.toml: expected valid TOML ("),
        (b"x = " + b"[" * 40 + b"]" * 40, "c.toml: x: "),
        (b"[" + b".".join([b"a"] * 3000) + b"]", " 24 "),
        (b"[train]\nsteps = " + b"9" * 5000, "c.toml: expected valid TOML ("),
        (b"[train]\nsteps = " + b"9" * 100, "train.steps = 999999"),
        (
            b'[run]\nname = "a\\u0000b"',
            r"run.name = 'a\x00b': ",
        ),
        (
            b'[run]\nname = "\\u001b[2J"',
            r"run.name = '\x1b[2J': ",
        ),
        (b'[run]\nnam = "' + b"x" * 5000 + b'"', "run.nam = 'xxxxxxxx"),
        (b'[run]\n"' + b"y" * 5000 + b'" = 3', "run.yyyyyyyyyyyyyyyy"),
        (b'[run]\n"\\u202eevil" = 3', r"run.\u202eevil = 3: "),
        (b"x = 1\n" * 800_000, " 4 MiB"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value[:40],
)
def test_files_that_no_one_would_write(tmp_path: Path, content: bytes, message: str) -> None:
    error = load_wrong_file(tmp_path, content)
    assert message in error and "c.toml" in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[run]\nname = 'a\x00b'", "expected valid TOML ("),
        ("[run]\nname = 'é'".encode("latin-1"), "UTF-8"),
        ("[run]\nname = 'a'".encode("utf-16"), "UTF-8"),
    ],
    ids=["nul", "latin", "utf16"],
)
def test_files_that_are_no_toml(tmp_path: Path, content: bytes, message: str) -> None:
    assert message in load_wrong_file(tmp_path, content)


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbf[train]\nsteps = 300\n")
    assert load_trainer_config(tmp_path / "c.toml").train.steps == 300  # type: ignore[attr-defined]


def check_mutations(file: Path, count: int, folder: Path) -> None:
    for number, content in enumerate(mutations(file, count)):
        changed = folder / "c.toml"
        changed.write_bytes(content)
        try:
            check_settings(read_toml(changed))
        except ConfigError as error:
            check_message(str(error))
        except Exception as error:
            raise AssertionError(f"mutation {number} of {file.name}: {error!r}") from error


def test_mutations_of_a_shipped_file(tmp_path: Path) -> None:
    for file in CONFIGS:
        check_mutations(file, 5, tmp_path)


@pytest.mark.ci_slow
@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_500_mutations_of_each_shipped_file(file: Path, tmp_path: Path) -> None:
    check_mutations(file, 500, tmp_path)


@pytest.mark.ci_slow
@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_20_mutations_of_each_shipped_file_by_the_command(file: Path, tmp_path: Path) -> None:
    """A run directory that cannot be made ends those that are right after all."""
    for number, content in enumerate(mutations(file, 20)):
        changed = tmp_path / "c.toml"
        changed.write_bytes(content)
        command = [
            sys.executable,
            "-m",
            "guardrail",
            "launch",
            str(changed),
            "--run-dir",
            "/proc/no-run-here",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 2, f"mutation {number} of {file.name}: {done}"
        assert done.stdout == ""
        for line in done.stderr.rstrip("\n").split("\n"):
            check_message(line)


# -- the commands


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder with a run that has ended, a configuration and a log; no process is started from
    here.
    """
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        patch.chdir(folder)
        patch.delenv("GUARDRAIL_ROOT", raising=False)
        text = '[run]\nname = "a"\n[train]\nsteps = 100\n[optim]\nwarmup_steps = 10\n[launch]\ndevice = "cpu"\n'
        (folder / "good.toml").write_text(text)
        (folder / "log.csv").write_text(
            "step,loss\n" + "".join(f"{n},{4 - n / 50}\n" for n in range(1, 60))
        )
        run = RunDirectory.create(folder / "runs", "a", text)
        run.append("ended", "stopped", phase="stopped", exit_code=130)
        run.write_status(
            Status(run=run.name, phase=Phase.STOPPED, step=7, total_steps=100, exit_code=130)
        )

        def start(*arguments: Any) -> None:
            raise WorkersFailed("nothing is started in this test")

        patch.setattr(supervisor_process, "start_supervisor", start)
        patch.setattr(doctor, "ask_torch", lambda: {"error": "not asked in this test"})
        yield folder


def options_of(name: str) -> list[str]:
    import importlib

    command: click.Command = importlib.import_module(f"guardrail.cli.{name}").command
    given = [option for parameter in command.params for option in parameter.opts]
    return ["--help", *(option for option in given if option.startswith("-"))]


def run_command(arguments: list[str]) -> tuple[int, str, str]:
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        code = main(arguments)
    return int(code), out.getvalue(), err.getvalue()


GOOD = [
    "good.toml",
    "log.csv",
    "a",
    "runs/a",
    "guard.window=64",
    "loss=loss",
    "3",
    "0.5",
    "stop",
    "pause",
    "lr",
    "runs",
]
WORDS = st.one_of(TEXTS, st.sampled_from(GOOD))
ARGUMENTS = st.sampled_from(list(COMMANDS)).flatmap(
    lambda name: st.tuples(
        st.just(name),
        st.lists(st.one_of(WORDS, st.sampled_from(options_of(name))), max_size=5).map(tuple),
    )
)


@pytest.mark.fault("R11")
@QUICK
@given(ARGUMENTS)
@example(("ctl", ("a", "skip", "9" * 400)))
@example(("ctl", ("a", "x" * 5000)))
@example(("ctl", ("a", "lr", "\x1b[2J")))
@example(("ctl", ("a", "pause", "--wait", "nan")))
@example(("ctl", ("a", "pause", "--at-step", "-1")))
@example(("tune", ("log.csv", "--budget", "nan")))
@example(("backtest", ("log.csv", "--labels", "good.toml")))
@example(("backtest", ("log.csv", "--column", "x" * 5000)))
@example(("backtest", ("no\x00such",)))
@example(("report", ("a", "-o", "/no/such/folder/x")))
@example(("verify", ("x" * 5000,)))
@example(("launch", ("good.toml", "--run-dir", "x" * 5000)))
@example(("launch", ("good.toml", "--run-dir", "\ud800")))
@example(("x" * 5000, ()))
@example(("\x1b]0;a\x07", ()))
def test_any_argument_of_any_command(place: Path, call: tuple[str, tuple[str, ...]]) -> None:
    name, arguments = call
    if "--web" in arguments or "--plot" in arguments:
        return  # a server; a library that may be missing
    code, _, errors = run_command([name, *arguments])
    assert code in (0, 2, 4, 5, 130), (code, errors)
    assert "Traceback" not in errors
    for line in errors.rstrip("\n").split("\n"):
        assert not line or check_message(line) is None


# -- logs of other programs

LINES = {
    "csv": b"step,loss,grad_norm\n1,4.5,1.0\n2,4.4,nan\n3,4.3,0.9\n",
    "jsonl": b'{"step": 1, "loss": 4.5}\n{"step": 2, "train": {"loss": 4.4}, "loss": NaN}\n',
    "text": b"s:1 trl:10.2 lr:0.1 norm:3.1\ns:2 trl:9.8 lr:0.1 norm:2.9\n",
    "megatron": b" iteration 10/ 100 | consumed samples: 9 | lm loss: 4.5E+00 | loss scale: 1.0 | grad norm: 0.9 |\n",
    "trainer_state": b'{"log_history": [{"loss": 4.5, "step": 1}, {"loss": 4.4, "step": 2}]}',
    "wandb csv": b'Step,a - loss,a - loss__MIN\n1,4.5,4.5\n2,"4,4",4.4\n',
    "wandb": b":W&B\xe1\xbe\x00" + b"\x01\x02\x03\x04\x05\x00\x01hello",
}
SUFFIX = {
    "csv": "csv",
    "jsonl": "jsonl",
    "trainer_state": "json",
    "wandb csv": "csv",
    "wandb": "wandb",
}


def event_file() -> bytes:
    from guardrail.trackers import tfevents

    with tempfile.TemporaryDirectory() as folder:
        file = tfevents.EventFile(Path(folder))
        for step in range(1, 4):
            file.append(
                tfevents.encode_scalars({"train/loss": 4.0 / step}, step=step, at=float(step))
            )
        file.close()
        (written,) = Path(folder).glob("events*")
        return written.read_bytes()


def read_hostile(content: bytes, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_bytes(content)
        for path in (file, Path(folder)):
            for source in find_sources([str(path)]):
                try:
                    for log in source.read({}):
                        assert all(len(column) == len(log) for column in log.columns.values())
                        list(log.observations())
                except DataError as error:
                    for line in str(error).split("\n"):
                        check_message(line)


@pytest.mark.parametrize(
    "content",
    [
        *(
            pytest.param(content, marks=pytest.mark.fault("R11"))
            for content in (
                b'{"step": 1, "loss": ' + b"9" * 400 + b"}\n",
                b'{"step": ' + b"9" * 400 + b', "loss": 4.5}\n{"step": 2, "loss": 4.4}\n',
                b"s:" + b"9" * 400 + b" trl:4.5\ns:2 trl:4.4\n",
                b"s:" + b"9" * 5000 + b" trl:4.5\ns:2 trl:4.4\n",
            )
        ),
        b'{"loss": ' + b'{"a": ' * 900 + b"1" + b"}" * 900 + b"}\n",
        b'{"log_history": [{"loss": ' + b'{"a": ' * 900 + b"1" + b"}" * 900 + b"}]}",
        b"[" * 3000,
        b"step,loss\n1," + b"9" * 400 + b"\n",
        b"step,\x1b[2J\x00\n1,2\n",
    ],
    ids=["int", "step", "text step", "digits", "deep", "deep state", "brackets", "csv", "header"],
)
def test_logs_that_no_one_would_write(content: bytes) -> None:
    read_hostile(content, "log.jsonl")


@QUICK
@given(st.sampled_from([*LINES, "events"]), st.integers(0, 2**32), st.binary(max_size=40))
def test_any_damage_to_a_log(kind: str, seed: int, tail: bytes) -> None:
    content = event_file() if kind == "events" else LINES[kind]
    name = "events.out.tfevents.1.a" if kind == "events" else f"log.{SUFFIX.get(kind, 'log')}"
    read_hostile(mutated(content, seed) + tail, name)


@pytest.mark.fault("R11")
@QUICK
@given(
    st.lists(
        st.dictionaries(st.sampled_from(["step", "loss", "grad_norm", "x"]), SCALARS), max_size=4
    )
)
def test_any_record_of_a_log(records: list[dict[str, Any]]) -> None:
    content = b"\n".join(json.dumps(record).encode("utf-8", "surrogatepass") for record in records)
    read_hostile(content, "log.jsonl")


def test_the_values_of_the_launcher_are_all_tried() -> None:
    assert {
        "launch",
        "guard",
        "notify",
        "data",
        "model",
        "optim",
        "train",
        "parallel",
        "faults",
    } <= {section for section, _ in keys_of()}
    assert len([key for key in keys_of() if key[0] == "launch"]) == len(_fields(LaunchSection))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        pytest.param(b"[" * 3000, "not JSON", marks=pytest.mark.fault("R11")),
        (b"\xff", "not JSON"),
        (b"[1]", " object "),
        *(
            pytest.param(labels, message, marks=pytest.mark.fault("R11"))
            for labels, message in (
                (b'{"log": 3}', "log: Expected `object`, got `int`"),
                (
                    b'{"log": {"use": "score"}}',
                    "[STEP, KIND, NOTE]",
                ),
                (b'{"log": {"use": "score", "labels": [[1]]}}', "length 3"),
                (
                    b'{"log": {"use": "score", "labels": [], "auto_tolerated": [["a", "b"]]}}',
                    "expected auto_tolerated",
                ),
            )
        ),
    ],
)
def test_labels_that_are_none(place: Path, labels: bytes, message: str) -> None:
    (place / "labels.json").write_bytes(labels)
    code, _, errors = run_command(["backtest", "log.csv", "--labels", "labels.json"])
    assert code == 2 and message in errors and "labels.json" in errors


@pytest.mark.fault("R11")
def test_a_list_of_samples_that_is_none(tmp_path: Path) -> None:
    from guardrail.core.errors import UsageError
    from guardrail.decide.quarantine import Quarantine
    from trainer.train import read_lines

    for line in ("9" * 5000, "x" * 5000, "\x1b[2J", "1@" + "9" * 30):
        with pytest.raises(UsageError, match=r"line 1: ") as caught:
            Quarantine().read([line])
        check_message(str(caught.value), longest=200)
    (tmp_path / "q").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"data\.quarantine = .*not UTF-8 text"):
        read_lines(str(tmp_path / "q"))


def test_a_device_that_never_ends_is_not_read(place: Path) -> None:
    """Not marked: over a version without the check it would fill the memory of the machine."""
    for words in (["backtest"], ["backtest", "log.csv", "--labels"]):
        code, _, errors = run_command([*words, "/dev/zero"])
        assert code == 2 and "/dev/zero" in errors, errors
