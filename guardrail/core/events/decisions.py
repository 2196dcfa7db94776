"""Journal lines about incidents: what was found, what was decided, and what was done."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from guardrail.core.cause_evidence import CauseEvidence
from guardrail.core.events.event import INCIDENT, Event, Int64, Positions
from guardrail.core.format import format_plural
from guardrail.core.records.findings import Finding
from guardrail.core.records.record import field_of
from guardrail.core.records.spans import Span
from guardrail.core.records.verdicts import Action, LossTrend, Remedy

Documents = tuple[Any, ...]  # `DocumentRef` fields; older versions wrote names
OPEN, REPEATED = "open", "repeated"
RECOVERED, HIGHER_LOSS, ACCEPTED = "recovered", "recovered with higher loss", "accepted"
CLOSED = (RECOVERED, HIGHER_LOSS, ACCEPTED)
ENDS = (*CLOSED, REPEATED)  # states in which the steps since the onset are complete


class StepJudged(Event, frozen=True, kw_only=True):
    """Base of `finding` and `verdict`: what was found in a step, and what follows.

    Attributes:
        action, would, beyond: see `Verdict`.
        batch: positions [first, last) of the batch.
        at_step: number of the update that was tried.
        parameters: rank -> names of parameters with a non-finite gradient.
        modules: rank -> the first module with a non-finite output.
        tokens: those with the longest rows of the embedding gradient.
    """

    symbol: ClassVar[str] = "▲"
    topic: ClassVar[str] = INCIDENT
    optional: ClassVar[frozenset[str]] = frozenset(("beyond", "parameters", "modules", "tokens"))

    action: str = ""
    would: str | None = None
    beyond: str | None = None
    findings: tuple[Finding, ...] = ()
    onset: Int64 | None = None
    window: Positions | None = None
    incident: Int64 | None = None
    batch: Positions | None = None
    at_step: Int64 | None = None
    parameters: dict[str, Any] = msgspec.field(default_factory=dict)
    modules: dict[str, Any] = msgspec.field(default_factory=dict)
    tokens: tuple[Any, ...] = ()


class FindingNoted(StepJudged, frozen=True, kw_only=True):
    """Something was found, and the update is applied."""

    kind: str = "finding"


class VerdictGiven(StepJudged, frozen=True, kw_only=True):
    """The guard decided about a step."""

    printed: ClassVar[bool] = True

    kind: str = "verdict"

    @property
    def tone(self) -> str:
        return "warn"

    @property
    def advised(self) -> str:
        """Return the action that the mode `advise` only names; "": the verdict is carried out."""
        if self.action not in APPLIED or self.would is None or self.would == Action.APPLY.value:
            return ""
        return self.would


class SamplesTaken(Event, frozen=True, kw_only=True):
    """Base of `skipped` and `rollback`: samples that the run skips from now on.

    Attributes:
        span: which; None where none are skipped, or the line cannot be read.
        count: how many samples.
        documents: the first of them, as `DocumentRef` fields; `documents_total`: all.
        samples: single samples with their loss and their share of the gradient.
        remedies: what is done besides.
    """

    topic: ClassVar[str] = INCIDENT
    optional: ClassVar[frozenset[str]] = frozenset(
        ("documents", "documents_total", "samples", "remedies")
    )

    span: Span | None = None
    count: Int64 = 0
    incident: Int64 | None = None
    documents: Documents = ()
    documents_total: Int64 = 0
    samples: tuple[Any, ...] = ()
    remedies: tuple[Remedy, ...] = ()

    @property
    def tone(self) -> str:
        return "warn"

    @property
    def is_by_user(self) -> bool:
        """Return whether a user asked for it."""
        return self.span is not None and self.span.origin == "user"

    def describe_samples(self) -> str:
        """Return "64 samples of 2 documents (a.txt, b.txt)"."""
        samples = format_plural(self.count, "sample")
        if not self.documents_total:
            return samples
        paths = [str(field_of(document, "path") or "") for document in self.documents]
        names = list(dict.fromkeys(path.rsplit("/", 1)[-1] for path in paths))
        more = ""
        if len(names) > 3 or self.documents_total > len(self.documents):
            more = ", ..."
        documents = format_plural(self.documents_total, "document")
        return f"{samples} of {documents} ({', '.join(names[:3])}{more})"


class Skipped(SamplesTaken, frozen=True, kw_only=True):
    """Samples were skipped."""

    symbol: ClassVar[str] = "S"
    printed: ClassVar[bool] = True

    kind: str = "skipped"

    def sentence(self) -> str:
        return self.message or f"skipped {self.describe_samples()}"


class RolledBack(SamplesTaken, frozen=True, kw_only=True):
    """An earlier state was restored, and the window that led to the rollback is skipped.

    Attributes:
        to_step, from_step: applied steps of the restored state, and of the state before the
            rollback.
        onset: first bad step.
        window: positions [first, last).
        tier: of the state: "memory" or "disk".
        new_timeline: that begins after `to_step`.
        escalation: action of the `[[guard.escalation]]` step; "" for a user's. "rung" on disk.
    """

    symbol: ClassVar[str] = "R"
    printed: ClassVar[bool] = True
    optional: ClassVar[frozenset[str]] = frozenset(("documents", "documents_total", "samples"))

    kind: str = "rollback"
    to_step: Int64 | None = None
    from_step: Int64 | None = None
    onset: Int64 | None = None
    window: Positions | None = None
    tier: str = ""
    new_timeline: Int64 | None = None
    escalation: str = msgspec.field(default="", name="rung")

    @property
    def notice(self) -> str:
        return self.kind

    def sentence(self) -> str:
        if self.message or self.to_step is None or self.from_step is None:
            return self.message
        lost = format_plural(self.from_step - self.to_step, "step")
        skipped = "nothing skipped"
        if self.span is not None and self.span.last > self.span.first:
            skipped = f"skipped {self.describe_samples()}"
        return f"restored step {self.to_step:,} from {self.tier} ({lost} discarded), {skipped}"


class Undone(Event, frozen=True, kw_only=True):
    """A decision was undone: an earlier state was restored, and its samples are allowed again.

    Attributes:
        lines: numbers of the journal lines that no longer hold.
        spans: that are no longer skipped.
        samples: number of samples in them.
        pardons: ranges [first, last) of positions that the guard must not reject again.
        rollbacks: timelines that the undone rollbacks began.
        to_step, from_step, tier, new_timeline: see `RolledBack`.
    """

    symbol: ClassVar[str] = "R"
    printed: ClassVar[bool] = True
    topic: ClassVar[str] = INCIDENT

    kind: str = "undo"
    lines: tuple[Int64, ...] = ()
    spans: tuple[Span, ...] = ()
    pardons: tuple[Positions, ...] = ()
    rollbacks: tuple[Int64, ...] = ()
    samples: Int64 = 0
    to_step: Int64 | None = None
    from_step: Int64 | None = None
    tier: str = ""
    new_timeline: Int64 | None = None
    incident: Int64 | None = None

    @property
    def tone(self) -> str:
        return "warn"

    @property
    def notice(self) -> str:
        return self.kind


class RemedyUsed(Event, frozen=True, kw_only=True):
    """A remedy without skipped data. Only older versions wrote such lines.

    Attributes:
        remedies: fields of `Remedy`, of which the line may lack some.
    """

    printed: ClassVar[bool] = True
    topic: ClassVar[str] = INCIDENT

    kind: str = "remedy"
    who: str | None = None
    incident: Int64 | None = None
    remedies: tuple[Any, ...] = ()


class IncidentChanged(Event, frozen=True, kw_only=True):
    """An incident opened, repeated or ended.

    Attributes:
        number: of the incident, from 1.
        state: "open", "repeated", "recovered", "recovered with higher loss" or "accepted".
        steps_lost: applied steps that rollbacks discarded for it.
        curve: of the loss before the onset, on a line that opens it.
        expected, got, noise, offset: see `RecoveryResult`, on a line that ends it.
    """

    symbol: ClassVar[str] = "#"
    printed: ClassVar[bool] = True
    topic: ClassVar[str] = INCIDENT
    optional: ClassVar[frozenset[str]] = frozenset(
        ("steps_lost", "curve", "expected", "got", "noise", "offset")
    )

    kind: str = "incident"
    number: Int64 = 0
    state: str = ""
    onset: Int64 | None = None
    steps_lost: Int64 | None = None
    at_step: Int64 | None = None
    curve: LossTrend | None = None
    expected: float | None = None
    got: float | None = None
    noise: float | None = None
    offset: float | None = None

    @property
    def is_closed(self) -> bool:
        return self.state in CLOSED

    @property
    def tone(self) -> str:
        return "good" if self.is_closed else "plain"

    @property
    def notice(self) -> str:
        return "incident" if self.state == OPEN else self.state

    def sentence(self) -> str:
        """Return "incident 1: recovered: loss 2.3, trend 2.2 (noise 0.1); 17 steps repeated"."""
        if self.message:
            return self.message
        said = f"incident {self.number}: {self.state}"
        repeated = format_plural(self.steps_lost or 0, "step")
        if self.state == ACCEPTED:
            return f"{said} as it is after step {self.step}"
        if self.state == REPEATED:
            return f"{said}, {repeated} repeated so far"
        if self.got is not None and self.expected is not None:
            said += f": loss {self.got:.4g}, trend before step {self.onset} {self.expected:.4g}"
            said += f" (noise {self.noise or 0.0:.2g})"
        if self.is_closed and self.steps_lost:
            said += f"; {repeated} repeated"
        return said


class Diagnosed(Event, frozen=True, kw_only=True):
    """The cause test of an incident has a result; see `Diagnosis` for the fields of that name.

    Attributes:
        incident: number of the incident.
        at_step, batch: of the rejected step.
        onset: first step of the anomaly.
        signals: for which the step was rejected.
    """

    printed: ClassVar[bool] = True
    topic: ClassVar[str] = INCIDENT

    kind: str = "diagnosis"
    cause: str = ""
    reason: str = ""
    rank: Int64 = -1
    host: str = ""
    passes: Int64 = 0
    applied: bool = False
    positions: tuple[Int64, ...] = ()
    ahead: bool = False
    structure: float | None = None
    shift: bool = False
    borne: bool = False
    evidence: CauseEvidence | None = None
    incident: Int64 | None = None
    at_step: Int64 | None = None
    batch: Positions | None = None
    onset: Int64 | None = None
    signals: tuple[str, ...] = ()

    def sentence(self) -> str:
        return self.message or f"cause of incident {self.incident}: {self.cause}: {self.reason}"


# Actions of the mode `advise`: it applies each update, but for those that fp16 skips.
APPLIED = (Action.APPLY.value, Action.FP16_OVERFLOW.value)
# Actions by which something is done about an incident.
ACTS = (Action.SKIP.value, Action.ROLLBACK.value, Action.RETRY.value)
