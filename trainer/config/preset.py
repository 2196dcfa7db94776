"""Published recipes, `configs/presets/NAME.toml`: values that hold wherever a configuration sets
none of its own.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any

from guardrail.core.errors import ConfigError

# Ways to say the same thing: a file that uses one of them gets none of the others from a preset.
ALTERNATIVES = {
    "optim": [{"warmup_steps", "warmup_tokens", "warmup_share"}],
    "train": [{"steps", "epochs"}, {"batch_ramp", "batch_size"}],
}


def presets_folder() -> Path:
    """Where the presets are: beside this file in an installed package, in configs/presets of a
    clone.
    """
    installed = Path(__file__).parent / "presets"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "configs" / "presets"


def list_presets() -> list[str]:
    return sorted(path.stem for path in presets_folder().glob("*.toml"))


def with_preset(tree: dict[str, Any]) -> dict[str, Any]:
    """A parsed configuration over the preset that its `[model] preset` names, if it names one.

    Raises:
        ConfigError: there is no such preset; names the nearest.
    """
    model = tree.get("model")
    name = model.get("preset", "") if isinstance(model, dict) else ""
    if not name or not isinstance(name, str):  # a wrong type is refused with all the others
        return tree
    if name not in list_presets():
        close = difflib.get_close_matches(name, list_presets(), n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(list_presets())}"
        raise ConfigError("the name of a preset", key="model.preset", value=name, hint=hint)
    preset = tomllib.loads((presets_folder() / f"{name}.toml").read_text(encoding="utf-8"))
    merged = dict(tree)
    for section, values in preset.items():
        own = tree.get(section, {})
        if isinstance(own, dict):
            merged[section] = _beneath(values, own, ALTERNATIVES.get(section, [])) | own
    return merged


def _beneath(
    values: dict[str, Any], own: dict[str, Any], alternatives: list[set[str]]
) -> dict[str, Any]:
    taken: set[str] = set().union(*(group for group in alternatives if group & own.keys()))
    return {key: value for key, value in values.items() if key not in taken}
