"""`undo`: a decision of the guard is taken back; see `guardrail.decide.undo`."""

from __future__ import annotations

import math

import msgspec

from guardrail.core.events.decisions import Undone
from guardrail.core.records.status import Status
from guardrail.core.text import clean_text
from guardrail.decide.control_commands.arguments import NumberOrNewest
from guardrail.decide.control_commands.base import ControlCommand, HoldsFor, RunActions, ScreenKey
from guardrail.decide.control_commands.preview import Preview
from guardrail.decide.control_commands.restore_preview import newest_state, preview_restore
from guardrail.decide.control_commands.run_facts import RecordedFacts
from guardrail.decide.undo import UndoPlan, find_undo_plan


class Undo(ControlCommand):
    """Restore the newest state from before a decision, and bring its samples back."""

    name = "undo"
    argument = NumberOrNewest(
        metavar="[SEQ]", low=1, number="the seq of a journal line", newest="the newest decision"
    )
    help = "Undo the guard's decision of journal line SEQ; without SEQ its newest."
    key = ScreenKey(
        key="u",
        label="undo",
        help="Undo the guard's newest decision: read what it costs, confirm.",
        rank=6,
        asks_first=True,
    )
    holds_for = HoldsFor.TIMELINE
    own_line = Undone

    @property
    def seq(self) -> int | None:
        """Return the journal line that is named; None: the newest decision is meant."""
        if math.isnan(self.value):
            return None
        return int(self.value)

    def describe(self) -> str:
        if self.seq is None:
            return "undo"
        return f"undo line {self.seq}"

    @classmethod
    def dialog_lines(cls, status: Status | None) -> list[str]:
        return ["The guard's newest decision is undone: its samples may be used again."]

    def preview_effect(self, run: RecordedFacts) -> Preview:
        plan = find_undo_plan(run.events, self.seq)
        if isinstance(plan, str):
            return self.preview_refusal(run, plan)
        state = None
        if plan.first is not None:
            state = newest_state(run.states, plan.first, candidates=True)
        # The newest decision may change: the preview names the line that it is about.
        value = float(plan.of)
        if state is None:
            refusal = no_state_before(plan)
            return self.make_preview(run, value=value, possible=False, refusal=refusal)
        undone = [*plan.spans, *plan.rollbacks]
        standing = [remedy for decision, remedy in run.remedies if decision not in undone]
        restored = preview_restore(
            run, state, command=self.name, value=value, window=None, remedies=standing
        )
        window = None
        if plan.spans:
            first = min(span.first for span in plan.spans)
            window = first, max(span.last for span in plan.spans)
        remark = f'undone is "{clean_text(plan.message, 200)}"'
        return msgspec.structs.replace(
            restored, window=window, returned=plan.positions, remark=remark
        )

    def execute(self, actions: RunActions) -> bool:
        plan, lines = actions.find_decision(self.seq)
        if isinstance(plan, str):
            return actions.acknowledge(self, refusal=plan)
        assert plan.first is not None
        state = actions.find_state(plan.first, candidates=True)
        if state is None:
            return actions.acknowledge(self, refusal=no_state_before(plan))
        if not actions.acknowledge(self, refusal=actions.why_state_changed(state)):
            return False
        actions.undo(plan, state, lines)
        actions.end_question()
        return True


def no_state_before(plan: UndoPlan) -> str:
    """Return the refusal where no state from before the decision is left."""
    return f"no snapshot or checkpoint from before journal line {plan.of} is left"
