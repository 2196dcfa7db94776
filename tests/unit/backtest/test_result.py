"""The alarms of a backtest, by the action of the controller."""

from __future__ import annotations

import pytest

from guardrail.backtest.result import ACTS, NOTE, Alarm, BacktestIncident
from guardrail.core.records.verdicts import Action


def alarm(verdict: str, step: int = 7) -> Alarm:
    return Alarm(
        row=step,
        step=step,
        onset_row=step,
        onset_step=step,
        kind="loss spike",
        signal="loss",
        verdict=verdict,
        score=9.0,
        threshold=6.0,
        value=9.0,
        baseline=2.0,
        incident=1,
        before_step=None,
        evidence="loss 9",
    )


def test_every_action_has_a_severity():
    assert set(ACTS) == set(Action) - {Action.APPLY}
    severities = [alarm(action.value).severity for action in ACTS]
    assert severities == list(range(len(ACTS)))
    assert alarm(NOTE).severity == -1


@pytest.mark.parametrize(
    ("verdict", "skips", "rollbacks", "discarded"),
    [
        (NOTE, 0, 0, 0),
        ("overflow", 0, 0, 0),
        ("retry", 0, 0, 1),
        ("skip", 1, 0, 1),
        ("rollback", 0, 1, 1),
        ("pause", 0, 1, 1),
        ("halt", 0, 1, 1),
    ],
)
def test_an_incident_counts_what_its_alarm_would_do(verdict, skips, rollbacks, discarded):
    one = alarm(verdict)
    incident = BacktestIncident(one, one, one)
    incident.add_alarm(one)
    counted = (incident.skips, incident.rollbacks, incident.steps_discarded)
    assert counted == (skips, rollbacks, discarded)


def test_a_repeated_batch_is_milder_than_a_skipped_update():
    retry, skip = alarm("retry"), alarm("skip", step=8)
    incident = BacktestIncident(retry, retry, retry)
    incident.add_alarm(retry)
    incident.add_alarm(skip)
    assert (incident.worst, incident.acted) == (skip, retry)
