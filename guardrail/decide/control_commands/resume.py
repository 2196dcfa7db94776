"""`resume`: a paused training continues. The key of `pause` gives it too."""

from __future__ import annotations

from guardrail.decide.control_commands.base import ControlCommand, RunActions
from guardrail.decide.control_commands.run_facts import RunFacts
from guardrail.decide.questions import ParkResult, how_to_answer

NOT_PAUSED = "training is not paused"


class Resume(ControlCommand):
    """Continue a paused training. It answers no question."""

    name = "resume"
    help = "Continue after a pause."

    def label(self) -> str:
        return "continue"

    def refuse(self, run: RunFacts) -> str:
        if run.is_asking:
            return how_to_answer(run.question)
        if not run.is_paused:
            return NOT_PAUSED
        return ""

    def execute(self, actions: RunActions) -> bool:
        actions.acknowledge(self)
        actions.end_pause(ParkResult.AS_PROPOSED)
        return True
