"""`accept`: the run is accepted as it is, though an incident is not over."""

from __future__ import annotations

from guardrail.core.events.run_state import CommandAnswered
from guardrail.core.records.status import Status
from guardrail.decide.control_commands.base import (
    ControlCommand,
    ReplayTarget,
    RunActions,
    ScreenKey,
)
from guardrail.decide.control_commands.preview import Preview
from guardrail.decide.control_commands.run_facts import RecordedFacts, RunFacts

NO_INCIDENT = "every incident is over"


class Accept(ControlCommand):
    """End the open incidents; later states may become good again."""

    name = "accept"
    help = "Accept the run as it is while an incident is open. States count as good again."
    key = ScreenKey(
        key="A",
        label="",
        help="Accept the run as it is though an incident is not over: asks first.",
        asks_first=True,
    )

    def label(self) -> str:
        return "accept the run as it is"

    @classmethod
    def dialog_lines(cls, status: Status | None) -> list[str]:
        return ["The incident that is not over ends, and later states may become good."]

    def refuse(self, run: RunFacts) -> str:
        if run.is_asking:
            return "the guard has a question open: answer that"
        one = run.unresolved
        if one is None:
            return NO_INCIDENT
        if one.is_open and not one.let_pass:
            return f"incident {one.incident} is still open, and no bad update was applied"
        return ""

    def preview_effect(self, run: RecordedFacts) -> Preview:
        one = run.unresolved
        assert one is not None
        what = f"incident {one.incident} ({one.sentence()}) is accepted as it is"
        after = f"states after step {run.step:,} may become good again"
        remark = f"{what}, nothing is restored; {after}, and then older good ones are pruned"
        return self.make_preview(run, remark=remark)

    def execute(self, actions: RunActions) -> bool:
        batch = actions.next_batch()
        actions.acknowledge(self, batch=batch)
        actions.accept(batch)
        return True

    def replayed(self, target: ReplayTarget, event: CommandAnswered) -> None:
        event.check_readable("batch")
        target.accept_incidents(event.step, event.batch or (0, 0))
