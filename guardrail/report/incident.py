"""What there is to know of one incident: what was seen, what was done, what was left out, how it
ended. Pure.
"""

from __future__ import annotations

import math

import msgspec

from guardrail.core.records import Finding, LossTrend, Record, Span


class Document(Record, frozen=True, kw_only=True):
    """A stretch of a document that was left out. `record` counts from 1; 0: the file is the
    document.
    """

    path: str
    record: int = 0
    first_byte: int = 0
    last_byte: int = 0
    excerpt: str = ""


class Sample(Record, frozen=True, kw_only=True):
    """One sample that was left out by itself: its loss, its share of the trouble, and what is odd
    about its text.
    """

    position: int
    loss: float = math.nan
    share: float = math.nan
    documents: tuple[Document, ...] = ()
    excerpt: str = ""
    odd: tuple[str, ...] = ()


class Token(Record, frozen=True, kw_only=True):
    """A token whose row of the embedding's gradient was among the longest at a rejected step.

    Attributes:
        text: "" where no tokenizer was at hand; what does not print stands in it as an escape.
        share: of the squared norm of the embedding's gradient, in [0, 1].
        norm: of its row of that gradient, before clipping.
        count: in the batch; -1: nobody counted.
    """

    id: int
    text: str = ""
    share: float = math.nan
    norm: float = math.nan
    count: int = -1

    def sentence(self) -> str:
        """'token 126 "~": up to 87% of the gradient of the embedding, norm 1.46, 264 times in the
        batch'
        """
        facts = (
            [f"up to {100 * self.share:.2g}% of the gradient of the embedding"]
            if math.isfinite(self.share)
            else []
        )
        facts += [f"norm {self.norm:.4g}"] if math.isfinite(self.norm) else []
        facts += [f"{self.count:,} times in the batch"] if self.count >= 0 else []
        named = f'token {self.id} "{self.text}"' if self.text else f"token {self.id}"
        return f"{named}: {', '.join(facts)}" if facts else named


class IncidentAction(Record, frozen=True, kw_only=True):
    """What was done about an incident.

    Attributes:
        action: "skip", "rollback", "pause", "halt", "retry", "remedy", "undo", or "would ..." where
            the guard only advised.
        step, timeline: where the run stood.
        to_step, tier, steps_lost: of a rollback: the snapshot used, and applied updates that were
        given up.
        window: positions [first, last) of the sample order that were left out.
        new_timeline: that it began, -1 if it began none.
        remedies: what went with it, a sentence each.
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


class Cost(Record, frozen=True, kw_only=True):
    """What an incident has cost.

    Attributes:
        steps: applied updates that were given up.
        seconds: that these and the rejected tries took; NaN where no row has measured it.
        parked: seconds that the run waited for a person.
        rejected: updates that were kept out of the weights.
        excess: nats a token, median, by which the losses from the onset on that were given up or
            rejected stand above the curve from before it; NaN where there is none.
        price: nats a token that the given-up steps bring on that curve: what it costs to make them
        again.
    """

    steps: int = 0
    seconds: float = math.nan
    parked: float = 0.0
    rejected: int = 0
    excess: float = math.nan
    price: float = 0.0


class Incident(Record, frozen=True, kw_only=True):
    """Findings that belong together, with what was done and what was left out. `number` 0: the
    journal gave none.

    Attributes:
        state: "open", "recovered", "offset" (a loss that stays above what was expected) or
        "recurred".
        tokens: that pulled hardest on the embedding where it was in trouble, by the longest row of
        any rejected step.
        cause, cause_reason: what a replay has shown, "" where none was made.
        closed_step: of the run when it was over; 0: it is not.
        curve: of the loss before the onset, where there was enough of it.
        outcome: the sentence that closed it.
        measured: the numbers of that sentence, as far as the journal has them: name -> value.
    """

    number: int
    state: str
    onset: int
    opened: float
    closed: float | None = None
    findings: tuple[Finding, ...] = ()
    # rank -> non-finite gradients
    parameters: dict[str, list[str]] = msgspec.field(default_factory=dict)
    tokens: tuple[Token, ...] = ()
    deeds: tuple[IncidentAction, ...] = ()
    spans: tuple[Span, ...] = ()
    samples: int = 0
    documents: tuple[Document, ...] = ()
    documents_total: int = 0
    named: tuple[Sample, ...] = ()
    cause: str = ""
    cause_reason: str = ""
    closed_step: int = 0
    curve: LossTrend | None = None
    outcome: str = ""
    measured: dict[str, float] = msgspec.field(default_factory=dict)
    cost: Cost = Cost()
