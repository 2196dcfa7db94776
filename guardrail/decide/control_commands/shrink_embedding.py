"""`shrink-embedding`: a factor on the gradients of the embedding."""

from __future__ import annotations

from guardrail.core.records.status import Status
from guardrail.decide.control_commands.arguments import Factor
from guardrail.decide.control_commands.base import ScreenKey
from guardrail.decide.control_commands.factor import FactorCommand
from guardrail.decide.control_commands.preview import Preview
from guardrail.decide.control_commands.run_facts import RecordedFacts
from guardrail.decide.remedies.effects import EMBED_ALPHA


class ShrinkEmbedding(FactorCommand):
    """Multiply the gradients of the embedding."""

    name = "shrink-embedding"
    aliases = ("embed-alpha",)
    argument = Factor(high=1.0, default=0.1)
    help = "Multiply the embedding gradients, 0 < FACTOR <= 1."
    key = ScreenKey(
        key="e",
        label="embedding",
        help="Multiply the gradients of the embedding by a factor.",
        rank=6,
        title="embedding",
    )
    factor = EMBED_ALPHA

    def label(self) -> str:
        return f"embedding gradients ×{self.value:g}"

    @classmethod
    def dialog_lines(cls, status: Status | None) -> list[str]:
        return ["Factor on the gradients of the embedding, in (0, 1]; 1 leaves them as they are."]

    def preview_effect(self, run: RecordedFacts) -> Preview:
        return self.preview_factor(run, alpha=self.scaled(run.next_rates().embedding, run))
