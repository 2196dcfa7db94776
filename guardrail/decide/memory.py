"""What a controller knows that outlives a rollback and a crash. The journal holds it. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.findings import Finding, Observation, Severity
from guardrail.core.records.verdicts import Diagnosis
from guardrail.decide.diagnoses import Diagnoses
from guardrail.decide.incidents import Incidents
from guardrail.decide.rollback import Rollback
from guardrail.detectors.build import find_detector

Range = tuple[int, int]  # positions [first, last) of the sample order


class ControllerMemory:
    """Rollbacks, incidents, causes, and batches that are applied even with findings.

    Attributes:
        incidents: numbered; the last one may be open.
        rollbacks: all that were done and not undone, oldest first.
        diagnoses: results of the cause tests.
        allowlist: ranges whose batches are applied with any finite finding.
        levels: batches with which the data became another kind; applied likewise.
        tolerated: batches that were raised a little, with no batch as the cause; applied likewise.
        empty_spans: batches that were rejected because they had no labels, which is no anomaly.
    """

    def __init__(self, settings: GuardOptions) -> None:
        self.incidents = Incidents(confirm=settings.steps_until_good)
        self.rollbacks: list[Rollback] = []
        self.diagnoses = Diagnoses()
        self.allowlist: list[Range] = list(settings.allowlist)
        self.levels: list[Range] = []
        self.tolerated: list[Range] = []
        self.empty_spans: set[Range] = set()

    # -- batches that are applied ------------------------------------------------------------------

    def is_allowlisted(self, obs: Observation, findings: Iterable[Finding]) -> bool:
        """Return whether a user has allowed this batch. NaN is never allowed."""
        for first, last in self.allowlist:
            if first < obs.last and obs.first < last:
                return _may_be_applied(findings)
        return False

    def begins_level(self, obs: Observation, findings: Iterable[Finding]) -> bool:
        """Return whether the data is another kind from this batch on, as a cause test has shown."""
        return _begins_in(self.levels, obs) and _may_be_applied(findings)

    def is_tolerated(self, obs: Observation) -> bool:
        """Return whether every batch is as high as this one, as a cause test has shown."""
        return _begins_in(self.tolerated, obs)

    def note_cause(self, diagnosis: Diagnosis, batch: Range) -> None:
        """Note what a diagnosis says about the batch itself."""
        if diagnosis.shift:
            self.levels.append(batch)
        if diagnosis.borne:
            self.tolerated.append(batch)

    def allow(self, ranges: Iterable[Range]) -> None:
        """Do not reject batches with a position in these ranges again: a user has undone that."""
        self.allowlist += [(first, last) for first, last in ranges]

    def accept(self, step: int, batch: Range) -> tuple[int, ...]:
        """Accept the run as it is after `step` updates.

        Args:
            batch: positions [first, last) of the next batch. While an incident is open, it is the
                first one of a new level.

        Returns:
            The incidents that were not over.
        """
        if self.incidents.open:
            self.levels.append(batch)
        return self.incidents.accept(step)

    # -- rollbacks ---------------------------------------------------------------------------------

    def load_rollbacks(self, rollbacks: Iterable[Rollback]) -> None:
        """Replace the rollbacks of the run; oldest first."""
        self.rollbacks = list(rollbacks)

    def go_back(self, step: int, rollbacks: Iterable[Rollback]) -> None:
        """Follow the run to the state after `step` updates.

        Args:
            rollbacks: all of the run, oldest first.
        """
        self.load_rollbacks(rollbacks)
        self.incidents.rewind(step)


def _begins_in(ranges: Iterable[Range], obs: Observation) -> bool:
    return any(first <= obs.first < last for first, last in ranges)


def _may_be_applied(findings: Iterable[Finding]) -> bool:
    """Return whether no rejecting finding makes the update meaningless."""
    return all(
        finding.severity is Severity.NOTE or find_detector(finding.kind).may_be_allowlisted
        for finding in findings
    )
