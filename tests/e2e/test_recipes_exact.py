"""A rollback is exact with every optimizer, stabiliser, objective and schedule, and under a batch
ramp.

Run A meets corrupted documents and rolls back; run B knows from its beginning what A left out.
Their steps, learning rates, gradient norms and final weights have the same bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.running import (
    BLIND,
    assert_same,
    of_kind,
    table,
    tiny,
    told,
    trained,
    write_corpus,
)

GUARD = {"loss_score": 5.0, **BLIND}
RECIPES: dict[str, dict[str, Any]] = {
    "muon, prefix lm, wsd, batch ramp": {
        "model": {"kind": "prefix", "qk_norm": True, "layers": 1},
        "optim": {"name": "muon", "schedule": "wsd", "warmup_share": 0.05},
        "train": {
            "objective": "prefix-lm",
            "ramp_from": 4,
            "ramp_by": 4,
            "ramp_tokens": 1500,
            "micro_batch_size": 2,
        },
    },
    "adafactor, spans, encoder and decoder, zclip": {
        "model": {"kind": "encoder-decoder", "layers": 1, "positions": "t5", "norm_place": "pre"},
        "optim": {"name": "adafactor", "lr": 2e-2, "zclip": 2.5, "schedule": "constant"},
        "train": {"objective": "span", "steps": 60},
    },
    "stable adamw, blanks, qk clip, z-loss": {
        "model": {
            "kind": "prefix",
            "blank_positions": True,
            "activation": "geglu",
            "bias": True,
            "norm": "layer",
        },
        "optim": {"stable": True, "qk_clip": 0.05, "implementation": "foreach"},
        "train": {"objective": "blank", "z_loss": 1e-3},
    },
    "adam, alibi, parallel, linear": {
        "model": {"positions": "alibi", "parallel": True, "kv_heads": 1, "activation": "relu"},
        "optim": {
            "name": "adam",
            "weight_decay": 0.01,
            "schedule": "linear",
            "warmup_tokens": 1024,
        },
    },
}


NAMES = list(RECIPES)
SHAPES = [
    *((name, 1, "ddp") for name in NAMES),
    pytest.param(NAMES[0], 2, "fsdp", marks=pytest.mark.ci_slow),
    pytest.param(NAMES[1], 2, "ddp", marks=pytest.mark.slow),
    pytest.param(NAMES[2], 2, "fsdp", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "world", "strategy"), SHAPES)
def test_a_rollback_is_exact(name: str, world: int, strategy: str, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", bad=range(8, 10))
    sections = RECIPES[name]
    train = {"steps": 48, **sections.get("train", {})}
    config = tiny(
        tmp_path, world=world, strategy=strategy, guard=GUARD, **{**sections, "train": train}
    )
    a = trained(config)
    assert of_kind(a, "rollback"), "nothing was rolled back: the comparison would show nothing"
    b = trained(told(config, a))
    assert not of_kind(b, "rollback")
    assert_same(a, b)
    losses = table(a, ("loss",))[:, 0]
    assert losses[-10:].mean() < 0.8 * losses[:3].mean()
