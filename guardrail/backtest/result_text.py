"""The result of a backtest as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from guardrail.backtest.result import NOTE, BacktestIncident, BacktestResult
from guardrail.core.format import format_plural
from guardrail.detectors.build import OWN_SIGNALS
from guardrail.detectors.signed_loss import LossKind

_OTHER_ROWS = {"evaluation": "of an evaluation", "summary": "with a summary"}


def format_result(result: BacktestResult) -> Iterator[str]:
    """Give a line for the log, then one line per incident."""
    steps = result.steps
    columns = ", ".join(result.names.values()) or "nothing"
    span = ""
    if len(steps):
        span = f", steps {min(steps):,} to {max(steps):,}"
    others = "".join(f"; {_format_rows(n, kind)}" for kind, n in result.other_rows.items())
    yield f"{result.path}: {len(steps):,} records{span} ({result.format}; {columns}{others})"
    if result.loss is LossKind.SIGNED:
        reason = "its values show it"
        if result.policy_column:
            reason = f"the column {result.policy_column} shows it"
        yield (
            f"  the loss is signed, {reason}: it may be 0 or negative, and its ratios are not judged"
            " (guard.loss)"
        )
    if result.format != "guardrail run":
        extra = [signal for signal in result.names if signal not in OWN_SIGNALS]
        if extra:
            yield f"  values far above the usual are only noted: {', '.join(extra)}"
    if result.further:
        yield (
            f"  recorded, not judged: {_list_further(result.further)};"
            " --column SIGNAL=NAME notes spikes of one"
        )
    for incident in result.incidents:
        yield f"  {_format_incident(incident)}"
    if result.notes:
        yield f"  {format_plural(result.notes, 'more note')}"
    if result.differing is not None:
        yield f"  {_compare_with_live(len(result.differing))}"


def _format_rows(count: int, kind: str) -> str:
    name = _OTHER_ROWS.get(kind, "without a signal")
    return f"{format_plural(count, 'row')} {name} not judged"


def _list_further(further: dict[str, str]) -> str:
    names = []
    for signal, name in further.items():
        if signal == name:
            names.append(name)
        else:
            names.append(f"{signal} ({name})")
    return ", ".join(names)


def _compare_with_live(differing: int) -> str:
    if not differing:
        return "all verdicts are the same as in the live run"
    return f"{format_plural(differing, 'verdict')} not the same as in the live run"


def _format_incident(incident: BacktestIncident) -> str:
    worst = incident.worst
    onset = min(incident.first.onset_step, incident.first.step)
    acted = "only noted"
    if incident.acted is not None:
        acted = f"acted on at step {incident.acted.step:,}"
    end = "to the end of the log"
    if incident.over is not None:
        end = f"over after step {incident.last.step:,}"
    return (
        f"step {onset:>9,}  {worst.verdict:<8}  {worst.kind:<11}  {worst.evidence}; {acted}, {end}"
    )


def sum_results(results: list[BacktestResult]) -> dict[str, int]:
    """Return the sums over all logs, as `guardrail backtest --json` prints them."""
    incidents = [incident for result in results for incident in result.incidents]
    alarms = [alarm for result in results for alarm in result.alarms]
    saved = 0
    for result in results:
        saved += sum(map(result.count_saved_steps, result.incidents))
    return {
        "logs": len(results),
        "records": sum(len(result.steps) for result in results),
        "incidents": sum(incident.acted is not None for incident in incidents),
        "skips": sum(incident.skips for incident in incidents),
        "rollbacks": sum(incident.rollbacks for incident in incidents),
        "notes": sum(alarm.verdict == NOTE for alarm in alarms),
        "steps_given_up": sum(incident.steps_discarded for incident in incidents),
        "steps_saved_at_most": saved,
    }


def format_summary(results: list[BacktestResult]) -> list[str]:
    """Return the sums over all logs as lines."""
    sums = sum_results(results)
    records = sums["records"]
    acts = sums["skips"] + sums["rollbacks"]
    rate = "never"
    if records:
        rate = f"{1e4 * acts / records:.1f} per 10,000 records"
    return [
        f"{format_plural(sums['logs'], 'log')}, {records:,} records: would have acted in"
        f" {format_plural(sums['incidents'], 'incident')} ({format_plural(sums['skips'], 'update')}"
        f" skipped, {sums['rollbacks']:,} rollbacks or halts: {rate})"
        f" and noted {sums['notes']:,}",
        f"discarded: {format_plural(sums['steps_given_up'], 'recorded step')}, skipped or repeated",
        f"saved: at most {format_plural(sums['steps_saved_at_most'], 'step')},"
        " in which the runs were unstable after the first action",
    ]
