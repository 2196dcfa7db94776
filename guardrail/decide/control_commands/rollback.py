"""`rollback`: a snapshot or checkpoint is restored, and the data since then are skipped."""

from __future__ import annotations

import math

from guardrail.core.events.decisions import RolledBack
from guardrail.decide.control_commands.arguments import NumberOrNewest
from guardrail.decide.control_commands.base import ControlCommand, HoldsFor, RunActions, ScreenKey
from guardrail.decide.control_commands.preview import Preview
from guardrail.decide.control_commands.restore_preview import newest_state, preview_restore
from guardrail.decide.control_commands.run_facts import RecordedFacts


class Rollback(ControlCommand):
    """Restore the named step, or the newest good state, and skip the data since then."""

    name = "rollback"
    argument = NumberOrNewest(
        metavar="[STEP]", low=0, number="a step", newest="the newest good one"
    )
    help = "Restore a snapshot or checkpoint; without STEP the newest good one."
    key = ScreenKey(
        key="r",
        label="roll back",
        help="Roll back: choose a snapshot or checkpoint, read what it costs, confirm.",
        rank=1,
    )
    holds_for = HoldsFor.TIMELINE
    own_line = RolledBack

    @property
    def to_step(self) -> int | None:
        """Return the step that is named; None: the newest good state is meant."""
        if math.isnan(self.value):
            return None
        return int(self.value)

    def describe(self) -> str:
        if self.to_step is None:
            return "rollback"
        return f"rollback to step {self.to_step}"

    def label(self) -> str:
        if self.to_step is None:
            return "roll back"
        return f"roll back to step {self.to_step:,}"

    def no_such_state(self) -> str:
        """Return the refusal where no state fits."""
        where = "an earlier step"
        if self.to_step is not None:
            where = f"step {self.to_step:,}"
        return f"there is no snapshot or valid checkpoint of {where}"

    def preview_effect(self, run: RecordedFacts) -> Preview:
        state = newest_state(run.states, run.cursor - 1, to_step=self.to_step)
        if state is None:
            return self.preview_refusal(run, self.no_such_state())
        window = (state.cursor, max(run.cursor, run.end))
        if refusal := run.nothing_left(window):
            return self.preview_refusal(run, refusal)
        remedies = [remedy for _, remedy in run.remedies]
        return preview_restore(
            run, state, command=self.name, value=self.value, window=window, remedies=remedies
        )

    def execute(self, actions: RunActions) -> bool:
        state = actions.find_state(to_step=self.to_step)
        if state is None:
            return actions.acknowledge(self, refusal=self.no_such_state())
        refusal = actions.why_state_changed(state)
        refusal = refusal or actions.nothing_left(actions.window_since(state))
        if not actions.acknowledge(self, refusal=refusal):
            return False
        is_done = actions.roll_back(state, reason=f"rollback to step {state.step} by command")
        if is_done:
            actions.end_question()
        return is_done
