"""Secrets stand in no file of a run, on no screen and in no command line; only the process that
uses them has them.
"""

from __future__ import annotations

import errno
import os
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from guardrail.cli import report as report_command
from guardrail.cli.main import main
from guardrail.core.config import GuardConfig, build_config, load_guard_options, load_trainer_config
from guardrail.core.errors import ConfigError
from guardrail.core.sections import NotifySection
from guardrail.core.toml_file import dump_toml
from guardrail.launch import launcher as launching
from guardrail.launch import preflight
from guardrail.launch.notify import Notifier
from guardrail.rundir.run_directory import RunDirectory
from guardrail.tui.model.config_lines import read_config_lines
from tests.support.lab import Lab, wait_for
from tests.support.texts import numbers_in

MASK = "(masked)"
MARK = "PLANTED5ecretMarker"  # part of every secret here
ADDRESS = f"http://user:{MARK}@127.0.0.1:1/hooks/{MARK}?token={MARK}"
STEPS = "[train]\nsteps = 300\n"


def reference(**place: str) -> Any:
    """{ env = "NAME" } or { file = "PATH" }."""
    from guardrail.core.secret import SecretRef

    return SecretRef(**place)


def loaded(path: Path, text: str, *overrides: str) -> GuardConfig:
    (path / "c.toml").write_text(text)
    return load_trainer_config(path / "c.toml", overrides=overrides)


# -- the configuration


@pytest.mark.fault("A3", "R10")
def test_a_reference_is_kept_and_a_literal_is_masked_in_the_copy(tmp_path: Path) -> None:
    from guardrail.core import secret

    text = f"""{STEPS}[notify]
command = "curl -H 'Authorization: {MARK}'"
webhook = "{ADDRESS}"
apprise = ["ntfy://{MARK}", {{ env = "NTFY" }}, {{ file = "{tmp_path}/ntfy" }}]
"""
    settings = loaded(tmp_path, text)
    copy = dump_toml(settings)
    assert MARK not in copy and MARK not in repr(settings)
    notify = tomllib.loads(copy)["notify"]
    assert notify["apprise"] == [MASK, {"env": "NTFY"}, {"file": f"{tmp_path}/ntfy"}]
    again = build_config(tomllib.loads(copy), file="copy", base=tmp_path)
    assert secret.find_missing_secrets(tomllib.loads(copy)["notify"]) == [
        "notify.command",
        "notify.webhook",
        "notify.apprise",
    ]
    assert secret.find_written_secrets(again.notify) == {}
    assert secret.find_written_secrets(settings.notify).keys() == {"command", "webhook", "apprise"}
    assert dump_toml(again) == copy


@pytest.mark.fault("A3")
def test_relative_files_of_secrets_are_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = loaded(
        tmp_path, STEPS + '[notify]\nwebhook = { file = "hook" }\ncommand = { env = "COMMAND" }\n'
    )
    assert settings.notify.webhook == reference(file=f"{tmp_path}/hook")
    assert settings.notify.command == reference(env="COMMAND")


@pytest.mark.fault("A3", "R11")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            f"webhook = 'htp://{MARK}'",
            "notify.webhook = (masked): ",
        ),
        (
            f"webhook = 'http://x y{MARK}'",
            "notify.webhook = (masked): ",
        ),
        (f"webhok = 'http://{MARK}'", "notify.webhok = (masked): "),
        (
            f"webhook = ['http://{MARK}']",
            "notify.webhook = (masked): ",
        ),
        (f"apprise = '{MARK}'", "notify.apprise = (masked): "),
        (f"apprise = 'json://{MARK}'", "notify.apprise = (masked): "),
        (
            "webhook = 3",
            "notify.webhook = 3: ",
        ),
        (
            f"webhook = {{ env = '{MARK} x' }}",
            "notify.webhook.env: ",
        ),
        ("webhook = {}", "notify.webhook: "),
        ("webhook = { env = 'A', file = 'b' }", "notify.webhook: "),
        ("webhook = { enf = 'A' }", "notify.webhook.enf = (masked): "),
        ("command = { env = 3 }", "notify.command.env = 3: "),
        (f"on = ['{MARK[:6].lower()}']", "notify.on[0] = 'plante': "),
    ],
)
def test_a_message_about_a_secret_does_not_repeat_it(
    tmp_path: Path, line: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, f"{STEPS}[notify]\n{line}\n")
    assert f"c.toml: {message}" in str(caught.value) and MARK not in str(caught.value)


