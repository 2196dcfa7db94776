"""Wrong configurations, and the files of configs/."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from guardrail.core.config import GuardConfig, build_config, load_guard_options, load_trainer_config
from guardrail.core.errors import ConfigError, ExitCode
from guardrail.core.guard_options import ESCALATION, EscalationStep, GuardOptions
from guardrail.core.records.verdicts import Mode
from guardrail.core.toml_file import dump_toml
from tests.support.golden import assert_golden
from tests.support.places import ROOT
from tests.unit.core.wrong_settings import STEPS, WRONG_FILES, WRONG_OVERRIDES
from trainer.config import config as trainer_config
from trainer.config.config import Config
from trainer.config.sections import TrainSection

CONFIGS = ROOT / "configs"
TWO_PROCESSES = STEPS + "[launch]\nprocesses = 2"


def refused(path: Path, text: str, *overrides: str) -> ConfigError:
    """The error of a configuration that holds `text`."""
    file = path / "c.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_trainer_config(file, overrides=overrides)
    assert caught.value.exit_code is ExitCode.USAGE
    return caught.value


@pytest.mark.parametrize(("text", "key", "hint"), WRONG_FILES)
def test_a_bad_file_is_refused_by_its_key(tmp_path: Path, text: str, key: str, hint: str) -> None:
    error = refused(tmp_path, text)
    assert (Path(error.file).name, error.key) == ("c.toml", key)
    assert hint in error.hint
    message = str(error).replace("`config`", "").replace("`Config`", "")
    for leftover in ("`", r"\bobject\b", r"\barray\b", "Expected", "Invalid enum", "msgspec"):
        assert not re.search(leftover, message)


def test_the_messages_of_wrong_settings(tmp_path: Path) -> None:
    parts = []
    for text, _, _ in WRONG_FILES:
        shown = "\n".join(f"    {line}" for line in text.splitlines())
        parts.append(f"{shown}\n{refused(tmp_path, text)}")
    for override, _, _ in WRONG_OVERRIDES:
        error = refused(tmp_path, TWO_PROCESSES, override)
        parts.append(f"    --set {override}\n{error}")
    text = "\n\n".join(parts) + "\n"
    assert_golden("errors.txt", text.replace(f"{tmp_path}/", ""))


@pytest.mark.fault("B5")
def test_a_batch_is_shared_out_over_data_ranks_and_not_over_processes(tmp_path: Path) -> None:
    text = STEPS + "batch_size = 6\n[launch]\nprocesses = 8\n[parallel]\ntp = 2\n"
    error = refused(tmp_path, text)
    assert (error.key, error.value) == ("train.batch_size", 6)
    assert re.findall(r"\d+", error.expected) == ["4", "8", "2"]
    assert "8" in error.hint


@pytest.mark.parametrize(("override", "file", "key"), WRONG_OVERRIDES)
def test_a_bad_override_is_named_as_such(
    tmp_path: Path, override: str, file: str, key: str
) -> None:
    error = refused(tmp_path, TWO_PROCESSES, override)
    assert (Path(error.file).name, error.key) == (file, key)


@pytest.mark.parametrize(
    "key", ["data.tokenizer", "data.quarantine", "data.cache", "data.sources", "model.hf"]
)
@pytest.mark.parametrize(
    "name",
    ["a" * 300, "nosuch/" + "a" * 300, "a/" * 3000, "~nosuch/" + "ä" * 200],
    ids=["long", "below", "deep", "bytes"],
)
def test_a_value_too_long_for_a_file_name_is_refused_by_its_key(
    tmp_path: Path, key: str, name: str
) -> None:
    override = f'{key}=["{name}"]' if key == "data.sources" else f'{key}="{name}"'
    error = refused(tmp_path, STEPS, override)
    message = str(error)
    assert error.file == "--set" and error.key.startswith(key)
    assert message.endswith(os.strerror(errno.ENAMETOOLONG))
    assert name[:50] in message and len(message) < 400


def test_a_value_with_nul_is_refused_by_its_key(tmp_path: Path) -> None:
    for key in (
        "data.tokenizer",
        "data.quarantine",
        "data.cache",
        "model.hf",
        "model.preset",
        "launch.trainer",
    ):
        error = refused(tmp_path, STEPS, f'{key}="a\\u0000b"')
        assert str(error).startswith(f"--set: {key} = 'a\\x00b': ")


def test_an_error_of_the_guard_alone_names_the_override(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[guard]\nwindow = 64\n")
    for override, name in (("guard.window=-1", "history"), ("guard.warmup=99", "min_history")):
        with pytest.raises(ConfigError) as error:
            load_guard_options(file, overrides=[override])
        assert error.value.key == f"guard.detectors.spike.{name}" and error.value.file == "--set"
    file.write_text("[guard]\nwindow = -1\n")
    with pytest.raises(ConfigError) as error:
        load_guard_options(file, overrides=["guard.loss_score=6"])
    assert error.value.key == "guard.detectors.spike.history" and error.value.file == str(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, os.strerror(errno.ENOENT)),
        (b"\xff\xfe", "not UTF-8 text"),
        ("folder", os.strerror(errno.EISDIR)),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "c.toml"
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_trainer_config(file)


# -- overrides and defaults ------------------------------------------------------------------------


def loaded(path: Path, text: str = STEPS, *overrides: str) -> Config:
    file = path / "c.toml"
    file.write_text(text)
    config = load_trainer_config(file, overrides=overrides)
    assert isinstance(config, Config)
    return config


def test_overrides_reach_nested_keys_and_new_sections(tmp_path: Path) -> None:
    config = loaded(
        tmp_path,
        STEPS,
        "guard.mode=ask",
        "guard.skip_before=100",
        " optim.lr = 2e-4 ",
        "model.tied=false",
        'data.sources=["builtin:python"]',
        "train.steps=1_000",
        "train.steps=2000",
    )
    assert config.guard.mode is Mode.ASK and config.guard.window_before == 100
    assert config.optim.lr == 2e-4 and config.model.tied is False and config.train.steps == 2000


@pytest.mark.parametrize("name", ["007", "2024-01-01", "a b", "1\\nx = 2", "12:30:00"])
def test_a_value_that_is_no_toml_is_a_string(tmp_path: Path, name: str) -> None:
    assert loaded(tmp_path, STEPS, f"run.name={name}").run.name == name


def test_building_does_not_touch_the_tree() -> None:
    tree = tomllib.loads(STEPS)
    build_config(
        tree, file="c.toml", overrides=["train.steps=5", "optim.warmup_steps=1"], base=Path.cwd()
    )
    assert tree == {"train": {"steps": 300}}


def test_paths_are_absolute_after_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "a[1].txt").write_text("x")
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "q.txt").write_text("1\n")
    config = loaded(
        tmp_path,
        STEPS
        + "[data]\nsources = ['text.txt', '*.txt', '~/a[1].txt', 'builtin:python']\nquarantine = 'q.txt'\ncache = 'c'\n"
        + "[run]\nroot = '~/runs'\n",
    )
    here, home = str(tmp_path), str(tmp_path / "home")
    assert config.data.sources == (
        f"{here}/text.txt",
        f"{here}/*.txt",
        f"{home}/a[1].txt",
        "builtin:python",
    )
    assert config.data.quarantine == f"{here}/q.txt" and config.data.cache == f"{here}/c"
    assert config.run.root == f"{home}/runs"
    assert config.resolved(base=Path("/elsewhere")) == config


def test_counts_follow_from_batch_and_processes() -> None:
    config = Config(train=TrainSection(steps=1, batch_size=48, micro_batch_size=4))
    config = msgspec.structs.replace(
        config, launch=msgspec.structs.replace(config.launch, processes=2, nodes=3)
    )
    assert (config.world, config.micro_batch_size, config.micro_batches) == (6, 4, 2)


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.toml")), ids=lambda file: file.name)
def test_every_file_in_configs_loads_and_dumps_to_the_same(file: Path, tmp_path: Path) -> None:
    config = load_trainer_config(file)
    (tmp_path / "config.toml").write_text(dump_toml(config))
    assert load_trainer_config(tmp_path / "config.toml") == config
    sections = re.split(r"^\[", file.read_text(), flags=re.MULTILINE)
    assert all("\n# " in f"\n{section}" for section in sections), "every section is explained"


def test_the_shipped_files_are_there() -> None:
    assert {"quickstart.toml", "gpu-8.toml"} <= {file.name for file in CONFIGS.glob("*.toml")}


@pytest.mark.parametrize(
    ("name", "mode"), [("careful", "ask"), ("night", "auto"), ("advise", "advise")]
)
def test_who_decides_is_chosen_by_a_file_and_every_line_of_it_is_explained(
    name: str, mode: str
) -> None:
    config, quickstart = (
        load_trainer_config(CONFIGS / f"{name}.toml"),
        load_trainer_config(CONFIGS / "quickstart.toml"),
    )
    assert isinstance(config, Config) and isinstance(quickstart, Config)
    assert (config.guard.mode, config.run.name) == (mode, name)
    assert (config.model, config.optim, config.train) == (
        quickstart.model,
        quickstart.optim,
        quickstart.train,
    )
    assert (config.data, config.launch.device) == (quickstart.data, "cpu")
    lines = (CONFIGS / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    guard = lines[lines.index("[guard]") : lines.index("[snapshots]")]
    bare = [
        line
        for above, line in pairwise(guard)
        if "=" in line and above in ("", "[guard]") and line[0] != "#"
    ]
    assert not bare, "a setting under no comment"


def test_quickstart_is_small_and_stands_alone() -> None:
    config = load_trainer_config(CONFIGS / "quickstart.toml")
    assert isinstance(config, Config)
    assert config.data.sources == ("builtin:python",) and config.data.order == "stream"
    assert (config.launch.processes, config.launch.device) == (2, "cpu")


def test_a_complete_configuration_survives_dump_and_load(tmp_path: Path) -> None:
    config = loaded(
        tmp_path,
        STEPS
        + "[[faults]]\nkind = 'nan_loss'\nstep = 3\nrank = 0\nvalue = 1e-30\n[guard]\nmode = 'advise'\n"
        + "[run]\nname = 'ünïcode \"quoted\"'\n[optim]\nlr = 3.3333333333333335e-4\n",
    )
    tree = tomllib.loads(dump_toml(config))
    assert set(tree) == {field.name for field in msgspec.structs.fields(Config)}
    assert build_config(tree, file="dumped", base=Path("/")) == config


# -- the machine -----------------------------------------------------------------------------------


def test_a_ring_larger_than_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_trainer_config(CONFIGS / "gpu-8.toml")
    monkeypatch.setattr(trainer_config, "memory_bytes", lambda: 64 * 2**30)
    config.check_machine()
    monkeypatch.setattr(trainer_config, "memory_bytes", lambda: 32 * 2**30)
    with pytest.raises(ConfigError) as caught:
        config.check_machine()
    assert (caught.value.key, caught.value.value) == ("snapshots.keep", 4)
    for number in ("32.0 GiB", "1.2 GiB", "39.4 GiB", "3 would fit"):
        assert number in str(caught.value)
    monkeypatch.setattr(trainer_config, "memory_bytes", lambda: 2**30)
    with pytest.raises(ConfigError, match=r"GiB; 0 needs"):
        config.check_machine()
    sharded = msgspec.structs.replace(
        config, train=msgspec.structs.replace(config.train, strategy="fsdp")
    )
    monkeypatch.setattr(trainer_config, "memory_bytes", lambda: 8 * 2**30)
    sharded.check_machine()


def test_memory_is_what_this_machine_has() -> None:
    assert 2**28 < trainer_config.memory_bytes() < 2**50


def test_the_vocabulary_is_known_before_anything_is_tokenised(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}}))
    assert loaded(tmp_path, STEPS + f"[data]\ntokenizer = '{file}'").vocabulary == 2
    file.write_text("broken")
    assert loaded(tmp_path, STEPS + f"[data]\ntokenizer = '{file}'").vocabulary == 8192
    assert loaded(tmp_path, STEPS).vocabulary == 259


def test_reading_a_configuration_loads_no_torch() -> None:
    code = (
        "import sys; from guardrail.core.config import load_trainer_config; "
        "load_trainer_config(sys.argv[1]); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(CONFIGS / "quickstart.toml")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"


def test_every_setting_is_explained_beside_it() -> None:
    """A line of comment above each field, or above the group of fields that it stands in."""
    for module in (
        "guardrail/core/guard_options.py",
        "guardrail/core/sections.py",
        "trainer/config/sections.py",
        "trainer/config/recipe.py",
        "trainer/config/layout.py",
    ):
        explained = section = False
        for number, line in enumerate((CONFIGS.parent / module).read_text().splitlines(), 1):
            if line[:1].strip():
                section = re.match(r"class \w+(Section|Options|Step)\(", line) is not None
            if line.startswith("    #"):
                explained = True
            elif not line.strip() or line.strip().startswith(('"""', "class ", "def ")):
                explained = line.startswith("    #")
            elif section and re.match(r"    (?!RENAMED)\w+: .* = ", line):
                assert explained, f"{module}:{number}: {line.strip()}"


def test_settings_alone_make_a_schema() -> None:
    GuardConfig().check(base=Path.cwd())
    GuardConfig().check_machine()


def test_the_night_writes_the_default_ladder_out() -> None:
    """So that what stands beside each rung is what happens without one, and at the end of it the
    run halts.
    """
    night = load_trainer_config(CONFIGS / "night.toml").guard
    assert night.ladder == (*ESCALATION, EscalationStep(action="halt"))
    assert (night.skips, night.rollbacks) == (
        2 * GuardOptions().skips,
        8,
    ) and GuardOptions().rollbacks == 5
