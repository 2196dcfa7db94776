from __future__ import annotations

import itertools
import random
import tracemalloc

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guardrail.core.errors import DataError, UsageError
from guardrail.core.records.spans import Span
from guardrail.decide import quarantine as quarantine_module
from guardrail.decide.quarantine import Quarantine
from guardrail.decide.sample_cursor import Batch, CursorState, SampleCursor
from guardrail.decide.sample_order import SampleOrder, mix64
from tests.support.texts import numbers_in

HYPOTHESIS = settings(deadline=None, derandomize=True, max_examples=60)


# -- order -----------------------------------------------------------------------------------------


@HYPOTHESIS
@given(st.integers(1, 2000), st.integers(0, 2**64 - 1), st.integers(0, 5))
def test_each_epoch_is_a_permutation(samples: int, seed: int, epoch: int) -> None:
    order = SampleOrder(samples=samples, seed=seed)
    ids = order.samples(epoch * samples, (epoch + 1) * samples)
    assert sorted(ids) == list(range(samples))


@pytest.mark.parametrize("samples", [*range(1, 40), 63, 64, 65, 255, 256, 257, 1023, 1024, 1025])
def test_sizes_around_powers_of_two(samples: int) -> None:
    assert sorted(SampleOrder(samples=samples, seed=1).samples(0, samples)) == list(range(samples))


@HYPOTHESIS
@given(st.integers(1, 300), st.integers(0, 1000), st.integers(0, 100))
def test_a_position_gives_the_same_sample_however_it_is_asked_for(
    samples: int, first: int, count: int
) -> None:
    order = SampleOrder(samples=samples, seed=7)
    assert order.samples(first, first + count) == [
        order.sample(p) for p in range(first, first + count)
    ]


def test_epochs_and_seeds_give_other_permutations() -> None:
    order = SampleOrder(samples=1000, seed=1)
    first, second = order.samples(0, 1000), order.samples(1000, 2000)
    assert first != second != SampleOrder(samples=1000, seed=2).samples(1000, 2000)
    assert first != list(range(1000))
    assert [order.epoch(p) for p in (0, 999, 1000, 2500)] == [0, 0, 1, 2]


def test_the_permutation_looks_random() -> None:
    """No runs of neighbours, no drift: what a weak mixing function would show."""
    ids = np.array(SampleOrder(samples=10_000, seed=5).samples(0, 10_000))
    steps = np.abs(np.diff(ids))
    assert (steps == 1).mean() < 0.002
    assert abs(steps.mean() / 10_000 - 1 / 3) < 0.02  # mean distance of two uniform numbers
    assert abs(np.corrcoef(ids, np.arange(10_000))[0, 1]) < 0.05


def test_the_order_is_the_one_that_runs_were_saved_with() -> None:
    """Golden values: another order would silently resume every saved run on other data."""
    assert SampleOrder(samples=1000, seed=3).samples(0, 6) == [462, 392, 245, 878, 935, 421]
    assert SampleOrder(samples=1000, seed=3).samples(998, 1003) == [232, 172, 587, 680, 324]
    assert [mix64(), mix64(0), mix64(1, 2, 3), mix64(-1)] == [
        11400714819323198485,
        7960286522194355700,
        5246500226706903259,
        13029008266876403067,
    ]


def test_far_positions_cost_what_near_ones_do() -> None:
    order = SampleOrder(samples=10**12, seed=3)
    far = order.samples(10**15, 10**15 + 16)
    assert len(set(far)) == 16 and all(0 <= sample < 10**12 for sample in far)


def test_a_stream_is_the_data_as_it_stands() -> None:
    order = SampleOrder(samples=5, seed=3, shuffled=False)
    assert order.samples(0, 12) == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_no_samples_is_an_error() -> None:
    with pytest.raises(DataError, match=r"SampleOrder\(samples\).* > 0"):
        SampleOrder(samples=0)


# -- quarantine ------------------------------------------------------------------------------------


def test_a_sample_is_left_out_from_an_epoch_on() -> None:
    quarantine = Quarantine()
    quarantine.add(5, epoch=2)
    quarantine.add(7)
    assert [quarantine.holds(5, epoch) for epoch in range(4)] == [False, False, True, True]
    quarantine.add(5, epoch=3)
    assert quarantine.holds(5, 2)
    quarantine.add(5, epoch=1)
    assert list(quarantine.lines()) == ["5@1", "7"] and len(quarantine) == 2
    assert quarantine.holds(7, 0) and not quarantine.holds(6, 9)


def test_lines_are_read_back_with_comments_and_blanks() -> None:
    first = Quarantine()
    for sample, epoch in ((3, 0), (10, 4), (2, 1)):
        first.add(sample, epoch)
    second = Quarantine()
    second.read(["# from a run", "", *first.lines(), "  11  # a bad document", "12@0"])
    assert list(second.lines()) == ["2@1", "3", "10@4", "11", "12"]


