"""Panes: rows cut to the cell at every size, what each must say, and text from outside that can do
no harm.
"""

from __future__ import annotations

import math
import os
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from rich.cells import cell_len

from guardrail.core.events.event import Event
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.status import Phase, RankStatus, SnapshotInfo
from guardrail.core.records.verdicts import Cause
from guardrail.rundir.run_directory import RunDirectory
from guardrail.tui.draw.lines import Row
from guardrail.tui.model import logtail
from guardrail.tui.model.background_facts import WINDOW, Background, BackgroundReader
from guardrail.tui.model.config_lines import read_config_lines
from guardrail.tui.model.evidence import EvidenceBuilder
from guardrail.tui.model.log_lines import make_log_line
from guardrail.tui.model.logtail import LogTail, PrintedLine
from guardrail.tui.model.pane_state import PaneState
from guardrail.tui.model.rank_health import Rank, RankTracker, assess_ranks
from guardrail.tui.model.run_reader import RunReader
from guardrail.tui.model.run_story import ASKS, StoryBuilder
from guardrail.tui.model.view import Snapshot, View
from guardrail.tui.panes import ranks as ranks_pane
from guardrail.tui.panes.table import BY_NAME, PANES
from guardrail.tui.screens import header_footer as panels
from tests.support.events import make_line
from tests.support.fake_run import FakeRun, example, snapshot_of
from tests.support.places import ROOT

SIZES = [(40, 10), (80, 24), (200, 60)]
HOSTILE = {
    "cursor": "a\x1b[2Jb\x1b[10;10Hc",
    "clipboard": "a\x1b]52;c;ZXZpbA==\x07b\x1b]52;c;ZXZpbA==\x1b\\c",
    "c1": "a\x9b31mb\x9d52;c;eA==\x9cc\x90q\x9c",
    "unterminated": "a\x1b]0;title",
    "controls": "a\x00\x07\x08\r\n\tb\x7f\x85\u2028c",
    "bidi": "a\u202egnp.exe\u2066b\u2069\u200f",
    "markup": "[red]a[/red] [/] [link=x]b \\[",
    "surrogate": "a\ud800b",
    "wide": "語の本文" * 40,
    "hebrew": "שלום עולם " * 20,
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈" * 20,
    "tags": "a\U000e0041\ufeff\u2060b",
    "long": "x" * 100_000,
}
RAW = re.compile(
    "[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200e\u200f\ud800-\udfff\u2028\u2029]"
)


def text(rows: Sequence[Row]) -> str:
    return "\n".join("".join(piece for piece, _ in line) for line in rows)


def rank(number: int, *, seconds: float = 0.12, host: str = "", **changes: Any) -> RankStatus:
    made = RankStatus(rank=number, pid=1000 + number, host=host or f"node-{number // 8:03d}", phase=Phase.STEP,
                      step=100, step_seconds=seconds, memory_bytes=4 * 10**9)  # fmt: skip
    return msgspec.structs.replace(made, **changes)


def ranks(count: int, *, slow: int = -1, silent: int = -1, now: float = 0.0) -> tuple[Rank, ...]:
    draw = random.Random(3)
    return tuple(
        Rank(rank(at, seconds=0.39 if at == slow else 0.12 + 0.005 * draw.random()),
             now - (40 if at == silent else 0.5), now - 0.5)
        for at in range(count)
    )  # fmt: skip


def view(around: Background | None = None, **changes: Any) -> View:
    fake = example()
    return View(
        replace(snapshot_of(fake), around=around or Background(), **changes), fake.time + 0.4
    )


def full(now: float) -> Background:
    printed = tuple(
        PrintedLine(str(at % 4), f"line {at} of what a rank prints, {'long ' * (at % 40)}")
        for at in range(300)
    )
    text = (ROOT / "configs" / "quickstart.toml").read_text()
    return Background(
        ranks(1024, slow=500, silent=700, now=now),
        ((500, 87),),
        printed,
        read_config_lines(text),
        2,
    )


def assert_fits(rows: Sequence[Row], width: int, height: int, what: str) -> None:
    assert len(rows) <= height, what
    for line in rows:
        for piece, _ in line:
            assert not RAW.search(piece), (what, piece)
        assert cell_len(text([line])) <= width, (what, text([line]))


