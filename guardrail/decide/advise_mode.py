"""The counts of `advise`: what rejections and rollbacks leave elsewhere when they are really done.
Pure.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from guardrail.core.records import Action, Finding, Observation
from guardrail.decide.policy import is_anomaly
from guardrail.decide.response import Response
from guardrail.decide.rollback import Rollback
from guardrail.detectors.base import LogJumps
from guardrail.detectors.build import find_detector


class AdviseSimulation:
    """Would-be rejections and rollbacks. Part of the state: in `advise` no ledger and no journal
    holds them.
    """

    KEEP = 64  # would-be rollbacks; more than any sensible budget

    def __init__(self) -> None:
        # troubled would-be rejections since the last accepted step or would-be rollback
        self.streak = 0
        self.since = 0  # the step of the first of them
        self.left_out: list[
            LogJumps
        ] = []  # of each would-be rejection since the last accepted step
        self.rollbacks: deque[Rollback] = deque(maxlen=self.KEEP)

    def accepted(self) -> None:
        self.streak, self.left_out = 0, []

    def book(
        self, done: Response, obs: Observation, findings: Sequence[Finding], onset: int
    ) -> bool:
        """What `auto` would have done about a rejected step; returns whether it would have gone
        back or halted.
        """
        self.rejected(obs.step, trouble=is_anomaly(findings), jumps=jumps_of(findings))
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

    def rejected(self, step: int, *, trouble: bool, jumps: LogJumps) -> None:
        if trouble and not self.streak:
            self.since = step
        self.streak += trouble
        self.left_out.append(jumps)

    def state_dict(self) -> dict[str, Any]:
        return {
            "streak": self.streak,
            "since": self.since,
            "left_out": [dict(jumps) for jumps in self.left_out],
            "rollbacks": [
                [r.from_step, r.to_step, r.onset, *r.window, r.escalation] for r in self.rollbacks
            ],
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> AdviseSimulation:
        advice = cls()
        advice.streak, advice.since = int(state["streak"]), int(state["since"])
        advice.left_out = [dict(jumps) for jumps in state["left_out"]]
        for from_step, to_step, onset, first, last, *rung in state["rollbacks"]:
            advice.rollbacks.append(
                Rollback(
                    from_step=from_step,
                    to_step=to_step,
                    onset=onset,
                    window=(first, last),
                    escalation="".join(rung),
                )
            )
        return advice


def jumps_of(findings: Iterable[Finding]) -> LogJumps:
    """The spikes among findings of positive signals: signal -> log(value / baseline)."""
    jumps = {}
    for finding in findings:
        is_spike = find_detector(finding.kind).judges_one_value
        if is_spike and finding.value > 0.0 and finding.baseline > 0.0:
            jumps[finding.signal] = math.log(finding.value / finding.baseline)
    return jumps
