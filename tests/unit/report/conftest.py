"""The run that most tests of the report begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from guardrail.rundir.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run directory without rows and journal lines."""
    return RunDirectory.create(tmp_path, "demo", "[data]\nquarantine = ''\n")