def all_rows(seen: View, width: int, height: int, cursor: int | None, words: str = "") -> None:
    """Every pane, its detail and its counters."""
    for pane in PANES:
        state = PaneState(cursor=cursor, filter=words, focused=True)
        assert_fits(pane.build(seen, width, height, state), width, height, pane.name)
        entries = pane.count(seen, state)
        assert entries >= 0
        if pane.step is not None:
            step = pane.step(seen, state)
            assert step is None or cursor is not None
        if pane.detail is not None:
            # The window scrolls and cuts; only what leads to the terminal matters.
            assert_fits(
                [line for line in pane.detail(seen, width, height, state)], 10**7, 10**6, pane.name
            )


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("cursor", [None, 0, 3, 10**6])
def test_every_pane_fits_empty_and_full(width: int, height: int, cursor: int | None) -> None:
    empty = View(Snapshot("new/1"), 0.0)
    seen = view()
    seen = replace(seen, snapshot=replace(seen.snapshot, around=full(seen.now)))
    for one in (empty, seen):
        for words in ("", "1", "nothing like this"):
            all_rows(one, width, height, cursor, words)


def test_panes_have_numbers_and_names_of_their_own() -> None:
    assert len({pane.number for pane in PANES}) == len({pane.name for pane in PANES}) == len(PANES)
    assert "1" not in {pane.number for pane in PANES}, "the curves"


# -- hostile text


def hostile(piece: str) -> View:
    """A run in which every text that can come from outside is `piece`."""
    fake = FakeRun(name="evil/1").begin().advance(300).spike(length=2, back_to=290)
    document = {"path": piece, "record": 3, "first_byte": 1, "last_byte": 2, "excerpt": piece}
    span = {
        "first": 16,
        "last": 32,
        "cause": piece,
        "step": 301,
        "reason": piece,
        "positions": [17, 18],
    }
    fake.event(
        "diagnosis",
        piece,
        incident=1,
        cause=piece,
        reason=piece,
        rank=0,
        host=piece,
        passes=[piece],
    )
    fake.event("skipped", piece, incident=1, span=span, documents=[document, piece], documents_total=9,
               samples=[{"position": 17, "loss": 9.0, "share": 0.9, "documents": [document], "excerpt": piece,
                         "odd": [piece]}])  # fmt: skip
    fake.event("verdict", piece, incident=1, action="skip", at_step=301, findings=[
        {"signal": piece, "step": 301, "kind": "loss_spike", "severity": "reject", "value": 9.0, "baseline": 2.0,
         "score": 9.0, "threshold": 8.0, "onset": 301}], parameters={piece: [piece]},
        tokens=[{"id": 7, "text": piece, "norm": 1.0, "share": 0.5, "count": 3}])  # fmt: skip
    fake.event(
        "remedy", piece, incident=1, remedies=[{"kind": piece, "value": 0.5, "from_step": 3}]
    )
    fake.event("command", piece, id=piece, command=piece, who=piece, effect="applied", reason=piece)
    fake.event("incident", piece, number=1, state=piece, onset=301)
    fake.event(piece, piece, **{"x": piece})
    digest = StoryBuilder()
    digest.add(fake.events)
    bad = rank(1, host=piece)
    around = Background(
        ranks=(Rank(bad, fake.time, fake.time),) * 3,
        printed=(PrintedLine("0", logtail._shown(piece.encode("utf-8", "surrogatepass"))),) * 5,
        settings=read_config_lines(
            f"[data]\nsources = [{msgspec.json.encode(piece.replace(chr(0xD800), '')).decode()}]\n"
        ),
    )
    status = msgspec.structs.replace(
        fake.status, run=piece, host=piece, disk=piece, progress=piece, question=piece,
        snapshots=(SnapshotInfo(step=1, cursor=1, timeline=0, tier=piece, state=piece, path=piece),),
    )  # fmt: skip
    snapshot = replace(
        snapshot_of(fake), name=piece, status=status, problem=piece, recorded="", around=around
    )
    return View(replace(snapshot, story=digest.story()), fake.time)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_harmless_in_every_pane(name: str) -> None:
    seen = hostile(HOSTILE[name])
    for width, height in SIZES:
        for cursor in (None, 0, 1):
            all_rows(seen, width, height, cursor)
        for build in (
            panels.header_rows,
            panels.status_rows,
            panels.message_rows,
            panels.footer_rows,
        ):
            assert_fits(build(seen, width, 1), width, 1, build.__name__)


