from __future__ import annotations

import math

import pytest

from guardrail.backtest.backtest import run_backtest
from guardrail.backtest.importers.sources import find_sources
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.findings import FindingKind, Observation
from guardrail.core.records.signals import GRAD_NORM, LOSS, LOSS_SCALE, UPDATE_NORM
from guardrail.core.records.verdicts import Action, Mode, Verdict
from guardrail.decide.controller import Controller
from guardrail.detectors.loss_scale import AT_START, FALL, ScaleCollapse
from tests.support.feed import BATCH, JudgedSteps, noisy, plain, through_json
from tests.support.places import TESTS
from tests.support.texts import numbers_in

IN_A_ROW = GuardOptions().overflows


class Scaled(JudgedSteps):
    """A run under a dynamic loss scale: an overflow halves it, as torch's scaler does."""

    def __init__(self, mode: Mode = Mode.AUTO) -> None:
        super().__init__(Controller(GuardOptions(), mode=mode))
        self.scale = 65536.0
        self.told: list[Verdict] = []
        self.flagged = False  # as the guard does it, which knows its scaler

    def attempt(self, *, overflow: bool = False, loss: float | None = None) -> Verdict:
        signals = {
            LOSS: noisy(2.0)(self.cursor) if loss is None else loss,
            GRAD_NORM: math.inf if overflow else noisy(0.5, seed=1, noise=0.1)(self.cursor),
            LOSS_SCALE: self.scale,
        }
        verdict = self.judge(signals, overflow=overflow and self.flagged)
        self.told.append(verdict)
        if overflow:
            self.scale = max(1.0, self.scale / 2)
        return verdict

    def healthy(self, steps: int = 100) -> None:
        for _ in range(steps):
            verdict = self.attempt()
            assert verdict.action is Action.APPLY and not verdict.findings


def test_overflows_at_the_start_and_single_ones_later_are_no_incident() -> None:
    run = Scaled()
    verdicts = [run.attempt(overflow=True) for _ in range(8)]
    for _ in range(3):
        run.healthy(60)
        verdicts += [run.attempt(overflow=True)]
    run.healthy(60)
    assert {v.action for v in verdicts} == {Action.FP16_OVERFLOW} and {
        v.incident for v in verdicts
    } == {None}
    assert not any(v.findings for v in verdicts)
    assert numbers_in(verdicts[0].reason) == [65536]


def test_overflow_after_overflow_is_a_collapse() -> None:
    run = Scaled()
    run.healthy()
    verdicts = [run.attempt(overflow=True) for _ in range(IN_A_ROW)]
    assert [v.action for v in verdicts] == [Action.FP16_OVERFLOW] * (IN_A_ROW - 1) + [
        Action.ROLLBACK
    ]
    assert (
        verdicts[-1].findings[0].kind is FindingKind.SCALE_COLLAPSE and verdicts[-1].incident == 1
    )
    finding = verdicts[-1].findings[0]
    assert (finding.signal, finding.value, finding.baseline) == (LOSS_SCALE, 512, 65536)
    assert finding.score == IN_A_ROW and finding.threshold == IN_A_ROW
    assert finding.sentence() in verdicts[-1].reason
    assert ScaleCollapse.explain_rollback(finding) in verdicts[-1].reason
    assert numbers_in(verdicts[-1].reason)[:4] == [512, 65536, IN_A_ROW, IN_A_ROW - 1]


def test_a_recorded_overflow_and_a_live_one_are_judged_by_one_rule() -> None:
    """A log has no flag; its loss scale, finite loss and infinite norm say the same."""
    logged, live = Scaled(), Scaled()
    for run in (logged, live):
        run.healthy(20)  # not settled yet
    for index in range(40):
        for run in (logged, live):
            run.flagged = run is live
            run.scale = run.scale if index % 20 else 65536.0
            run.attempt(overflow=index % 20 < AT_START)
    assert [plain(v) for v in logged.told] == [plain(v) for v in live.told]
    assert [v.action for v in live.told].count(Action.ROLLBACK) == 2


def test_a_scale_that_falls_from_the_very_first_step_to_its_end_is_a_collapse_too() -> None:
    run = Scaled()
    verdicts = [run.attempt(overflow=True) for _ in range(AT_START)]
    assert [v.action for v in verdicts] == [Action.FP16_OVERFLOW] * (AT_START - 1) + [
        Action.ROLLBACK
    ]


def test_at_a_scale_of_one_it_is_no_longer_the_scale() -> None:
    run = Scaled()
    run.scale = 1.0
    run.healthy()
    verdicts = [run.attempt(overflow=True) for _ in range(3)]
    assert [v.action for v in verdicts] == [Action.SKIP, Action.SKIP, Action.ROLLBACK]
    assert verdicts[-1].findings[0].kind is FindingKind.NONFINITE


def test_a_loss_that_is_not_finite_is_never_an_overflow() -> None:
    run = Scaled()
    run.healthy()
    verdict = run.attempt(overflow=True, loss=math.nan)
    assert {f.kind for f in verdict.findings} == {FindingKind.NONFINITE} and verdict.incident == 1


def test_a_scale_that_falls_far_below_what_was_usual_is_noted_once() -> None:
    """GLM-130B: the scale fell for about 30 steps before the loss exploded, a healthy step between
    two halvings.
    """
    run = Scaled(Mode.ADVISE)
    run.healthy()
    for _ in range(10):
        run.attempt(overflow=True)
        run.attempt()
    notes = [v for v in run.told if any(f.kind is FindingKind.SCALE_COLLAPSE for f in v.findings)]
    assert len(notes) == 1 and notes[0].findings[-1].value == 65536 / 2**FALL
    assert run.controller.healthy_through < notes[0].step


