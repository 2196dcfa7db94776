"""What an incident was, in plain sentences: one template per cause, filled with the numbers of its
evidence. Pure.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from guardrail.core.cause_evidence import (
    BatchesAhead,
    LabelOrder,
    OlderState,
    OtherBatches,
    SameBatch,
)
from guardrail.core.format import format_number, format_plural
from guardrail.core.records.findings import FindingKind
from guardrail.report.formats import file_name, format_signal, join_words, shorten
from guardrail.report.incident import Incident, IncidentAction, SkippedFile
from guardrail.report.skipped_files import typical_remark

STRUCTURED = 0.25  # least share of the normal label-order loss of a text with structure
NEIGHBOUR = 0.1  # a file with a smaller share of the largest one is only next to the bad ones
# What a heading calls a finding. Another kind is called by its own name.
_ANOMALIES = {
    FindingKind.NONFINITE: "NaN or Inf",
    FindingKind.NO_TOKENS: "A batch without labels",
    FindingKind.GRAD_SPIKE: "Gradient spike",
    FindingKind.EMBED_SPIKE: "Spike of the embedding gradient",
    FindingKind.UPDATE_SPIKE: "Spike of the update norm",
    FindingKind.GROWTH: "Growing norm",
    FindingKind.LEVEL_SHIFT: "Raised level",
    FindingKind.IMPOSSIBLE: "Impossible value",
    FindingKind.STUCK: "Repeated value",
    FindingKind.SCALE_COLLAPSE: "Collapse of the loss scale",
    FindingKind.RESUME_JUMP: "Jump after a resume",
}


@dataclass(frozen=True, kw_only=True)
class CauseTemplate:
    """Attributes:
    short: for a table.
    title: for a heading; slots: {files}, {rank}, {what}.
    conclusion: what the evidence shows, after it.
    """

    short: str
    title: str
    conclusion: str = ""


@dataclass(frozen=True, kw_only=True)
class Paragraph:
    """What an incident was: a heading, and sentences, most important first."""

    title: str
    sentences: tuple[str, ...]


NEW_DATA = CauseTemplate(
    short="new data",
    title="A new kind of data{files}",
    conclusion="The data is new to the model and has structure, so guardrail accepted it.",
)
RAISED = CauseTemplate(
    short="raised level",
    title="Raised values, but no spike",
    conclusion="Other batches have the same values, so guardrail applied the update.",
)
NOT_TESTED = CauseTemplate(short="not tested", title="{what}, cause not tested")
TEMPLATES = {
    "data": CauseTemplate(
        short="bad data",
        title="Bad data{files}",
        conclusion="The cause is the data, not the model.",
    ),
    "data, only from this state": CauseTemplate(
        short="data + state",
        title="Data that spikes only from this model state{files}",
        conclusion="The cause is this data together with this state of the model.",
    ),
    "state": CauseTemplate(
        short="model state",
        title="The state of the model, not the data",
        conclusion="The cause is the state of the model, not the data.",
    ),
    "not reproducible": CauseTemplate(
        short="not reproducible",
        title="A fault{rank} that did not repeat",
        conclusion="A rare case is harmless. If it returns, check this device.",
    ),
    "unknown": CauseTemplate(
        short="unknown",
        title="{what}, cause unknown",
        conclusion="The cause test had too little to compare with.",
    ),
}


def find_template(incident: Incident) -> CauseTemplate:
    """Return the template of an incident's cause. A cause that is not known is its own title."""
    if not incident.cause:
        return NOT_TESTED
    if incident.is_new_data:
        return NEW_DATA
    if incident.is_raised_only:
        return RAISED
    if incident.cause in TEMPLATES:
        return TEMPLATES[incident.cause]
    named = incident.cause.replace("{", "(").replace("}", ")")
    return CauseTemplate(short=named, title=f"{named}{{files}}")


def describe_incident(incident: Incident) -> Paragraph:
    """Return the paragraph of an incident: what was wrong, the evidence, the effect on the run."""
    template = find_template(incident)
    rank = ""
    if incident.cause_rank >= 0:
        rank = f" on rank {incident.cause_rank}"
    if rank and incident.cause_host:
        rank += f" (host {incident.cause_host})"
    title = template.title.format(
        files=list_files(incident.files), rank=rank, what=name_anomaly(incident)
    )
    sentences = [*_describe_tries(incident), *_describe_evidence(incident)]
    if template.conclusion:
        sentences.append(template.conclusion)
    sentences += [
        *_describe_text(incident),
        *_describe_effect(incident),
        *_describe_loss_after(incident),
    ]
    return Paragraph(title=title, sentences=tuple(sentences))


# -- what was wrong


def name_anomaly(incident: Incident) -> str:
    """Return "Loss spike", "NaN or Inf", ...; "Anomaly" if the journal has no finding."""
    worst = next(iter(incident.findings), None)
    if worst is None:
        return "Anomaly"
    if worst.kind in _ANOMALIES:
        return _ANOMALIES[worst.kind]
    words = worst.kind.value.replace("_", " ")
    return words[:1].upper() + words[1:]


def _describe_tries(incident: Incident) -> Iterator[str]:
    tried = [action for action in incident.actions if action.batch is not None]
    rejected = [action for action in tried if not action.action.startswith("would ")]
    if len(rejected) > 1 and not _is_retry(rejected):
        steps = [action.step + 1 for action in rejected]
        first, last = min(steps), max(steps)
        if first == last:
            yield f"guardrail rejected {len(rejected):,} consecutive batches at step {first:,}."
        else:
            yield f"guardrail rejected {len(rejected):,} batches at steps {first:,} to {last:,}."


def _is_retry(actions: Sequence[IncidentAction]) -> bool:
    return all(action.action == "retry" for action in actions)