@pytest.mark.parametrize("line", ["x", "-1", "1@-1", "1@x", "1.5", "1 2", "@3", "1@", "1_0", "+4"])
def test_a_bad_line_is_named(line: str) -> None:
    with pytest.raises(UsageError) as caught:
        Quarantine().read(["1", line], source="q.txt")
    assert str(caught.value).startswith("q.txt, line 2: ") and repr(line) in str(caught.value)


def test_an_id_that_the_data_does_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match=r"q.txt, line 1: sample 100\b.*\b100\b"):
        Quarantine().read(["100"], source="q.txt", samples=100)
    Quarantine().read(["99"], source="q.txt", samples=100)


# -- batches ---------------------------------------------------------------------------------------


def ledger(samples: int = 1000, batch: int = 8, **options: int) -> SampleCursor:
    return SampleCursor(SampleOrder(samples=samples, seed=3), batch_size=batch, **options)


def advance(book: SampleCursor, *, applied: bool = True) -> Batch:
    batch = book.next_batch()
    assert batch is not None
    if not applied:
        book.skip_span(Span(first=batch.first, last=batch.last, origin="rejected", step=1))
    book.advance(batch, applied=applied)
    return batch


def test_batches_follow_the_order_and_looking_does_not_move() -> None:
    book = ledger()
    assert book.next_batch() == book.next_batch()
    batches = [advance(book) for _ in range(5)]
    assert [b.first for b in batches] == [0, 8, 16, 24, 32]
    assert sum((b.samples for b in batches), ()) == tuple(book.order.samples(0, 40))
    assert all(b.positions == tuple(range(b.first, b.last)) for b in batches)


def test_quarantined_samples_are_passed_over_and_the_batch_stays_full() -> None:
    book = ledger()
    left_out = set(book.order.samples(3, 6)) | set(book.order.samples(12, 13))
    for sample in left_out:
        book.quarantine.add(sample)
    first, second = advance(book), advance(book)
    assert first.positions == (0, 1, 2, 6, 7, 8, 9, 10) and (first.first, first.last) == (0, 11)
    assert second.positions == (11, 13, 14, 15, 16, 17, 18, 19)
    assert not left_out & set(first.samples + second.samples)


def test_a_batch_begins_with_the_first_position_that_it_uses() -> None:
    book = ledger()
    for sample in book.order.samples(0, 8):
        book.quarantine.add(sample)
    assert advance(book).first == 8


def test_the_end_of_the_data_gives_a_short_batch_and_then_none() -> None:
    book = ledger(samples=20, limit=20)
    assert [len(advance(book).samples) for _ in range(3)] == [8, 8, 4]
    assert book.next_batch() is None
    everything = ledger(samples=20, limit=20)
    for sample in range(20):
        everything.quarantine.add(sample)
    assert everything.next_batch() is None


def test_batches_cross_epochs() -> None:
    book = ledger(samples=20)
    for _ in range(2):
        advance(book)
    batch = advance(book)
    assert batch.samples == tuple(book.order.samples(16, 24)) and (batch.first, batch.last) == (
        16,
        24,
    )


def test_all_samples_quarantined_is_an_error_and_not_an_endless_loop() -> None:
    book = ledger(samples=20)
    for sample in range(20):
        book.quarantine.add(sample, epoch=1)
    assert [len(advance(book).samples) for _ in range(2)] == [8, 8]
    with pytest.raises(DataError) as caught:
        advance(book)
    assert numbers_in(str(caught.value)) == [20]


def test_almost_all_samples_quarantined_still_trains() -> None:
    """One usable sample, wherever the permutations of the epochs put it."""
    for usable in range(50):
        book = ledger(samples=50, batch=4)
        for sample in set(range(50)) - {usable}:
            book.quarantine.add(sample)
        assert advance(book).samples == (usable,) * 4


def test_a_sample_met_again_is_left_out_from_that_epoch_on() -> None:
    """Its healthy use in epoch 0 stays true: a run that is told from its beginning makes the same
    batches.
    """
    book = ledger(samples=20)
    for _ in range(4):
        advance(book)
    rejected = advance(book, applied=False)  # positions 32-40: epoch 1
    after = [advance(book) for _ in range(6)]
    told = ledger(samples=20)
    told.quarantine.read(book.quarantine.lines())
    assert all(line.endswith("@1") or line.endswith("@2") for line in told.quarantine.lines())
    for _ in range(4):
        advance(told)
    assert [advance(told).samples for _ in range(6)] == [b.samples for b in after]
    assert not {s for b in after for s in b.samples} & set(rejected.samples)


