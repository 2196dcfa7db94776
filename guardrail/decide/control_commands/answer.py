"""`answer`: what the guard's question is answered with."""

from __future__ import annotations

import msgspec

from guardrail.decide.control_commands.arguments import Word
from guardrail.decide.control_commands.base import ControlCommand, HoldsFor, RunActions, ScreenKey
from guardrail.decide.control_commands.preview import Preview, proposals_of
from guardrail.decide.control_commands.run_facts import RecordedFacts, RunFacts
from guardrail.decide.questions import CHOICES, Open, ParkResult, question_changed

NO_QUESTION = "no question is open"


class Answer(ControlCommand):
    """Answer the question of the guard."""

    name = "answer"
    argument = Word(metavar="|".join(CHOICES), words=CHOICES, takes_numbers=True)
    help = "Answer the guard's question; accept means as it proposes."
    key = ScreenKey(
        key="a",
        label="answer",
        help="Answer the guard's question while training is paused.",
        rank=1,
    )
    holds_for = HoldsFor.QUESTION

    @property
    def result(self) -> ParkResult:
        """Return how the answer ends the wait."""
        return ParkResult(int(self.value))

    def describe(self) -> str:
        return f"answer {CHOICES[int(self.value)]}"

    def refuse(self, run: RunFacts) -> str:
        if self.question:
            changed = question_changed(self.question, Open(run.question, {}))
            if changed:
                return changed
        if not run.is_asking:
            return NO_QUESTION
        return ""

    def preview_effect(self, run: RecordedFacts) -> Preview:
        proposals = proposals_of(run.events)
        choice = int(self.value)
        if choice >= len(proposals):
            return self.preview_refusal(run, NO_QUESTION)
        return msgspec.structs.replace(
            proposals[choice], value=self.value, question=run.question, timeline=run.timeline
        )

    def execute(self, actions: RunActions) -> bool:
        refusal = ""
        if self.result is ParkResult.AS_PROPOSED:
            refusal = actions.why_proposal_changed()
        if not actions.acknowledge(self, refusal=refusal):
            return False
        if self.result is ParkResult.STOP:
            actions.end_run(f"stopped by {actions.sender} while the guard asked")
        actions.end_pause(self.result)
        return True
