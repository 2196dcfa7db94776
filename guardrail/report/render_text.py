"""A report as plain text for a terminal, a pager or a mail. Pure; everything in a report is clean
already.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Iterator, Sequence

from guardrail.core.records import CommandKind, Finding, Mode, Span
from guardrail.report.incident import Document, Incident, IncidentAction, Sample
from guardrail.report.model import CheckpointLine, CommandRecord, Report, Restart

MAX_DOCUMENTS = 16  # named of one incident; the JSON report has all that the journal named
MAX_DEEDS = 12  # told of one incident


def tell(report: Report, *, drawn: Sequence[str] = ()) -> str:
    """`drawn`: lines of a picture, which stand behind the head."""
    lines = [
        *head_lines(report),
        "",
        *drawn,
        *([""] if drawn else []),
        *_incidents(report.incidents),
    ]
    for title, part in (
        (
            "Asked for by a person",
            [f"  step {deed.step:,}  {deed.sentence}" for deed in report.by_person],
        ),
        ("Commands", [command_line(answer) for answer in report.commands]),
        ("Restarts", [line for restart in report.restarts for line in restart_lines(restart)]),
        ("Checkpoints", list(shown_checkpoints(report.checkpoints))),
        ("Also noted", [f"  {trouble}" for trouble in report.troubles]),
    ):
        if part:
            lines += ["", title, *part]
    return "\n".join(lines)


def head_lines(report: Report) -> Iterator[str]:
    of = f" of {report.total_steps:,}" if report.total_steps else ""
    code = f" (exit {report.exit_code})" if report.exit_code is not None else ""
    yield f"{report.run}  {report.state}{code}  step {report.step:,}{of}"
    yield f"  {report.path}"
    if report.reason:
        yield f"  {report.reason}"
    elif report.state == "lost":
        yield "  ended without a last word; `guardrail launch --resume` goes on with it"
    facts = []
    if report.started:
        facts.append(f"started {_moment(report.started)}, {_duration(report.seconds)}")
    if report.world:
        facts.append(f"{_count(report.world, 'rank')}{f' on {report.host}' if report.host else ''}")
    if report.mode:
        facts.append(f"mode {report.mode}")
    if facts:
        yield f"  {', '.join(facts)}"
    numbers = []
    if report.loss is not None:
        numbers.append(f"loss {report.loss:.4g}")
    if report.eval_loss is not None:
        numbers.append(f"held-out loss {report.eval_loss:.4g}")
    if report.tokens:
        numbers.append(f"{report.tokens:,} tokens")
    if report.guard_share:
        numbers.append(f"guard {report.guard_share:.2%} of the step")
    if numbers:
        yield f"  {', '.join(numbers)}"
    if report.unresolved:
        yield f"  {report.unresolved}"
    if report.left_out:
        yield (
            f"  {_count(report.left_out, 'sample')} left out"
            if report.left_out > 0
            else "  samples were left out"
        )


def _incidents(incidents: tuple[Incident, ...]) -> Iterator[str]:
    if not incidents:
        yield "No incidents"
        return
    yield "Incidents"
    for incident in incidents:
        number = f"#{incident.number}" if incident.number else "#?"
        yield f"{number}  step {incident.onset:,}  {incident.state}"
        for finding in incident.findings:
            yield f"    {finding_line(finding)}"
        for rank, names in incident.parameters.items():
            yield f"    rank {rank}: not finite: {', '.join(names)}"
        for token in incident.tokens:
            yield f"    {token.sentence()}"
        if incident.cause:
            yield f"    cause: {incident.cause}: {incident.cause_reason}"
        for deed in incident.deeds[:MAX_DEEDS]:
            yield f"    {deed_line(deed)}"
            yield from (f"      with {remedy}" for remedy in deed.remedies)
        if len(incident.deeds) > MAX_DEEDS:
            yield f"    and {len(incident.deeds) - MAX_DEEDS} more of the kind"
        if cost := cost_of(incident):
            yield f"    cost: {cost}"
        if saved := saved_by(incident):
            yield f"    saved: {saved}"
        if worth := worth_of(incident):
            yield f"    worth: {worth}"
        if incident.outcome:
            yield f"    outcome: {incident.outcome}"
        yield from _left_out(incident)


def cost_of(incident: Incident) -> str:
    """ "3 steps given up, 12 samples left out, 1.3 s of training, 40 s parked", as far as it was
    measured.
    """
    cost = incident.cost
    parts = [f"{_count(cost.steps, 'step')} given up"] if cost.steps else []
    parts += [f"{_count(incident.samples, 'sample')} left out"] if incident.samples else []
    parts += [f"{_seconds(cost.seconds)} of training"] if cost.seconds == cost.seconds else []
    parts += [f"{_seconds(cost.parked)} parked"] if cost.parked else []
    return ", ".join(parts)


def saved_by(incident: Incident) -> str:
    """What was kept out of the weights: only what was measured, no guess at what would have become
    of the run.
    """
    if not incident.cost.rejected:
        return ""
    updates = f"{_count(incident.cost.rejected, 'update')} kept out of the weights"
    high = [f for f in incident.findings if f.baseline and not abs(f.value) <= abs(f.baseline)]
    if not high:
        return updates
    worst = max(
        high, key=lambda f: abs(f.value / f.baseline) if math.isfinite(f.value) else math.inf
    )
    times = f", {worst.value / worst.baseline:.3g} times" if math.isfinite(worst.value) else ""
    return (
        f"{updates}; {worst.signal} reached {worst.value:.4g} against {worst.baseline:.4g}{times}"
    )


def worth_of(incident: Incident) -> str:
    """Whether what was gained is worth the steps lost, in nats a token by the curve from before the
    onset: only what was measured, "" where there was no curve, no loss to hold against it or no
    loss after it. A gain within the noise of a single loss is called neither."""
    cost, offset, noise = (
        incident.cost,
        incident.measured.get("offset", math.nan),
        incident.measured.get("noise", 0.0),
    )
    if not math.isfinite(cost.excess) or not math.isfinite(offset):
        return ""
    gain = cost.excess - offset - cost.price
    said = f"loss against its curve: {cost.excess:+.3g} in what was given up or rejected, {offset:+.3g} after"
    if cost.steps:
        said += (
            f"; the {_count(cost.steps, 'step')} made again bring {cost.price:.2g} on that curve"
        )
    return f"{'within the noise' if abs(gain) <= noise else 'yes' if gain > 0 else 'no'}: {said}"


def sample_line(sample: Sample) -> str:
    """One sample that was left out by itself."""
    where = ", ".join(str(document_line(document)) for document in sample.documents)
    loss = f"loss {sample.loss:.4g}" if sample.loss == sample.loss else ""
    share = f"{sample.share:.0%} of the gradient" if sample.share == sample.share else ""
    facts = ", ".join(part for part in (loss, share, *sample.odd) if part)
    return f"position {sample.position:,}{f' of {where}' if where else ''}{f': {facts}' if facts else ''}"


def finding_line(finding: Finding) -> str:
    onset = f", since step {finding.onset:,}" if finding.onset < finding.step else ""
    return f"step {finding.step:,}: {finding.kind.value.replace('_', ' ')}: {finding.sentence()}{onset}"


def deed_line(deed: IncidentAction) -> str:
    if deed.action != "rollback" or deed.to_step is None:
        return deed.sentence or f"{deed.action} at step {deed.step:,}"
    tier = f" from {deed.tier}" if deed.tier else ""
    window = ""
    if deed.window:
        first, last = deed.window
        window = (
            f", leaving out positions {first:,} to {last - 1:,}"
            if first < last
            else ", leaving nothing out"
        )
    return f"rollback: back to step {deed.to_step:,}{tier}, {_count(deed.steps_lost, 'step')} lost{window}"


def _left_out(incident: Incident) -> Iterator[str]:
    where = stretches_line(incident)
    if not where:
        return
    yield f"    left out: {where}"
    for sample in incident.named[:MAX_DOCUMENTS]:
        yield f"      {sample_line(sample)}"
    for document in incident.documents[:MAX_DOCUMENTS]:
        yield f"      {document_line(document)}"
        if document.excerpt:
            yield f'        "{document.excerpt}"'
    shown = min(len(incident.documents), MAX_DOCUMENTS)
    if shown and incident.documents_total > shown:
        yield f"      and {_count(incident.documents_total - shown, 'more document')}"


def stretches_line(incident: Incident) -> str:
    """ "12 samples of 5 documents (positions 40 to 43, 44 to 47, 36 to 47)", "" where nothing is
    left out.
    """
    spans = [span for span in incident.spans if span.positions or span.first < span.last]
    if not spans:
        return ""
    of = f" of {_count(incident.documents_total, 'document')}" if incident.documents_total else ""
    where = ", ".join(map(_stretch, spans[:8]))
    more = f" and {len(spans) - 8} more stretches" if len(spans) > 8 else ""
    return f"{_count(incident.samples, 'sample')}{of} (positions {where}{more})"


def _stretch(span: Span) -> str:
    chosen = f", {len(span.positions)} of them" if span.positions else ""
    return f"{span.first:,} to {max(span.first, span.last - 1):,}{chosen}"


def document_line(document: Document) -> str:
    record = f":{document.record}" if document.record else ""
    stretch = (
        f"  bytes {document.first_byte:,}-{document.last_byte:,}" if document.last_byte else ""
    )
    return f"{document.path}{record}{stretch}"


def command_line(answer: CommandRecord) -> str:
    value = ""
    if answer.command == CommandKind.MODE.value and answer.value in range(len(Mode)):
        value = f" {list(Mode)[int(answer.value)].value}"
    elif (
        answer.command not in ("pause", "resume", "checkpoint", "accept", "stop")
        and answer.value == answer.value
    ):
        value = f" {answer.value:g}"
    who = f" by {answer.who}" if answer.who else ""
    reason = f": {answer.reason}" if answer.reason else ""
    return f"  step {answer.step:,}  {answer.command or 'command'}{value}{who}  {answer.effect}{reason}"


def restart_lines(restart: Restart) -> Iterator[str]:
    lost = f", {_count(restart.steps_lost, 'step')} made again" if restart.steps_lost else ""
    yield f"  {_moment(restart.time)}  {restart.sentence or f'continues at step {restart.step:,}'}{lost}"
    for difference in restart.differs:
        yield f"    differs from what was saved: {difference}"


def shown_checkpoints(checkpoints: Iterable[CheckpointLine]) -> Iterator[str]:
    """Those that are there or went wrong; pruned ones are counted."""
    pruned = 0
    for checkpoint in checkpoints:
        if checkpoint.state == "pruned":
            pruned += 1
            continue
        size = f"  {_bytes(checkpoint.bytes)}" if checkpoint.bytes else ""
        reason = f"  {checkpoint.reason}" if checkpoint.reason else ""
        yield f"  step {checkpoint.step:,}  {checkpoint.state}  {checkpoint.name}{size}{reason}"
    if pruned:
        yield f"  {_count(pruned, 'older one')} pruned"


def _seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _moment(time: float) -> str:
    try:
        return datetime.datetime.fromtimestamp(time).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return "?"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
