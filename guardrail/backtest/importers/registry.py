"""The list of importers. A new one is a file in this folder and one line here.

The first importer that recognises a file reads it. `TextLogs` is the last: it takes any text that
the user named.
"""

from __future__ import annotations

from guardrail.backtest.importers.base import Importer
from guardrail.backtest.importers.delimited import Tables
from guardrail.backtest.importers.event_files import EventFiles
from guardrail.backtest.importers.jsonlines import JsonLines
from guardrail.backtest.importers.run_directory import RunDirectories
from guardrail.backtest.importers.text_logs import TextLogs
from guardrail.backtest.importers.trainer_state import TrainerStates
from guardrail.backtest.importers.wandb_files import WandbFiles
from guardrail.core.packages import install_hint

IMPORTERS: tuple[Importer, ...] = (
    RunDirectories(),
    EventFiles(),
    WandbFiles(),
    TrainerStates(),
    JsonLines(),
    Tables(),
    TextLogs(),
)


def list_formats() -> str:
    """Return what can be read, as a part of a sentence: "A, B, and C"."""
    *first, last = [importer.reads for importer in IMPORTERS]
    return f"{', '.join(first)}, and {last}"


def format_table() -> str:
    """Return what can be read, as the table of docs/backtest.md."""
    lines = ["| source | how it is recognised |", "|---|---|"]
    for importer in IMPORTERS:
        how = importer.recognised_by
        if importer.package:
            how += f" (`{install_hint(importer.package)}`)"
        lines.append(f"| {importer.reads} | {how} |")
    return "\n".join(lines) + "\n"
