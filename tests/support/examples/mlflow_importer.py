"""An importer in one file: MLflow's metric files, mlruns/EXPERIMENT/RUN/metrics/NAME.

Each metric is a file of lines "milliseconds value step". The files of one folder are one run.

To use it, add `MlflowMetrics()` to `IMPORTERS` in guardrail/backtest/importers/registry.py, before
`TextLogs()`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guardrail.backtest.importers.base import Importer, Scope
from guardrail.backtest.importers.jsonlines import log_from_records
from guardrail.backtest.importers.log_file import LogFile
from guardrail.backtest.importers.recorded_log import Log

_LINE = re.compile(r"(?P<time>\d{12,14}) (?P<value>\S+) (?P<step>\d+)")


class MlflowMetrics(Importer):
    name = "mlflow"
    reads = "metric files of MLflow"
    recognised_by = "a first line of time, value and step"
    scope = Scope.FOLDER

    def recognises(self, file: LogFile) -> bool:
        return file.is_plain_text and _LINE.fullmatch(file.first_line) is not None

    def read(self, path: Path, shown: str, columns: Mapping[str, str]) -> list[Log]:
        return self.read_together([path], shown, columns)

    def read_together(
        self, paths: Sequence[Path], shown: str, columns: Mapping[str, str]
    ) -> list[Log]:
        records: dict[int, dict[str, Any]] = {}
        for path in paths:
            for line in path.read_text(errors="replace").splitlines():
                match = _LINE.fullmatch(line)
                if match is not None:
                    step = int(match["step"])
                    records.setdefault(step, {"step": step})[path.name] = match["value"]
        in_order = [records[step] for step in sorted(records)]
        return [log_from_records(in_order, shown, self.name, columns)]
