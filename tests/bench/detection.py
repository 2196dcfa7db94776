"""Who sees instabilities, and at what price: guardrail and the published rules on the same recorded runs.

    python tests/bench/detection.py TRACES [--policy FILE] [--set guard.KEY=VALUE] [--families]

TRACES holds one folder a run, with log.csv (step, loss, grad_norm), and labels.json; how verdicts are scored stands in
guardrail/scoring.py. guardrail's constants were chosen with these runs in view; `--families` shows what it does on
each family of runs, to be compared with a choice that left that family out. The rules have their published defaults.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from guardrail.backtest import backtest
from guardrail.config import GuardSection, load_guard
from guardrail.importers import delimited
from guardrail.importers.log import Log
from guardrail.records import GRAD_NORM, LOSS
from guardrail.scoring import score, total
from tests.bench.rules import RULES, Rule

Verdicts = dict[str, tuple[Sequence[int], list[tuple[int, str]]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path)
    parser.add_argument("--policy")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--families", action="store_true", help="also guardrail's figures of each family of runs")
    arguments = parser.parse_args()
    labels = json.loads((arguments.traces / "labels.json").read_text(encoding="utf-8"))
    logs = {
        path.parent.name: delimited.read(path, str(path), {})[0] for path in sorted(arguments.traces.glob("*/log.csv"))
    }
    settings = load_guard(arguments.policy, overrides=arguments.overrides)
    seconds, verdicts = by_guardrail(logs, settings)
    figures, marks = score(labels, verdicts)
    print(
        f"{'rule':26} {'grave acted on':>14} {'labelled noted':>14} {'false skips':>12} {'rollbacks':>10} {'notes':>8}"
    )
    print(f"{'':26} {'':>14} {'':>14} {'in 10,000':>12} {'in 10,000':>10} {'':>8}")
    print_row("guardrail", figures)
    for name, make in RULES.items():
        print_row(name, score(labels, by_rule(logs, make))[0])
    records = figures["records"]
    print(f"\n{len(marks)} runs, {records:,} records; guardrail took {1e6 * seconds / records:.1f} us a record,")
    print(f"rows from onset to the first act: median {figures['delay_median']}, 90 % {figures['delay_p90']}")
    print("The rules have their published defaults; guardrail's constants were chosen with these runs in view, so the")
    print("fair figure for them is one from a choice that left the family out, or from runs that nobody has seen.")
    if arguments.families:
        print("\nguardrail by family of runs")
        families = sorted({family(run) for run in marks})
        for name in families:
            print_row(name, total(mark for run, mark in marks.items() if family(run) == name))


def by_guardrail(logs: dict[str, Log], settings: GuardSection) -> tuple[float, Verdicts]:
    """(seconds, run -> steps and verdicts)."""
    results = {run: backtest(log, settings) for run, log in logs.items()}
    verdicts: Verdicts = {
        run: (result.steps, [(alarm.row, alarm.verdict) for alarm in result.alarms]) for run, result in results.items()
    }
    return sum(result.seconds for result in results.values()), verdicts


def by_rule(logs: dict[str, Log], make: Any) -> Verdicts:
    verdicts: Verdicts = {}
    for run, log in logs.items():
        rule: Rule = make(len(log))
        empty = [None] * len(log)
        losses, norms = (
            [log.columns[name].get(row) for row in range(len(log))] if name in log.columns else empty
            for name in (LOSS, GRAD_NORM)
        )
        said = ((row, rule.observe(*pair)) for row, pair in enumerate(zip(losses, norms, strict=True)))
        verdicts[run] = log.steps, [(row, verdict) for row, verdict in said if verdict is not None]
    return verdicts


def family(run: str) -> str:
    """Runs of one author or one program: "wmt_base_s4t2" -> "wmt"."""
    name = run.split("_")[0]
    return "wmt" if name.startswith("wmt") else name


def print_row(name: str, figures: dict[str, Any]) -> None:
    acted = f"{figures['acted']}/{figures['grave']}"
    noted = f"{figures['noted']}/{figures['labelled']}"
    skips, rollbacks = figures["false_skips_per_10k"], figures["false_rollbacks_per_10k"]
    print(f"{name:26} {acted:>14} {noted:>14} {skips:12.2f} {rollbacks:10.2f} {figures['false_notes_per_10k']:8.2f}")


if __name__ == "__main__":
    main()
