"""`lr`: a factor on the scheduled learning rate."""

from __future__ import annotations

from guardrail.core.records.status import Status
from guardrail.decide.control_commands.arguments import Factor
from guardrail.decide.control_commands.base import ScreenKey
from guardrail.decide.control_commands.factor import FactorCommand
from guardrail.decide.control_commands.preview import Preview
from guardrail.decide.control_commands.run_facts import RecordedFacts
from guardrail.decide.remedies.effects import LR


class ScaleLearningRate(FactorCommand):
    """Multiply the scheduled learning rate."""

    name = "lr"
    argument = Factor(high=100.0, default=0.5)
    help = "Multiply the scheduled learning rate."
    key = ScreenKey(
        key="l",
        label="rate",
        help="Multiply the scheduled learning rate by a factor.",
        rank=3,
        title="learning rate",
    )
    factor = LR

    def label(self) -> str:
        return f"rate ×{self.value:g}"

    @classmethod
    def current_value(cls, status: Status | None) -> float:
        return status.lr_factor if status else 1.0

    @classmethod
    def dialog_lines(cls, status: Status | None) -> list[str]:
        now = cls.current_value(status)
        return [f"Factor on the scheduled learning rate (now ×{now:g}; 1 is the schedule itself)."]

    def preview_effect(self, run: RecordedFacts) -> Preview:
        before = run.next_rates().lr
        return self.preview_factor(run, lr_before=before, lr=self.scaled(before, run))