def test_leave_out_counts_what_is_new() -> None:
    book = ledger()
    assert book.skip_span(Span(first=0, last=8, origin="rejected", step=1)) == 8
    assert book.skip_span(Span(first=4, last=12, origin="rollback", step=1)) == 4
    assert [span.first for span in book.spans] == [0, 4]


# -- streak ----------------------------------------------------------------------------------------


def test_the_streak_counts_rejections_with_nothing_applied_between() -> None:
    book = ledger()
    advance(book)
    assert [advance(book, applied=False).streak for _ in range(3)] == [0, 1, 2]
    assert advance(book).streak == 3
    assert advance(book).streak == 0
    assert advance(book, applied=False).streak == 0


def test_what_a_rollback_has_answered_does_not_count_again() -> None:
    book = ledger()
    for _ in range(3):
        advance(book)
    saved = book.state()
    advance(book)
    for _ in range(2):
        advance(book, applied=False)
    batch = book.next_batch()
    assert batch is not None and batch.streak == 2
    book.skip_span(Span(first=24, last=batch.last, origin="rollback", step=4))
    book.restore(saved)
    again = book.next_batch()
    assert again is not None and (again.first, again.streak) == (batch.last, 0)


def test_a_rejection_before_the_window_still_counts_when_it_is_passed_again() -> None:
    book = ledger()
    saved = book.state()
    advance(book)
    advance(book, applied=False)
    assert advance(book).streak == 1
    book.restore(saved)
    assert [advance(book).streak for _ in range(3)] == [0, 1, 0]


def test_what_a_person_leaves_out_is_no_streak() -> None:
    book = ledger()
    advance(book)
    book.skip_span(Span(first=8, last=24, origin="user", step=2, batches=2))
    batch = advance(book)
    assert (batch.first, batch.streak) == (24, 0)


# -- state -----------------------------------------------------------------------------------------


def test_state_goes_through_json_and_the_quarantine_stays() -> None:
    book = ledger()
    for _ in range(3):
        advance(book)
    advance(book, applied=False)
    saved = msgspec.json.decode(msgspec.json.encode(book.state()))
    assert saved == {"cursor": 32, "applied_end": 24}
    following = [advance(book) for _ in range(3)]
    book.restore(saved)
    assert book.state() == CursorState(cursor=32, applied_end=24)
    assert [advance(book) for _ in range(3)] == following and len(book.quarantine) == 8


@HYPOTHESIS
@given(st.integers(0, 2**32), st.integers(1, 120), st.integers(0, 60))
def test_a_restart_from_any_state_and_the_journal_makes_the_same_batches(
    seed: int, samples: int, cut: int
) -> None:
    """The undisturbed run and one that died after `cut` batches, resumed from an older state."""
    rng = random.Random(seed)
    book = SampleCursor(SampleOrder(samples=samples + 8, seed=seed), batch_size=rng.randint(1, 8))
    journal: list[Span] = []
    saved: list[tuple[CursorState, int]] = []
    applied: list[Batch] = []
    for _ in range(cut):
        if rng.random() < 0.2:
            saved.append((book.state(), len(applied)))
        batch = book.next_batch()
        assert batch is not None
        if rng.random() < 0.02 and len(book.quarantine) < samples // 2:
            journal.append(Span(first=batch.first, last=batch.last, origin="rejected", step=1))
            book.skip_span(journal[-1])
            book.advance(batch, applied=False)
        else:
            book.advance(batch, applied=True)
            applied.append(batch)
    if not saved:
        return
    state, done = rng.choice(saved)
    again = SampleCursor(SampleOrder(samples=samples + 8, seed=seed), batch_size=book.batch_size)
    for span in journal:
        again.skip_span(span)
    again.restore(state)
    for batch in applied[done:]:
        made = again.next_batch()
        assert made == batch
        again.advance(made, applied=True)


def test_a_batch_that_lost_some_samples_is_formed_again_from_the_same_place() -> None:
    ledger = SampleCursor(SampleOrder(samples=40, shuffled=False), batch_size=4, limit=80)
    batch = ledger.next_batch()
    assert batch is not None
    span = Span(first=0, last=4, origin="rejected", step=1, positions=(0, 2))
    assert ledger.samples_of(span) == [0, 2] and ledger.skip_span(span) == 2
    again = ledger.next_batch()
    assert again is not None and again.positions == (1, 3, 4, 5) and again.streak == 1
    ledger.advance(again, applied=True)
    after = ledger.next_batch()
    assert after is not None and (after.first, after.streak) == (6, 0)
    # In the next epoch they are left out as well, and taken back they are not.
    assert [p for p in (ledger.batch_of_range(40, 44) or again).positions] == [41, 43]
    assert ledger.undo_skips([span]) == 2
    assert len((ledger.batch_of_range(40, 44) or again).positions) == 4


