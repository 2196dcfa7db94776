"""The journal as the screen shows it, also where the journal is strange."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guardrail.core.events.event import Event
from guardrail.core.records.findings import Finding, FindingKind, Severity
from guardrail.core.records.verdicts import Action
from guardrail.tui.model.incident_list import format_skipped
from guardrail.tui.model.log_lines import make_log_line
from guardrail.tui.model.run_story import ADVISED_ACTIONS, Story, StoryBuilder
from tests.support.events import make_line
from tests.support.fake_run import FakeRun, example


def event(kind: str, message: str = "", *, step: int = 10, seq: int = 1, **data: Any) -> Event:
    return make_line(
        seq=seq, time=0.0, step=step, timeline=0, kind=kind, message=message, data=data
    )


def story(*events: Event) -> Story:
    builder = StoryBuilder()
    builder.add(events)
    return builder.story()


def finding(**changes: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {"signal": "loss", "step": 11, "kind": "loss_spike", "severity": "reject", "value": 11.5,
                             "baseline": 2.3, "score": 41.0, "threshold": 8.0, "onset": 11}  # fmt: skip
    return plain | changes


def span(first: int, last: int, cause: str = "rejected", step: int = 11) -> dict[str, Any]:
    return {"first": first, "last": last, "cause": cause, "step": step}


def test_the_example() -> None:
    shown = story(*example().events)
    spike, nan = shown.incidents
    assert (spike.number, spike.step, spike.open) == (2, 1207, False)
    assert spike.action.split()[-1] == "1,200"
    worst = spike.findings[0]
    assert (worst.signal, worst.kind, worst.value) == ("loss", FindingKind.LOSS_SPIKE, 11.5)
    assert re.findall(r"\d+ \w+", format_skipped(spike)) == ["48 samples", "3 documents"]
    assert spike.documents == ("0037.txt", "0038.txt", "web.jsonl:1207")
    assert (nan.number, nan.step, nan.action) == (1, 403, "update skipped")
    assert shown.marks["R"] == ((1200, "2"),)
    assert shown.marks["S"] == ((403, "1"),), "the skip at 1,207 belongs to the abandoned timeline"
    assert not shown.recovering


def test_recovering_until_the_incident_is_over() -> None:
    fake = FakeRun().begin().advance(100).spike()
    assert story(*fake.events).recovering
    assert not story(*fake.recover().events).recovering


def test_a_verdict_before_its_incident_has_a_number() -> None:
    shown = story(
        event("verdict", action="skip", findings=[finding()], at_step=11),
        event("incident", number=3, state="open", onset=11),
    )
    assert [(i.number, i.step, i.action, len(i.findings)) for i in shown.incidents] == [
        (3, 11, "update skipped", 1)
    ]


def test_verdicts_without_any_incident() -> None:
    """`advise` opens none; verdicts far apart are two incidents."""
    shown = story(
        event("verdict", action="apply", would="skip", findings=[finding()], at_step=11),
        event("verdict", action="apply", would="rollback", findings=[finding(step=12)], at_step=12),
        event("verdict", action="apply", would="skip", findings=[finding(step=400)], at_step=400),
        event("verdict", action="apply", findings=[finding(severity="note")], at_step=500),
    )
    assert [(i.step, i.action) for i in shown.incidents] == [
        (400, ADVISED_ACTIONS[Action.SKIP]),
        (11, ADVISED_ACTIONS[Action.ROLLBACK]),
    ]
    assert not shown.marks["S"] and not shown.recovering


def test_samples_named_twice_count_once() -> None:
    shown = story(
        event("incident", number=1, state="open", onset=11),
        event("skipped", span=span(100, 116), samples=16, incident=1),
        event("skipped", span=span(116, 132), samples=16, incident=1),
        event(
            "rollback", span=span(100, 148, "rollback"), to_step=5, onset=11, samples=48, incident=1
        ),
    )
    assert shown.incidents[0].samples == 48


def test_the_worst_finding_of_each_kind_is_shown() -> None:
    shown = story(
        event("incident", number=1, state="open", onset=11),
        event("verdict", action="skip", findings=[finding(value=6.0, score=10.0)], incident=1),
        event("verdict", action="skip", findings=[finding(value=11.5, score=41.0)], incident=1),
        event("verdict", action="rollback", findings=[finding(value=9.0, score=20.0)], incident=1),
    )
    assert [f.value for f in shown.incidents[0].findings] == [11.5]


def test_what_a_user_asked_for_is_no_incident() -> None:
    shown = story(
        event("skipped", span=span(0, 16, "user", step=12), samples=16, incident=0),
        event("rollback", span=span(0, 16, "user"), to_step=5, onset=6, incident=0),
    )
    assert not shown.incidents and shown.marks["R"] == ((5, ""),)
    assert not shown.marks["S"], "step 12 was abandoned by the rollback"


def test_answers_and_marks_of_commands() -> None:
    shown = story(
        event("command", step=20, id="a", command="lr", value=0.5, effect="applied", reason=""),
        event(
            "command",
            step=21,
            id="b",
            command="rollback",
            effect="refused",
            reason="no\x1b[2J state",
        ),
    )
    assert shown.answers["a"].applied and shown.answers["a"].step == 20
    assert not shown.answers["b"].applied and shown.answers["b"].reason == "no state"
    assert shown.marks["!"] == ((20, "×0.5"),)


@pytest.mark.parametrize(
    "command", ["lr", pytest.param("shrink-embedding", marks=pytest.mark.fault("B2"))]
)
def test_a_factor_that_was_set_stands_beside_its_mark(command: str) -> None:
    shown = story(event("command", id="a", command=command, value=0.5, effect="applied", step=7))
    assert shown.marks["!"] == ((7, "×0.5"),)


def test_proposals_while_parked() -> None:
    parked = event("paused", "why", proposals=["rollback", "go on", "stop"])
    assert story(parked).proposals == ("rollback", "go on", "stop")
    assert story(parked, event("resumed")).proposals == ()
    for samples, said in ((0, "back"), (64, "rollback")):
        given = [{"action": "rollback", "samples": samples}, {"action": "go on", "samples": 0}]
        assert story(event("paused", "why", proposals=given)).proposals == (said, "go on")


def test_skips_after_a_restart_point_are_forgotten() -> None:
    shown = story(
        event("skipped", span=span(0, 16, step=30), incident=1),
        event("restarted", step=20, checkpoint="c", reason="killed", restarts=1),
    )
    assert not shown.marks["S"]


@pytest.mark.parametrize(
    ("kind", "data", "mark", "tone"),
    [
        ("rollback", {}, "R", "warn"),
        ("checkpoint", {"state": "failed"}, "C", "bad"),
        ("checkpoint", {"state": "good"}, "C", "plain"),
        ("command", {"effect": "refused"}, "!", "warn"),
        ("disk", {"state": "failing"}, "▲", "bad"),
        ("disk", {"state": "ok"}, "●", "good"),
        ("incident", {"state": "recovered"}, "#", "good"),
        ("ended", {"phase": "finished"}, "■", "good"),
        ("ended", {"phase": "failed"}, "■", "bad"),
        ("something new", {}, "·", "plain"),
    ],
)
def test_lines(kind: str, data: dict[str, Any], mark: str, tone: str) -> None:
    line = make_log_line(event(kind, "message", **data))
    assert (line.mark, line.tone, line.text) == (mark, tone, "message")


def test_a_line_without_a_message_says_its_data() -> None:
    assert make_log_line(event("eval", loss=2.5)).text == "eval loss 2.5"


def test_a_story_does_not_grow_for_ever() -> None:
    builder = StoryBuilder()
    for number in range(3000):
        builder.add([event("command", step=number, id=f"id-{number}", effect="applied"),
                    event("incident", number=number + 1, state="open", onset=number)])  # fmt: skip
    shown = builder.story()
    assert len(shown.lines) == 500 and len(shown.answers) == 500 and len(shown.incidents) == 200
    assert shown.incidents[0].number == 3000
    assert [step for step, _ in shown.marks["!"]] == list(range(1000, 3000)), "the newest marks"


def test_a_story_that_was_handed_out_does_not_change() -> None:
    builder = StoryBuilder()
    builder.add(example().events)
    before = builder.story()
    lines, marks = before.lines, dict(before.marks)
    builder.add([event("rollback", span=span(0, 9, "rollback"), to_step=3, onset=4, incident=1)])
    assert before.lines == lines and dict(before.marks) == marks


_strange = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
_kinds = st.sampled_from(
    "started restarted finding verdict skipped rollback incident command checkpoint disk eval paused resumed "
    "note rank_hung rank_failed ended novel".split()
)
_names = st.sampled_from(
    "action would findings onset window span documents documents_total samples incident to_step from_step number state "
    "id effect reason cp_step proposals phase at_step".split()
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(_kinds, st.text(max_size=20), st.dictionaries(_names, _strange, max_size=6)),
        max_size=6,
    )
)
def test_strange_journals_never_raise(lines: list[tuple[str, str, dict[str, Any]]]) -> None:
    events = [
        make_line(seq=i, time=1.0, step=5, timeline=0, kind=k, message=m, data=d)
        for i, (k, m, d) in enumerate(lines)
    ]
    assert len(story(*events).lines) == len(events)


def test_findings_that_are_no_findings_are_ignored() -> None:
    real = finding()
    shown = story(
        event("verdict", action="skip", findings=[real, {"signal": "loss"}, 7], at_step=11)
    )
    assert shown.incidents[0].findings == (
        Finding(signal="loss", step=11, kind=FindingKind.LOSS_SPIKE, severity=Severity.REJECT, value=11.5, baseline=2.3,
                score=41.0, threshold=8.0, onset=11),
    )  # fmt: skip
