"""The base of every section of the configuration, and the ranges that its numbers may have."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from msgspec import Meta, structs

from guardrail.core.renamed_keys import Renamed

Positive = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
PositiveFloat = Annotated[float, Meta(gt=0)]
NonNegativeFloat = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]


class Section(Renamed, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """Base of every section. Unknown keys are errors; values never change after loading."""


SectionT = TypeVar("SectionT", bound=Section)


def replace_key(section: SectionT, key: str, value: Any) -> SectionT:
    """Return a copy of a section with another value.

    Args:
        key: dotted, below the section, such as "detectors.spike.loss_threshold".
    """
    name, _, rest = key.partition(".")
    if rest:
        value = replace_key(getattr(section, name), rest, value)
    return structs.replace(section, **{name: value})
