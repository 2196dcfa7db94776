"""The step counter of a recorded log went back: another run, or a resume from a checkpoint.

A live run restores a state and never shows this.
"""

from __future__ import annotations

from guardrail.core.records.findings import Finding, FindingKind, Observation, Severity
from guardrail.detectors.base import Detector


class Restart(Detector):
    """Notes a step whose number is lower than the one before it. The controller knows that."""

    name = "restart"
    kind = FindingKind.RESTART
    title = "Step counter that goes back"
    help = """\
- **Note:** in a recorded log, the number of a step is lower than the one before it.
- If it is at least half of the one before, the run was resumed from a checkpoint.
- Otherwise another run begins in the same log, and every detector begins anew.
- **Test:** `tests/unit/decide/test_controller.py`."""

    def observe(self, obs: Observation) -> list[Finding]:
        return [self.make_finding(obs, Severity.NOTE, signal="step", value=obs.step)]

    @classmethod
    def sentence(cls, finding: Finding) -> str:
        return f"the step counter goes back to {finding.step}"
