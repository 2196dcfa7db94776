"""Each part of the guard alone, with a small context and fakes in the place of the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from guardrail.core.config import GuardConfig
from guardrail.core.errors import ConfigError, UsageError
from guardrail.core.events.event import Event
from guardrail.core.events.run_state import Note
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.commands import Command, Shown
from guardrail.core.records.spans import Span
from guardrail.core.records.status import Phase, Status
from guardrail.core.records.verdicts import Action, Mode, Verdict
from guardrail.decide.control_commands.registry import command_of, find_command, numbers_of
from guardrail.decide.control_commands.skip import Skip
from guardrail.decide.controller import Controller
from guardrail.decide.questions import ParkResult
from guardrail.decide.run_history import RunHistory
from guardrail.decide.sample_cursor import Batch, SampleCursor
from guardrail.decide.sample_order import SampleOrder
from guardrail.rundir.run_directory import RunDirectory
from guardrail.torch.checkpoint.rollback_target import Target
from guardrail.torch.guard import command_handler
from guardrail.torch.guard.between_steps import BetweenSteps
from guardrail.torch.guard.command_actions import GuardActions
from guardrail.torch.guard.command_handler import CommandHandler
from guardrail.torch.guard.context import Progress, RankInfo, RunContext, RunRecorder
from guardrail.torch.guard.deferred_gate import DeferredGate
from guardrail.torch.guard.guarded_scheduler import GuardedScheduler
from guardrail.torch.guard.loop_checks import LoopChecks
from guardrail.torch.guard.quarantine import Quarantine
from guardrail.torch.guard.rank_heartbeat import RankHeartbeat
from guardrail.torch.guard.resume_check import ResumeCheck
from guardrail.torch.guard.run_end import RunEnd
from guardrail.torch.guard.run_status import RunStatus
from guardrail.torch.guard.side_effects import StepSideEffects
from guardrail.torch.guard.step import Step
from guardrail.torch.guard.step_diagnosis import StepDiagnosis
from guardrail.torch.guard.step_evidence import StepEvidence
from guardrail.torch.guard.step_judge import StepJudge
from guardrail.torch.guard.step_metrics import StepMetrics
from guardrail.torch.guard.timeline_switch import TimelineSwitch
from guardrail.torch.guard.update_applier import UpdateApplier
from guardrail.torch.guard.verdict_executor import VerdictExecutor
from guardrail.torch.measure.reduction import StepReduction
from guardrail.torch.measure.update_gate import Gate
from guardrail.torch.state.training_state import TrainingState
from tests.support.events import make_line
from tests.support.findings import make_nan_finding
from tests.support.reduced import make_reduced
from tests.support.texts import numbers_in


class Rig:
    """A context in memory, its journal, and a small model."""

    def __init__(self, run: RunDirectory | None = None, **options: Any) -> None:
        self.events: list[Event] = []
        config = GuardConfig(guard=GuardOptions(**options))
        progress = Progress(mode=config.guard.mode)
        self.ctx = RunContext(
            config=config,
            ranks=RankInfo(),
            recorder=RunRecorder(run, progress=progress, active=True, learn=self.events.append),
            order=SampleCursor(SampleOrder(samples=100, shuffled=False), batch_size=4),
            history=RunHistory(),
            controller=Controller(config.guard),
            progress=progress,
            run=run,
        )
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 1)
        self.model = nn.Sequential(self.layer)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        self.reduction = StepReduction(self.model, rank=0, world=1)
        self.state = TrainingState(self.model, [self.optimizer], None, None, None)
        self.metrics = StepMetrics(self.ctx, set_step_time=lambda seconds: None)
        self.gate = Gate(
            [self.optimizer], parameters=self.reduction.parameters, embedding=[], clip=0.0
        )
        self.applier = UpdateApplier(
            self.ctx,
            self.gate,
            None,
            GuardedScheduler(None),
            None,
            state=self.state,
            metrics=self.metrics,
        )
        self.done: list[Any] = []  # what fakes were asked to do

    def note(self, *what: Any, **more: Any) -> None:
        self.done.append((*what, *more.items()))

    def step(self) -> Step:
        batch = self.ctx.order.next_batch()
        assert batch is not None
        return Step(never, number=self.ctx.progress.step + 1, batch=batch, began=0.0)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def executor(self, **parts: Any) -> VerdictExecutor:
        fakes: dict[str, Any] = {
            "snapshots": SimpleNamespace(note_incident=lambda since: None),
            "side_effects": SimpleNamespace(undo=lambda: self.note("undo")),
            "evidence": SimpleNamespace(collect=lambda *given: {}),
            "diagnosis": None,
            "ask": lambda *given, **more: ParkResult.AS_PROPOSED,
            "end": self.note,
            **parts,
        }
        quarantine = Quarantine(self.ctx)
        return VerdictExecutor(
            self.ctx,
            self.applier,
            quarantine,
            SimpleNamespace(roll_back=lambda **given: False, span=span_of),  # type: ignore[arg-type]
            metrics=self.metrics,
            **fakes,
        )


def never(*given: Any) -> None:
    raise AssertionError("step.finish is not called here")


def span_of(*, window: tuple[int, int], onset: int, **given: Any) -> Span:
    return Span(first=window[0], last=window[1], origin="rollback", step=onset)


def verdict(action: Action, **values: Any) -> Verdict:
    return Verdict(action=action, step=1, reason="as the test wants it", **values)


def status() -> Status:
    raise AssertionError("no status is asked for here")


# -- what all share --------------------------------------------------------------------------------


def test_an_event_carries_the_step_and_the_timeline_of_the_run() -> None:
    rig = Rig()
    rig.ctx.progress.step, rig.ctx.progress.timeline = 7, 2
    rig.ctx.recorder.write(Note(message="something", data={"size": 3}))
    (event,) = rig.events
    assert (event.step, event.timeline, event.data) == (7, 2, {"size": 3})


def test_one_rank_needs_no_process_group() -> None:
    ranks = RankInfo()
    assert ranks.broadcast("a") == "a" and ranks.gather(3) == [3]
    assert ranks.sum([1.0, math.inf]) == [1.0, math.inf] and ranks.run_together(lambda: 5) == 5


def test_a_new_journal_line_changes_the_effects_of_a_step() -> None:
    rig = Rig()
    assert rig.ctx.effects(5).lr == 1.0
    data = {"command": "lr", "value": 0.5, "effect": "applied"}
    rig.ctx.history.add(
        make_line(seq=1, time=0.0, step=3, timeline=0, kind="command", message="", data=data)
    )
    assert rig.ctx.effects(5).lr == 0.5
    rig.ctx.set_history(RunHistory())
    assert rig.ctx.effects(5).lr == 1.0


def test_a_mode_reaches_the_controller_and_a_wrong_one_is_refused() -> None:
    rig = Rig()
    rig.ctx.set_mode("ask")  # type: ignore[arg-type]
    assert rig.ctx.progress.mode is Mode.ASK is rig.ctx.controller.mode
    with pytest.raises(ConfigError):
        rig.ctx.set_mode("later")  # type: ignore[arg-type]


def test_a_heartbeat_reports_the_last_applied_step_where_none_is_named() -> None:
    rig = Rig()
    calls: list[Any] = []
    beats = SimpleNamespace(
        at=lambda *given: calls.append(given), step_seconds=0.0, stop=lambda: calls.append("stop")
    )
    heartbeat = RankHeartbeat(rig.ctx, beats)  # type: ignore[arg-type]
    rig.ctx.progress.step = 4
    heartbeat.set_phase(Phase.SAVE)
    heartbeat.set_phase(Phase.STEP, 5)
    heartbeat.set_step_time(0.25)
    heartbeat.close()
    heartbeat.close()
    heartbeat.set_phase(Phase.SAVE)
    assert calls == [(Phase.SAVE, 4), (Phase.STEP, 5), "stop"] and beats.step_seconds == 0.25


# -- one step --------------------------------------------------------------------------------------


def test_a_scheduler_that_the_loop_steps_too_is_an_error() -> None:
    rig = Rig()
    scheduler = torch.optim.lr_scheduler.LambdaLR(rig.optimizer, lambda step: 1.0)
    guarded = GuardedScheduler(scheduler)
    rig.optimizer.step()
    guarded.advance()
    scheduler.step()
    with pytest.raises(UsageError, match=r"scheduler\.step"):
        guarded.advance()
    guarded.restored()
    guarded.advance()
    GuardedScheduler(None).advance()


def test_side_effects_are_undone_redone_and_kept_for_two_steps() -> None:
    rig = Rig()
    effects = StepSideEffects(rig.state)
    effects.begin()
    drawn = torch.rand(1)
    effects.undo()
    assert torch.equal(torch.rand(1), drawn)
    effects.undo()
    effects.redo()
    first = effects.current
    effects.swap()
    assert effects.current is not first
    effects.swap()
    assert effects.current is first
    state = torch.get_rng_state()
    effects.begin_rest()
    torch.rand(3)
    effects.discard_rest()
    effects.discard_rest()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_row_of_a_step_is_written_once_and_can_be_corrected() -> None:
    rig = Rig()
    rows: list[dict[str, float]] = []
    rig.ctx.recorder.row = rows.append  # type: ignore[method-assign]
    step = rig.step()
    rig.metrics.begin(step, make_reduced(), verdict(Action.SKIP), {"loss": (1.5, 4.0)}, 0.1)
    rig.metrics.set_action(Action.APPLY)
    rig.metrics.set_learning_rate(0.2)
    step.applied = True
    rig.metrics.add(step, make_reduced(), seconds=2.0, guarding=0.5)
    rig.metrics.write_now()
    rig.metrics.flush()
    rig.metrics.flush()
    (row,) = rows
    assert row["verdict"] == list(Action).index(Action.APPLY) and row["lr"] == 0.2
    assert (row["loss_baseline"], row["loss_threshold"], row["guard_time"]) == (1.5, 4.0, 0.5)
    assert rig.metrics.guard_share == 0.25 and rig.metrics.seconds_for(3) == 6.0
    assert rig.metrics.tokens_per_second == 4.0


def test_an_applied_update_moves_weights_step_tokens_and_cursor() -> None:
    rig = Rig()
    step = rig.step()
    before = rig.layer.bias.detach().clone()
    rig.layer.bias.grad = torch.ones(1)
    assert rig.applier.learning_rate(1) == 0.5
    rig.applier.apply(step, make_reduced(scale=0.5))
    assert torch.equal(rig.layer.bias, before - 0.25) and rig.layer.bias.grad is None
    progress = rig.ctx.progress
    assert step.applied and (progress.step, progress.tokens) == (1, 8)
    assert rig.ctx.order.cursor == 4


def test_the_device_decides_whether_an_update_is_applied() -> None:
    rig = Rig()
    step, position = rig.step(), rig.ctx.order.state()
    seen: dict[str, Any] = {}
    rig.gate.apply = lambda factor, **given: seen.update(given)  # type: ignore[method-assign]
    rig.applier.apply_on_device(
        step,
        norm=torch.tensor(1.0),
        scale=torch.tensor(1.0),
        applied=torch.tensor(False),
        began=0.0,
    )
    assert seen["unless"].item() == 1.0 and rig.ctx.progress.step == 1
    rig.applier.take_back(step, position=position, update_square=None)
    assert rig.ctx.progress.step == 0 == rig.ctx.order.cursor and not step.applied


def test_a_step_without_gradients_is_refused_once() -> None:
    rig = Rig()
    checks = LoopChecks(
        rig.ctx,
        reduction=rig.reduction,
        learning_rate=lambda step: 0.1,
        averages_gradients=True,
    )
    with pytest.raises(UsageError) as caught:
        checks.refuse_without_gradients(rig.step(), make_reduced(graded=0))
    assert caught.value.kind == "no_gradients" and numbers_in(str(caught.value)) == [1]
    checks.refuse_without_gradients(rig.step(), make_reduced(graded=0))
    checks = LoopChecks(
        rig.ctx,
        reduction=rig.reduction,
        learning_rate=lambda step: 0.1,
        averages_gradients=True,
    )
    checks.refuse_without_gradients(rig.step(), make_reduced(grad_norm=0.0))
    assert rig.kinds() == ["note"]


def test_a_judged_step_has_a_verdict_and_a_row() -> None:
    rig = Rig()
    judge = StepJudge(rig.ctx, checks=SimpleNamespace(), metrics=rig.metrics)  # type: ignore[arg-type]
    step = rig.step()
    observation, found = judge.judge(step, make_reduced(math.nan, nonfinite_loss=(0,)), lr=0.1)
    assert found.action is Action.SKIP and step.verdict is found
    assert observation.first == 0 and rig.metrics.row is not None and rig.metrics.row["lr"] == 0.1


def test_evidence_names_the_parameters_and_the_module() -> None:
    rig = Rig()
    rig.layer.weight.grad = torch.full((1, 2), math.nan)
    evidence = StepEvidence(
        rig.ctx,
        reduction=rig.reduction,
        state=rig.state,
        rerun_forward=lambda: rig.model(torch.full((1, 2), math.inf)),
    )
    findings = (make_nan_finding(1), make_nan_finding(1, signal="grad_norm"))
    found = evidence.collect(
        rig.step(), verdict(Action.SKIP, findings=findings), make_reduced(math.nan)
    )
    assert found["parameters"] == {"0": ["0.weight"]}
    assert found["modules"] == {"0": "0"}
    assert evidence.collect(rig.step(), verdict(Action.APPLY), make_reduced()) == {}


def test_no_samples_are_named_where_the_cause_is_not_known() -> None:
    rig = Rig()
    replays: Any = SimpleNamespace()
    diagnosis = StepDiagnosis(rig.ctx, replays=replays, ring=SimpleNamespace())  # type: ignore[arg-type]
    batch = rig.step().batch
    assert diagnosis.find_bad_samples(batch, verdict(Action.SKIP, incident=1)) is None
    assert diagnosis.find_bad_samples(batch, verdict(Action.APPLY, incident=1)) is None


# -- verdicts --------------------------------------------------------------------------------------


def test_a_skipped_batch_is_quarantined_and_the_weights_stay() -> None:
    rig = Rig(max_skipped_share=1.0)
    step, weights = rig.step(), rig.layer.weight.detach().clone()
    rig.layer.weight.grad = torch.ones(1, 2)
    done = rig.executor().carry_out(step, verdict(Action.SKIP), make_reduced(), None)  # type: ignore[arg-type]
    assert done.action is Action.SKIP and rig.done == [("undo",)]
    assert torch.equal(rig.layer.weight, weights) and rig.layer.weight.grad is None
    assert len(rig.ctx.order.quarantine) == 4 == rig.ctx.order.cursor
    assert rig.kinds() == ["skipped"] and not step.applied


def test_more_than_the_share_is_a_halt_or_with_a_user_a_question() -> None:
    rig = Rig(max_skipped_share=0.01)
    halted = rig.executor().carry_out(rig.step(), verdict(Action.SKIP), make_reduced(), None)  # type: ignore[arg-type]
    assert (halted.action, halted.beyond) == (Action.HALT, Action.SKIP)
    assert rig.done[-1][0] is Phase.HALTED and not len(rig.ctx.order.quarantine)
    rig = Rig(max_skipped_share=0.01, mode=Mode.ASK)
    executor = rig.executor(ask=lambda *given, **more: ParkResult.GO_ON)
    asked = executor.carry_out(rig.step(), verdict(Action.SKIP), make_reduced(), None)  # type: ignore[arg-type]
    assert asked.action is Action.PAUSE and len(rig.ctx.order.quarantine) == 4


def test_a_late_rejection_that_cannot_go_back_halts() -> None:
    rig = Rig(max_skipped_share=1.0)
    step = rig.step()
    observation: Any = SimpleNamespace(first=0, last=4, step=1)
    rig.executor().roll_back_late(step, observation, verdict(Action.SKIP))
    assert rig.done[-1][0] is Phase.HALTED


def test_the_deferred_gate_refuses_what_it_cannot_skip_on_the_device() -> None:
    rig = Rig()
    with pytest.raises(UsageError, match="fused=True"):
        deferred_gate(rig)
    rig.gate.optimizers[:] = [torch.optim.AdamW(rig.model.parameters(), fused=True)]
    gate = deferred_gate(rig)
    assert gate.read_result() and gate.first_command() is None and not gate.begin()
    assert gate.safe_limits(rig.step(), wait=True) is None and gate.waited_steps == 1
    again = make_reduced()
    assert gate.first_numbers(again) is again


def deferred_gate(rig: Rig) -> DeferredGate:
    fake: Any = SimpleNamespace()
    return DeferredGate(
        rig.ctx,
        rig.applier,
        reduction=rig.reduction,
        metrics=rig.metrics,
        judge=fake,
        executor=fake,
        side_effects=StepSideEffects(rig.state),
        between_steps=fake,
        needs_outcome=lambda step: False,
        tolerance=lambda: 0.0,
    )


# -- data and timelines ----------------------------------------------------------------------------


def test_the_quarantine_writes_first_and_names_documents() -> None:
    rig = Rig(max_skipped_share=0.05)
    quarantine = Quarantine(
        rig.ctx, describe_samples=lambda ids: ([{"path": "/data/a.txt"}] * len(ids), 1)
    )
    span = Span(first=0, last=4, origin="rejected", step=1)
    assert quarantine.over_share(span) == ""
    quarantine.skip(span)
    (event,) = rig.events
    assert (event.kind, event.data["count"], event.data["documents_total"]) == ("skipped", 4, 1)
    assert "a.txt" in event.message and len(rig.ctx.order.quarantine) == 4
    assert quarantine.over_share(Span(first=4, last=8, origin="rejected", step=2))


def test_a_resume_on_other_data_is_refused_and_another_schedule_is_named() -> None:
    rig = Rig()
    check = ResumeCheck(
        rig.ctx,
        reduction=rig.reduction,
        fixed_batch_loss=lambda: 2.5,
        scheduled_lr=lambda step: 0.1,
        fingerprints={"data": "aa", "config": "bb"},
    )
    rig.ctx.order.cursor = 20
    facts = {**check.facts(), "step": 5, "cursor": 20}
    assert check.check(facts, 0.1) == {
        "schedule": "ok",
        "data": "ok",
        "trained": "ok",
        "loss": "ok",
    }
    assert check.check(facts, 0.3)["schedule"] != "ok" and not rig.events
    check.check(facts | {"identity": {"config": "cc"}}, 0.1)
    assert rig.kinds() == ["note"]
    with pytest.raises(UsageError, match="fingerprint"):
        check.check(facts | {"identity": {"data": "cc"}}, 0.1)
    check.refuse_other_order(facts)
    with pytest.raises(UsageError) as caught:
        check.refuse_other_order(facts | {"order": {"samples": 99, "seed": 0, "shuffled": False}})
    assert numbers_in(str(caught.value)) == [rig.ctx.order.order.n_samples, 99, 5]


class FakeSnapshots:
    """Holds one state, that of step 0."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.extra: dict[str, Any] = {}
        self.retry_due, self.failed_save = False, 0
        self.ring, self.infos = None, ()

    def resume(self, history: RunHistory) -> None:
        return None

    def take_first(self, facts: Any, **given: Any) -> None:
        self.extra = facts(False)

    def find_target(self, cursor: int, **given: Any) -> Target | None:
        return Target(step=0, cursor=0, tier="memory", state="good") if self.extra else None

    def restore(self, target: Target) -> dict[str, Any]:
        return self.extra

    def save_final(self, facts: Any, *, onset: int | None) -> str:
        return ""

    def finish_rollback(self, facts: Any, target: Target) -> None:
        self.rig.note("rolled back", target.step)

    def after_step(self, step: int, **given: Any) -> None:
        self.rig.note("after", step)

    def note_failures(self, serials: Sequence[int]) -> None:
        pass

    def write_events(self) -> None:
        pass

    def save_now(self, facts: Any) -> None:
        self.rig.note("saved", facts(False)["step"])

    def note_incident(self, since: int | None) -> None:
        pass


