"""`checkpoint`: a checkpoint is written now."""

from __future__ import annotations

from guardrail.decide.control_commands.base import ControlCommand, RunActions, ScreenKey
from guardrail.decide.control_commands.preview import Preview
from guardrail.decide.control_commands.run_facts import RecordedFacts


class WriteCheckpoint(ControlCommand):
    """Write a checkpoint now. The guard itself gives it to retry a save that has failed."""

    name = "checkpoint"
    help = "Write a checkpoint now."
    key = ScreenKey(key="c", label="checkpoint", help="Write a checkpoint now.", rank=4)

    def preview_effect(self, run: RecordedFacts) -> Preview:
        return self.make_preview(run, remark=f"writes the state after step {run.step:,}")

    def execute(self, actions: RunActions) -> bool:
        actions.acknowledge(self)
        actions.save_checkpoint()
        return True
