"""An example of a command to a run: `damp` multiplies the learning rate by 0.1 until `lr` is given.

To add it to guardrail, put `Damp` into `COMMANDS` of guardrail/decide/control_commands/registry.py.
"""

from __future__ import annotations

from guardrail.core.events.run_state import CommandAnswered
from guardrail.decide.control_commands.base import (
    ControlCommand,
    ReplayTarget,
    RunActions,
    ScreenKey,
)
from guardrail.decide.control_commands.preview import Preview
from guardrail.decide.control_commands.run_facts import RecordedFacts, RunFacts
from guardrail.decide.remedies.effects import LR

FACTOR = 0.1


class Damp(ControlCommand):
    """Multiply the learning rate by 0.1."""

    name = "damp"
    help = "Multiply the learning rate by 0.1."
    key = ScreenKey(key="D", label="damp", help="Multiply the learning rate by 0.1.")

    def refuse(self, run: RunFacts) -> str:
        if run.setting_of(LR).at(run.step + 1) == FACTOR:
            return "the learning rate is damped already"
        return ""

    def preview_effect(self, run: RecordedFacts) -> Preview:
        return self.make_preview(run, lr=run.next_rates().lr * FACTOR)

    def execute(self, actions: RunActions) -> bool:
        # The journal line is the setting itself: `replayed` reads it, now and after a restart.
        return actions.acknowledge(self)

    def replayed(self, target: ReplayTarget, event: CommandAnswered) -> None:
        target.set_factor(LR, event.step + 1, FACTOR)
