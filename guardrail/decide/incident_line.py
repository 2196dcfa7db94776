"""The `incident` line of the journal, for a verdict that opens, repeats or ends an incident. Pure."""

from __future__ import annotations

from msgspec.structs import replace

from guardrail.core.events.decisions import IncidentChanged
from guardrail.core.records.verdicts import Verdict
from guardrail.decide.memory import ControllerMemory


def make_incident_line(memory: ControllerMemory, verdict: Verdict) -> IncidentChanged:
    """Return the journal line of a verdict that opens, repeats or ends an incident."""
    assert verdict.incident is not None
    number, outcome = verdict.incident, verdict.outcome
    rollbacks = [one for one in memory.rollbacks if one.incident == number]
    line = IncidentChanged(
        number=number,
        state=verdict.incident_state,
        onset=_find_onset(memory, verdict),
        steps_lost=sum(one.from_step - one.to_step for one in rollbacks),
        at_step=verdict.step,
    )
    if not line.is_closed:
        return replace(line, curve=memory.incidents.curve)
    if outcome is None:
        return line
    return replace(
        line,
        expected=outcome.expected,
        got=outcome.got,
        noise=outcome.noise,
        offset=outcome.offset,
    )


def _find_onset(memory: ControllerMemory, verdict: Verdict) -> int | None:
    """Return the first step of the incident; None: it is not known any more."""
    if verdict.onset:
        return verdict.onset
    ended = [one.onset for one in memory.incidents.ended if one.number == verdict.incident]
    return ended[0] if ended else None
