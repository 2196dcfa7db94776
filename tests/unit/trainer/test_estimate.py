"""Sizes worked out without a model are those of the model that is built and cut."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.support.running import tiny
from trainer.config.config import Config
from trainer.config.estimate import outline, rank_parameters
from trainer.model import Decoder
from trainer.parallel.pipeline import StagePosition, cut_model


def config_of(folder: Path, parallel: dict[str, Any], model: dict[str, Any]) -> Config:
    world = math.prod(size for name, size in parallel.items() if name != "chunks")
    return tiny(
        folder,
        world=world,
        parallel=parallel,
        model=model,
        train={"batch_size": 24, "micro_batch_size": 2},
    )


MODELS: dict[str, dict[str, Any]] = {
    "pre": {"layers": 7, "width": 16, "heads": 2, "tied": False},
    "bloom-like": {
        "layers": 7,
        "width": 16,
        "heads": 2,
        "tied": False,
        "norm": "layer",
        "bias": True,
        "positions": "alibi",
        "embedding_norm": True,
    },
    "post": {
        "layers": 7,
        "width": 16,
        "heads": 2,
        "tied": False,
        "norm_place": "post",
        "positions": "learned",
    },
}


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_parameters_of_each_stage_are_those_that_are_left_of_the_model(
    name: str, chunks: int, tmp_path: Path
) -> None:
    config = config_of(tmp_path, {"pp": 3, "chunks": chunks}, MODELS[name])
    length = config.data.sequence_length
    found = []
    for stage in range(3):
        model = Decoder(config.model, vocabulary=config.vocabulary, sequence_length=length, seed=0)
        cut_model(model, StagePosition(stage=stage, stages=3, chunks=chunks, group=None))  # type: ignore[arg-type]
        found.append(sum(parameter.numel() for parameter in model.parameters()))
    assert rank_parameters(config) == found


def test_shards_and_tensor_parallel_groups_share_what_a_stage_has(tmp_path: Path) -> None:
    whole = rank_parameters(config_of(tmp_path, {"pp": 2}, MODELS["pre"]))
    shared = rank_parameters(config_of(tmp_path, {"pp": 2, "dp_shard": 2, "tp": 2}, MODELS["pre"]))
    assert shared == [-(-count // 4) for count in whole]


def test_a_model_of_unknown_size_gets_no_sizes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    said = outline(config_of(tmp_path, {"dp_replicate": 2}, {"hf": str(tmp_path)}))
    assert len(said) == 2 and "2 replica(s)" in said[0]