def timeline_switch(rig: Rig, snapshots: FakeSnapshots) -> TimelineSwitch:
    return TimelineSwitch(
        rig.ctx,
        snapshots,  # type: ignore[arg-type]
        Quarantine(rig.ctx),
        resume_check=ResumeCheck(rig.ctx, reduction=rig.reduction),
        state=rig.state,
        scheduler=GuardedScheduler(None),
        set_phase=lambda phase: None,
    )


def test_a_rollback_restores_progress_and_skips_the_window_on_a_new_timeline() -> None:
    rig = Rig()
    switch = timeline_switch(rig, FakeSnapshots(rig))
    assert not switch.roll_back(window=(4, 8), onset=2, reason="too early")
    switch.open()
    rig.ctx.progress.step, rig.ctx.progress.tokens = 3, 24
    assert switch.roll_back(window=(4, 8), onset=2, reason="a test")
    progress = rig.ctx.progress
    assert (progress.step, progress.tokens, progress.timeline) == (0, 0, 1)
    assert len(rig.ctx.order.quarantine) == 4 and rig.done == [("rolled back", 0)]
    assert rig.kinds() == ["note", "started", "rollback"]
    assert rig.events[-1].data["from_step"] == 3 and rig.events[-1].step == 3


def test_an_end_that_cannot_be_saved_is_a_failure() -> None:
    rig = Rig()
    snapshots = FakeSnapshots(rig)
    phases: list[Phase] = []
    end = RunEnd(
        rig.ctx,
        metrics=rig.metrics,
        snapshots=snapshots,  # type: ignore[arg-type]
        facts=lambda checkpoint: {},
        set_phase=phases.append,
    )
    end.end(Phase.FINISHED, "done")
    assert rig.ctx.progress.phase is Phase.FINISHED and phases == [Phase.SAVE, Phase.FINISHED]
    snapshots.save_final = lambda facts, *, onset: "disk full"  # type: ignore[method-assign]
    end.end(Phase.FINISHED, "done")
    assert rig.ctx.progress.phase is Phase.FAILED
    assert rig.events[-1].data["planned"] == "finished" and not rig.events[-1].data["saved"]


