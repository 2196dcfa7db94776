"""`pause`: training waits after the current step."""

from __future__ import annotations

from guardrail.decide.control_commands.base import ControlCommand, RunActions, ScreenKey
from guardrail.decide.control_commands.run_facts import RunFacts


class Pause(ControlCommand):
    """Pause after the current step."""

    name = "pause"
    help = "Pause after the current step."
    key = ScreenKey(
        key="p",
        label="pause",
        help="Pause training after the current step, or continue it.",
        rank=1,
    )

    def refuse(self, run: RunFacts) -> str:
        if run.is_paused:
            return "training is paused already"
        return ""

    def execute(self, actions: RunActions) -> bool:
        actions.acknowledge(self)
        actions.pause()
        return True
