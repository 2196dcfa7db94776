"""The first steps after a resume, whose jumps are noted once for each signal. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from guardrail.core.records.findings import Finding, Observation
from guardrail.detectors.resume_jump import ROWS, ResumeJump


class ResumeWatch:
    """Asks the detector of resume jumps about the first rows after a resume.

    Attributes:
        rows: how many are still to be compared; each step reads it.

    Args:
        detector: compares a step with the level before the resume.
    """

    def __init__(self, detector: ResumeJump) -> None:
        self._detector = detector
        self.rows = 0
        self._noted: set[str] = set()  # signals whose jump was noted

    def begin(self) -> None:
        """Compare the next rows."""
        self.rows, self._noted = ROWS, set()

    def observe(self, obs: Observation) -> list[Finding]:
        """Return the jumps of this row that were not noted before."""
        self.rows -= 1
        found = self._detector.observe(obs)
        findings = [finding for finding in found if finding.signal not in self._noted]
        self._noted.update(finding.signal for finding in findings)
        return findings

    def state(self) -> list[Any]:
        """Return the state as JSON values; []: no resume is being watched."""
        return [self.rows, *sorted(self._noted)] if self.rows else []

    def load_state(self, state: Sequence[Any]) -> None:
        """Take over a state."""
        self.rows, self._noted = 0, set()
        if state:
            self.rows, self._noted = int(state[0]), set(state[1:])
