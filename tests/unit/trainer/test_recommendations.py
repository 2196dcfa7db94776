"""What doctor says of a configuration beside published practice: each remark, where it is made and
where it is not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from guardrail.core.config import build_config
from guardrail.launch import doctor
from guardrail.launch import launcher as launching
from trainer.config import remarks
from trainer.config.config import Config
from trainer.config.recommendations import GPT3, published_recipe

# 124 M parameters, 0.5 M tokens a batch, 2.6 G tokens.
USUAL: dict[str, Any] = {
    "model": {"preset": "gpt3-124m"},
    "train": {"steps": 5000},
    "data": {"tokenizer": "bpe", "vocabulary": 50257},
}


def settings(**sections: Any) -> Config:
    tree = {
        name: {**USUAL.get(name, {}), **sections.get(name, {})}
        for name in USUAL.keys() | sections.keys()
    }
    made = build_config(tree, file="x.toml", base=Path.cwd())
    assert isinstance(made, Config)
    return made


def test_a_published_recipe_is_beyond_reproach() -> None:
    assert remarks(settings()) == []
    for name in ("llama-like", "palm-like", "t5-like"):
        assert remarks(settings(model={"preset": name}, train={"steps": 20_000})) == []


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"optim": {"lr": 1e-2}},
            ["optim.lr = 0.01", "17 times", "6.0e-04", "125 M", "table 2.1"],
        ),
        ({"optim": {"lr": 3e-5}}, ["optim.lr = 3e-05", "20 times below"]),
        ({"optim": {"clip": 0.0}}, ["optim.clip = 0", "clip at 1.0"]),
        ({"optim": {"clip": 5.0}}, ["optim.clip = 5", "clip at 1.0"]),
        ({"model": {"norm_place": "post"}}, ['norm_place = "post"', "Xiong et al. 2020"]),
        ({"model": {"norm_place": "sandwich"}}, ['norm_place = "sandwich"', "Zeng et al. 2022"]),
        ({"model": {"embedding_norm": True}}, ["model.embedding_norm", "Le Scao et al. 2022"]),
        (
            {"optim": {"beta2": 0.999}},
            ["optim.beta2 = 0.999", "1000 steps", "Wortsman et al. 2023"],
        ),
        ({"optim": {"beta2": 0.8}}, ["optim.beta2 = 0.8", "5 steps", "0.95 to 0.99"]),
        (
            {"optim": {"beta2": 0.99999}},
            ["optim.beta2 = 0.99999", "100000 steps", "5000"],
        ),
        (
            {"train": {"batch_size": 8, "steps": 160_000}},
            ["16.4 K tokens", "few", "125 M parameters", "500 K"],
        ),
        ({"train": {"batch_size": 4096, "steps": 5000}}, ["8.39 M tokens", "many"]),
        (
            {"train": {"steps": 500}},
            ["262 M tokens", "125 M parameters", "2.1 per", "Hoffmann et al. 2022"],
        ),
        ({"train": {"steps": 1_000_000}}, ["4,187 per", "Dubey et al. 2024"]),
        ({"optim": {"warmup_steps": 1000}}, ["20%", "0.125 %"]),
        ({"optim": {"warmup_steps": 3}}, ["3 steps", "0.06%"]),
        ({"optim": {"warmup_steps": 0}}, ["no warm-up", "Liu et al. 2020"]),
        ({"optim": {"min_lr_share": 0.5}}, ["optim.min_lr_share = 0.5", "0.1"]),
    ],
)
def test_each_departure_is_named_with_its_source(
    sections: dict[str, Any], words: list[str]
) -> None:
    (remark,) = remarks(settings(**sections))
    for word in words:
        assert word in remark


@pytest.mark.parametrize(
    "sections",
    [
        {"optim": {"clip": 0.0, "zclip": 2.5}},
        {"optim": {"name": "adafactor", "lr": 1e-2, "beta2": 0.5}},  # relative rate, own decay
        # a small batch profits from it
        {"optim": {"beta2": 0.999}, "train": {"batch_size": 32, "steps": 50_000}},
    ],
)
def test_what_has_its_reason_is_not_remarked(sections: dict[str, Any]) -> None:
    assert remarks(settings(**sections)) == []


def test_small_models_are_not_compared_by_size(tmp_path: Path) -> None:
    small = {
        "model": {"preset": "", "layers": 2},
        "data": {"tokenizer": "bytes"},
        "train": {"batch_size": 4},
    }
    assert remarks(settings(**small, optim={"lr": 0.05})) == []
    assert len(remarks(settings(**small, optim={"clip": 0.0}))) == 1
    assert len(remarks(settings(**small, optim={"beta2": 0.99999}))) == 1
    assert remarks(settings(**small, optim={"beta2": 0.999})) == []


def test_sizes_between_those_of_the_table_lie_between() -> None:
    for parameters, batch, rate in GPT3:
        assert published_recipe(int(parameters)) == pytest.approx((batch, rate))
    assert published_recipe(10**7) == published_recipe(125 * 10**6) and published_recipe(
        10**13
    ) == published_recipe(175 * 10**9)
    batch, rate = published_recipe(950 * 10**6)
    assert 0.5e6 < batch < 1e6 and 2e-4 < rate < 2.5e-4


def test_doctor_passes_the_remarks_on_as_notes(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[optim]\nclip = 0\n[train]\nsteps = 300\n")
    settings = launching.load_settings(str(file))
    torch = {"devices": [], "gloo": True, "nccl": False, "bf16": False}
    checks = list(doctor._check_configuration(settings, str(file), (), torch))
    (remark,) = [check for check in checks if check.name == doctor.PRACTICE]
    assert remark.level == "note" and "not clipped" in remark.text
    assert checks[-1].level == "ok"
