"""Data that has become another kind is learnt, and not left out: what lies ahead tells it from a
bad stretch.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

import guardrail.torch.diagnose.cause_test
from guardrail.core.events.decisions import HIGHER_LOSS
from guardrail.core.events.event import Event
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.findings import FindingKind, Observation, Severity
from guardrail.core.records.signals import LOSS
from guardrail.core.records.verdicts import Action, Cause, Diagnosis, Mode
from guardrail.decide.anomaly_signature import AnomalySignature, ReplayPass
from guardrail.decide.controller import Controller
from guardrail.decide.root_cause import add_batches_ahead, add_label_order
from guardrail.report.build import build_report
from tests.parallel.test_law import killed_behind
from tests.support.events import make_line
from tests.support.feed import healthy_loss, noisy, obs, warmed
from tests.support.findings import make_finding, make_nan_finding
from tests.support.running import (
    BATCH,
    SHAPES,
    assert_same,
    new_run,
    of_kind,
    spans,
    tiny,
    train,
    trained,
)
from trainer.objectives.loss import IGNORED, shuffle_labels

SPIKE = make_finding(31, value=6.0, baseline=2.0, score=110.0)


def far(*losses: float) -> list[tuple[int, ReplayPass]]:
    """Batches 256, 128, ... ahead with these losses."""
    return [
        (256 >> at, ReplayPass(what="far", signals={LOSS: value}))
        for at, value in enumerate(losses)
    ]


@pytest.mark.parametrize(
    ("losses", "ahead"),
    [
        ((6.0, 6.1, 5.8, 6.2, 6.0), True),
        ((6.0, 2.0, 5.8, 6.2, 6.0), True),  # some of the old kind is among it
        ((2.0, 2.1), False),  # two that are healthy are enough: it is a stretch
        ((6.0, 2.0, 2.1), False),
        ((6.0, 6.0, 6.0), True),  # not more before the end of the run
        ((6.0, 6.0), False),
        ((), False),
    ],
)
def test_all_that_is_looked_at_ahead_must_be_in_the_same_trouble(
    losses: tuple[float, ...], ahead: bool
) -> None:
    before = Diagnosis(cause=Cause.DATA, reason="it comes again", passes=6)
    after = add_batches_ahead(
        before, AnomalySignature.from_findings([SPIKE]), far(*losses), passes=6 + len(losses)
    )
    assert after.ahead is ahead and after.passes == 6 + len(losses) and after.cause is Cause.DATA
    hit = sum(value > 4.0 for value in losses)
    seen = after.evidence.batches_ahead if after.evidence is not None else None
    assert (seen is not None) == bool(losses)
    assert seen is None or (seen.spiked, seen.tested) == (hit, len(losses))
    assert (f"{hit} of {len(losses)} batches" in after.reason) == bool(losses)


def test_what_is_not_a_number_is_never_the_level() -> None:
    nan = make_nan_finding(31, baseline=2.0)
    before = Diagnosis(cause=Cause.DATA, reason="it comes again", passes=6)
    assert not add_batches_ahead(
        before, AnomalySignature.from_findings([nan]), far(*[math.nan] * 5), passes=11
    ).ahead


# -- the controller


def other(step: int) -> Observation:
    """Another kind of text: three times the loss, four times the norm."""
    return obs(step, 3.0 * healthy_loss(step), noisy(2.0, seed=1, noise=0.2)(step))


def shifted(mode: Mode) -> tuple[Controller, int]:
    """(A controller that has been told of the shift at a step, that step)."""
    controller = Controller(GuardOptions(mode=mode))
    step = warmed(controller)
    verdict = controller.observe(other(step))
    assert controller.needs_cause_test(verdict)
    retry = controller.apply_diagnosis(
        other(step), verdict, Diagnosis(cause=Cause.DATA, shift=True)
    )
    assert retry.action is Action.RETRY and retry.window is None and not retry.accepted
    return controller, step


@pytest.mark.parametrize("mode", [Mode.AUTO, Mode.ASK])
def test_the_batch_is_formed_again_and_begins_a_level(mode: Mode) -> None:
    controller, step = shifted(mode)
    first = controller.observe(other(step))
    assert first.action is Action.APPLY and first.accepted
    assert {f.kind for f in first.findings} == {
        FindingKind.LEVEL_SHIFT
    } and "accepted" in first.reason
    ends = [first.incident_state]
    for later in range(step + 1, step + 100):
        verdict = controller.observe(other(later))
        assert verdict.action is Action.APPLY and verdict.accepted, verdict
        ends.append(verdict.incident_state)
    assert [state for state in ends if state] == [HIGHER_LOSS], (
        "it is over, and the loss has stayed above its curve"
    )
    # What leaves the new level is found as what left the old one was.
    spike = obs(step + 100, 9.0 * healthy_loss(step + 100), 20.0)
    assert controller.observe(spike).action is Action.SKIP


def test_another_batch_is_asked_about_anew_and_a_nan_stays_out() -> None:
    controller, step = shifted(Mode.AUTO)
    broken = obs(step, math.nan, 1.0)
    assert controller.observe(broken).action is Action.SKIP
    elsewhere = obs(step, 6.0, 3.0, first=10_000)
    verdict = controller.observe(elsewhere)
    assert verdict.action is Action.SKIP


def test_a_process_that_starts_again_knows_where_the_level_begins() -> None:
    live, step = shifted(Mode.AUTO)
    resumed = Controller(GuardOptions())
    resumed.load_state_dict(live.state_dict())
    batch = other(step)
    curve = None
    data: list[tuple[str, dict[str, Any]]] = [
        (
            "diagnosis",
            {
                "incident": 1,
                "cause": "data",
                "shift": True,
                "at_step": step,
                "batch": [batch.first, batch.last],
            },
        ),
        ("incident", {"number": 1, "state": "open", "onset": step, "curve": curve}),
    ]
    resumed.rebuild(
        make_line(seq=at, time=0.0, step=step - 1, timeline=0, kind=kind, message="", data=fields)
        for at, (kind, fields) in enumerate(data, 1)
    )
    assert resumed.memory.incidents.open
    for later in range(step, step + 40):
        ours, theirs = resumed.observe(other(later)), live.observe(other(later))
        assert (
            (ours.action, ours.accepted) == (theirs.action, theirs.accepted) == (Action.APPLY, True)
        )
    assert resumed.state_dict() == live.state_dict()


def test_nobody_is_wary_before_the_place_of_the_trouble() -> None:
    """A process that starts again from an older state knows of the incident there, and judged those
    steps without.
    """
    controller = Controller(GuardOptions())
    step = warmed(controller)
    raised = obs(step, 1.12 * healthy_loss(step), 0.5 * math.exp(0.2 * 6))
    assert controller.observe(raised).action is Action.APPLY, "nothing by itself"

    for place, action in ((raised.first + 5 * 16, Action.APPLY), (raised.first, Action.SKIP)):
        again = Controller(GuardOptions())
        warmed(again)
        again.rebuild(
            make_line(
                seq=at, time=0.0, step=step - 1, timeline=0, kind=kind, message="", data=fields
            )
            for at, (kind, fields) in enumerate(
                [
                    ("incident", {"number": 1, "state": "open", "onset": step}),
                    (
                        "diagnosis",
                        {
                            "incident": 1,
                            "cause": "data",
                            "at_step": step,
                            "batch": [place, place + 16],
                        },
                    ),
                ],
                1,
            )
        )
        assert again.observe(raised).action is action


def raised(step: int) -> Observation:
    """No spike: loss and norm more than half-way to one."""
    return obs(step, 1.14 * healthy_loss(step), 0.5 * math.exp(0.2 * 6))


def test_what_every_batch_has_a_little_of_is_borne_and_a_spike_is_not() -> None:
    controller = Controller(GuardOptions())
    step = warmed(controller)
    assert controller.observe(raised(step)).action is Action.APPLY
    verdict = controller.observe(raised(step + 1))
    assert verdict.action is Action.SKIP and controller.needs_cause_test(verdict)
    told = controller.classify_shift(raised(step + 1), Diagnosis(cause=Cause.STATE))
    assert (
        told.borne
        and not controller.classify_shift(other(step + 1), Diagnosis(cause=Cause.STATE)).borne
    )
    retry = controller.apply_diagnosis(raised(step + 1), verdict, told)
    assert retry.action is Action.RETRY and retry.incident_state == "open"
    assert controller.memory.is_tolerated(raised(step + 1))
    for later in range(step + 1, step + 4):
        borne = controller.observe(raised(later))
        assert borne.action is Action.APPLY and borne.accepted, borne
    assert controller.observe(other(step + 4)).action is not Action.APPLY, "a spike is a spike"


def test_what_is_borne_and_goes_on_to_rise_is_found_as_a_divergence() -> None:
    controller = Controller(GuardOptions())
    step = warmed(controller)
    controller.observe(raised(step))
    verdict = controller.observe(raised(step + 1))
    told = controller.classify_shift(raised(step + 1), Diagnosis(cause=Cause.STATE))
    controller.apply_diagnosis(raised(step + 1), verdict, told)
    kinds: set[FindingKind] = set()
    for later in range(step + 1, step + 60):
        seen = controller.observe(
            obs(later, (1.14 + 0.002 * (later - step)) * healthy_loss(later), 0.5)
        )
        kinds |= {
            finding.kind
            for finding in seen.findings
            if finding.severity is Severity.WEIGHTS_DAMAGED
        }
        if kinds:
            break
    assert kinds == {FindingKind.DIVERGENCE}


@pytest.mark.parametrize(("mark", "steps"), [("shift", 20), ("borne", 1)])
def test_a_level_begins_at_its_place_though_nobody_is_wary_any_more(mark: str, steps: int) -> None:
    """The step was rejected because an incident was open; a process that starts again when it is
    over finds nothing.
    """
    kept = []
    for ends in ([], ["recovered"]):
        controller = Controller(GuardOptions())
        step = warmed(controller)
        seen = raised(step)
        batch = [seen.first, seen.last]
        lines: list[tuple[str, dict[str, Any]]] = [
            ("incident", {"number": 1, "state": "open", "onset": step}),
            ("diagnosis", {"incident": 1, "cause": "data", "at_step": step, "batch": batch}),
            (
                "diagnosis",
                {"incident": 1, "cause": "data", "at_step": step, "batch": batch, mark: True},
            ),
            *(("incident", {"number": 1, "state": state}) for state in ends),
        ]
        controller.rebuild(
            make_line(seq=at, time=0.0, step=step, timeline=0, kind=kind, message="", data=fields)
            for at, (kind, fields) in enumerate(lines, 1)
        )
        assert controller.memory.incidents.open is not bool(ends)
        for later in range(step, step + steps):
            verdict = controller.observe(
                raised(later) if later == step else obs(later, healthy_loss(later), 0.5)
            )
            assert verdict.action is Action.APPLY and verdict.accepted
        kept.append(controller.state_dict())
    assert kept[0] == kept[1]
    ignorant = Controller(GuardOptions())
    step = warmed(ignorant)
    for later in range(step, step + steps):
        ignorant.observe(raised(later) if later == step else obs(later, healthy_loss(later), 0.5))
    assert kept[0] != ignorant.state_dict()


# -- whole runs


@pytest.fixture
def structured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measure of the label order gives 0.6, as it would for text after some hundred steps of
    training.

    These runs are too short for a model to learn any order. The measure itself has tests of its
    own.
    """

    def measured(diagnosis: Diagnosis, gains: object, usual: object, *, passes: int) -> Diagnosis:
        return structs.replace(diagnosis, structure=0.6, passes=passes)

    monkeypatch.setattr(guardrail.torch.diagnose.cause_test, "add_label_order", measured)


