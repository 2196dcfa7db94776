"""A detector is added by one file and its line in `guardrail/detectors/build.py`.

The test adds the example to a copy of guardrail and runs that copy in another process.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest

from tests.support.places import ROOT, TESTS
from tests.support.texts import numbers_in

USE = """
import json
from guardrail.core.config import GuardConfig, load_guard_options
from guardrail.core.errors import ConfigError
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.findings import FindingKind
from guardrail.core.toml_file import dump_toml
from guardrail.decide.controller import Controller
from guardrail.detectors.build import find_detector
from guardrail.rundir.run_directory import RunDirectory
from tests.support.class_docs import fill_detection
from tests.support.feed import healthy_loss, obs

options = load_guard_options("guard.toml")
controller = Controller(options)
for step in range(1, 41):
    controller.observe(obs(step, healthy_loss(step), 0.5, tokens=100))
verdict = controller.observe(obs(41, healthy_loss(41), 0.5, tokens=20))
other = Controller(options)
anew = other.load_state_dict(json.loads(json.dumps(controller.state_dict())))
old = controller.state_dict()
del old["detectors"]["token_drift"]

run = RunDirectory.create("runs", "x", dump_toml(GuardConfig(guard=options)))
run.append("verdict", verdict.reason, findings=list(verdict.findings))
(event,) = run.events()
try:
    load_guard_options(None, overrides=["guard.detectors.token_drift.least_shar=1"])
    error = ""
except ConfigError as refused:
    error = str(refused)
print(json.dumps({
    "default": GuardOptions().detectors.token_drift.least_share,
    "given": options.detectors.token_drift.least_share,
    "error": error,
    "reason": verdict.reason,
    "read": [finding.sentence() for finding in event.findings],
    "title": find_detector(FindingKind("token_drift")).title,
    "anew": [anew, other.load_state_dict(old)],
    "page": fill_detection(open("detection.md").read()),
}))
"""


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a copy of guardrail with the example says."""
    tmp = tmp_path_factory.mktemp("added")
    no_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "guardrail", tmp / "guardrail", ignore=no_caches)
    detectors = tmp / "guardrail" / "detectors"
    shutil.copy(TESTS / "support" / "examples" / "token_drift.py", detectors)
    build = (detectors / "build.py").read_text()
    line = "from guardrail.detectors.token_drift import TokenDrift\n"
    build = re.sub(r"(?m)^(?=from guardrail\.detectors\.stuck)", line, build)
    build = build.replace("    StuckGradNorm,\n)", "    StuckGradNorm,\n    TokenDrift,\n)")
    (detectors / "build.py").write_text(build)
    shutil.copy(ROOT / "docs" / "detection.md", tmp)
    (tmp / "guard.toml").write_text("[guard.detectors.token_drift]\nleast_share = 0.25\n")
    paths = {"PYTHONPATH": f"{tmp}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp, env=os.environ | paths, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_its_settings_are_read_from_toml(used: dict[str, Any]) -> None:
    assert (used["default"], used["given"]) == (0.5, 0.25)
    assert "guard.detectors.token_drift.least_share" in used["error"]


def test_its_finding_has_its_sentence_in_the_journal(used: dict[str, Any]) -> None:
    (sentence,) = used["read"]
    assert numbers_in(sentence) == [20, 100] and sentence in used["reason"]


def test_its_state_travels_and_an_older_state_loads_without_it(used: dict[str, Any]) -> None:
    assert used["anew"] == [[], ["token_drift"]]


def test_its_documentation_is_written(used: dict[str, Any]) -> None:
    page = used["page"]
    title = used["title"]
    assert f"## {title}\n" in page
    assert "| `token_drift.least_share` | 0.5 |" in page
    assert f"[`token_drift`](#{title.lower().replace(' ', '-')})" in page
