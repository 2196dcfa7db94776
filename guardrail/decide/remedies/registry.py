"""The list of all remedies, and the remedy of a name or of an effect."""

from __future__ import annotations

from collections.abc import Iterable

from guardrail.decide.remedies.base import EscalationRemedy
from guardrail.decide.remedies.halt import Halt
from guardrail.decide.remedies.lower_lr import LowerLr
from guardrail.decide.remedies.older import OlderState
from guardrail.decide.remedies.pause import Pause
from guardrail.decide.remedies.reset_moments import ResetMoments
from guardrail.decide.remedies.rollback import PlainRollback
from guardrail.decide.remedies.shrink_embedding import ShrinkEmbeddingGradients
from guardrail.decide.remedies.skip import SkipUpdate
from guardrail.decide.remedies.tighten_clip import TightenClip
from guardrail.decide.remedies.widen import WidenWindow

REMEDIES: tuple[type[EscalationRemedy], ...] = (
    SkipUpdate,
    PlainRollback,
    WidenWindow,
    OlderState,
    LowerLr,
    ShrinkEmbeddingGradients,
    TightenClip,
    ResetMoments,
    Pause,
    Halt,
)


def index_remedies(
    remedies: Iterable[type[EscalationRemedy]], attribute: str
) -> dict[str, type[EscalationRemedy]]:
    """Return the remedies by one of their names, without those that have none.

    Raises:
        TypeError: two have the same name. A subclass inherits both names of its base.
    """
    found: dict[str, type[EscalationRemedy]] = {}
    for cls in remedies:
        name = getattr(cls, attribute)
        if name in found:
            raise TypeError(
                f"{cls.__name__} and {found[name].__name__} both have {attribute} = {name!r}: "
                "give each remedy its own"
            )
        if name:
            found[name] = cls
    return found


BY_ACTION = index_remedies(REMEDIES, "action")
BY_EFFECT = index_remedies(REMEDIES, "effect")
# kind of an effect -> its name in the header of the screen
SCREEN_NAMES = {cls.effect: cls.screen_name for cls in REMEDIES if cls.screen_name}


def find_effect(kind: str) -> type[EscalationRemedy]:
    """Return the remedy that has this kind of effect; the base class for any other kind."""
    return BY_EFFECT.get(kind, EscalationRemedy)
