"""Each cause has a template, and its paragraph the numbers of the evidence."""

from __future__ import annotations

import re
from typing import Any

import pytest

from guardrail.core.cause_evidence import (
    CauseEvidence,
    LabelOrder,
    OlderState,
    OtherBatches,
    SameBatch,
)
from guardrail.core.records.findings import FindingKind
from guardrail.core.records.verdicts import Cause
from guardrail.report.cause_sentences import (
    NEW_DATA,
    NOT_TESTED,
    RAISED,
    TEMPLATES,
    describe_incident,
    find_template,
    list_files,
)
from guardrail.report.incident import Incident, SkippedFile
from guardrail.report.table_rows import describe_finding, describe_findings
from tests.support.findings import make_finding


def incident(**changes: Any) -> Incident:
    return Incident(**{"number": 1, "state": "recovered", "onset": 5, "opened": 0.0, **changes})


@pytest.mark.parametrize("cause", [cause.value for cause in Cause])
def test_each_cause_has_a_template(cause: str) -> None:
    assert find_template(incident(cause=cause)) in TEMPLATES.values()


def test_what_a_cause_is_called_besides() -> None:
    assert find_template(incident()) is NOT_TESTED
    assert find_template(incident(cause="data", is_new_data=True)) is NEW_DATA
    assert find_template(incident(cause="state", is_raised_only=True)) is RAISED
    assert find_template(incident(cause="{x} 0.9")).short == "(x) 0.9"
    assert describe_incident(incident(cause="{files}{x}")).title.startswith("(files)(x)")


def test_the_paragraph_has_the_numbers_of_the_evidence() -> None:
    evidence = CauseEvidence(
        other_batches=OtherBatches(tested=5, spiked=1),
        older_state=OlderState(step=160, spiked=True),
        label_order=LabelOrder(here=-0.01, normal=2.1),
    )
    files = tuple(SkippedFile(path=f"{n}.txt", shown=f"{n}.txt", bytes=90) for n in (357, 358))
    said = describe_incident(incident(cause="data", evidence=evidence, files=files))
    assert "357.txt" in said.title and "2 files" in said.title
    text = " ".join(said.sentences)
    for number in ("160", "4 of 5", "0.0", "2.1"):
        assert number in text, number
    same = SameBatch(signal="gradient", repeated=False, first=1.5, again=1.25, where="rank 1 (vm)")
    fault = incident(
        cause="not reproducible",
        cause_rank=1,
        cause_host="vm",
        evidence=CauseEvidence(same_batch=same),
    )
    said = describe_incident(fault)
    assert "rank 1" in said.title and "1.5" in said.sentences[0] and "1.25" in said.sentences[0]


def test_every_sentence_is_short() -> None:
    """At most 20 words, by the rules of the project's texts."""
    for template in (*TEMPLATES.values(), NEW_DATA, RAISED, NOT_TESTED):
        assert len(template.conclusion.split()) <= 20


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({}, []),
        ({"a.txt": 9}, ["1", "a.txt"]),
        ({f"{n:04d}.txt": 900 for n in range(9)}, ["9", "0000.txt", "0008.txt"]),
        ({f"{n * n}.txt": 900 for n in range(9)}, ["9", "0.txt", "1.txt", "7"]),
        # Files with few bytes of the samples come last, after the limit in bytes.
        ({"1.txt": 5, "2.txt": 3000, "3.txt": 284}, ["1", "2.txt", "300", "1.txt", "3.txt"]),
        ({"1.txt": 0, "2.txt": 3000}, ["2", "1.txt", "2.txt"]),
    ],
)
def test_files_are_named_in_few_words(sizes: dict[str, int], named: list[str]) -> None:
    files = [SkippedFile(path=name, shown=name, bytes=size) for name, size in sizes.items()]
    said = list_files(files)
    assert re.findall(r"\w+\.txt|\d+", said) == named
    assert len(said) <= 70 and bool(said) == bool(sizes)


@pytest.mark.parametrize("kind", FindingKind)
def test_each_kind_of_finding_has_its_words(kind: FindingKind) -> None:
    found = make_finding(9, signal="embed_grad_norm", kind=kind, value=1640.4, ranks=(2,))
    said = describe_finding(found)
    assert 0 < len(said) <= 60 and "embed_grad_norm" not in said
    assert describe_findings([found])