def test_a_copy_and_a_command_wait_until_the_loop_has_done_with_the_step() -> None:
    rig = Rig()
    handler: Any = SimpleNamespace(
        is_done_already=False, carry_out=lambda *given: rig.note("command", *given)
    )
    between = BetweenSteps(
        rig.ctx,
        metrics=rig.metrics,
        snapshots=FakeSnapshots(rig),  # type: ignore[arg-type]
        facts=lambda checkpoint: {},
        command_handler=handler,
        end=rig.note,
    )
    between.set_applied(True)
    between.handle_requests(make_reduced(command_kind=3, command_value=0.5))
    assert rig.done == []
    between.finish_previous_step()
    between.finish_previous_step()
    between.carry_out_requests()
    between.carry_out_requests()
    assert rig.done == [("after", 0), ("command", 3, 0.5)]
    handler.is_done_already = True
    between.handle_requests(make_reduced(command_kind=3, stop=1))
    between.carry_out_requests()
    assert rig.done[2][0] is Phase.STOPPED and len(rig.done) == 3


# -- commands --------------------------------------------------------------------------------------


class FakePoller:
    """Hands out commands in their order."""

    problem = ""
    commands: ClassVar[list[Command]] = []

    def __init__(self, run: RunDirectory, *, stamp: Any) -> None:
        self._stamp = stamp

    def next(self, step: int) -> Command | None:
        return self._stamp(self.commands.pop(0)) if self.commands else None

    def close(self) -> None:
        pass


