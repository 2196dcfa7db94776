"""What the commands that set a factor have in common. The journal line is the setting itself."""

from __future__ import annotations

from typing import Any

from guardrail.core.events.run_state import CommandAnswered
from guardrail.decide.control_commands.base import ControlCommand, HoldsFor, ReplayTarget
from guardrail.decide.control_commands.preview import Preview
from guardrail.decide.control_commands.run_facts import RecordedFacts, RunFacts, Setting


class FactorCommand(ControlCommand):
    """Sets a factor that holds from the next step on, until it is set again."""

    holds_for = HoldsFor.SETTING

    def describe(self) -> str:
        return f"{self.name} x{self.value:g}"

    def current_setting(self, run: RunFacts) -> Setting:
        factor = run.setting_of(self.factor).at(run.step + 1)
        return Setting(factor, f"x{factor:g}")

    def scaled(self, value: float, run: RunFacts) -> float:
        """Return what becomes of a `value` that the present factor is part of."""
        factor = self.current_setting(run).value
        if not factor:
            return float("nan")
        return value / factor * self.value

    def preview_factor(self, run: RecordedFacts, **fields: Any) -> Preview:
        """Return a preview with the factor that is replaced, and these fields."""
        return self.make_preview(
            run,
            instead_of=self.current_setting(run).value,
            remark=f"from step {run.step + 1:,} on",
            **fields,
        )

    def replayed(self, target: ReplayTarget, event: CommandAnswered) -> None:
        target.set_factor(self.factor, event.step + 1, self.value)