@examples(max_examples=25, deadline=None)
@given(piece=st.lists(st.one_of(st.sampled_from(sorted(HOSTILE.values(), key=len)[:-1]), st.text(max_size=30)),
                      max_size=4).map("".join), width=st.integers(20, 120))  # fmt: skip
def test_any_text_is_harmless(piece: str, width: int) -> None:
    all_rows(hostile(piece), max(40, width), 20, 0)


# -- ranks


@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 12), (200, 60)])
@pytest.mark.parametrize("count", [8, 64, 1024])
def test_the_straggler_and_the_silent_one_are_named(count: int, width: int, height: int) -> None:
    seen = view(
        Background(ranks(count, slow=5, silent=3, now=example().time + 0.4), ((5, 87), (1, 13)))
    )
    shown = text(BY_NAME["ranks"].build(seen, width, height, PaneState()))
    assert "slowest 5 (node-000) 390 ms" in shown
    assert width < 80 or "in 87 of 100 steps" in shown
    if count == 8 or count == 1024:
        assert "? silent 0:00:40" in shown and "▲ 3.2 × median" in shown
    if count == 1024:
        assert shown.count("█") == 1, "one cell of the map is hot"
        worst = ranks_pane.PANE.entries(seen, PaneState())
        assert [one.rank.status.rank for one in worst[:2]] == [3, 5]


def test_no_rank_is_silent_between_two_looks() -> None:
    """A look at a thousand ranks on a slow disk may be half a minute old."""
    now = example().time
    for looked, missed in ((now + 0.4, 0), (now + 30, 8)):
        seen = replace(view(Background(ranks(8, now=now), looked=looked)), now=now + 60)
        assert ranks_pane.PANE.count(seen, PaneState(filter="silent")) == missed


def test_a_rank_is_found_by_its_number_and_its_host() -> None:
    seen = view(Background(ranks(1024, slow=513, now=example().time)))
    assert [
        one.rank.status.rank
        for one in ranks_pane.matching_ranks(seen, PaneState(filter="node-064"))
    ] == list(range(512, 520))
    assert ranks_pane.PANE.count(seen, PaneState(filter="slow")) == 1


def test_groups_of_ranks_share_a_cell_and_show_their_worst() -> None:
    shown = ranks_pane.heat_map(assess_ranks(ranks(4096, slow=4000), 0.0), 40, 4)
    assert len(shown) <= 4 and text(shown).count("█") == 1


def test_silence_goes_by_the_clock_of_the_viewer() -> None:
    """The host's clock is an hour late; each new heartbeat is a sign of life all the same."""
    book, skew = RankTracker(), -3600.0
    for now in (1000.0, 1010.0, 1020.0):
        known = book.update(
            [rank(0, heartbeat=now + skew, progress=7, progress_time=now + skew), rank(1)], now
        )
    first, second = assess_ranks(known, 1021.0)
    assert (first.fault, second.fault) == ("", "silent")
    book.update([rank(0, heartbeat=5.0, progress=7)], 1100.0)
    (stuck,) = assess_ranks(book.update([rank(0, heartbeat=6.0, progress=7)], 1200.0), 1201.0)
    assert stuck.fault == "stuck" and stuck.seconds > 100
    (again,) = assess_ranks(
        book.update([rank(0, heartbeat=1201.0, progress_time=1201.0, incarnation=1)], 1201.0),
        1202.0,
    )
    assert again.fault == ""
    assert assess_ranks(known, 99999.0, ended=True)[1].fault == "", (
        "after the end no rank is silent"
    )


# -- looking around


def test_looking_at_many_ranks_takes_its_share_of_the_time_and_no_more(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "x", config_text())
    run.write_rank(rank(0, heartbeat=1.0))
    (run.logs / "rank-0.log").write_bytes(b"hello\n")
    seconds = iter([0.0, 0.5, 1.0, 9.9, 10.0, 10.0, 10.5])
    background = BackgroundReader(run, clock=lambda: 1.0, timer=lambda: next(seconds))
    assert background.look() and [one.status.rank for one in background.around.ranks] == [0]
    assert not background.around.settings, "the first frame waits for no schema"
    assert not background.look() and not background.look(), (
        "half a second of work is not done again for ten"
    )
    run.write_rank(rank(1, heartbeat=1.0))
    assert background.look() and len(background.around.ranks) == 2
    assert any(one.differs for one in background.around.settings)
    assert not background.look()


def config_text() -> str:
    return '[run]\nname = "x"\n[guard]\nloss_score = 5.0\ngrad_score = 10.0\n'


