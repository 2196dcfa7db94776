"""Published recipes, `configs/presets/NAME.toml`: defaults for the keys that a file does not set."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any

from guardrail.core.errors import ConfigError

# Keys that set the same thing. A file that sets one of a group gets none of the others from a preset.
ALTERNATIVES = {
    "optim": [{"warmup_steps", "warmup_tokens", "warmup_share"}],
    "train": [{"steps", "epochs"}, {"batch_ramp", "batch_size"}],
}


def presets_folder() -> Path:
    """Return the folder of the presets: beside this file if installed, configs/presets in a clone."""
    installed = Path(__file__).parent / "presets"
    if installed.is_dir():
        return installed
    return Path(__file__).parents[2] / "configs" / "presets"


def list_presets() -> list[str]:
    """Return the names of all presets, sorted."""
    return sorted(path.stem for path in presets_folder().glob("*.toml"))


def with_preset(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a parsed configuration, completed by the preset that `model.preset` names.

    Raises:
        ConfigError: there is no such preset; names the nearest.
    """
    model = tree.get("model")
    if not isinstance(model, dict):
        return tree
    name = model.get("preset", "")
    if not name or not isinstance(name, str):  # a wrong type is refused later
        return tree
    if name not in list_presets():
        hint = f"presets: {', '.join(list_presets())}"
        close = difflib.get_close_matches(name, list_presets(), n=1, cutoff=0.4)
        if close:
            hint = f"did you mean {close[0]}?"
        raise ConfigError("the name of a preset", key="model.preset", value=name, hint=hint)
    preset = tomllib.loads((presets_folder() / f"{name}.toml").read_text(encoding="utf-8"))
    merged = dict(tree)
    for section, values in preset.items():
        own = tree.get(section, {})
        if isinstance(own, dict):
            defaults = _without_alternatives(values, own, ALTERNATIVES.get(section, []))
            merged[section] = defaults | own
    return merged


def _without_alternatives(
    values: dict[str, Any], own: dict[str, Any], alternatives: list[set[str]]
) -> dict[str, Any]:
    """Return the preset's values without those that `own` sets by another key."""
    taken: set[str] = set()
    for group in alternatives:
        if group & own.keys():
            taken |= group
    return {key: value for key, value in values.items() if key not in taken}
