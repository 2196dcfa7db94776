"""`[train] compile`: what is compiled is guarded, copied, replayed and rolled back like what is
not.
"""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from guardrail.core.errors import ConfigError
from guardrail.rundir.checkpoint_folders import checkpoint_dirs
from guardrail.rundir.manifest import read_manifest
from guardrail.rundir.run_directory import RunDirectory
from tests.support.running import assert_same, of_kind, table, tiny, told, trained
from trainer.config.config import Config

# Warnings of torch's own tracer, which is no reason to fail.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
    pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex"),
]

# A NaN, whose batch is left out, and weights that are damaged, which is gone back from.
FAULTS = [
    {"kind": "nan_loss", "first": 64, "last": 65},
    {"kind": "scale_weights", "step": 21, "times": 1, "value": 1000.0},
]


def compiled(
    folder: Path, backend: str, *, faults: Any = FAULTS, steps: int = 26, **sections: Any
) -> Config:
    train = {"steps": steps, "compile": True, "compile_backend": backend}
    return tiny(folder, train=train, faults=faults, **sections)


def names(run: RunDirectory) -> set[str]:
    return set(read_manifest(checkpoint_dirs(run.checkpoints)[0]).tensors)


def check(folder: Path, config: Config) -> RunDirectory:
    """Rolled back exactly, and with the names of a model that was never compiled."""
    run = trained(config, seconds=600.0)
    assert of_kind(run, "verdict") and of_kind(run, "diagnosis") and of_kind(run, "rollback")
    sound = msgspec.structs.replace(told(config, run), faults=())  # nothing scales its weights
    assert_same(run, trained(sound, seconds=600.0))
    return run


def test_compiled_blocks_are_rolled_back_exactly_and_keep_their_names(tmp_path: Path) -> None:
    run = check(tmp_path, compiled(tmp_path, "eager"))
    plain = trained(tiny(tmp_path, faults=FAULTS, train={"steps": 26}))
    assert names(run) == names(plain) and not any("_orig_mod" in name for name in names(run))
    # Captured and run without another compiler behind it, it is the same arithmetic.
    assert_same(run, plain)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "strategy"), [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
@pytest.mark.parametrize("gate", ["sync", "lagged"])
def test_on_every_strategy(tmp_path: Path, world: int, strategy: str, gate: str) -> None:
    config = compiled(tmp_path, "aot_eager", world=world, strategy=strategy, guard={"gate": gate})
    check(tmp_path, config)


@pytest.mark.slow
def test_generated_code_trains_alike_and_is_exact(tmp_path: Path) -> None:
    quiet = {"model": {"dropout": 0.0}}  # inductor throws dice of its own
    run = check(tmp_path, compiled(tmp_path, "inductor", **quiet))
    plain = trained(tiny(tmp_path, faults=FAULTS, train={"steps": 26}, **quiet))
    assert np.allclose(table(run, ("loss",)), table(plain, ("loss",)), rtol=1e-3)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("optim", "qk_clip", 100.0), ("train", "activation_checkpointing", True)],
)
def test_what_does_not_go_with_it_is_refused(
    tmp_path: Path, section: str, key: str, value: Any
) -> None:
    sections: dict[str, Any] = {"train": {"compile": True}}
    sections.setdefault(section, {})[key] = value
    with pytest.raises(ConfigError, match=r"train\.compile") as caught:
        tiny(tmp_path, **sections)
    assert caught.value.key == f"{section}.{key}"
