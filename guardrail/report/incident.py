"""The record of one incident: findings, actions, skipped data, cost, and how it ended. Pure."""

from __future__ import annotations

import math

import msgspec

from guardrail.core.cause_evidence import CauseEvidence
from guardrail.core.records.findings import Finding
from guardrail.core.records.record import Record
from guardrail.core.records.spans import Span
from guardrail.core.records.verdicts import LossTrend


class Document(Record, frozen=True, kw_only=True):
    """A skipped range of a document. `record` counts from 1; 0 means that the file is the document."""

    path: str
    record: int = 0
    first_byte: int = 0
    last_byte: int = 0
    excerpt: str = ""


class Sample(Record, frozen=True, kw_only=True):
    """One sample that was found bad by itself, with its loss, its share of the gradient, and what
    is unusual about its text.
    """

    position: int
    loss: float = math.nan
    share: float = math.nan
    documents: tuple[Document, ...] = ()
    excerpt: str = ""
    odd: tuple[str, ...] = ()


class Token(Record, frozen=True, kw_only=True):
    """A token whose row of the embedding gradient was among the longest at a rejected step.

    Attributes:
        text: "" where no tokenizer was at hand; characters that do not print are escapes.
        share: of the squared norm of the embedding gradient, in [0, 1].
        norm: of its row of that gradient, before clipping.
        count: in the batch; -1: not counted.
    """

    id: int
    text: str = ""
    share: float = math.nan
    norm: float = math.nan
    count: int = -1

    def sentence(self) -> str:
        """Return 'token 126 "~": up to 87% of the gradient of the embedding, norm 1.46, 264 times
        in the batch'.
        """
        facts = []
        if math.isfinite(self.share):
            facts = [f"up to {100 * self.share:.2g}% of the gradient of the embedding"]
        if math.isfinite(self.norm):
            facts.append(f"norm {self.norm:.4g}")
        if self.count >= 0:
            facts.append(f"{self.count:,} times in the batch")
        if self.text:
            named = f'token {self.id} "{self.text}"'
        else:
            named = f"token {self.id}"
        if facts:
            return f"{named}: {', '.join(facts)}"
        return named


class SkippedFile(Record, frozen=True, kw_only=True):
    """A file with skipped documents or records, as far as the journal names them.

    Attributes:
        path: in full.
        shown: the path relative to the folder of the data.
        bytes: that were skipped; 0: the journal does not say.
        records: the number of its records, where it holds several documents.
        remark: what is odd about its text, "" where nothing was found.
        excerpts: beginnings of the skipped ranges.
    """

    path: str
    shown: str
    bytes: int = 0
    records: int = 0
    remark: str = ""
    excerpts: tuple[str, ...] = ()


class IncidentAction(Record, frozen=True, kw_only=True):
    """What was done about an incident.

    Attributes:
        action: "skip", "rollback", "pause", "halt", "retry", "remedy", "undo", or "would ..." if the
            guard only advised.
        step, timeline: of the run at the action.
        to_step, tier, steps_lost: of a rollback: the restored step, where its snapshot was, and the
            number of discarded updates.
        window: skipped positions [first, last) of the sample order.
        new_timeline: number of the timeline that it began; -1 if it began none.
        remedies: one sentence per remedy that belongs to it.
        short_remedies: the same in two or three words each, for the table of the summary.
        batch: positions [first, last) of the rejected batch.
        signal, value, baseline: of the most severe finding about that batch.
        samples_skipped: samples of the batch or the window; -1: the journal does not say.
    """

    action: str
    step: int
    timeline: int
    time: float
    sentence: str
    to_step: int | None = None
    tier: str = ""
    steps_lost: int = 0
    window: tuple[int, int] | None = None
    new_timeline: int = -1
    remedies: tuple[str, ...] = ()
    short_remedies: tuple[str, ...] = ()
    batch: tuple[int, int] | None = None
    signal: str = ""
    value: float = math.nan
    baseline: float = math.nan
    samples_skipped: int = -1


class Cost(Record, frozen=True, kw_only=True):
    """What an incident cost.

    Attributes:
        steps: number of applied updates that were discarded.
        seconds: time of these steps and of the rejected tries; NaN: not measured.
        parked: seconds that the run waited for an answer.
        rejected: number of updates that were not applied.
        excess: median difference, in nats per token, between the discarded or rejected losses since
            the onset and the trend before it; NaN without a trend.
        price: nats per token by which the discarded steps had improved on that trend. They must be
            repeated.
    """

    steps: int = 0
    seconds: float = math.nan
    parked: float = 0.0
    rejected: int = 0
    excess: float = math.nan
    price: float = 0.0

    @property
    def total_seconds(self) -> float:
        """Return training time plus waiting time in seconds; NaN if neither was measured."""
        if math.isnan(self.seconds):
            return self.parked or math.nan
        return self.seconds + self.parked


class Effect(Record, frozen=True, kw_only=True):
    """Whether the actions of an incident were worth their cost: losses compared with the trend
    before it, in nats per token.

    Attributes:
        excess: loss of discarded and rejected batches minus the trend.
        offset: loss after the incident minus the trend.
        price: improvement of the discarded steps on the trend.
        noise: of a single loss.
        worth: "yes", "no", or "within the noise".
    """

    excess: float
    offset: float
    price: float
    noise: float
    worth: str


class Incident(Record, frozen=True, kw_only=True):
    """Findings that belong together, with the actions and the skipped data. `number` is 0 if the
    journal gave none.

    Attributes:
        state: "open", "recovered", "accepted", "recovered with higher loss" or "repeated" (it came
            again after a rollback), as in the journal.
        modules: rank -> first module with a non-finite output.
        tokens: with the longest rows of the embedding gradient of any rejected step.
        cause, cause_reason: result of the cause test; "" if there was none.
        cause_rank, cause_host: the rank whose result did not reproduce; -1 and "" if there is none.
        evidence: the numbers of the cause test.
        has_bad_updates: updates of the bad data were applied before the first finding.
        is_new_data: it was classified as a new kind of data, and accepted.
        is_raised_only: raised values without a spike, which were applied.
        closed_step: step at which it was over; 0: it is open.
        curve: trend of the loss before the onset, if there were enough steps for a fit.
        outcome: the journal's sentence at its end.
        measured: numbers of that journal line: name -> value.
        files: those with skipped documents, sorted by path.
        effect: None if no loss can be compared with a trend.
    """

    number: int
    state: str
    onset: int
    opened: float
    closed: float | None = None
    findings: tuple[Finding, ...] = ()
    # rank -> names of parameters with non-finite gradients
    parameters: dict[str, list[str]] = msgspec.field(default_factory=dict)
    modules: dict[str, str] = msgspec.field(default_factory=dict)
    tokens: tuple[Token, ...] = ()
    actions: tuple[IncidentAction, ...] = ()
    spans: tuple[Span, ...] = ()
    samples: int = 0
    documents: tuple[Document, ...] = ()
    documents_total: int = 0
    named: tuple[Sample, ...] = ()
    cause: str = ""
    cause_reason: str = ""
    cause_rank: int = -1
    cause_host: str = ""
    evidence: CauseEvidence | None = None
    has_bad_updates: bool = False
    is_new_data: bool = False
    is_raised_only: bool = False
    closed_step: int = 0
    curve: LossTrend | None = None
    outcome: str = ""
    measured: dict[str, float] = msgspec.field(default_factory=dict)
    cost: Cost = Cost()
    files: tuple[SkippedFile, ...] = ()
    effect: Effect | None = None