def test_what_would_leave_no_sample_is_said_before() -> None:
    ledger = SampleCursor(SampleOrder(samples=40, seed=0, shuffled=True), batch_size=4)
    all_of_it = "all 40 samples of the training split would be skipped"
    assert (
        ledger.why_user_may_not_skip(0, 39) == ""
        and ledger.why_user_may_not_skip(0, 40) == all_of_it
    )
    # As many positions across an epoch's end show some samples twice.
    twice = 40 - len(set(ledger.order.samples(20, 60)))
    assert twice > 0 and ledger.why_user_may_not_skip(20, 60) == ""
    assert ledger.why_user_may_not_skip(20, 80) == all_of_it
    ledger.skip_span(Span(first=40, last=79, origin="user", step=1))
    (kept,) = set(range(40)) - set(ledger.order.samples(40, 79))
    place = 80 + ledger.order.samples(80, 120).index(kept)
    assert (
        ledger.why_user_may_not_skip(80, place) == ""
        and ledger.why_user_may_not_skip(place, place + 1) == all_of_it
    )
    ledger.skip_span(Span(first=place, last=place + 1, origin="user", step=1))
    ledger.restore(CursorState(cursor=place, applied_end=0))
    with pytest.raises(DataError, match="all 40 samples"):
        ledger.next_batch()


class ById:
    """The rule of a quarantine in its plainest form: an epoch for each sample."""

    def __init__(self) -> None:
        self.from_epoch: dict[int, int] = {}

    def add(self, sample: int, epoch: int) -> None:
        self.from_epoch[sample] = min(epoch, self.from_epoch.get(sample, epoch))

    def holds(self, sample: int, epoch: int) -> bool:
        return sample in self.from_epoch and self.from_epoch[sample] <= epoch


@pytest.mark.parametrize("long", [1, 3])
def test_ranges_of_positions_hold_what_their_samples_would(
    long: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over epochs, overlapping, and among single samples."""
    monkeypatch.setattr(quarantine_module, "LONG_RANGE", long)
    for seed in range(60):
        draw = random.Random(seed)
        count = draw.choice((3, 7, 20, 50))
        order = SampleOrder(samples=count, seed=seed, shuffled=draw.random() < 0.7)
        quarantine, plain = Quarantine(), ById()
        for _ in range(draw.randrange(1, 8)):
            if draw.random() < 0.3:
                sample, epoch = draw.randrange(count), draw.randrange(4)
                quarantine.add(sample, epoch)
                plain.add(sample, epoch)
            else:
                first = draw.randrange(4 * count)
                last = first + draw.randrange(1, 2 * count)
                quarantine.add_range(order, first, last)
                for position in range(first, last):
                    plain.add(order.sample(position), order.epoch(position))
            assert len(quarantine) == len(plain.from_epoch)
        lines = [str(s) if e == 0 else f"{s}@{e}" for s, e in sorted(plain.from_epoch.items())]
        assert list(quarantine.lines()) == lines
        for sample, epoch in itertools.product(range(count), range(7)):
            assert quarantine.holds(sample, epoch) == plain.holds(sample, epoch)
        ids = order.samples(first := draw.randrange(5 * count), first + 2 * count)
        held = [
            plain.holds(sample, order.epoch(position)) for position, sample in enumerate(ids, first)
        ]
        assert quarantine.are_held(first, ids, order) == held


@pytest.mark.parametrize("samples", [1, 2, 5, 100, 4097])
@pytest.mark.parametrize("shuffled", [True, False])
def test_the_place_of_a_sample_in_an_epoch(samples: int, shuffled: bool) -> None:
    order = SampleOrder(samples=samples, seed=3, shuffled=shuffled)
    for epoch in (0, 1, 5):
        ids = np.array(order.samples(epoch * samples, (epoch + 1) * samples))
        assert (order.find_offsets(ids, epoch) == np.arange(samples)).all()


@pytest.mark.fault("C5")
def test_a_long_skip_is_one_range() -> None:
    """640,000 samples; one entry for each would be 50 MB."""
    order = SampleOrder(samples=1_000_000, seed=1)
    book = SampleCursor(order, batch_size=32)
    tracemalloc.start()
    try:
        new = book.skip_span(
            Span(first=100, last=640_100, origin="user", step=1, reason="", batches=20_000)
        )
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert new == len(book.quarantine) == 640_000
    assert kept < 1_000_000
    book.cursor = 90
    batch = book.next_batch()
    assert batch is not None and batch.positions == (*range(90, 100), *range(640_100, 640_122))
    book.cursor = order.n_samples + 5
    later = book.next_batch()
    assert later is not None
    gone = set(order.samples(100, 640_100))
    assert not gone & set(later.samples) and len(later.samples) == 32
    assert book.undo_skips(list(book.spans)) == 640_000 and len(book.quarantine) == 0
