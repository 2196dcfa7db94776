"""The counts of the mode `advise`, in which rejections and rollbacks are not carried out. Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from guardrail.core.records.findings import Finding, Observation
from guardrail.core.records.verdicts import Action
from guardrail.decide.policy import is_anomaly
from guardrail.decide.response import Response
from guardrail.decide.rollback import Rollback
from guardrail.detectors.base import LogJumps
from guardrail.detectors.build import find_detector


class AdviseSimulation:
    """Advised rejections and rollbacks.

    They are part of a snapshot, because in `advise` neither the cursor nor the journal has them.

    Attributes:
        streak: advised rejections of anomalies since the last accepted step or advised rollback.
        since: step of the first of them.
        skipped: jumps of each advised rejection since the last accepted step.
        rollbacks: advised rollbacks, the newest last.
    """

    KEEP = 64  # advised rollbacks; more than any budget

    def __init__(self) -> None:
        self.streak = 0
        self.since = 0
        self.skipped: list[LogJumps] = []
        self.rollbacks: deque[Rollback] = deque(maxlen=self.KEEP)

    def note_accepted(self) -> None:
        """Take in an accepted step."""
        self.streak, self.skipped = 0, []

    def note_response(
        self, done: Response, obs: Observation, findings: Sequence[Finding], onset: int
    ) -> bool:
        """Take in what `auto` would do about a rejected step.

        Returns:
            Whether it would roll back or halt.
        """
        self.note_rejected(obs.step, anomaly=is_anomaly(findings), jumps=collect_jumps(findings))
        if done.action not in (Action.ROLLBACK, Action.HALT):
            return False
        self.streak = 0
        if done.action is Action.ROLLBACK:
            to_step = max(0, onset - 1)
            self.rollbacks.append(
                Rollback(
                    from_step=obs.step - 1,
                    to_step=to_step,
                    onset=onset,
                    window=done.window,
                    escalation=done.escalation,
                )
            )
        return True

    def note_rejected(self, step: int, *, anomaly: bool, jumps: LogJumps) -> None:
        """Take in an advised rejection."""
        if anomaly and not self.streak:
            self.since = step
        self.streak += anomaly
        self.skipped.append(jumps)

    def state_dict(self) -> dict[str, Any]:
        """Return the JSON-able state; "left_out" holds `skipped`."""
        return {
            "streak": self.streak,
            "since": self.since,
            "left_out": [dict(jumps) for jumps in self.skipped],
            "rollbacks": [
                [r.from_step, r.to_step, r.onset, *r.window, r.escalation] for r in self.rollbacks
            ],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> AdviseSimulation:
        """Return the counts of a state that `state_dict` returned."""
        advice = cls()
        advice.streak, advice.since = int(state["streak"]), int(state["since"])
        advice.skipped = [dict(jumps) for jumps in state["left_out"]]
        for from_step, to_step, onset, first, last, *escalation in state["rollbacks"]:
            advice.rollbacks.append(
                Rollback(
                    from_step=from_step,
                    to_step=to_step,
                    onset=onset,
                    window=(first, last),
                    escalation="".join(escalation),
                )
            )
        return advice


def collect_jumps(findings: Iterable[Finding]) -> LogJumps:
    """Return the spikes of positive signals: signal -> log(value / baseline)."""
    jumps = {}
    for finding in findings:
        is_spike = find_detector(finding.kind).judges_one_value
        if is_spike and finding.value > 0.0 and finding.baseline > 0.0:
            jumps[finding.signal] = math.log(finding.value / finding.baseline)
    return jumps
