"""`stop`: the run saves a checkpoint and ends."""

from __future__ import annotations

from guardrail.core.records.status import Status
from guardrail.decide.control_commands.base import ControlCommand, RunActions, ScreenKey
from guardrail.decide.control_commands.preview import Preview
from guardrail.decide.control_commands.run_facts import RecordedFacts
from guardrail.decide.questions import ParkResult


class Stop(ControlCommand):
    """Save a checkpoint and end."""

    name = "stop"
    help = "Save a checkpoint and end."
    key = ScreenKey(
        key="S",
        label="stop",
        help="Stop training: save a checkpoint and end. Asks first.",
        rank=2,
        asks_first=True,
    )
    waits_for_preview = False  # it saves and ends whatever has changed

    @classmethod
    def dialog_lines(cls, status: Status | None) -> list[str]:
        step = status.step if status else 0
        return [
            f"Training saves a checkpoint at step {step:,} and ends. It can be continued later."
        ]

    def preview_effect(self, run: RecordedFacts) -> Preview:
        remark = f"saves after step {run.step:,} and ends; --resume continues there"
        return self.make_preview(run, remark=remark)

    def execute(self, actions: RunActions) -> bool:
        actions.acknowledge(self)
        actions.end_run("stopped by command")
        actions.end_pause(ParkResult.STOP)
        return True
