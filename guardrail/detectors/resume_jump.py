"""The first steps after a resume are far above or BELOW the level before it.

A higher loss means that something was not restored: moments, schedule, scaler. A lower one means
that data is used a second time. Neither is a reason to skip an update. A spike directly after a
resume is judged like any other spike. So this is a note, which names the resume. Its onset is the
step itself: the decisions of a resumed run must not depend on the resume.
"""

from __future__ import annotations

from guardrail.core.records.findings import Finding, FindingKind, Observation, Severity
from guardrail.core.records.signals import GRAD_NORM, LOSS
from guardrail.detectors.base import Detector, DetectorParts
from guardrail.detectors.spike import NOTE_SHARE, Spike
from guardrail.detectors.spikes import GradNormSpike, LossSpike

# Rows after a resume that are compared. The first may have unusual data; a missing part of the
# state changes all of them.
ROWS = 4


class ResumeJump(Detector):
    """Notes signals that are off their baselines, up or down, after a resume.

    Args:
        spikes: the detectors with the baselines. A jump counts from where they note a spike.
    """

    name = "resume_jump"
    kind = FindingKind.RESUME_JUMP
    signals = (LOSS, GRAD_NORM)
    title = "Jump after a resume"
    help = """\
The first four steps after a resume are compared with the baseline from before it, upward and
downward.

- **Note:** a jump of 0.6 of a limit.
- A higher loss says that something was not restored: moments, schedule, scaler.
- A lower loss says that data is met a second time.
- It rejects nothing. A spike after a resume is a spike like any other.
- **Test:** `tests/unit/detectors/test_resume_jump.py`."""

    def __init__(self, *spikes: Spike) -> None:
        self.spikes = spikes

    @classmethod
    def create(cls, parts: DetectorParts) -> ResumeJump:
        return cls(parts.get(LossSpike), parts.get(GradNormSpike))

    def observe(self, obs: Observation) -> list[Finding]:
        findings = []
        for spike in self.spikes:
            distance = spike.distance(obs)
            if distance is None or spike.baseline.count < spike.min_history:
                continue
            jump, limit = abs(distance[0]), NOTE_SHARE * distance[1]
            if jump > limit:
                severity = Severity.NOTE
                findings.append(
                    spike.claim(obs, self.kind, severity, jump=jump, limit=limit, onset=obs.step)
                )
        return findings

    @classmethod
    def sentence(cls, finding: Finding) -> str:
        return (
            f"{finding.signal} {finding.value:.4g} after the resume, "
            f"{finding.baseline:.4g} before it"
        )