AT = 35  # first step of another kind of data
FOREVER = [{"kind": "spike_loss", "first": (AT - 1) * BATCH, "last": 10**6, "value": 3.0}]


@pytest.mark.usefixtures("structured")
@pytest.mark.parametrize(
    ("world", "strategy", "gate"),
    [
        (1, "ddp", "sync"),
        pytest.param(2, "fsdp", "sync", marks=pytest.mark.ci_slow),
        *(pytest.param(*s, "lagged", marks=pytest.mark.slow) for s in SHAPES),
    ],
)
def test_nothing_of_it_is_left_out_and_not_a_bit_is_changed(
    tmp_path: Path, world: int, strategy: str, gate: str
) -> None:
    optim = {"implementation": "fused"} if gate == "lagged" else {}
    config = tiny(
        tmp_path, world=world, strategy=strategy, faults=FOREVER, guard={"gate": gate}, optim=optim
    )
    run = trained(config)
    (cause,) = of_kind(run, "diagnosis")
    assert cause.data["ahead"] and cause.data["shift"]
    assert cause.data["at_step"] == AT and cause.data["reason"] in cause.message
    assert not spans(run)
    (noted,) = [event for event in of_kind(run, "finding") if "level shift" in event.message]
    assert noted.data["at_step"] == AT and noted.data["incident"] == 1
    (incident,) = build_report(run).incidents
    assert incident.cost.rejected == 0 and incident.cost.seconds > 0.0, "the second try was applied"
    off = tiny(
        tmp_path / "off",
        world=world,
        strategy=strategy,
        faults=FOREVER,
        guard={"mode": "off"},
        optim=optim,
    )
    assert_same(run, trained(off))


