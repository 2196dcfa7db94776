"""`mode`: who decides."""

from __future__ import annotations

from guardrail.core.events.run_state import CommandAnswered
from guardrail.core.records.status import Status
from guardrail.core.records.verdicts import Mode
from guardrail.decide.control_commands.arguments import Word
from guardrail.decide.control_commands.base import (
    ControlCommand,
    HoldsFor,
    ReplayTarget,
    RunActions,
    ScreenKey,
)
from guardrail.decide.control_commands.preview import Preview
from guardrail.decide.control_commands.run_facts import RecordedFacts, RunFacts, Setting

MODES = tuple(Mode)
MEANINGS = {
    Mode.AUTO: "acts by itself",
    Mode.ASK: "pauses before a rollback and asks",
    Mode.ADVISE: "reports what it would do and changes nothing",
    Mode.OFF: "detects nothing",
}


class ChangeMode(ControlCommand):
    """Change what the guard may do by itself."""

    name = "mode"
    aliases = ("policy",)
    argument = Word(
        metavar="MODE",
        words=tuple(mode.value for mode in MODES),
        meanings=tuple(MEANINGS[mode] for mode in MODES),
    )
    help = "Change who decides: auto, ask, advise or off."
    key = ScreenKey(
        key="m",
        label="mode",
        help="Change who decides: auto, ask, advise or off.",
        rank=4,
        title="who decides",
    )
    holds_for = HoldsFor.SETTING

    @property
    def mode(self) -> Mode:
        """Return the mode that the command sets."""
        return MODES[int(self.value)]

    def describe(self) -> str:
        return f"mode {self.mode.value}"

    @classmethod
    def current_value(cls, status: Status | None) -> float:
        now = status.mode if status else Mode.AUTO
        return float(MODES.index(now))

    def current_setting(self, run: RunFacts) -> Setting:
        return Setting(float(MODES.index(run.mode)), run.mode.value)

    def preview_effect(self, run: RecordedFacts) -> Preview:
        now = self.current_setting(run)
        remark = f"{self.mode.value} instead of {now.words}"
        return self.make_preview(run, instead_of=now.value, remark=remark)

    def execute(self, actions: RunActions) -> bool:
        actions.acknowledge(self)
        actions.set_mode(self.mode)
        return True

    def replayed(self, target: ReplayTarget, event: CommandAnswered) -> None:
        target.set_mode(self.mode)
