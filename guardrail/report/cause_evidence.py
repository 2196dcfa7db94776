"""The evidence of a `diagnosis` line of the journal. Pure.

The line holds it under `evidence`. Older versions wrote the numbers into the sentence `reason`
alone; this module parses them. What does not fit stays unknown.
"""

from __future__ import annotations

import math
import re

from guardrail.core.cause_evidence import (
    BatchesAhead,
    CauseEvidence,
    LabelOrder,
    OlderState,
    OtherBatches,
    SameBatch,
)
from guardrail.core.events.decisions import Diagnosed
from guardrail.core.files import as_int
from guardrail.core.text import clean_text

LONGEST = 2000  # characters of a sentence that are read
_NUMBER = r"(-?(?:\d[\d.]*(?:e[+-]?\d+)?|nan|inf))"
_AGAIN = re.compile(rf"^(\S+) {_NUMBER} comes again")
_OTHERS = re.compile(rf"(\d+) of (\d+) other batches show it \(([^)]*)\)(?: over {_NUMBER})?")
_OLDER = re.compile(
    rf"from the state of step (\d+) (.*?)(?:, where another batch has {_NUMBER})? (too|only)\b"
)
_HAS = re.compile(rf" has {_NUMBER}")
_AHEAD = re.compile(r"so do (\d+) of (\d+) batches (\d+) to (\d+) ahead")
_ORDER = re.compile(
    rf"in another order the loss is {_NUMBER} higher, and {_NUMBER} with usual batches"
)
_OTHER_NUMBER = re.compile(
    r"gave another number(?: on (.*?)| (in the reduction between the ranks))?: "
    rf"(.*?) {_NUMBER} at first and {_NUMBER} then"
)


def find_evidence(event: Diagnosed) -> CauseEvidence | None:
    """Return the evidence of a `diagnosis` line; None where it has none that can be read."""
    if "evidence" in event.data:
        return event.evidence
    found = evidence_from_sentence(event.reason[:LONGEST])
    return None if found.is_empty else found


def evidence_from_sentence(reason: str) -> CauseEvidence:
    """Return the numbers in the sentence of older versions, which wrote no `evidence`."""
    return CauseEvidence(
        same_batch=_find_same_batch(reason),
        other_batches=_find_other_batches(reason),
        older_state=_find_older_state(reason),
        batches_ahead=_find_batches_ahead(reason),
        label_order=_find_label_order(reason),
    )


def _find_same_batch(reason: str) -> SameBatch | None:
    if again := _AGAIN.search(reason):
        value = _parse_number(again[2])
        return SameBatch(signal=clean_text(again[1], 60), repeated=True, first=value, again=value)
    if other := _OTHER_NUMBER.search(reason):
        return SameBatch(
            signal=clean_text(other[3].removeprefix("the "), 60),
            repeated=False,
            first=_parse_number(other[4]),
            again=_parse_number(other[5]),
            where=clean_text(other[1] or other[2] or "", 120),
        )
    return None


def _find_other_batches(reason: str) -> OtherBatches | None:
    found = _OTHERS.search(reason)
    if found is None:
        return None
    values = tuple(_parse_number(value.strip()) for value in found[3].split(",") if value.strip())
    return OtherBatches(
        tested=as_int(int(found[2])),
        spiked=as_int(int(found[1])),
        values=values,
        limit=_parse_number(found[4]) if found[4] else None,
    )


def _find_older_state(reason: str) -> OlderState | None:
    found = _OLDER.search(reason)
    if found is None:
        return None
    return OlderState(
        step=as_int(int(found[1])),
        spiked=found[4] == "too",
        values=tuple(_parse_number(value) for value in _HAS.findall(found[2])),
        other_batch=_parse_number(found[3]) if found[3] else None,
    )


def _find_batches_ahead(reason: str) -> BatchesAhead | None:
    found = _AHEAD.search(reason)
    if found is None:
        return None
    spiked, tested, nearest, farthest = (as_int(int(number)) for number in found.groups())
    return BatchesAhead(tested=tested, spiked=spiked, nearest=nearest, farthest=farthest)


def _find_label_order(reason: str) -> LabelOrder | None:
    found = _ORDER.search(reason)
    if found is None:
        return None
    return LabelOrder(here=_parse_number(found[1]), normal=_parse_number(found[2]))


def _parse_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