@pytest.mark.usefixtures("structured")
@pytest.mark.parametrize("where", ["cause", "end"])
def test_killed_where_the_level_begins_or_behind_it_and_begun_again_from_before(
    tmp_path: Path, where: str
) -> None:
    """Without a checkpoint a run begins anew; by then the incident is open, or over."""
    config = tiny(tmp_path, faults=FOREVER, checkpoint={"every": 1000}, train={"steps": 75})
    whole, run = trained(config), new_run(config)
    assert killed_behind(
        run, config.world, closing if where == "end" else lambda event: event.kind == "diagnosis"
    )
    assert train(run, config.world) == "finished"
    assert not spans(run)
    assert_same(run, whole)


def closing(event: Event) -> bool:
    return event.kind == "incident" and event.data.get("state") in (
        "recovered",
        "recovered with higher loss",
    )


@pytest.mark.usefixtures("structured")
def test_a_bad_stretch_is_left_out_and_so_is_all_where_that_is_wanted(tmp_path: Path) -> None:
    stretch = [{**FOREVER[0], "last": (AT + 4) * BATCH}]
    run = trained(tiny(tmp_path / "stretch", faults=stretch))
    causes = of_kind(run, "diagnosis")
    assert causes and not any(cause.data["shift"] for cause in causes)
    assert all("0 of 2 batches" in cause.message for cause in causes)
    assert sum(span.last - span.first for span in spans(run)) == 5 * BATCH
    config = tiny(tmp_path / "all", faults=FOREVER, guard={"shift": "leave_out", "skips": 6})
    run = new_run(config)
    assert train(run, 1) == "halted"
    assert all(not event.data["shift"] for event in of_kind(run, "diagnosis"))
    assert sum(span.last - span.first for span in spans(run)) == 6 * BATCH