@pytest.mark.fault("A3")
@pytest.mark.parametrize(
    "text",
    [
        f"notify = '{MARK}'",
        f"notify = ['{MARK}']",
        f"[[notify]]\nwebhook = '{MARK}'",
        f"[[notfy]]\nwebhok = '{MARK}'",
        f"[optim]\nlr = [{{ webhook = '{MARK}' }}]",
        f"[optim]\nlr = [[{{ webhook = '{MARK}' }}]]",
        f"[notify]\n'https://{MARK}' = 1",
    ],
)
def test_nor_does_one_about_what_is_around_it(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"c\.toml: ") as caught:
        loaded(tmp_path, text)
    assert MARK not in str(caught.value)


@pytest.mark.fault("A3")
def test_expectation_and_hint_of_an_error_are_masked_too() -> None:
    for value in (MARK, [MARK, 3], {"a": MARK}):
        error = ConfigError(f"not {MARK}", key="notify.apprise", value=value, hint=f"[{MARK!r}]")
        assert (
            str(error) == "notify.apprise = (masked): expected not (masked)\n  hint: ['(masked)']"
        )
        assert MARK not in error.expected + error.hint and MARK not in str(error.at("--set"))
    plain = ConfigError("a list", key="data.sources", value="corpus", hint='["corpus"]')
    assert str(plain).startswith("data.sources = 'corpus': ")
    assert str(plain).endswith(' a list\n  hint: ["corpus"]')
    endless: list[object] = []
    endless.append(endless)
    assert str(ConfigError("a path", key="run", value=endless)).endswith(" a path")


@pytest.mark.parametrize(
    "override",
    [
        pytest.param(f"notify.webhook=ftp://{MARK}", marks=pytest.mark.fault("A3")),
        pytest.param(f"notify.webhook {ADDRESS}", marks=pytest.mark.fault("A3")),
        pytest.param(f"webhook={ADDRESS}", marks=pytest.mark.fault("A3")),
        f"notify.webhook.x={MARK}",
        pytest.param(f"notify={MARK}", marks=pytest.mark.fault("A3")),
        pytest.param(f"notify = {MARK}", marks=pytest.mark.fault("A3")),
        pytest.param(f'notify.apprise="{MARK}"', marks=pytest.mark.fault("A3")),
        pytest.param(f"run.name.x={{webhook='{MARK}'}}", marks=pytest.mark.fault("A3")),
    ],
)
def test_nor_does_one_about_an_override(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="--set") as caught:
        loaded(tmp_path, STEPS + "[run]\nname = 'a'\n", override)
    assert MARK not in str(caught.value)


@pytest.mark.fault("A3")
def test_nor_does_one_about_an_override_that_does_not_fit_the_command(tmp_path: Path) -> None:
    for override in (f"notify.webhook={MARK}", f"notify={MARK}", f"webhook {MARK}"):
        with pytest.raises(ConfigError, match=r"\[guard\]") as caught:
            load_guard_options(overrides=[override])
        assert MARK not in str(caught.value)
    run = RunDirectory.create(tmp_path, "old", STEPS)
    with pytest.raises(ConfigError, match="--set: ") as caught:
        launching.prepare_resume(str(run.path), (f"webhook {MARK}",), root=str(tmp_path))
    assert MARK not in str(caught.value)