@pytest.fixture
def handler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Rig, CommandHandler]:
    monkeypatch.setattr("guardrail.torch.guard.command_inbox.CommandPoller", FakePoller)
    monkeypatch.setattr(command_handler, "PARKED_SECONDS", 0.0)
    monkeypatch.setattr(FakePoller, "commands", [])
    rig = Rig(RunDirectory.create(tmp_path, "parts", ""))
    snapshots: Any = FakeSnapshots(rig)
    switch = timeline_switch(rig, snapshots)
    switch.open()
    actions = GuardActions(
        rig.ctx,
        snapshots=snapshots,
        quarantine=Quarantine(rig.ctx),
        timeline_switch=switch,
        end=rig.note,
        status=status,
        set_phase=lambda phase: None,
        is_stop_requested=lambda: False,
    )
    made = CommandHandler(rig.ctx, actions)
    assert rig.ctx.run is not None
    made.open(rig.ctx.run)
    return rig, made


def give(kind: str, value: float = 0.0, **more: Any) -> tuple[int, float]:
    command = Command(id=f"{kind}-1", kind=kind, value=value, who="ann", **more)
    FakePoller.commands.append(command)
    found = find_command(kind)
    assert found is not None
    return numbers_of(found(value))


def test_a_command_is_answered_before_its_effect(handler: tuple[Rig, CommandHandler]) -> None:
    rig, commands = handler
    given = give("skip", 2.0)
    assert commands.next(1) == given and isinstance(command_of(*given), Skip)
    assert commands.carry_out(*given)
    assert rig.kinds() == ["started", "command", "skipped"]
    assert rig.events[1].data["who"] == "ann" and len(rig.ctx.order.quarantine) == 8
    assert rig.ctx.order.cursor == 0


