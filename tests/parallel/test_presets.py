"""Presets: found, complete, beneath what the file says; each trains."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from guardrail.core.config import build_config
from guardrail.core.errors import ConfigError
from guardrail.core.toml_file import dump_toml
from tests.support.places import ROOT
from tests.support.running import of_kind, table, tiny, trained
from trainer.config import preset
from trainer.config.config import Config
from trainer.config.sizes import parameter_count

NAMES = ["bloom-like", "glm-like", "gpt3-124m", "llama-like", "palm-like", "t5-like"]
# Keys of [model] that make it small; the rest is the preset's.
TOY: dict[str, dict[str, Any]] = {
    name: {"layers": 2, "width": 32, "heads": 4, "dropout": 0.0} for name in NAMES
} | {
    "t5-like": {
        "layers": 1,
        "encoder_layers": 1,
        "width": 32,
        "heads": 4,
        "hidden": 64,
        "dropout": 0.0,
    }
}


def settings(
    model: dict[str, Any], overrides: tuple[str, ...] = (), **sections: dict[str, Any]
) -> Config:
    tree = {"train": {"steps": 10_000}, "model": model} | sections
    made = build_config(tree, file="x.toml", overrides=overrides, base=Path.cwd())
    assert isinstance(made, Config)
    return made


def test_the_presets_are_those_of_the_readme_and_of_the_folder() -> None:
    assert preset.list_presets() == NAMES
    assert preset.presets_folder().resolve() == (ROOT / "configs" / "presets").resolve()


@pytest.mark.parametrize("name", NAMES)
def test_every_value_of_a_preset_arrives(name: str) -> None:
    made = settings({"preset": name})
    for section, values in tomllib.loads(
        (preset.presets_folder() / f"{name}.toml").read_text()
    ).items():
        for key, value in values.items():
            assert getattr(getattr(made, section), key) == value, f"{section}.{key}"
    again = build_config(tomllib.loads(dump_toml(made)), file="config.toml", base=Path.cwd())
    assert again == made  # a run's own config.toml stands above the preset that it names


@pytest.mark.parametrize(
    ("name", "vocabulary", "millions"),
    [
        ("gpt3-124m", 50257, 125.2),  # 124.4 at GPT-2's 1024 positions
        ("bloom-like", 250_880, 559.2),  # BLOOM-560M
        ("t5-like", 32_128, 222.9),  # T5 base
    ],
)
def test_sizes_are_those_of_the_published_models(
    name: str, vocabulary: int, millions: float
) -> None:
    made = settings({"preset": name})
    count = parameter_count(made.model, vocabulary, sequence_length=made.data.sequence_length)
    assert count / 1e6 == pytest.approx(millions, rel=0.002)


def test_the_file_stands_above_the_preset_and_set_above_both() -> None:
    made = settings({"preset": "palm-like", "layers": 3}, ("model.width=384",), optim={"lr": 0.5})
    assert (made.model.layers, made.model.width, made.model.parallel) == (3, 384, True)
    assert (made.optim.lr, made.optim.beta2, made.train.z_loss) == (0.5, 0.99, 1e-4)
    assert settings({}, ("model.preset=bloom-like",)).model.positions == "alibi"


def test_another_way_to_say_the_same_takes_the_presets_place() -> None:
    assert settings({"preset": "gpt3-124m"}).schedule(steps=10_000).warmup == 12
    made = settings({"preset": "gpt3-124m"}, optim={"warmup_steps": 7})
    assert made.optim.warmup_share == 0 and made.schedule(steps=10_000).warmup == 7


@pytest.mark.parametrize(
    ("name", "hint"), [("lama-like", " llama-like?"), ("xyz", "presets: bloom-like")]
)
def test_an_unknown_preset_names_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings({"preset": name})
    assert (
        caught.value.key == "model.preset"
        and hint in (caught.value.hint or "")
        and caught.value.file == "x.toml"
    )
    with pytest.raises(ConfigError) as caught:
        settings({}, (f"model.preset={name}",))
    assert caught.value.file == "--set"


def test_a_preset_of_a_wrong_type_is_refused_like_any_other_value() -> None:
    with pytest.raises(ConfigError) as caught:
        settings({"preset": 3})
    assert caught.value.key == "model.preset"


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_trains_at_toy_size(name: str, tmp_path: Path) -> None:
    config = tiny(
        tmp_path,
        model={"preset": name, **TOY[name]},
        optim={"lr": 3e-2 if name == "t5-like" else 5e-3, "warmup_steps": 5},
        train={"steps": 50},
        guard={"mode": "off"},
    )
    losses = table(trained(config), ("loss",))[:, 0]
    assert losses[-8:].mean() < 0.75 * losses[:2].mean(), losses


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bloom-like", "glm-like", "t5-like"])
def test_a_preset_trains_in_16_bits_on_shards_with_recomputation(name: str, tmp_path: Path) -> None:
    """Masks, biases, positions and the encoder's output pass through FSDP's casts and the
    checkpointed blocks.
    """
    config = tiny(
        tmp_path,
        world=2,
        strategy="fsdp",
        model={"preset": name, **TOY[name]},
        optim={"name": "adamw", "lr": 5e-3, "warmup_steps": 5},
        train={
            "steps": 40,
            "precision": "bf16",
            "activation_checkpointing": True,
            "eval_every": 40,
        },
        data={"eval_fraction": 0.05},
        guard={"mode": "off"},
    )
    run = trained(config)
    losses = table(run, ("loss",))[:, 0]
    assert losses[-8:].mean() < 0.75 * losses[:2].mean(), losses
    (event,) = of_kind(run, "eval")
    assert event.data["loss"] < losses[0]
