"""The run does not go on where it was: the first steps after a resume stand far above or BELOW what
came before.

A loss that is higher says that something was not restored (moments, schedule, scaler). One that is
lower says that data is met a second time. Neither is a reason to leave an update out, and a spike
right after a resume is a spike like any other; so this is a note, which names the resume. Its onset
is the step itself: what a resumed run decides must not depend on that it was resumed.
"""

from __future__ import annotations

from collections.abc import Iterable

from guardrail.core.records import Finding, FindingKind, Observation, Severity
from guardrail.detectors.spike import NOTE_SHARE, Spike

# Rows that are looked at: the first may meet odd data, and what was not restored shows in all of
# them.
ROWS = 4


def resume_jumps(obs: Observation, spikes: Iterable[Spike]) -> list[Finding]:
    """Signals that are off their baselines, up or down, by as much as a spike detector finds worth
    a note.
    """
    findings = []
    for spike in spikes:
        distance = spike.distance(obs)
        if distance is None or spike.baseline.count < spike.warmup:
            continue
        jump, limit = abs(distance[0]), NOTE_SHARE * distance[1]
        if jump > limit:
            findings.append(
                spike.claim(
                    obs,
                    FindingKind.RESUME_JUMP,
                    Severity.NOTE,
                    jump=jump,
                    limit=limit,
                    onset=obs.step,
                )
            )
    return findings