# -- bad data and other data


def judged(structure: float | None, *, ahead: bool, raised: bool = True) -> bool:
    """Whether a step is taken for another kind of data; `raised`: by a row of steps that are no
    spikes.
    """
    controller = Controller(GuardOptions())
    step = warmed(controller)
    seen = obs(step, 1.1 * healthy_loss(step), 0.5) if raised else other(step)
    found = Diagnosis(cause=Cause.DATA, structure=structure, ahead=ahead)
    return controller.classify_shift(seen, found).shift


@pytest.mark.parametrize("raised", [True, False])
def test_what_lies_ahead_and_what_the_model_finds_in_it_tell_them_apart(raised: bool) -> None:
    assert judged(0.6, ahead=True, raised=raised)
    assert not judged(0.02, ahead=True, raised=raised), (
        "labels by lot, to the end of the data: still bad data"
    )
    assert judged(0.6, ahead=False, raised=raised) is raised, (
        "a spike that does not last is left out, whatever it is"
    )
    assert not judged(None, ahead=False, raised=raised)


@pytest.mark.fault("A13")
@pytest.mark.parametrize("raised", [True, False])
def test_data_whose_structure_was_not_measured_is_never_accepted_as_new_data(raised: bool) -> None:
    controller = Controller(GuardOptions())
    step = warmed(controller)
    seen = obs(step, 1.1 * healthy_loss(step), 0.5) if raised else other(step)
    found = controller.classify_shift(seen, Diagnosis(cause=Cause.DATA, structure=None, ahead=True))
    assert not found.shift
    assert found.reason.strip("; "), "it says that this was not measured"


