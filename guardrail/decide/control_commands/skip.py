"""`skip`: the next batches are not used in this run."""

from __future__ import annotations

from guardrail.core.events.decisions import Skipped
from guardrail.core.format import format_plural
from guardrail.core.records.status import Status
from guardrail.decide.control_commands.arguments import Count
from guardrail.decide.control_commands.base import ControlCommand, HoldsFor, RunActions, ScreenKey
from guardrail.decide.control_commands.preview import Preview
from guardrail.decide.control_commands.run_facts import RecordedFacts

MAX_SKIP = 100_000  # batches of one command


class Skip(ControlCommand):
    """Skip the next batches."""

    name = "skip"
    argument = Count(high=MAX_SKIP, unit="batches", default=1)
    help = "Skip the next N batches."
    key = ScreenKey(
        key="s", label="skip", help="Skip the next N batches.", rank=3, title="skip batches"
    )
    holds_for = HoldsFor.TIMELINE
    own_line = Skipped

    def describe(self) -> str:
        return f"skip {format_plural(int(self.value), 'batch')}"

    @classmethod
    def dialog_lines(cls, status: Status | None) -> list[str]:
        return ["How many of the next batches are skipped? This run never uses their samples."]

    def preview_effect(self, run: RecordedFacts) -> Preview:
        batches = int(self.value)
        window = run.next_window(batches)
        if window is None:
            verb = "is" if batches == 1 else "are"
            remark = f"the next {format_plural(batches, 'batch')} {verb} skipped"
            return self.make_preview(run, remark=remark)
        if refusal := run.nothing_left(window):
            return self.preview_refusal(run, refusal)
        return self.make_preview(run, window=window, samples=run.fresh(range(*window)))

    def execute(self, actions: RunActions) -> bool:
        batches = int(self.value)
        window = actions.next_window(batches)
        if not actions.acknowledge(self, refusal=actions.nothing_left(window)):
            return False
        actions.skip(
            window, batches=batches, reason=f"{format_plural(batches, 'batch')} skipped by command"
        )
        actions.end_question()
        return True