def test_a_reader_publishes_what_is_around(tmp_path: Path) -> None:
    run = example().write(tmp_path)
    run.write_config(config_text())
    run.write_rank(rank(0))
    reader = RunReader(run, present=False)
    reader.look()
    assert [one.status.rank for one in reader.latest().around.ranks] == [0]
    assert not reader.latest().problem


def test_the_slowest_of_the_newest_rows_is_counted(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "x", "")
    with run.metrics_writer() as writer:
        for step in range(1, 300):
            writer.append({"step": step, "slowest_rank": 7 if step % 4 else math.nan})
    background = BackgroundReader(run)
    background.count_slowest(run.metrics())
    assert background.around.slowest == ((7, WINDOW * 3 // 4),)


# -- output


def test_logs_are_followed_in_bounded_memory(tmp_path: Path) -> None:
    tail = LogTail(tmp_path)
    assert not tail.read_new_lines()
    log = tmp_path / "rank-3.log"
    log.write_bytes(b"one\ntw")
    assert tail.read_new_lines() and [line.text for line in tail.lines] == ["one"]
    assert not tail.read_new_lines()
    with log.open("ab") as file:
        file.write(b"o\r  50 %\r 100 %\nthree \xff\x1b[2J\n\n")
    assert tail.read_new_lines()
    assert [(line.source, line.text) for line in tail.lines[1:]] == [
        ("3", " 100 %"),
        ("3", "three �"),
    ]
    with log.open("ab") as file:
        file.write(b"x" * 10_000_000)
    tail.read_new_lines()
    with log.open("ab") as file:
        file.write(b"still the same line\nnext\n")
    tail.read_new_lines()
    assert tail.lines[-1].text == "next" and all(len(line.text) <= 500 for line in tail.lines)
    log.write_bytes(b"cut\n")
    assert tail.read_new_lines() and tail.lines[-1].text == "cut"
    (tmp_path / "rank-0.log").write_bytes(b"".join(b"%d\n" % at for at in range(100_000)))
    tail.read_new_lines()
    assert len(tail.lines) == logtail.KEPT_LINES and tail.lines[-1].text == "99999"
    os.mkfifo(tmp_path / "rank-9.log")
    assert not tail.read_new_lines(), "a pipe stops no reader"


def test_output_is_filtered_by_rank_and_words_and_shows_its_end() -> None:
    lines = tuple(PrintedLine(str(at % 3), f"step {at}") for at in range(90))
    seen = view(Background(printed=(*lines, PrintedLine("2", "RuntimeError: bad"))))
    shown = BY_NAME["output"].build(seen, 60, 6, PaneState())
    assert "RuntimeError: bad" in text(shown) and shown[-1][-1][1] == "bad"
    assert "step 88" in text(BY_NAME["output"].build(seen, 60, 3, PaneState(filter="1: step")))


# -- configuration


def test_what_differs_from_the_defaults_is_marked() -> None:
    found = {f"{one.section}.{one.key}": one for one in read_config_lines(config_text())}
    defaults = GuardOptions()
    assert found["guard.loss_score"].differs and found["guard.loss_score"].default == str(
        defaults.loss_score
    )
    assert not found["guard.grad_score"].differs and found["guard.grad_score"].known
    shown = text(
        BY_NAME["config"].build(
            view(Background(settings=tuple(found.values()))), 80, 10, PaneState()
        )
    )
    assert "● guard.loss_score = 5.0   default 8.0" in shown and "2 of 3 " in shown


def test_a_run_directory_names_no_code_to_import() -> None:
    found = read_config_lines('[launch]\ntrainer = "antigravity"\n[model]\nwidth = 7\n')
    assert [(one.section, one.known) for one in found] == [("launch", True), ("model", False)]
    assert not any(one.known for one in read_config_lines("this is = = no TOML\x1b[2J"))


# -- evidence


def test_evidence_shows_cause_samples_remedy_and_outcome() -> None:
    fake = FakeRun().begin().advance(300).spike(length=1, back_to=290)
    fake.event(
        "diagnosis",
        "",
        incident=1,
        cause=Cause.DATA_AND_STATE.value,
        reason="3 of 3 passes gave 11.5",
    )
    span = {
        "first": 4800,
        "last": 4816,
        "cause": "rejected",
        "step": 301,
        "positions": [4801, 4803],
    }
    fake.event(
        "skipped",
        "",
        incident=1,
        span=span,
        documents=["/data/0037.txt"],
        samples=[
            {
                "position": 4801,
                "loss": 11.5,
                "share": 0.91,
                "excerpt": "Ã‚Â Ã‚Â",
                "odd": ["repeats 0.98"],
            }
        ],
    )
    fake.event(
        "incident",
        "incident 1: recovered after 12 steps",
        number=1,
        state="recovered",
        expected=2.3,
    )
    seen = View(snapshot_of(fake), fake.time)
    shown = text(BY_NAME["incidents"].detail(seen, 100, 40, PaneState(cursor=0)))  # type: ignore[misc]
    for said in (f"{Cause.DATA_AND_STATE.value}: 3 of 3 passes gave 11.5",
                 "position 4,801: loss 11.5, 91 %",
                 "odd: repeats 0.98", "“Ã‚Â Ã‚Â”", "2 of them (rejected)", "recovered after 12 steps",
                 "expected 2.3", "score 18.4 (limit 8)", "0037.txt"):  # fmt: skip
        assert said in shown, said


def test_what_is_undone_is_no_longer_skipped() -> None:
    def event(seq: int, kind: str, **data: Any) -> Event:
        return make_line(seq=seq, time=1.0, step=9, timeline=0, kind=kind, data=data)

    evidence = EvidenceBuilder()
    one = {"first": 0, "last": 16, "cause": "rejected", "step": 9}
    two = {"first": 8, "last": 32, "cause": "rollback", "step": 9}
    evidence.add(
        [event(1, "skipped", span=one, incident=1), event(2, "rollback", span=two, incident=1)]
    )
    assert evidence.known().samples_skipped == 32, "what both skip counts once"
    evidence.add([event(3, "undo", spans=[two])])
    known = evidence.known()
    assert (known.samples_skipped, [one.span.origin for one in known.skipped]) == (
        16,
        ["rejected"],
    )


def test_the_journal_says_who_gave_a_command() -> None:
    event = make_line(seq=1, time=1.0, step=9, timeline=0, kind="command", message="pause applied",
                  data={"who": "ana@node-1\x1b[2J", "effect": "applied"})  # fmt: skip
    assert make_log_line(event).text == "pause applied (by ana@node-1)"
    assert make_log_line(msgspec.structs.replace(event, who="")).text == "pause applied"


@pytest.mark.fault("B7")
def test_gpus_whose_use_is_unknown_say_what_is_missing() -> None:
    def shown(percent: float) -> str:
        report = rank(0, gpu_memory_bytes=10**9, gpu_percent=percent)
        now = example().time + 0.4
        seen = view(Background((Rank(report, now, now),)))
        return text(ranks_pane.PANE.build(seen, 120, 12, PaneState()))

    assert "GPU use unknown: needs guardrail[gpu]" in shown(-1.0)
    assert "unknown" not in shown(43.0) and "GPU  43 %" in shown(43.0)


@pytest.mark.fault("T15")
@pytest.mark.parametrize(
    ("command", "value", "who", "answer", "by"),
    [
        ("answer", 0, "ann@vm", "accepted", "ann@vm"),
        ("answer", 1, "ann@vm", "continued", "ann@vm"),
        ("answer", 2, "ann@vm", "stopped", "ann@vm"),
        ("answer", 1, "guard", "continued", "default"),
        ("skip", 3, "ben@vm", "skip", "ben@vm"),
    ],
)
def test_an_incident_says_how_its_question_was_answered_and_by_whom(
    command: str, value: int, who: str, answer: str, by: str
) -> None:
    fake = FakeRun().begin().advance(300)
    fake.event("incident", "incident 1: open", number=1, state="open", onset=301)
    fake.event(
        "verdict",
        "pause at step 301",
        action="pause",
        would="rollback",
        incident=1,
        at_step=301,
        findings=[],
    )
    fake.event("paused", "proposed: rollback", proposals=["rollback", "go on", "stop"], incident=1)

    def row() -> str:
        view = View(snapshot_of(fake), fake.time)
        return "".join(
            text for text, _ in BY_NAME["incidents"].build(view, 110, 20, PaneState())[1]
        )

    assert ASKS in row()
    fake.event("command", "taken", command=command, value=value, who=who, effect="applied", id="x")
    if answer == "stopped":
        fake.event("ended", "stopped", phase="stopped")
    else:
        fake.event("resumed", "continued")
    assert f"{answer} by {by}" in row() and ASKS not in row()
