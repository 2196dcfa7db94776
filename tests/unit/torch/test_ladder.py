"""What the guard does beyond leaving data out, rung by rung, in a loop of one's own."""

from typing import Any

import pytest

from guardrail.core.records.verdicts import Action, Cause, Diagnosis, Mode, Verdict
from guardrail.torch.guard.guard import Step
from guardrail.torch.measure.reduced_step import ReducedStep
from tests.unit.torch.test_guard import Loop


class Glitch(Loop):
    """A fault of the machine, not of the data: the loss of the first `times` tries of a step is a
    thousand times it.
    """

    def __init__(self, *, at: int, times: int, cause: Cause, **settings: Any) -> None:
        super().__init__(factor=1e3, **settings)
        self.at, self.left = at, times
        self.guard.verdict_executor.find_cause = lambda step, verdict, reduced: self.judge(
            step, verdict, reduced, cause
        )

    def judge(self, step: Step, verdict: Verdict, reduced: ReducedStep, cause: Cause) -> Diagnosis:
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
    ("cause", "expected"), [(Cause.HARDWARE, [Action.RETRY] * 2), (Cause.STATE, [Action.ROLLBACK])]
)
def test_what_is_not_the_datas_fault_costs_no_data(
    healthy: Loop, cause: Cause, expected: list[Action]
) -> None:
    loop = Glitch(at=21, times=len(expected), cause=cause).train()
    assert actions(loop) == expected
    assert len(loop.guard.cursor.quarantine) == 0
    assert loop.losses == healthy.losses and loop.digest() == healthy.digest()


def test_a_state_that_is_in_trouble_again_is_gone_on_from_at_a_low_rate(healthy: Loop) -> None:
    loop = Glitch(at=21, times=3, cause=Cause.STATE).train()
    verdicts = [step.verdict for step in loop.attempts if step.verdict is not None]
    back = [verdict for verdict in verdicts if verdict.action is Action.ROLLBACK]
    assert [verdict.escalation for verdict in back] == ["rollback", "lower_lr", "lower_lr"]
    assert [(one.value, one.hold_steps) for verdict in back for one in verdict.remedies] == [
        (0.1, 20),
        (0.1**2, 40),
    ]
    assert len(loop.guard.cursor.quarantine) == 0 and loop.digest() != healthy.digest()


@pytest.mark.parametrize("applied", [False, True])
def test_bad_data_is_left_out_and_gone_back_for_only_where_an_update_of_it_was_applied(
    applied: bool,
) -> None:
    """Six bad batches from step 21 on, twice as many as `persist` would bear without a cause."""
    told = [Diagnosis(cause=Cause.DATA, applied=applied)]
    loop = Loop(bad=range(80, 104), factor=1e3)
    loop.guard.verdict_executor.find_cause = lambda step, verdict, reduced: (
        told.pop() if told else Diagnosis(cause=Cause.DATA)
    )
    loop.train()
    assert actions(loop) == (
        [Action.ROLLBACK, *[Action.SKIP] * 5] if applied else [Action.SKIP] * 6
    )
    # and the batch before the onset
    assert len(loop.guard.cursor.quarantine) == (28 if applied else 24)
    other = Loop(mode=Mode.OFF)
    other.guard.cursor.quarantine.read(loop.guard.cursor.quarantine.lines())
    other.train()
    assert loop.losses == other.losses and loop.digest() == other.digest()


def test_a_machine_that_goes_on_like_that_is_halted_with_its_name() -> None:
    loop = Glitch(at=21, times=99, cause=Cause.HARDWARE, retries=2).train()
    assert actions(loop) == [Action.RETRY, Action.RETRY, Action.HALT]
    assert loop.guard.step == 20 and "rank 0 on here" in loop.attempts[-1].verdict.reason