@pytest.mark.parametrize("junk", [math.nan, math.inf, 0.0, -1.0])
def test_a_scale_that_is_none_changes_nothing(junk: float) -> None:
    run = Scaled()
    run.healthy()
    state = through_json(run.controller.state_dict()["detectors"][LOSS_SCALE])
    run.scale = junk
    run.healthy(3)
    assert run.controller.state_dict()["detectors"][LOSS_SCALE] == state


def test_state_goes_through_json_at_any_step() -> None:
    run = Scaled()
    for index in range(120):
        run.attempt(overflow=index > 60 and index % 3 == 0)
        copy = Controller(GuardOptions())
        copy.load_state_dict(through_json(run.controller.state_dict()))
        assert copy.state_dict() == run.controller.state_dict()
        assert copy.healthy_through == run.controller.healthy_through


def test_an_update_that_grew_is_a_note_since_it_is_in_the_weights_already() -> None:
    """Marin-32B: the norm of the update rose first."""
    controller = Controller(GuardOptions())
    update = noisy(0.03, seed=4, noise=0.1)

    def seen(step: int, factor: float = 1.0) -> Observation:
        signals = {LOSS: noisy(2.0)(step), GRAD_NORM: 0.5, UPDATE_NORM: factor * update(step)}
        return Observation(step=step, first=step * BATCH, last=(step + 1) * BATCH, signals=signals)

    for step in range(1, 201):
        assert not controller.observe(seen(step)).findings
    verdict = controller.observe(seen(201, factor=30.0))
    assert verdict.action is Action.APPLY
    assert [(f.signal, f.kind) for f in verdict.findings] == [
        (UPDATE_NORM, FindingKind.UPDATE_SPIKE)
    ]
    assert controller.healthy_through == 200


CASES = TESTS / "cases" / "logs"


def scaled_run(
    controller: Controller, steps: range, *, scale: float, jump: float = 1.0
) -> list[Verdict]:
    """The gradient norm is logged while the gradients are still multiplied by the loss scale."""
    verdicts = []
    for step in steps:
        norm = scale * jump * noisy(0.8, seed=1, noise=0.15)(step)
        signals = {LOSS: noisy(3.0)(step), GRAD_NORM: norm, LOSS_SCALE: scale}
        verdicts.append(
            controller.observe(Observation(step=step, first=step, last=step + 1, signals=signals))
        )
    return verdicts


@pytest.mark.parametrize(
    "factor",
    [
        pytest.param(64.0, marks=pytest.mark.fault("E12")),
        1 / 64,
        pytest.param(4096.0, marks=pytest.mark.fault("E12")),
    ],
)
def test_a_norm_that_jumps_with_the_loss_scale_is_in_another_unit(factor: float) -> None:
    controller = Controller(GuardOptions())
    assert not any(
        verdict.findings for verdict in scaled_run(controller, range(1, 200), scale=1024.0)
    )
    verdicts = scaled_run(controller, range(200, 260), scale=1024.0 * factor)
    assert not any(f.signal != LOSS_SCALE for verdict in verdicts for f in verdict.findings)
    # The baseline is that of the new unit at once, and a spike is one as before.
    (spiked,) = scaled_run(controller, range(260, 261), scale=1024.0 * factor, jump=40.0)
    assert spiked.action is Action.SKIP
    state = through_json(controller.state_dict())
    assert (
        controller.load_state_dict(state) == [] and through_json(controller.state_dict()) == state
    )


def test_a_norm_that_jumps_by_more_than_the_loss_scale_is_a_spike() -> None:
    controller = Controller(GuardOptions())
    scaled_run(controller, range(1, 200), scale=1024.0)
    (spiked,) = scaled_run(controller, range(200, 201), scale=2048.0, jump=200.0)
    assert spiked.action is Action.SKIP


@pytest.mark.fault("E12")
def test_a_recorded_log_whose_norm_jumps_with_the_scale() -> None:
    ((log,),) = (source.read({}) for source in find_sources([str(CASES / "c18b.jsonl")]))
    assert [(alarm.step, alarm.kind) for alarm in run_backtest(log, GuardOptions()).alarms] == []


@pytest.mark.fault("E11")
def test_an_update_norm_that_doubles_is_noted_before_the_loss_rises() -> None:
    """Its scatter is 3 %."""
    ((log,),) = (source.read({}) for source in find_sources([str(CASES / "c22.jsonl")]))
    alarms = run_backtest(log, GuardOptions()).alarms
    first = alarms[0]
    assert (first.step, first.signal, first.kind, first.verdict) == (
        304,
        "update_norm",
        "update_spike",
        "note",
    )
    assert min(alarm.step for alarm in alarms if alarm.signal == "loss") >= 314


@pytest.mark.fault("E11")
def test_a_further_signal_is_judged_by_its_own_scatter() -> None:
    """The update norm of one block doubles; the gradient norm of a block may do so."""
    names = ("update_norm/layers.3", "grad_norm/layers.3")
    controller = Controller(GuardOptions())
    for step in range(1, 120):
        noise = {name: noisy(0.2, seed=at + 2, noise=0.03)(step) for at, name in enumerate(names)}
        if step == 119:
            noise = {name: 2.0 * value for name, value in noise.items()}
        signals = {LOSS: noisy(3.0)(step), **noise}
        verdict = controller.observe(
            Observation(step=step, first=step, last=step + 1, signals=signals)
        )
        assert [finding.signal for finding in verdict.findings] == (
            ["update_norm/layers.3"] if step == 119 else []
        )
