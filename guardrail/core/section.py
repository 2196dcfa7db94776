"""The base of every section of the configuration, and the ranges that its numbers may have."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from guardrail.core.renamed_keys import Renamed

Positive = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
PositiveFloat = Annotated[float, Meta(gt=0)]
NonNegativeFloat = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]


class Section(Renamed, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """Base of every section: unknown keys are errors, values never change after loading."""
