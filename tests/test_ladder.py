"""What the guard does beyond leaving data out, rung by rung, in a loop of one's own."""

from typing import Any

import pytest

from guardrail.records import Action, Cause, Diagnosis, Verdict
from guardrail.torch.guard import Step
from guardrail.torch.probes import Reduced
from tests.test_guard import Loop


class Glitch(Loop):
    """A fault of the machine, not of the data: the loss of the first `times` tries of a step is a thousand times it."""

    def __init__(self, *, at: int, times: int, cause: Cause, **settings: Any) -> None:
        super().__init__(factor=1e3, **settings)
        self.at, self.left = at, times
        self.guard.verdicts.judge = lambda step, verdict, reduced: self.judge(step, verdict, reduced, cause)

    def judge(self, step: Step, verdict: Verdict, reduced: Reduced, cause: Cause) -> Diagnosis:
        assert verdict.action is not Action.APPLY and reduced.loss > 100 and step.verdict is verdict
        return Diagnosis(cause=cause, reason="as the test wants it", rank=0, host="here")

    def loss(self, step: Step) -> Any:
        loss = super().loss(step)
        if step.number == self.at and self.left:
            self.left -= 1
            return loss * self.factor
        return loss


@pytest.fixture(scope="module")
def healthy() -> Loop:
    return Loop().train()


def actions(loop: Loop) -> list[Action]:
    given = [step.verdict.action for step in loop.attempts if step.verdict is not None]
    return [action for action in given if action is not Action.APPLY]


@pytest.mark.parametrize(
    ("cause", "expected"), [(Cause.HARDWARE, [Action.RETRY] * 2), (Cause.STATE, [Action.ROLLBACK] * 2)]
)
def test_what_is_not_the_datas_fault_costs_no_data(healthy: Loop, cause: Cause, expected: list[Action]) -> None:
    loop = Glitch(at=21, times=2, cause=cause).train()
    assert actions(loop) == expected
    assert len(loop.guard.ledger.quarantine) == 0
    assert loop.losses == healthy.losses and loop.digest() == healthy.digest()


def test_a_machine_that_goes_on_like_that_is_halted_with_its_name() -> None:
    loop = Glitch(at=21, times=99, cause=Cause.HARDWARE, retries=2).train()
    assert actions(loop) == [Action.RETRY, Action.RETRY, Action.HALT]
    assert loop.guard.step == 20 and "rank 0 on here" in loop.attempts[-1].verdict.reason