def list_files(files: Sequence[SkippedFile]) -> str:
    """Return " in 5 files: 0357.txt to 0361.txt (under 300 bytes also from 0356.txt and 0362.txt)"."""
    if not files:
        return ""
    largest = max(file.bytes for file in files)
    few = [file for file in files if 0 < file.bytes < NEIGHBOUR * largest]
    bad = [file for file in files if file not in few]
    said = f" in {format_plural(len(bad), 'file')}: {_list_names(bad)}"
    if few:
        most = max(file.bytes for file in few)
        limit = 10 ** len(str(most))
        limit = min(limit, 100 * (most // 100 + 1))
        said += f" (under {limit:,} bytes also from {_list_names(few)})"
    return said


def _list_names(files: Sequence[SkippedFile]) -> str:
    names = [shorten(file_name(file.shown), 40) for file in files]
    if len(names) > 3 and _is_range(names):
        return f"{names[0]} to {names[-1]}"
    if len(names) > 3:
        return f"{', '.join(names[:2])} and {len(names) - 2:,} more"
    return join_words(names)


def _is_range(names: Sequence[str]) -> bool:
    """Return whether the names differ only by a number that counts up by one."""
    parts = [re.fullmatch(r"(\D*)(\d{1,15})(\D*)", os.path.basename(name)) for name in names]
    found = [(part[1], part[3], int(part[2])) for part in parts if part is not None]
    if len(found) < len(names) or len({part[:2] for part in found}) > 1:
        return False
    numbers = [part[2] for part in found]
    return numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def _describe_text(incident: Incident) -> Iterator[str]:
    if incident.samples and (
        remark := typical_remark(odd for s in incident.named for odd in s.odd)
    ):
        yield f"Typical of the skipped text: {remark}."


# -- how that is known


def _describe_evidence(incident: Incident) -> Iterator[str]:
    evidence = incident.evidence
    if evidence is None:
        return
    if evidence.same_batch is not None:
        yield from _describe_same_batch(evidence.same_batch)
    if evidence.older_state is not None:
        yield _describe_older_state(evidence.older_state)
    if evidence.other_batches is not None and evidence.other_batches.tested:
        yield _describe_other_batches(evidence.other_batches)
    if evidence.batches_ahead is not None and evidence.batches_ahead.spiked:
        yield _describe_batches_ahead(evidence.batches_ahead)
    if evidence.label_order is not None:
        yield _describe_label_order(evidence.label_order)


def _describe_same_batch(test: SameBatch) -> Iterator[str]:
    if test.repeated:
        return
    where = ""
    if test.where.startswith(("rank", "every")):
        where = f" on {test.where}"
    first, again = format_number(test.first), format_number(test.again)
    yield f"The same batch gave a {format_signal(test.signal)} of {first}{where}, then {again}."


def _describe_older_state(test: OlderState) -> str:
    if test.spiked:
        return f"Run again from the older state of step {test.step:,}, the data spikes too."
    return f"Run again from the older state of step {test.step:,}, the data is normal."


def _describe_other_batches(test: OtherBatches) -> str:
    normal = test.tested - test.spiked
    if not normal:
        return (
            f"All {format_plural(test.tested, 'other batch')} tested from the same state spike too."
        )
    verb = "are"
    if normal == 1:
        verb = "is"
    return f"{normal:,} of {format_plural(test.tested, 'other batch')} {verb} normal from the same state."


def _describe_batches_ahead(test: BatchesAhead) -> str:
    return (
        f"{test.spiked} of {test.tested} later batches "
        f"({test.nearest:,} to {test.farthest:,} batches ahead) spike too."
    )


def _describe_label_order(test: LabelOrder) -> str:
    here, normal = max(0.0, test.here), test.normal
    known = (
        f"Shuffling the labels costs {here:.1f} nats per token here and {normal:.1f} on normal text"
    )
    if not math.isfinite(here) or not normal > 0:
        return f"{known}."
    structured = "has no structure"
    if here / normal >= STRUCTURED:
        structured = "has structure"
    return f"{known}: this text {structured}."


# -- what it did to the run


def _describe_effect(incident: Incident) -> Iterator[str]:
    advised = [action for action in incident.actions if action.action.startswith("would ")]
    rollbacks = [action for action in incident.actions if action.action == "rollback"]
    if advised:
        yield "guardrail only reported it (mode advise): every update was applied."
    for rollback in rollbacks[-1:]:
        lost = sum(action.steps_lost for action in rollbacks)
        why = "guardrail"
        if incident.has_bad_updates:
            why = "Bad updates were in the weights, so guardrail"
        if rollback.to_step is None:
            to_step = "an older state"
        else:
            to_step = f"step {rollback.to_step:,}"
        yield f"{why} restored {to_step} ({format_plural(lost, 'step')} discarded)."
    is_over = incident.closed is not None
    if is_over and incident.cost.rejected and not rollbacks and not advised:
        yield "No bad update was applied, so no rollback was needed."
    for undo in [action for action in incident.actions if action.action == "undo"][-1:]:
        state = ""
        if undo.to_step is not None:
            state = f", which restored step {undo.to_step:,}"
        yield f"A user has undone a decision of the guard at step {undo.step:,}{state}."


def _describe_loss_after(incident: Incident) -> Iterator[str]:
    got, trend = (incident.measured.get(name, math.nan) for name in ("got", "expected"))
    if not math.isfinite(got) or not math.isfinite(trend):
        return
    noise = incident.measured.get("noise", math.nan)
    around = ""
    if math.isfinite(noise):
        around = f" (noise {format_number(noise)})"
    yield (
        f"Loss after the incident {format_number(got)}, "
        f"trend predicted {format_number(trend)}{around}."
    )
