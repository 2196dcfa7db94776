"""The counts of `advise`: what rejections and rollbacks leave elsewhere when they are really done. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from guardrail.detectors.base import Jumps
from guardrail.policy import Rollback


class Advice:
    """Would-be rejections and rollbacks. Part of the state: in `advise` no ledger and no journal holds them."""

    KEEP = 64  # would-be rollbacks; more than any sensible budget

    def __init__(self) -> None:
        self.streak = 0  # troubled would-be rejections since the last accepted step or would-be rollback
        self.since = 0  # the step of the first of them
        self.left_out: list[Jumps] = []  # of each would-be rejection since the last accepted step
        self.rollbacks: deque[Rollback] = deque(maxlen=self.KEEP)

    def accepted(self) -> None:
        if self.left_out or self.streak:
            self.streak, self.left_out = 0, []

    def rejected(self, step: int, *, trouble: bool, jumps: Jumps) -> None:
        if trouble and not self.streak:
            self.since = step
        self.streak += trouble
        self.left_out.append(jumps)

    def state_dict(self) -> dict[str, Any]:
        return {
            "streak": self.streak,
            "since": self.since,
            "left_out": [dict(jumps) for jumps in self.left_out],
            "rollbacks": [[r.from_step, r.to_step, r.onset, *r.window, r.rung] for r in self.rollbacks],
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Advice:
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
                    rung="".join(rung),
                )
            )
        return advice
