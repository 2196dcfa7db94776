"""Old names of configuration keys: TOML, --set, dictionaries and keyword arguments take them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guardrail.core import renamed_keys
from guardrail.core.config import GuardConfig, build_config, check_settings, load_guard_options
from guardrail.core.errors import ConfigError
from guardrail.core.guard_options import EscalationStep, GuardOptions, ShrinkEmbedding
from guardrail.core.section import Section
from guardrail.core.sections import LaunchSection
from trainer.config import Config
from trainer.config.sections import TrainSection

SECTIONS: list[type[Section]] = [GuardOptions, LaunchSection, EscalationStep, TrainSection]
OLD = [(section, old, new) for section in SECTIONS for old, new in section.RENAMED.items()]


@pytest.fixture(autouse=True)
def _no_notice_yet() -> Iterator[None]:
    renamed_keys._noticed.clear()
    yield
    renamed_keys._noticed.clear()


def read(tree: dict[str, Any], *overrides: str) -> Config:
    tree = {"train": {"steps": 500}, **tree}
    config = build_config(tree, file="c.toml", overrides=overrides, base=Path.cwd())
    assert isinstance(config, Config)
    return config


@pytest.mark.parametrize(("section", "old", "new"), OLD, ids=lambda value: str(value))
def test_an_old_name_is_read_and_written_in_python(
    section: type[Section], old: str, new: str
) -> None:
    made: Any = EscalationStep(action="rollback") if section is EscalationStep else section()
    value = getattr(made, old)
    at: Any = made
    for part in new.split("."):
        at = getattr(at, part)
    assert value == at
    given: dict[str, Any] = {old: value}
    if section is EscalationStep and old != "do":
        given["action"] = "rollback"
    assert section(**given) == made


def test_old_names_in_toml_give_the_same_configuration() -> None:
    old = read(
        {
            "guard": {
                "persist": 4,
                "shift": "leave_out",
                "gate": "lagged",
                "embed_factor": 0.25,
                "embed_hold": 7,
                "ask_seconds": 9.0,
                "ask_default": "go_on",
                "ladder": [{"do": "skip"}, {"do": "lower_lr", "times": 2, "hold": 3, "back": 4}],
            },
            "launch": {"save_seconds": 11.0},
            "train": {"steps": 500, "ramp_from": 8, "ramp_tokens": 4096},
        }
    )
    new = read(
        {
            "guard": {
                "rollback_after_rejections": 4,
                "new_data": "skip",
                "decide": "deferred",
                "shrink_embedding": {"factor": 0.25, "hold_steps": 7},
                "answer_timeout": 9.0,
                "answer_default": "continue",
                "escalation": [
                    {"action": "skip"},
                    {"action": "lower_lr", "max_uses": 2, "hold_steps": 3, "ramp_steps": 4},
                ],
            },
            "launch": {"save_timeout": 11.0},
            "train": {"steps": 500, "batch_ramp": {"start": 8, "tokens": 4096}},
        }
    )
    assert old == new
    assert new.guard.rollback_after_rejections == 4 and new.guard.shrink_embedding.factor == 0.25


def test_an_old_name_draws_one_notice_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        read({"guard": {"persist": 4}}, "guard.window_before=3")
    lines = capfd.readouterr().err.splitlines()
    keys = sorted(re.findall(r"guard\.\w+", line) for line in lines)
    assert keys == [
        ["guard.persist", "guard.rollback_after_rejections"],
        ["guard.window_before", "guard.skip_before"],
    ]
    read({"guard": {"rollback_after_rejections": 4}})
    assert not capfd.readouterr().err


def test_an_override_wins_over_the_file_under_either_name() -> None:
    for in_file in ("persist", "rollback_after_rejections"):
        for given in ("persist", "rollback_after_rejections"):
            config = read({"guard": {in_file: 4}}, f"guard.{given}=6")
            assert config.guard.rollback_after_rejections == 6
    config = read({"guard": {"embed_factor": 0.2}}, "guard.shrink_embedding.floor=0.05")
    assert config.guard.shrink_embedding == ShrinkEmbedding(factor=0.2, floor=0.05)
    config = read({"guard": {"shrink_embedding": {"factor": 0.2}}}, "guard.embed_factor=0.3")
    assert config.guard.shrink_embedding.factor == 0.3


def test_both_names_of_a_key_are_refused() -> None:
    with pytest.raises(ConfigError) as error:
        read({"guard": {"persist": 4, "rollback_after_rejections": 4}})
    assert error.value.key == "guard.persist"


@pytest.mark.parametrize(
    ("overrides", "tree", "key", "file"),
    [
        ((), {"guard": {"persist": 0}}, "guard.rollback_after_rejections", "c.toml"),
        (("guard.persist=0",), {}, "guard.rollback_after_rejections", "--set"),
        (("guard.embed_factor=2",), {}, "guard.shrink_embedding.factor", "--set"),
        (("train.ramp_from=3",), {}, "train.batch_ramp.tokens", "c.toml"),
        ((), {"guard": {"shift": "neither"}}, "guard.new_data", "c.toml"),
        (
            (),
            {"guard": {"embed_factor": 0.5, "shrink_embedding": 3}},
            "guard.shrink_embedding",
            "c.toml",
        ),
    ],
)
def test_an_error_names_the_present_key_and_where_it_was_given(
    overrides: tuple[str, ...], tree: dict[str, Any], key: str, file: str
) -> None:
    with pytest.raises(ConfigError) as error:
        read(tree, *overrides)
    assert (error.value.key, error.value.file) == (key, file)


def test_dictionaries_and_policies_take_old_names(tmp_path: Path) -> None:
    assert check_settings({"guard": {"pardon": [[1, 2]]}}, GuardConfig).guard.allowlist == ((1, 2),)
    (tmp_path / "p.toml").write_text("[guard]\nconfirm = 5\n")
    assert load_guard_options(tmp_path / "p.toml", overrides=["guard.skips=9"]).max_data_skips == 9
    assert load_guard_options(tmp_path / "p.toml").steps_until_good == 5


def test_old_names_of_the_detectors_lead_to_their_tables() -> None:
    old = {"window": 64, "warmup": 16, "loss_score": 7.0, "grad_score": 9.0, "embed_score": 8.0}
    old |= {"divergence_score": 5.0, "divergence_steps": 12}
    spike = {"history": 64, "min_history": 16, "loss_threshold": 7.0}
    spike |= {"grad_threshold": 9.0, "embed_threshold": 8.0}
    divergence = {"threshold": 5.0, "steps": 12}
    new = read({"guard": {"detectors": {"spike": spike, "divergence": divergence}}}).guard
    assert read({"guard": old}).guard == GuardOptions(**old) == new
    assert (new.window, new.divergence_steps) == (64, 12)  # type: ignore[attr-defined]
    mixed = read({"guard": {"detectors": {"spike": {"history": 64}}}}, "guard.warmup=16").guard
    assert (mixed.detectors.spike.history, mixed.detectors.spike.min_history) == (64, 16)
    with pytest.raises(ConfigError) as error:
        read({"guard": {"window": 64, "detectors": {"spike": {"history": 64}}}})
    assert error.value.key == "guard.window"