@pytest.mark.fault("A3")
@pytest.mark.parametrize(
    "arguments", [("c.toml", f"notify.webhook=x {MARK}"), (f"notify.apprise={MARK}",)]
)
def test_nor_does_one_about_an_override_without_its_option(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", *arguments]) == 2
    shown = capsys.readouterr().err
    assert MARK not in shown and "notify." in shown and MASK in shown


@pytest.mark.fault("A3")
def test_the_launcher_wants_to_read_what_is_referred_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def problem(**notify: Any) -> ConfigError | None:
        found = preflight.find_problems(GuardConfig(notify=NotifySection(**notify)), file="c.toml")
        of_notify = (error for error in found if error.key.startswith("notify."))
        return next((error for error in of_notify if "installed" not in error.expected), None)

    monkeypatch.delenv("HOOK", raising=False)
    file = tmp_path / "hook"
    unset = problem(webhook=reference(env="HOOK"))
    assert unset is not None and (unset.file, unset.key) == ("c.toml", "notify.webhook.env")
    assert " HOOK " in unset.expected and unset.value is None
    missing = problem(command=reference(file=str(file)))
    assert missing is not None and os.strerror(errno.ENOENT) in missing.expected
    file.write_text(f"gopher://{MARK}\n")
    wrong = problem(webhook=reference(file=str(file)))
    assert wrong is not None and wrong.key == "notify.webhook"
    assert "https://" in wrong.expected and MARK not in str(wrong)
    file.write_bytes(b"\xff")
    binary = problem(apprise=(reference(file=str(file)),))
    assert binary is not None and "UTF-8" in binary.expected
    file.write_text("")
    empty = problem(apprise=(reference(file=str(file)),))
    assert empty is not None
    assert numbers_in(empty.expected.partition(str(file))[0]) == [1, 65536], "bytes"
    monkeypatch.setenv("HOOK", ADDRESS)
    assert problem(webhook=reference(env="HOOK")) is None


@pytest.mark.fault("A3")
@pytest.mark.parametrize(
    "override",
    [
        'notify.webhook={env="NOPE"}',
        'notify.webhook = {file="/nope"}',
        "notify.webhook.env=NOPE",
        "notify.command.env=NOPE",
    ],
)
def test_a_secret_that_an_override_refers_to_is_missed_there(tmp_path: Path, override: str) -> None:
    settings = loaded(tmp_path, STEPS, override)
    with pytest.raises(ConfigError, match=r"^--set: notify\."):
        preflight.check_launch(settings, file="c.toml", overrides=[override])
    with pytest.raises(ConfigError, match=r"^c\.toml: notify\."):
        preflight.check_launch(settings, file="c.toml", overrides=["notify.on=[]"])


# -- older run directories, and files that are none


@pytest.mark.fault("A3", "R10")
def test_a_copy_of_an_older_version_shows_no_secret(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "old", "")
    text = f'[run]\nname = "a"\n[notify]\nwebhook = "{ADDRESS}"\ncommand = ["curl", "{MARK}"]\non = ["failed"]\n'
    (run.path / "config.toml").write_text(text)
    assert MARK not in run.config_text()
    shown = {
        (line.section, line.key): line.value
        for line in read_config_lines(run.config_text(display=True))
    }
    assert shown["notify", "webhook"] == shown["notify", "command"] == MASK
    (run.path / "config.toml").write_text(text + "[[[")
    assert MARK not in run.config_text() and 'name = "a"' in run.config_text()
    run.write_config(text)
    assert MARK not in (run.path / "config.toml").read_text()
    assert (
        MARK
        not in (RunDirectory.create_at(tmp_path / "own", text).path / "config.toml").read_text()
    )


@pytest.mark.fault("A3")
def test_on_a_screen_other_settings_that_are_called_like_secrets_are_masked_too() -> None:
    from guardrail.core import secret

    text = f'[tracker]\napi_key = "{MARK}"\n[data]\nsources = ["s3://me:{MARK}@store/x"]\ntokenizer = "bytes"\n'
    assert secret.mask_text(text) == text, "the run needs them"
    shown = tomllib.loads(secret.mask_text(text, display=True))
    assert shown["tracker"]["api_key"] == MASK
    assert shown["data"] == {"sources": ["s3://(masked)@store/x"], "tokenizer": "bytes"}


# -- the process that uses them


@pytest.mark.fault("A3")
@pytest.mark.parametrize("place", ["literal", "env", "file"])
def test_a_failure_is_told_without_the_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    values = {
        "command": f"echo not there {MARK} >&2; exit 3",
        "webhook": ADDRESS.replace("/hooks/", "/hooks/%0a/"),
    }
    given: dict[str, Any] = dict(values)
    for name, value in values.items():
        monkeypatch.setenv(f"MY_{name}", value)
        (tmp_path / name).write_text(f"{value}\n")
        if place != "literal":
            given[name] = (
                reference(env=f"MY_{name}")
                if place == "env"
                else reference(file=str(tmp_path / name))
            )
    run = RunDirectory.create(tmp_path / "runs", "a", "")
    run.append("ended", "failed", phase="failed")
    Notifier(NotifySection(**given), run, record=run.write_event).send_new_events()
    told = [event for event in run.events() if event.kind == "notified"]
    assert [(event.data["way"], event.data["ok"]) for event in told] == [
        ("command", False),
        ("webhook", False),
    ]
    assert numbers_in(told[0].data["reason"]) == [3]
    assert told[0].data["reason"].endswith(f": not there {MASK}")
    assert all(event.data["reason"] in event.message for event in told)
    assert MARK not in run.journal_path.read_text()


@pytest.mark.fault("A3")
def test_a_secret_that_has_gone_is_a_failure_that_names_the_place(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "runs", "a", "")
    run.append("ended", "failed", phase="failed")
    Notifier(
        NotifySection(webhook=reference(file=str(tmp_path / "gone"))), run, record=run.write_event
    ).send_new_events()
    (told,) = [event for event in run.events() if event.kind == "notified"]
    assert not told.data["ok"] and "notify.webhook.file: " in told.message
    assert f"({tmp_path}/gone: {os.strerror(errno.ENOENT)})" in told.message


@pytest.mark.fault("A3")
def test_a_script_stands_in_no_command_line(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "runs", "a", "")
    run.append("ended", "failed", phase="failed")
    out = tmp_path / "out"
    command = f": {MARK}; tr '\\0' ' ' < /proc/$$/cmdline > {out}; env >> {out}"
    Notifier(NotifySection(command=command), run, record=run.write_event).send_new_events()
    assert "sh -c" in out.read_text() and MARK not in out.read_text()


# -- a real run


def commands_of_children(process: psutil.Process) -> str:
    """Command lines of everything that descends from a process."""
    found = []
    try:
        for child in [process, *process.children(recursive=True)]:
            found.append(" ".join(child.cmdline()))
    except psutil.Error:  # it has ended meanwhile
        return "\n".join(found)
    return "\n".join(found)


@pytest.mark.fault("A3", "R10")
def test_no_file_screen_or_command_line_of_a_run_holds_a_secret(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (lab.folder / "sent").mkdir()
    lab.write_config(
        f"""
processes = 2
max_restarts = 1
[notify]
command = "echo {MARK} > {lab.folder}/sent/$GUARDRAIL_SEQ; echo {MARK} >&2; exit 7"
on = ["rank_failed", "finished"]
[fake]
steps = 200
fault = "exit"
rank = 0
""",
        name="planted",
    )
    launcher = lab.start("launch", "c.toml", "--headless", "--set", f"notify.webhook={ADDRESS}")
    run = lab.newest()
    supervisor = lab.supervisor(run)
    seen: list[str] = []

    def ended() -> bool:
        seen.append(commands_of_children(supervisor))
        return launcher.poll() is not None

    wait_for(ended, seconds=240, what="the end of the run")
    output, errors = launcher.communicate()
    assert launcher.returncode == 0, errors
    for name in ("command", "webhook"):
        assert f"warning: notify.{name} " in errors
    assert len(list((lab.folder / "sent").iterdir())) == 2, "the command was run, with its secret"
    assert [event.data["ok"] for event in run.events() if event.kind == "notified"] == [False] * 4
    assert any("faketrainer" in commands for commands in seen)
    shown = lab.guardrail("attach", str(run.path), "--headless").stdout
    jsons = (
        lab.guardrail("report", str(run.path), "--json").stdout
        + lab.guardrail("runs", "--json").stdout
    )
    for text in (output, errors, *seen, shown, jsons):
        assert MARK not in text
    assert report_command.command.main(
        ["--root", str(lab.root), "planted"], standalone_mode=False
    ) in (None, 0)
    assert MARK not in capsys.readouterr().out
    pane = " ".join(line.value for line in read_config_lines(run.config_text(display=True)))
    assert MASK in pane and MARK not in pane
    files = [file for file in run.path.rglob("*") if file.is_file()]
    assert any(file.name.startswith("events.") for file in files)
    assert [file for file in files if MARK.encode() in file.read_bytes()] == []


@pytest.mark.fault("A3")
def test_a_resume_names_what_must_be_given_again_and_goes_on_without(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.write_config(
        f"""
[tensorboard]
enabled = false
[notify]
webhook = "{ADDRESS}"
on = ["finished"]
[fake]
steps = 10
""",
        name="again",
    )
    assert lab.guardrail("launch", "c.toml", "--headless").returncode == 0
    run = lab.newest()
    resumed = lab.guardrail(
        "launch", "--headless", "--resume", str(run.path), "--set", "launch.threads=1"
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "warning: notify.webhook " in resumed.stderr
    assert len([event for event in run.events() if event.kind == "notified"]) == 1, (
        "the first end alone"
    )
    # By reference: all of it is used, and stands nowhere.
    monkeypatch.setenv("PLANTED_ADDRESS", ADDRESS)
    (lab.folder / "command").write_text(f"echo {MARK} >&2; exit 7\n")
    sets = [
        "--set",
        'notify.webhook={ env = "PLANTED_ADDRESS" }',
        "--set",
        'notify.command={ file = "command" }',
    ]
    given = lab.guardrail("launch", "--headless", "--resume", str(run.path), *sets)
    assert given.returncode == 0, given.stderr
    assert MARK not in given.stderr + given.stdout and "warning: notify." not in given.stderr
    told = [
        (event.data["way"], event.data["ok"]) for event in run.events() if event.kind == "notified"
    ]
    # The end in between is told by the next start that can.
    assert told == [("webhook", False), *[("command", False), ("webhook", False)] * 2]
    files = [file for file in run.path.rglob("*") if file.is_file()]
    assert [file for file in files if MARK.encode() in file.read_bytes()] == []
    assert 'env = "PLANTED_ADDRESS"' in (run.path / "config.toml").read_text()


@pytest.mark.fault("A3")
def test_doctor_says_which_secrets_are_written_out(tmp_path: Path) -> None:
    settings = loaded(tmp_path, f"{STEPS}[notify]\nwebhook = '{ADDRESS}'\n")
    (remark,) = launching.secret_remarks(settings)
    assert "notify.webhook " in remark and MARK not in remark
    settings = msgspec.structs.replace(
        settings, notify=NotifySection(webhook=reference(env="HOOK"))
    )
    assert launching.secret_remarks(settings) == []