def test_a_measure_needs_something_to_be_measured_by() -> None:
    before = Diagnosis(cause=Cause.DATA, reason="it comes again", passes=6)
    assert add_label_order(before, [0.45], [0.8, 1.0], passes=9).structure == pytest.approx(0.5)
    assert add_label_order(before, [0.05], [0.06, 0.07], passes=9).structure is None, (
        "the model has learnt no order yet"
    )
    assert add_label_order(before, [0.45], [], passes=9).structure is None
    assert add_label_order(before, [None], [0.8], passes=6).structure is None


def test_labels_in_another_order_are_the_same_labels_row_by_row() -> None:
    labels = np.arange(40).reshape(4, 10)
    labels[0, :3] = labels[3] = IGNORED
    found = shuffle_labels(labels, seeds=[5, 6, 7])
    assert (np.sort(found, axis=1) == np.sort(labels, axis=1)).all() and (
        found[:3] != labels[:3]
    ).any(axis=1).all()
    assert (found[0, :3] == IGNORED).all() and (
        found == shuffle_labels(labels, seeds=[5, 6, 7])
    ).all()
    assert (shuffle_labels(labels[1:], seeds=[6, 7]) == found[1:]).all(), (
        "whichever rank has the row"
    )


# By this step the order of the text is worth something to so small a model.
LATE, SKILLED = 200, {"optim": {"lr": 1e-2, "warmup_steps": 5}}


def test_noise_to_the_end_of_the_data_is_not_learnt(tmp_path: Path) -> None:
    noise = [{"kind": "noise_tokens", "first": (LATE - 1) * BATCH, "last": 10**6}]
    run = new_run(
        tiny(tmp_path, faults=noise, guard={"skips": 6}, train={"steps": LATE + 25}, **SKILLED)
    )
    assert train(run, 1) == "halted"
    causes = [event.data for event in of_kind(run, "diagnosis")]
    assert causes and all(one["ahead"] and not one["shift"] for one in causes)
    # On some CPUs so small a model has learnt too little order by then for a measure.
    assert all(one["structure"] is None or one["structure"] < 0.1 for one in causes)


def structures(folder: Path, **shape: Any) -> list[float]:
    stretch = [
        {**FOREVER[0], "first": (LATE - 1) * BATCH, "last": (LATE + 2) * BATCH, "value": 20.0}
    ]
    model, train = {"tied": False, "dropout": 0.0}, {"steps": LATE + 2, "micro_batch_size": 4}
    run = trained(tiny(folder, faults=stretch, train=train, model=model, **SKILLED, **shape))
    return [event.data["structure"] for event in of_kind(run, "diagnosis")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [{"strategy": "ddp"}, {"strategy": "fsdp"}, {"tp": 2}, {"pp": 2}], ids=str
)
def test_every_mesh_finds_the_same_in_a_batch(tmp_path: Path, shape: dict[str, Any]) -> None:
    known = structures(tmp_path / "one")
    part = {"parallel": shape} if "strategy" not in shape else shape
    found = structures(tmp_path / "two", world=2, **part)
    # Two hundred steps at this rate let the order of additions grow to some per cent.
    assert (
        known and all(0.5 < one < 2.0 for one in known) and found == pytest.approx(known, rel=0.1)
    )