def test_a_command_for_what_is_not_there_any_more_is_refused(
    handler: tuple[Rig, CommandHandler],
) -> None:
    rig, commands = handler
    given = give("lr", 0.5, shown=Shown(instead_of=0.25))
    commands.next(1)
    assert not commands.carry_out(*given) and rig.events[-1].data["effect"] == "refused"
    given = give("resume")
    commands.next(1)
    assert not commands.carry_out(*given) and rig.events[-1].data["reason"]


def test_a_pause_ends_with_resume_and_carries_out_what_comes_meanwhile(
    handler: tuple[Rig, CommandHandler],
) -> None:
    rig, commands = handler
    give("checkpoint")
    give("mode", float(list(Mode).index(Mode.ASK)))
    give("resume")
    assert commands.park() is ParkResult.AS_PROPOSED
    assert rig.done == [("saved", 0)] and rig.ctx.progress.mode is Mode.ASK
    assert [rig.kinds()[1], rig.kinds()[-1]] == ["paused", "resumed"]
    assert not commands.agree_to_stop()


def test_an_answer_ends_a_question(handler: tuple[Rig, CommandHandler]) -> None:
    rig, commands = handler
    give("answer", 1.0)
    proposal = verdict(Action.PAUSE, would=Action.HALT)
    batch = Batch(first=0, last=4, positions=(0,), samples=(0,))
    commands._actions.status = lambda: Status(run="", phase=Phase.PAUSED)  # type: ignore[method-assign]
    assert commands.park("what now?", verdict=proposal, batch=batch) is ParkResult.GO_ON
    resumed = rig.events[-1]
    assert resumed.kind == "resumed" and resumed.data["answer"] == "go_on"
    assert resumed.data["question"] and commands.question.text == ""
    assert commands.question.ended[resumed.data["question"]]


def test_the_status_counts_what_is_left_of_the_data() -> None:
    rig = Rig()
    handler: Any = SimpleNamespace(
        problem="", question=SimpleNamespace(text="?", number=3, deadline=0.0, default="")
    )
    made = RunStatus(
        rig.ctx,
        total_steps=0,
        metrics=rig.metrics,
        snapshots=FakeSnapshots(rig),  # type: ignore[arg-type]
        command_handler=handler,
    )
    assert made.current().total_steps == 0
    rig.ctx.order.limit = 40
    rig.ctx.progress.step = 2
    present = made.current()
    assert (present.total_steps, present.step, present.question_number) == (12, 2, 3)
