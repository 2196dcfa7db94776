"""Kinds, fields and words of journal lines that older versions wrote. They are read for good."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from guardrail.core.records.verdicts import OLD_CAUSES, Remedy

# Kinds of lines in older versions -> present names.
OLD_KINDS: Mapping[str, str] = {
    "left_out": "skipped",
    "durability": "disk",
    "ranks_failed": "rank_failed",
    "hung": "rank_hung",
    "cause": "diagnosis",
}
# Names of commands in older versions -> present names; the command classes have the same aliases.
OLD_COMMANDS: Mapping[str, str] = {"embed-alpha": "shrink-embedding", "policy": "mode"}
# Present kind of line -> field -> word of an older version -> present word.
OLD_WORDS: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "command": {"command": OLD_COMMANDS},
    "diagnosis": {"cause": OLD_CAUSES},
    "disk": {"state": {"degraded": "failing"}},
    "incident": {"state": {"recurred": "repeated", "offset": "recovered with higher loss"}},
}


def use_present_names(fields: dict[str, Any]) -> None:
    """Change the kind, the fields and the words of a line into those of this version."""
    kind = fields["kind"] = OLD_KINDS.get(fields["kind"], fields["kind"])
    for name, words in OLD_WORDS.get(kind, {}).items():
        value = fields.get(name)
        if isinstance(value, str) and value in words:
            fields[name] = words[value]
    if isinstance(remedies := fields.get("remedies"), list):
        fields["remedies"] = [_with_present_keys(one) for one in remedies]


def _with_present_keys(remedy: Any) -> Any:
    if not isinstance(remedy, Mapping):
        return remedy
    return {Remedy.RENAMED.get(key, key): value for key, value in remedy.items()}
