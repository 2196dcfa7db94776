"""Was it enough, and was it worth it: an incident of which every number is known, in all four forms
of the report.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from guardrail.cli.main import main
from guardrail.core.events.decisions import HIGHER_LOSS
from guardrail.core.events.kinds import with_data
from guardrail.core.files import encode_json
from guardrail.core.format import format_number
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.findings import Observation
from guardrail.core.records.signals import GRAD_NORM, LOSS
from guardrail.core.records.verdicts import Action, LossTrend, Verdict
from guardrail.decide.controller import Controller
from guardrail.decide.incident_line import make_incident_line
from guardrail.decide.run_history import RunHistory
from guardrail.report.build import build_report
from guardrail.report.costs import WITHIN_NOISE, judge_effect
from guardrail.report.incident import Cost, Incident
from guardrail.report.output import incident_text, render_report
from guardrail.report.render_html import LEGEND
from guardrail.report.text_chart import HEIGHT, WIDTH, draw_chart
from guardrail.rundir.run_directory import RunDirectory
from tests.support.feed import noisy

ONSET, BACK, SHIFT, SPIKE, SECONDS = 100, 97, 1.05, 50.0, 2.0


def power(step: float) -> float:
    """The loss of a healthy step: the fit before the onset finds this very curve."""
    return 10.0 * step**-0.3


class RecordedIncident:
    """A run whose numbers come from here, judged by the controller and put on the record as the
    guard does it.
    """

    def __init__(self, folder: Path, *, shift: float) -> None:
        self.run = RunDirectory.create(folder, "known", "")
        self.controller = Controller(GuardOptions())
        self.closed: Verdict | None = None
        self._rows = self.run.metrics_writer()
        for step in range(1, ONSET):
            self.step(step, power(step))
            if step == BACK:
                before = self.controller.state_dict()
        for streak in range(2):
            self.step(ONSET, SPIKE, streak=streak)
        if shift > 1.0:
            back: dict[str, Any] = {
                "to_step": BACK,
                "from_step": ONSET - 1,
                "onset": ONSET,
                "window": [792, 808],
            }
            line = self.run.append(
                "rollback", "back", step=ONSET - 1, timeline=1, new_timeline=1, incident=1, **back
            )
            self.controller.load_state_dict(before)
            self.controller.memory.load_rollbacks(RunHistory.from_events([line]).rollbacks)
        step = ONSET if shift == 1.0 else BACK + 1
        while self.closed is None:
            self.step(
                step, power(step) * (shift if step >= ONSET else 1.0), timeline=int(shift > 1.0)
            )
            step += 1
        self._rows.close()

    def step(self, step: int, loss: float, *, streak: int = 0, timeline: int = 0) -> None:
        signals = {LOSS: loss, GRAD_NORM: noisy(0.5)(step)}
        verdict = self.controller.observe(
            Observation(
                step=step, first=8 * step, last=8 * step + 8, signals=signals, streak=streak
            )
        )
        row: dict[str, Any] = {"step": step, "timeline": timeline, "step_time": SECONDS, **signals}
        self._rows.append(row | {"verdict": list(Action).index(verdict.action)})
        if verdict.findings:
            findings = json.loads(encode_json(verdict.findings))
            data = {
                "action": verdict.action.value,
                "findings": findings,
                "incident": verdict.incident,
            }
            self.run.append("verdict", verdict.reason, step=step - 1, timeline=timeline, **data)
        if verdict.incident_state:
            line = with_data(make_incident_line(self.controller.memory, verdict))
            self.run.append("incident", line.message, step=step - 1, timeline=timeline, **line.data)
            self.closed = verdict if verdict.outcome is not None else None


@pytest.fixture(scope="module")
def shifted(tmp_path_factory: pytest.TempPathFactory) -> RecordedIncident:
    """A rollback of two steps, and a loss that stays five per cent above its curve."""
    return RecordedIncident(tmp_path_factory.mktemp("shifted"), shift=SHIFT)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> RecordedIncident:
    """Two skips, and a loss that goes on as if nothing had been."""
    return RecordedIncident(tmp_path_factory.mktemp("clean"), shift=1.0)


def numbers(known: RecordedIncident) -> tuple[float, float, float]:
    """(Where the curve leads at the steps that were compared, what was measured there, the price of
    the steps lost).
    """
    assert known.closed is not None
    logs = [math.log(step) for step in range(known.closed.step - 7, known.closed.step + 1)]
    expected = power(math.exp(sum(logs) / len(logs)))
    return expected, expected * SHIFT, power(ONSET) - power(ONSET + ONSET - 1 - BACK)


def test_the_offset_and_its_price_are_the_known_numbers(shifted: RecordedIncident) -> None:
    expected, got, price = numbers(shifted)
    (incident,) = build_report(shifted.run).incidents
    assert incident.state == HIGHER_LOSS and shifted.closed is not None
    assert (incident.onset, incident.closed_step) == (ONSET, shifted.closed.step - 1)
    assert incident.curve is not None and incident.curve.slope == pytest.approx(-0.3)
    measured = {
        "expected": expected,
        "got": got,
        "offset": got - expected,
        "noise": 0.0,
        "steps_lost": 2,
    }
    assert incident.measured == pytest.approx(measured, abs=1e-9)
    cost = incident.cost
    assert (cost.steps, cost.rejected, cost.seconds) == (2, 2, 4 * SECONDS)
    assert cost.excess == pytest.approx(SPIKE - power(ONSET)) and cost.price == pytest.approx(price)


def test_all_four_forms_show_what_it_cost_and_whether_it_was_worth_it(
    shifted: RecordedIncident, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, got, price = numbers(shifted)
    parts = [
        format_number(got),
        format_number(expected),
        f"{SPIKE - power(ONSET):+.3g}",
        f"{got - expected:+.3g}",
        format_number(price),
        "2 steps discarded",
        "2 updates rejected",
        "8 s",
    ]
    forms = [render_report(shifted.run, form) for form in ("markdown", "html")]
    for said in (incident_text(shifted.run, 1), *forms):
        missing = [part for part in parts if part not in said.replace("\\+", "+")]
        assert not missing, said
    assert main(["report", str(shifted.run.path), "--json"]) == 0
    (incident,) = json.loads(capsys.readouterr().out)["incidents"]
    assert incident["measured"]["offset"] == pytest.approx(got - expected)
    assert {"steps", "seconds", "parked", "rejected", "excess", "price"} <= set(incident["cost"])
    effect = {"excess": SPIKE - power(ONSET), "offset": got - expected, "price": price, "noise": 0}
    assert incident["effect"].pop("worth") == "yes"
    assert incident["effect"] == pytest.approx(effect, abs=1e-9)


def test_what_cost_no_step_and_left_no_offset(clean: RecordedIncident) -> None:
    (incident,) = build_report(clean.run).incidents
    assert incident.state == "recovered" and incident.measured["offset"] == pytest.approx(
        0.0, abs=1e-9
    )
    assert (incident.cost.steps, incident.cost.price) == (0, 0.0)
    assert incident.effect is not None and incident.effect.worth == "yes"
    assert incident.effect.excess == pytest.approx(SPIKE - power(ONSET))
    assert "discarded steps" not in incident_text(clean.run, 1)


def test_a_gain_below_its_price_is_not_worth_it() -> None:
    def worth(excess: float, offset: float, noise: float = 0.0) -> str | None:
        cost, measured = (
            Cost(steps=100, excess=excess, price=0.2),
            {"offset": offset, "noise": noise},
        )
        incident = Incident(number=1, state="offset", onset=5, opened=0.0, measured=measured)
        effect = judge_effect(incident, cost)
        return effect.worth if effect is not None else None

    assert worth(0.5, 0.1) == "yes" and worth(0.5, 0.4) == "no"
    assert worth(0.5, 0.1, 0.3) == worth(0.5, 0.4, 0.3) == WITHIN_NOISE
    assert worth(math.nan, 0.1) is None and worth(0.5, math.nan) is None


# -- the curves


def points(page: str, name: str) -> dict[float, float]:
    (found,) = re.findall(rf'<polyline class="{name}" points="([^"]*)"', page)[:1]
    pairs = (point.split(",") for point in found.split())
    return {float(x): float(y) for x, y in pairs}


def test_the_page_draws_where_the_loss_was_heading(shifted: RecordedIncident) -> None:
    """It lies on the losses before the onset, and below those that stayed up after it."""
    page = render_report(shifted.run, "html")
    heading, here = points(page, "heading"), points(page, "here")
    assert shifted.closed is not None
    span = max(here) - min(here)
    onset = min(here) + span * (ONSET - 1) / (shifted.closed.step - 1)
    assert max(heading) == pytest.approx(max(here), abs=span / shifted.closed.step + 0.2)
    before = {x: y for x, y in heading.items() if x < onset - 1}
    after = {x: y for x, y in heading.items() if x > onset + 1}
    assert len(before) > 30 and len(after) > 20
    for x, y in heading.items():
        near = here[min(here, key=lambda other: abs(other - x))]
        assert abs(near - y) < 1.0 if x in before else y - near > 1.0 if x in after else True
    assert LEGEND in page


def test_the_terminal_draws_the_loss(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "drawn", "")
    assert draw_chart(run, []) == []
    with run.metrics_writer() as rows:
        for step in range(1, 69):
            rows.append(
                {"step": step, "timeline": 0, "verdict": 0, "loss": 6.0 - 4.0 * (step - 1) / 67}
            )
        rows.append({"step": 69, "timeline": 0, "verdict": 1, "loss": math.nan})
        rows.append({"step": 35, "timeline": 0, "verdict": 1, "loss": 3.0})
    run.append("rollback", to_step=60, from_step=68, new_timeline=1)
    # Flat at e: drawn below the line where it is, above it in the end.
    flat = LossTrend(middle=0.0, level=1.0, slope=0.0, noise=0.1, spread=1.0, count=68)
    lines = draw_chart(run, [Incident(number=1, state="open", onset=69, opened=0.0, curve=flat)])
    assert all(len(line) <= 80 and line.isascii() for line in lines)
    picture = [line[11:].ljust(WIDTH) for line in lines[:HEIGHT]]
    assert picture[0][0] == "*" and picture[-1][-2] == ".", (
        "from the first loss to the last, which was discarded"
    )
    assert picture[0][-1] == "x", "what is not finite is at the top"
    assert sum(row.count("x") for row in picture) == 2 and picture[7][34] == "x"
    (row,) = [number for number, line in enumerate(picture) if "-" in line]
    assert row == round((6.2 - math.e) / 4.4 * 9) and lines[0].split("|")[0].strip() == "6.2"
    assert lines[HEIGHT + 1].split() == ["1", "69"]
    assert all(f"{mark} " in lines[-1] for mark in "*.x-"), "each mark is explained"


def test_tries_far_off_do_not_flatten_the_rest_and_the_chart_is_added_on_demand(
    shifted: RecordedIncident,
) -> None:
    assert not [
        line for line in render_report(shifted.run, "terminal").splitlines() if " |" in line
    ]
    lines = render_report(shifted.run, "terminal", chart=True).splitlines()
    drawn = [line for line in lines if re.match(r"^ {0,9}[\d.]* +\|", line)]
    assert len(drawn) == HEIGHT and "x" in drawn[0]
    assert sum("*" in line for line in drawn) >= HEIGHT // 2


@pytest.mark.parametrize(
    "curve",
    [
        None, 3, {}, {"middle": "x"},
        {"middle": 4.0, "level": math.inf, "slope": -1, "noise": 0, "spread": 1, "count": 8},
        {"middle": 4.0, "level": 1.0, "slope": -1e5, "noise": 0, "spread": 1, "count": 8},
        {"middle": 1e300, "level": 1.0, "slope": -1, "noise": 0, "spread": 1, "count": 8},
        {"middle": 100, "level": 99, "slope": -5, "noise": 0, "spread": 1, "count": 10**30},
    ],
)  # fmt: skip
def test_a_curve_of_a_hostile_journal_breaks_nothing(tmp_path: Path, curve: Any) -> None:
    run = RunDirectory.create(tmp_path, "hostile", "")
    with run.metrics_writer() as rows:
        for step in range(4):
            rows.append({"step": step, "timeline": 0, "verdict": step % 2, "loss": 2.0})
    run.append("verdict", "x", action="skip", step=0, incident=1)
    run.append("incident", "x", step=0, number=1, state="open", onset=0, curve=curve)
    run.append(
        "incident", "x", step=3, number=1, state="offset", onset=0, offset="nan", curve=curve
    )
    for form in ("terminal", "markdown", "html"):
        assert "incident" in render_report(run, form).lower()
    assert msgspec.json.decode(encode_json(build_report(run)))
