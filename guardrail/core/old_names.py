"""Names that moved: an old module still offers them, without a warning.

Nothing is loaded before a name is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def forward(
    old: str, new: str, names: Sequence[str], *, renamed: Mapping[str, str] | None = None
) -> Callable[[str], Any]:
    """Return the `__getattr__` of an old module.

    Args:
        old: the old module.
        new: the module that has the names now.
        names: that the old module offers under their present names.
        renamed: old name -> present name, with its module where that is not `new`.

    Raises:
        AttributeError: from the returned function, for any other name.
    """
    places = {**{name: name for name in names}, **(renamed or {})}

    def attribute(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        module, _, present = places[name].rpartition(".")
        return getattr(importlib.import_module(module or new), present)

    return attribute
