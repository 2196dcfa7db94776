"""What a remedy is: an entry of [[guard.escalation]], and what follows when it is used. Pure.

Some remedies have an effect on later steps, such as a lower learning rate. An effect is a
`guardrail.core.records.verdicts.Remedy`: a function of the step, whichever state the run was restored from.
So a run that continues from another state, or has the effect from its beginning (`guard.remedies`),
makes the same updates.

To add a remedy, write one file with one class and add the class to `REMEDIES` in
`guardrail/decide/remedies/registry.py`. `tests/support/examples/calm_down.py` is an example. A new
kind of effect also needs its use in `guardrail/torch/measure/update_gate.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from guardrail.core.format import format_plural
from guardrail.core.records.verdicts import Cause, Remedy

if TYPE_CHECKING:  # the options name the remedies, so they are imported after them
    from guardrail.core.guard_options import EscalationStep


class EscalationRemedy:
    """Base of all remedies.

    Attributes:
        action: its name in the configuration and in the journal.
        help: what it does, for docs/remedies.md.
        keys: keys of its entry that it reads.
        effect: kind of the effect that it has on later steps; "": none.
        subject: what the effect multiplies, for a sentence.
        report_name: the same for a row of the report.
        screen_name: the same for the header of the screen and the table of the report; "": it is
            not shown in the header.
        restores_state: it answers a call for a rollback. False for `skip`, which needs none.
        ends_run: the run halts or pauses.
        skips_data: its point is to skip data. It is tried first where the data is the cause.
        restores_older_state: it restores an older state than a plain rollback.
        is_tried_before_older: where the state is the cause, it is tried before older states.
        widens_window: the skipped window is longer, and its good samples are skipped as well.

    Args:
        entry: its entry of [[guard.escalation]].
        uses: earlier uses among the recent rollbacks, which did not help.
    """

    action: ClassVar[str]
    help: ClassVar[str]
    keys: ClassVar[tuple[str, ...]] = ("max_uses", "cooldown")
    effect: ClassVar[str] = ""
    subject: ClassVar[str] = ""
    report_name: ClassVar[str] = ""
    screen_name: ClassVar[str] = ""
    restores_state: ClassVar[bool] = True
    ends_run: ClassVar[bool] = False
    skips_data: ClassVar[bool] = False
    restores_older_state: ClassVar[bool] = False
    is_tried_before_older: ClassVar[bool] = False
    widens_window: ClassVar[bool] = False

    def __init__(self, entry: EscalationStep, *, uses: int = 0) -> None:
        self.entry = entry
        self.uses = uses

    @classmethod
    def fits(cls, cause: Cause | None, *, embedding_leads: bool) -> bool:
        """Return whether it can help against this cause; None: the cause is not known.

        Args:
            embedding_leads: the anomaly comes from the embedding.
        """
        return True

    def window_factor(self) -> int:
        """Return how much longer the skipped window is than that of a plain rollback."""
        return 1

    def move_target(self, before_step: int) -> int:
        """Return the step before which the restored state must lie.

        Args:
            before_step: the same for a plain rollback.
        """
        return before_step

    def effects(self, from_step: int) -> tuple[Remedy, ...]:
        """Return the effects on later steps.

        Each further use is twice as strong: the factor squared, for twice as many steps. It
        multiplies with effects that still hold.
        """
        if not self.effect:
            return ()
        times = 2**self.uses
        return (
            Remedy(
                kind=self.effect,
                value=self.entry.factor**times,
                from_step=from_step,
                hold_steps=self.entry.hold_steps * times,
                ramp_steps=self.entry.ramp_steps * times,
            ),
        )

    # -- an effect ---------------------------------------------------------------------------------

    @classmethod
    def factor_at(cls, effect: Remedy, step: int) -> float:
        """Return the factor of an effect at a step; 1.0 before and after it."""
        since = step - effect.from_step
        if since < 0 or since >= effect.hold_steps + effect.ramp_steps:
            return 1.0
        if since < effect.hold_steps:
            return effect.value
        share = (since - effect.hold_steps + 1) / (effect.ramp_steps + 1)
        return effect.value + (1.0 - effect.value) * share

    @classmethod
    def sentence(cls, effect: Remedy) -> str:
        """Return "the learning rate x 0.5 from step 120 for 100 steps, back over 200"."""
        subject = cls.subject or effect.kind
        steps = format_plural(effect.hold_steps, "step")
        text = f"{subject} x {effect.value:g} from step {effect.from_step} for {steps}"
        if effect.ramp_steps:
            text += f", back over {effect.ramp_steps}"
        return text

    @classmethod
    def report_line(cls, effect: Remedy) -> str:
        """Return "learning rate x 0.5 from step 120, hold 100 steps, ramp 200 steps"."""
        name = cls.report_name or effect.kind
        text = f"{name} x {effect.value:g} from step {effect.from_step:,}"
        if effect.hold_steps or effect.ramp_steps:
            text += f", hold {effect.hold_steps:,} steps, ramp {effect.ramp_steps:,} steps"
        return text

    @classmethod
    def short_line(cls, effect: Remedy) -> str:
        """Return "rate x0.5", for the table of the report."""
        return f"{cls.screen_name or effect.kind} x{effect.value:g}"
