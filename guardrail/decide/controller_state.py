"""What the parts of a controller share."""

from __future__ import annotations

from dataclasses import dataclass

from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.verdicts import Mode
from guardrail.decide.advise_mode import AdviseSimulation
from guardrail.decide.applied_steps import AppliedSteps
from guardrail.decide.detector_set import DetectorSet
from guardrail.decide.memory import ControllerMemory


@dataclass(slots=True)
class ControllerState:
    """Shared by the parts of a controller, which do not know each other.

    Attributes:
        settings: the [guard] section.
        mode: the present one.
        detectors: they travel with each snapshot.
        steps: the last applied steps; they travel with each snapshot.
        memory: what outlives a rollback.
        advice: what `auto` would have done, in mode `advise`.
        overflows: consecutive overflows of the loss scale, directly before the next step.
    """

    settings: GuardOptions
    mode: Mode
    detectors: DetectorSet
    steps: AppliedSteps
    memory: ControllerMemory
    advice: AdviseSimulation
    overflows: int = 0
