"""Fixtures that several test files share. No test touches the network, the user's cache or another
test's run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.faults import FAULTS
from tests.support.lab import Lab

# The files that take longest begin first: several workers share the files among them, and one that
# takes minutes and comes last would leave the others idle.
LONGEST = (
    "test_mesh",
    "test_supervisor",
    "test_exactness",
    "test_keys",
    "test_readme",
    "test_loop",
    "test_disk",
    "test_commands",
    "test_law",
    "test_stop",
    "test_crash",
    "test_cases",
    "test_shift",
    "test_cause",
    "test_fp16",
    "test_panels",
    "test_tui_terminal",
    "test_recipes_exact",
    "test_undo",
    "test_lagged",
    "test_secrets",
    "test_replay",
    "test_checkpoints",
    "test_backtest",
    "test_pause",
    "test_replay_incident",
    "test_good",
    "test_answers",
    "test_screens",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    for item in items:
        for mark in item.iter_markers("fault"):
            for fault in mark.args:
                if fault not in FAULTS:
                    raise pytest.UsageError(
                        f"{item.nodeid}: unknown fault {fault!r}, see tests/support/faults.py"
                    )


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Prepared text is shared between the tests of one session, its workers included, and with
    nobody else.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(shared / "cache")
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session", autouse=True)
def _perturbed_weights() -> Iterator[None]:
    """With GUARDRAIL_PERTURB=SEED, multiply all initial weights by 1 + 1e-6 x noise, as rounding on
    another CPU would.

    A test that then fails depends on the rounding of one machine.
    """
    seed = os.environ.get("GUARDRAIL_PERTURB")
    if not seed:
        yield
        return
    import torch

    import trainer.model.decoder as decoder

    draw = decoder.draw_weight

    def draw_perturbed(shape: torch.Size, std: float, generator: torch.Generator) -> torch.Tensor:
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(int(seed)))
        return draw(shape, std, generator) * (1.0 + 1e-6 * noise)

    decoder.draw_weight = draw_perturbed
    yield
    decoder.draw_weight = draw


@pytest.fixture(autouse=True)
def _no_rank_outlives_its_test() -> Iterator[None]:
    yield
    if ranks := sys.modules.get("tests.support.ranks"):  # imports torch, so only where a test has
        ranks.bury_ranks()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    try:
        yield lab
    finally:
        lab.close()
