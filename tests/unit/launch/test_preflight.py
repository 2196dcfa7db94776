"""What is refused before any process starts, and what cannot be known without torch."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import msgspec
import pytest

from guardrail.core.config import GuardConfig
from guardrail.core.errors import ConfigError
from guardrail.core.sections import LaunchSection
from guardrail.launch import launcher as launching
from guardrail.launch import preflight


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names in /dev."""
    names: list[str] = ["null", "dri"]
    monkeypatch.setattr(
        "guardrail.launch.preflight.os.listdir",
        lambda path: names if path == "/dev" else os.listdir(path),
    )
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return names


def refused(folder: Path, **launch: object) -> list[str]:
    """The keys that are refused."""
    settings = msgspec.structs.replace(
        GuardConfig(),
        launch=LaunchSection(**launch),  # type: ignore[arg-type]
    )
    return [
        error.key
        for error in preflight.find_problems(settings, file="c.toml")
        if error.key.startswith("launch.")
    ]


@pytest.mark.fault("B6")
@pytest.mark.parametrize("name", ["kfd", "dxg", "nvhost-gpu"])
def test_devices_that_torch_alone_can_count_are_not_refused(
    name: str, files: list[str], tmp_path: Path
) -> None:
    """ROCm, WSL2, Jetson: there is no /dev/nvidia0."""
    assert refused(tmp_path, device="cuda") == ["launch.device"]
    files.append(name)
    assert refused(tmp_path, device="cuda", processes=8) == []
    assert refused(tmp_path, device="auto", processes=8) == []


@pytest.mark.fault("B6")
def test_parts_of_a_device_are_not_counted_as_devices(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.append("nvidia0")
    assert refused(tmp_path, device="cuda", processes=2) == ["launch.processes"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1,MIG-2")
    assert refused(tmp_path, device="cuda", processes=2) == []


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, 2), ("0", 1), ("0,1,2", 2), ("", 0), ("-1", 0), ("GPU-0af3", 1), ("0,-1,1", 1)],
)
def test_devices_that_are_hidden_do_not_count(
    visible: str | None, expected: int, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files += ["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"]
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert preflight.count_cuda_devices() == expected


def test_hidden_devices_of_rocm_are_none(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    files.append("kfd")
    assert preflight.count_cuda_devices() is None
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "-1")
    assert preflight.count_cuda_devices() == 0


def test_a_machine_without_devices_is_refused_in_one_sentence(
    files: list[str], tmp_path: Path
) -> None:
    settings = msgspec.structs.replace(GuardConfig(), launch=LaunchSection(device="cuda"))
    with pytest.raises(ConfigError, match=r"launch\.device") as caught:
        preflight.check_launch(settings, file="c.toml")
    assert "/dev/nvidia0" in str(caught.value) and "/dev/kfd" in str(caught.value)


@pytest.mark.parametrize("root", ["a" * 300, "nosuch/" + "a" * 300], ids=["long", "below"])
def test_a_root_that_no_folder_can_have(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "c.toml"
    file.write_text('[train]\nsteps = 300\n[launch]\ndevice = "cpu"\n')
    for overrides, given, source in (
        ((), root, "--root or $GUARDRAIL_ROOT"),
        ((f"run.root={root}",), None, "--set"),
    ):
        with pytest.raises(ConfigError) as caught:
            launching.prepare_run(str(file), overrides, None, root=given)
        error = caught.value
        why = os.strerror(errno.ENAMETOOLONG)
        assert (error.file, error.key, error.hint) == (source, "run.root", why)


@pytest.mark.parametrize(
    "name", ["a" * 101, "\U00020000" * 100, "a/b"], ids=["long", "bytes", "slash"]
)
def test_a_name_that_no_run_can_have(name: str, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[train]\nsteps = 300\n[launch]\ndevice = "cpu"\n')
    with pytest.raises(ConfigError, match=r"^--set: run\.name = .*100"):
        launching.prepare_run(str(file), (f"run.name={name}",), None, root=str(tmp_path))
