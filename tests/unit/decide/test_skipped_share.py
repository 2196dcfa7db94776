"""By itself the guard skips no more than its share of the data: before that it asks, or saves and
halts.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from guardrail.backtest.rejudge import Rejudge
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.spans import Span
from guardrail.core.records.status import Phase
from guardrail.core.records.verdicts import Mode
from guardrail.decide.questions import ParkResult
from guardrail.decide.run_history import RunHistory
from guardrail.decide.sample_cursor import SampleCursor
from guardrail.decide.sample_order import SampleOrder
from guardrail.rundir.manifest import read_manifest
from guardrail.rundir.run_directory import RunDirectory
from guardrail.torch.guard.command_handler import CommandHandler
from tests.support.jumping import Loop
from tests.support.texts import numbers_in


def ledger(samples: int = 1000, **more: int) -> SampleCursor:
    return SampleCursor(
        SampleOrder(samples=samples, seed=1), batch_size=10, limit=more.get("limit")
    )


def span(first: int, last: int, cause: str = "rejected", *, allowed: bool = False) -> Span:
    return Span(first=first, last=last, origin=cause, step=1, allowed=allowed)


def over(one: SampleCursor, wanted: Span, share: float = 0.03, total_steps: int = 0) -> str:
    return one.why_guard_may_not_skip(wanted, share=share, data=one.data_size(total_steps))


# -- the count -------------------------------------------------------------------------------------


def test_the_data_are_the_distinct_samples_that_the_run_reads() -> None:
    assert ledger().data_size() == 1000
    assert ledger(limit=400).data_size() == 400 and ledger(limit=5000).data_size() == 1000
    assert ledger().data_size(30) == 300 and ledger().data_size(3000) == 1000
    growing = SampleCursor(SampleOrder(samples=1000), batch_size=lambda step: step)
    assert growing.data_size(10) == 55 and growing.data_size(10_000_000) == 1000


def test_a_sample_counts_once_and_a_users_own_skips_do_not() -> None:
    one = ledger()
    one.skip_span(span(0, 500, "user"))
    one.skip_span(span(600, 620))
    assert one.skipped_by_guard == 20
    one.skip_span(span(590, 625, "rollback"))  # holds what was rejected before
    assert one.skipped_by_guard == 35
    one.undo_skips([span(590, 625, "rollback")])
    assert one.skipped_by_guard == 20
    assert over(one, span(700, 710)) == "" and over(one, span(600, 620)) == ""
    said = over(one, span(700, 711))
    assert numbers_in(said) == [31, 1000, 0.03, 30] and "guard.max_skipped_share" in said


def test_many_epochs_do_not_make_more_data() -> None:
    one = ledger(100)
    one.skip_span(span(0, 3))
    assert over(one, span(100, 200)).startswith("100 of 100 samples")
    assert over(one, Span(first=0, last=3, origin="rejected", step=1)) == ""


def test_what_a_user_has_allowed_begins_the_count_anew_and_nothing_may_be_all() -> None:
    one = ledger(100)
    assert over(one, span(0, 10))
    one.skip_span(span(0, 10, allowed=True))
    assert one.skipped_by_guard == 0 and over(one, span(20, 23)) == "" and over(one, span(20, 24))
    assert over(one, span(10, 99), share=1.0) == ""
    assert over(one, span(10, 100), share=1.0) == one.why_user_may_not_skip(10, 100)
    assert numbers_in(one.why_user_may_not_skip(10, 100)) == [100]


# -- a guard ---------------------------------------------------------------------------------------


def ended(run: RunDirectory) -> str:
    return next(
        str(event.data["reason"]) for event in reversed(run.events()) if event.kind == "ended"
    )


@pytest.mark.fault("A11", "E5")
@pytest.mark.parametrize("share", [0.03, 0.2, 1.0])
def test_a_loss_that_steps_up_for_good_halts_a_small_run_with_a_checkpoint(
    tmp_path: Path, share: float
) -> None:
    known = (
        {"max_skipped_share": share}
        if "max_skipped_share" in GuardOptions.__struct_fields__
        else {}
    )
    loop = Loop(tmp_path, samples=80, mode=Mode.AUTO, **known)
    for step in loop.guard:
        loop.take(step)
    assert loop.guard.phase is Phase.HALTED
    reason = ended(loop.run)
    assert "guard.max_skipped_share" in reason if share < 1.0 else reason
    assert (
        len(loop.guard.cursor.quarantine) <= share * 80 and len(loop.guard.cursor.quarantine) < 80
    )
    (last,) = [event.data for event in loop.run.events() if event.kind == "ended"]
    assert (
        last["saved"] and read_manifest(max(loop.run.checkpoints.iterdir())).step == loop.guard.step
    )
    # a resume counts what was skipped before
    again = Loop(tmp_path, samples=80, mode=Mode.AUTO, **known).train()
    assert again.guard.phase is Phase.HALTED and len(again.guard.cursor.quarantine) <= share * 80


@pytest.mark.fault("A11")
def test_it_halts_without_a_run_directory_as_well(tmp_path: Path) -> None:
    loop = Loop(tmp_path, samples=80, directory=False)
    for step in loop.guard:
        loop.take(step)
    assert loop.guard.phase is Phase.HALTED


def test_where_a_screen_is_open_it_asks_and_an_answer_lets_it_skip_as_much_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunDirectory, "screens", lambda self: 1)
    questions = []

    def park(self: CommandHandler, question: str = "", **given: object) -> ParkResult:
        questions.append(question)
        return ParkResult.GO_ON

    monkeypatch.setattr(CommandHandler, "park", park)
    # A batch has 4 samples, and 4 of 400 may be skipped: the first bad batch is, the second is
    # asked about.
    loop = Loop(tmp_path, samples=400, bad=range(240, 252), max_skipped_share=0.01, persist=9)
    loop.train()
    assert loop.guard.phase is Phase.FINISHED
    assert [one.allowed for one in loop.guard.cursor.spans] == [False, True, False]
    (question,) = questions
    assert numbers_in(question)[-4:] == [8, 400, 0.01, 4] and question.endswith(": halt")
    verdicts = [event.data for event in loop.run.events() if event.kind == "verdict"]
    assert [(data["action"], data.get("beyond")) for data in verdicts] == [
        ("skip", None),
        ("pause", "skip"),
        ("skip", None),
    ]
    assert RunHistory.from_events(loop.run.events()).spans == loop.guard.cursor.spans
    judged = list(Rejudge(loop.run, loop.guard.config.guard, own=True))
    assert len(judged) == 133 and all(row.agrees for row in judged)


def test_a_rollback_beyond_the_share_is_not_done(tmp_path: Path) -> None:
    loop = Loop(
        tmp_path, samples=4000, bad=range(240, 252), max_skipped_share=12 / 520, persist=3
    ).train()
    # two batches are skipped; the window of the rollback holds four
    assert loop.guard.phase is Phase.HALTED
    assert numbers_in(ended(loop.run))[-4:-1] == [16, 520, pytest.approx(12 / 520, rel=1e-3)]
    (last,) = [event.data for event in loop.run.events() if event.kind == "verdict"][2:]
    assert (last["action"], last["beyond"]) == ("halt", "rollback")


def test_an_unanswered_question_about_the_share_never_skips(tmp_path: Path) -> None:
    """Whatever `ask_default` says: that would be by itself."""
    loop = Loop(
        tmp_path,
        samples=80,
        mode=Mode.ASK,
        ask_seconds=0.01,
        ask_default="go_on",
        persist=9,
        max_skipped_share=0.03,
    ).train()
    assert loop.guard.phase is Phase.HALTED and not loop.guard.cursor.spans
