"""HTML and Markdown hold the same as the terminal, and nothing that a browser would run."""

from __future__ import annotations

import errno
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from guardrail.cli.main import main
from guardrail.core.errors import RunDirectoryError
from guardrail.core.records.signals import GRAD_NORM, LOSS
from guardrail.core.records.spans import Span
from guardrail.core.records.verdicts import Action
from guardrail.report.build import build_report
from guardrail.report.output import (
    render_report,
)
from guardrail.report.quarantine import quarantine_lines
from guardrail.report.svg_curves import NAMES
from guardrail.report.text_chart import draw_chart
from guardrail.rundir.run_directory import RunDirectory
from tests.support.findings import make_finding
from tests.support.lab import without_waiting
from tests.support.report_runs import (
    assert_harmless,
    finished,
    rows,
    start,
)


class Tags(HTMLParser):
    """What a browser would see: tags with their attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data


HARMLESS = set(
    "html head meta title style body h1 h2 ul li p blockquote table tr th td code figure figcaption "
    "svg text line polyline polygon circle".split()
)


def test_a_page_holds_the_full_story_and_its_curves(run: RunDirectory) -> None:
    finished(run)
    rows(run, 7, timeline=1, grad_norm=1.0, eval_loss=2.5, loss_baseline=2.0, loss_threshold=9.0)
    rows(run, 8, timeline=1, verdict=Action.SKIP)
    seen = Tags(page := render_report(run, "html"))
    assert seen.open == [] and seen.tags <= HARMLESS
    for part in (
        "6 of 6 steps",
        "Incident 1: step 5, recovered",
        "2 steps discarded",
        "/data/0037.txt",
        "Ã‚Â Ã‚Â",
        "lr 0.5",
    ):
        assert part in seen.text, part
    assert NAMES[LOSS] in seen.text and NAMES[GRAD_NORM] in seen.text and page.count("<svg") == 2
    assert page.count('class="tried"') == 3, "two tries of step 5, one of step 8"
    assert 'class="gone"' in page and 'class="here"' in page and 'class="eval"' in page
    assert not re.search(r"https?://|url\(|@import", page), "nothing is fetched"


def test_markdown_has_the_same(run: RunDirectory) -> None:
    finished(run)
    page = render_report(run, "markdown")
    for part in (
        f"# {run.name}: finished, 6 of 6 steps",
        "## Incident 1: step 5, recovered",
        "2 steps discarded",
        "\n> Ã‚Â Ã‚Â",
        "Checkpoints: ",
        "## Commands",
    ):
        assert part in page, f"{part!r} is not in\n{page}"


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    """Of documents, of excerpts, of tokens, of the journal, and in the name of the run itself."""
    run = RunDirectory.create_at(tmp_path / "<b>n\x1b[2J[x](y)`\u202e", "[train]\nsteps = 2\n")
    evil = "</li><script>alert(1)</script><img src=x onerror=alert(1)> [a](javascript:x) ![b](//x) `c` \x1b[2J\n# zz"
    start(run, host=evil)
    rows(run, 1, 2)
    document = {"path": evil, "excerpt": evil}
    span = Span(first=0, last=4, origin="rejected", step=1, reason=evil)
    run.append(
        "verdict", evil, step=1, action="skip", findings=[make_finding(2, signal=evil)], incident=1
    )
    sample = {"position": 1, "loss": 9.0, "excerpt": evil, "odd": [evil], "documents": [document]}
    run.append(
        "skipped", evil, step=1, span=span, documents=[document], samples=[sample], incident=1
    )
    remedy = {"kind": evil, "value": 0.5, "from_step": 3, "hold": 1}
    run.append("remedy", evil, step=1, incident=1, remedies=[remedy])
    run.append(
        "incident",
        evil,
        step=1,
        number=1,
        state="recovered with higher loss",
        onset=1,
        **{evil: 1.0},
    )
    run.append("diagnosis", evil, incident=1, cause=evil, reason=evil)
    run.append("rank_hung", evil)
    run.append("ended", evil, phase=evil, reason=evil)
    page = render_report(run, "html")
    seen = Tags(page)
    assert seen.open == [] and seen.tags <= HARMLESS
    assert not {
        name
        for name in seen.attributes
        if name in ("src", "href", "style") or name.startswith("on")
    }
    assert "<script>alert(1)</script>" in seen.text
    markdown = render_report(run, "markdown")
    assert "<" not in markdown and not re.search(r"(?<!\\)[\[\]`]", markdown)
    assert not [line for line in markdown.splitlines() if line.startswith("# zz")]
    for content in (page, markdown, render_report(run, "terminal")):
        assert_harmless(content)


def test_a_run_without_rows_has_pages_too(run: RunDirectory) -> None:
    for form in ("terminal", "markdown", "html"):
        assert "No incidents" in render_report(run, form)


def test_a_file_is_written_in_the_form_that_its_name_asks_for(
    run: RunDirectory, tmp_path: Path
) -> None:
    finished(run)
    for name, begin in (
        ("a.md", "# "),
        ("a.html", "<!doctype html>"),
        ("a.txt", run.name),
        ("a.json", "{"),
    ):
        options = ["--json"] if name == "a.json" else []
        assert main(["report", str(run.path), "-o", str(tmp_path / name), *options]) == 0
        assert (tmp_path / name).read_text(encoding="utf-8").startswith(begin)
    assert main(["report", str(run.path), "-o", str(tmp_path / "no" / "a.md")]) == 2
    assert main(["report", str(run.path), "--json", "--format", "html"]) == 2


def test_a_million_steps_make_a_small_picture(run: RunDirectory) -> None:
    import numpy as np

    with run.metrics_writer() as writer:
        columns = writer.columns
        writer.append({"step": 1, "timeline": 0, "loss": 5.0, "verdict": 0})
    table = np.full((300_000, len(columns)), np.nan)
    table[:, columns.index("step")] = np.arange(2, 300_002)
    table[:, columns.index("timeline")] = table[:, columns.index("verdict")] = 0
    table[:, columns.index("loss")] = 2.0 + np.random.default_rng(0).normal(size=300_000) * 0.01
    table[150_000, columns.index("loss")] = 400.0
    with run.metrics_path.open("ab") as file:
        file.write(table.astype("<f8").tobytes())
    page = render_report(run, "html")
    assert len(page) < 60_000
    (line,) = re.findall(r'<polyline class="here" points="([^"]*)"', page)
    heights = [float(point.split(",")[1]) for point in line.split()]
    assert min(heights) < 30 and sorted(heights)[5] > 100, "the one spike reaches the top"


@pytest.mark.parametrize("column", ["step", "timeline", "verdict", "loss", "step_time"])
def test_a_metrics_file_full_of_nonsense_does_not_break_the_report(
    run: RunDirectory, column: str
) -> None:
    finished(run)
    run.append("restarted", "continues at step 2", step=2, timeline=2, checkpoint="step-00000002")
    before = run.metrics_path.read_bytes()
    at = run.metrics().columns.index(column)
    for value in (math.nan, math.inf, -math.inf, 1e300):
        for where in (slice(None), slice(-1, None)):
            table = np.frombuffer(before).reshape(-1, len(run.metrics().columns)).copy()
            table[where, at] = value
            run.metrics_path.write_bytes(table.tobytes())
            assert all(len(line) <= 80 for line in draw_chart(run, build_report(run).incidents)), (
                value,
                where,
            )
            for form in ("terminal", "html"):
                assert "finished" in render_report(run, form)


@pytest.mark.parametrize("byte", [b"[", b"\x7f", b"\xff", b"\x00"])
def test_a_metrics_file_of_one_byte_over_and_over(run: RunDirectory, byte: bytes) -> None:
    finished(run)
    run.metrics_path.write_bytes(byte * 100_000)
    for form in ("terminal", "markdown", "html"):
        assert "finished" in render_report(run, form)


@pytest.mark.parametrize("damage", ["[data", "x = " + "[" * 100_000])
def test_a_quarantine_of_a_configuration_that_cannot_be_read_is_refused(
    run: RunDirectory, damage: str
) -> None:
    (run.path / "config.toml").write_text(damage)
    with pytest.raises(RunDirectoryError, match=r"config\.toml") as caught:
        quarantine_lines(run)
    assert caught.value.kind == "not_toml"
    (run.path / "config.toml").unlink()
    assert quarantine_lines(run) == []
    os.mkfifo(run.path / "config.toml")
    with without_waiting(), pytest.raises(RunDirectoryError, match=r"config\.toml") as caught:
        quarantine_lines(run)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EINVAL
