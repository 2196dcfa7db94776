"""What holds for every detector in `guardrail.detectors.build`."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import msgspec
import pytest

from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.findings import Finding, FindingKind, Observation, Severity
from guardrail.core.records.signals import (
    EMBED_GRAD_NORM,
    EMBED_SHARE,
    GRAD_NORM,
    LOSS,
    LOSS_SCALE,
    UPDATE_NORM,
)
from guardrail.detectors.base import Detector, DetectorParts, DetectorSettings
from guardrail.detectors.build import DETECTORS, ON_DEMAND, SETTINGS, build_detectors, find_detector
from guardrail.detectors.spike_settings import SpikeSettings
from guardrail.detectors.spikes import NamedSpike
from tests.support.class_docs import comments_of
from tests.support.feed import BATCH, plain, through_json
from tests.support.findings import make_finding
from tests.support.golden import assert_golden

ALL = [*DETECTORS, *ON_DEMAND]
# What a kind of finding means, wherever it is read; detectors that share a kind agree about it.
MEANINGS = (
    "may_be_allowlisted",
    "is_anomaly",
    "dates_onset",
    "judges_one_value",
    "is_harmless_with_clipping",
    "has_unusable_value",
    "replay_sign",
)
OPTIONS = {
    "positive": GuardOptions(),
    "signed": GuardOptions(loss="signed"),
}


def rows(seed: int, *, signed: bool) -> Iterator[Observation]:
    """Observations of a run with every signal and every fault: spikes, drift, NaN, repeats."""
    random_numbers = random.Random(seed)
    for step in range(1, 10**9):
        noise = math.exp(random_numbers.gauss(0.0, 0.05))
        embed = 0.2 * noise * (1.0 if step % 90 else 50.0)
        growth = 1.08 ** max(0, step % 200 - 140)
        signals = {
            LOSS: 2.0 * noise + 3.0 * (step % 70 == 0) + 2.0 * (step % 300 > 250),
            GRAD_NORM: 0.5 * noise * growth,
            EMBED_GRAD_NORM: embed,
            EMBED_SHARE: embed**2 / (embed**2 + 0.1),
            UPDATE_NORM: 0.01 * noise * growth,
            LOSS_SCALE: 2.0 ** (16 - 5 * (step % 170 > 160)),
            "router": 1.0 + noise * (1.0 if step % 80 else 40.0),
        }
        if signed:
            signals[LOSS] -= 2.0
        if step % 97 == 0:
            signals[random_numbers.choice([LOSS, GRAD_NORM])] = math.nan
        if step % 101 == 0:
            signals[LOSS] = 0.0
        if step % 110 > 95:
            signals[LOSS] = signals[GRAD_NORM] = 1.5
        yield Observation(
            step=step,
            first=(step - 1) * BATCH,
            last=step * BATCH,
            signals=signals,
            tokens=0 if step % 103 == 0 else 100,
            streak=step % 5 == 0,
        )


def detectors_of(options: GuardOptions) -> dict[str, Detector]:
    """Every detector of a run, those that are asked only on demand among them."""
    detectors, parts = build_detectors(options)
    for cls in ON_DEMAND:
        if cls is NamedSpike:
            detectors["named router"] = NamedSpike("router", parts.settings(SpikeSettings))
        else:
            detectors[cls.name] = parts.get(cls)
    return detectors


def states(detectors: dict[str, Detector]) -> str:
    """All states, exactly."""
    return json.dumps({name: one.state_dict() for name, one in detectors.items()})


def feed(
    detectors: dict[str, Detector], observations: Iterator[Observation], steps: int
) -> list[Finding]:
    """Let all detectors judge and learn the next steps. Returns their findings."""
    found = []
    for obs in islice(observations, steps):
        for detector in detectors.values():
            found += detector.observe(obs)
        for detector in detectors.values():
            detector.update(obs)
    return found


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_it_says_what_it_is(cls: type[Detector]) -> None:
    assert cls.name and cls.title and cls.__doc__
    assert isinstance(cls.kind, FindingKind)
    assert cls.severities and set(cls.severities) <= set(Severity)
    assert "- **" in cls.help or "**Test:**" in cls.help
    assert not cls.help.endswith("\n")
    options: Any = GuardOptions()
    for key in cls.keys:
        value = options
        for part in key.split("."):
            value = getattr(value, part)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_each_key_has_a_default_and_a_meaning(settings: type[DetectorSettings]) -> None:
    assert SETTINGS[settings.table] is settings
    comments = comments_of(settings)
    for field in msgspec.structs.fields(settings):
        assert field.default is not msgspec.NODEFAULT
        assert len(comments[field.name].split()) > 3, field.name
    assert getattr(GuardOptions().detectors, settings.table) == settings()
    read = {f"detectors.{settings.table}.{name}" for name in settings.__struct_fields__}
    assert read <= {key for cls in ALL for key in cls.keys}, "a key that no detector names"


def test_names_are_unique() -> None:
    names = [cls.name for cls in ALL]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("kind", FindingKind)
def test_detectors_that_share_a_kind_agree_about_it(kind: FindingKind) -> None:
    found = find_detector(kind)
    for cls in ALL:
        if cls.kind is kind:
            for name in (*MEANINGS, "sentence", "explain_rollback"):
                one, other = getattr(cls, name), getattr(found, name)
                assert getattr(one, "__func__", one) == getattr(other, "__func__", other), name
    assert kind is FindingKind.LEVEL_SHIFT or found is not Detector, "no detector reports it"


@pytest.mark.parametrize("kind", [*FindingKind, FindingKind("of_another_version")])
@pytest.mark.parametrize("value", [0.0, 2.5, math.nan, math.inf, 1e30])
def test_each_finding_has_a_sentence(kind: FindingKind, value: float) -> None:
    finding = make_finding(
        5, signal="a_signal", kind=kind, value=value, baseline=1.0, onset=3, ranks=(1,)
    )
    sentence = finding.sentence()
    assert sentence and "\n" not in sentence and len(sentence) < 200
    assert sentence == find_detector(kind).sentence(finding)


def test_the_sentences_of_all_kinds() -> None:
    lines = []
    for kind in (*FindingKind, FindingKind("of_another_version")):
        for value, ranks in ((2.5, ()), (0.0, (1,)), (math.nan, (1, 3))):
            finding = Finding(
                signal="a_signal", step=5, kind=kind, severity=Severity.WEIGHTS_DAMAGED,
                value=value, baseline=1.0, score=9.0, threshold=8.0, onset=3, ranks=ranks,
            )  # fmt: skip
            lines.append(f"{kind.value}: {finding.sentence()}\n")
        if why := find_detector(kind).explain_rollback(finding):
            lines.append(f"{kind.value}, why a rollback: {why}\n")
    assert_golden("findings.txt", "".join(lines))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_observe_changes_nothing(options: GuardOptions) -> None:
    detectors = detectors_of(options)
    observations = rows(1, signed=options.loss == "signed")
    for _ in range(12):
        feed(detectors, observations, 50)
        before = states(detectors)
        for obs in islice(observations, 20):
            first = [one.observe(obs) for one in detectors.values()]
            assert plain(first) == plain([one.observe(obs) for one in detectors.values()])
        assert states(detectors) == before


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_step_that_is_not_applied_leaves_no_trace(options: GuardOptions) -> None:
    """Rejected values never enter: without `update`, the next findings are the same."""
    signed = options.loss == "signed"
    one, other = detectors_of(options), detectors_of(options)
    same, more = rows(2, signed=signed), rows(2, signed=signed)
    for _ in range(8):
        assert plain(feed(one, same, 60)) == plain(feed(other, more, 60))
        for obs in islice(rows(9, signed=signed), 30):
            for detector in other.values():
                detector.observe(obs)
    assert states(one) == states(other)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_state_goes_through_json(options: GuardOptions) -> None:
    signed = options.loss == "signed"
    whole = detectors_of(options)
    observations = rows(3, signed=signed)
    for _ in range(8):
        feed(whole, observations, 80)
        state = through_json({name: one.state_dict() for name, one in whole.items()})
        copy = detectors_of(options)
        for name, detector in copy.items():
            detector.load_state_dict(state[name])
        assert states(copy) == states(whole)
        ahead = list(islice(observations, 40))
        assert plain(feed(copy, iter(ahead), 40)) == plain(feed(whole, iter(ahead), 40))
        assert states(copy) == states(whole)


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_a_state_is_independent_and_reset_forgets(cls: type[Detector]) -> None:
    detectors = detectors_of(GuardOptions())
    name = "named router" if cls is NamedSpike else cls.name
    fresh = detectors[name].state_dict()
    observations = rows(4, signed=False)
    feed(detectors, observations, 100)
    state = detectors[name].state_dict()
    before = json.dumps(state)
    feed(detectors, observations, 100)
    assert json.dumps(state) == before, "the state that was handed out has changed"
    for detector in detectors.values():
        detector.reset()
    if name == "signed_loss":
        fresh |= {"kind": "positive", "records": 20}  # what was decided stays
    assert detectors[name].state_dict() == fresh


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_all_ranks_find_the_same(options: GuardOptions) -> None:
    """Two processes with equal numbers, whatever the order in which their signals came."""
    signed = options.loss == "signed"
    one, other = detectors_of(options), detectors_of(options)
    for obs in islice(rows(5, signed=signed), 600):
        turned = Observation(
            **{name: getattr(obs, name) for name in obs.__struct_fields__}
            | {"signals": dict(reversed(obs.signals.items()))}
        )
        found = [detector.observe(obs) for detector in one.values()]
        assert plain(found) == plain([detector.observe(turned) for detector in other.values()])
        for detector, twin in zip(one.values(), other.values(), strict=True):
            detector.update(obs)
            twin.update(turned)
    assert states(one) == states(other)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_findings_keep_to_what_the_class_says(options: GuardOptions) -> None:
    detectors = detectors_of(options)
    found: dict[str, list[Finding]] = {name: [] for name in detectors}
    for obs in islice(rows(6, signed=options.loss == "signed"), 900):
        for name, detector in detectors.items():
            found[name] += detector.observe(obs)
        for detector in detectors.values():
            detector.update(obs)
    for name, detector in detectors.items():
        assert {finding.severity for finding in found[name]} <= set(detector.severities), name
        for finding in found[name]:
            assert finding.onset <= finding.step
            if detector.signals:
                assert finding.signal in detector.signals
    if options.loss == "positive":
        silent = {name for name, findings in found.items() if not findings}
        assert silent <= {"signed_loss", "loss_scale", "together"}, "the rows exercise them"


def test_parts_are_created_once() -> None:
    parts = DetectorParts(GuardOptions())
    for cls in DETECTORS:
        assert parts.get(cls) is parts.get(cls)
