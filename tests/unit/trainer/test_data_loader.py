"""Which rank gets which rows, short batches, and reading ahead."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from guardrail.decide.sample_cursor import Batch, SampleCursor
from guardrail.decide.sample_order import SampleOrder
from tests.support.corpora import prepared, section, write
from trainer.data.corpus import Corpus
from trainer.data.loader import IGNORED, Loader, MicroBatch

BATCH = 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("loader")
    write(folder / "text" / "a.txt", "".join(f"line {number}\n" for number in range(40)))
    return prepared(section(folder))


def batches(corpus: Corpus, *, epochs: int = 1) -> Iterator[Batch]:
    samples = len(corpus.train)
    ledger = SampleCursor(
        SampleOrder(samples=samples, seed=3), batch_size=BATCH, limit=epochs * samples
    )
    ledger.quarantine.add(2)
    while (batch := ledger.next_batch()) is not None:
        yield batch
        ledger.advance(batch, applied=True)


def loaders(corpus: Corpus, world: int, micro_batches: int) -> list[Loader]:
    size = BATCH // (world * micro_batches)
    return [
        Loader(
            corpus.train,
            pad=corpus.pad,
            world=world,
            rank=r,
            micro_batches=micro_batches,
            micro_batch_size=size,
        )
        for r in range(world)
    ]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_the_ranks_cover_each_batch_exactly_once(
    corpus: Corpus, world: int, micro_batches: int
) -> None:
    lengths = set()
    for batch in batches(corpus, epochs=2):
        lengths.add(len(batch.samples))
        parts = [loader.load(batch) for loader in loaders(corpus, world, micro_batches)]
        # The m-th micro-batches of all ranks side by side, then the next: the order of the batch.
        in_order = [parts[rank][m] for m in range(micro_batches) for rank in range(world)]
        assert tuple(i for micro in in_order for i in micro.sample_ids) == batch.samples
        size = BATCH // (world * micro_batches)
        for micro in in_order:
            assert micro.tokens.shape == micro.labels.shape == (size, corpus.sequence_length)
            assert micro.tokens.dtype == micro.labels.dtype == np.int64
        assert (
            sum(micro.label_count for micro in in_order)
            == len(batch.samples) * corpus.sequence_length
        )
        tokens = np.concatenate([micro.tokens for micro in in_order])[: len(batch.samples)]
        labels = np.concatenate([micro.labels for micro in in_order])
        rows = corpus.train.tokens(batch.samples)
        assert (tokens == rows[:, :-1]).all() and (labels[: len(rows)] == rows[:, 1:]).all()
        assert (labels[len(rows) :] == IGNORED).all()
    assert len(lengths) == 2  # the last batch was short


def test_positions_are_those_of_the_first_samples(corpus: Corpus) -> None:
    batch = Batch(first=10, last=21, positions=(10, 11, 13, 14, 17, 20), samples=(5, 0, 7, 9, 1, 3))
    (loader,) = loaders(corpus, 1, 4)
    micros = loader.load(batch)
    # the last holds nothing but filling
    assert [micro.position for micro in micros] == [10, 13, 17, 21]
    assert [micro.sample_ids for micro in micros] == [(5, 0), (7, 9), (1, 3), ()]
    assert (micros[3].labels == IGNORED).all() and micros[3].label_count == 0


def test_padding_is_ignored_as_a_label(corpus: Corpus) -> None:
    newline = 10
    loader = Loader(corpus.train, pad=newline, world=1, rank=0, micro_batches=1, micro_batch_size=2)
    (micro,) = loader.load(Batch(first=0, last=2, positions=(0, 1), samples=(0, 1)))
    rows = corpus.train.tokens([0, 1])[:, 1:]
    assert (rows == newline).any()
    assert (micro.labels == np.where(rows == newline, IGNORED, rows)).all()


def test_a_batch_that_is_too_large_is_refused(corpus: Corpus) -> None:
    loader = Loader(corpus.train, pad=None, world=1, rank=0, micro_batches=1, micro_batch_size=2)
    with pytest.raises(ValueError, match=r"3 samples.* 2$"):
        loader.load(Batch(first=0, last=3, positions=(0, 1, 2), samples=(0, 1, 2)))


class Watched(Loader):
    """Notes which thread read which batch, and can be held up."""

    def __init__(self, corpus: Corpus) -> None:
        super().__init__(
            corpus.train, pad=None, world=1, rank=0, micro_batches=2, micro_batch_size=4
        )
        self.reads: list[tuple[str, int]] = []
        self.go = threading.Event()
        self.go.set()

    def _read(self, batch: Batch) -> list[MicroBatch]:
        ahead = threading.current_thread() is not threading.main_thread()
        if ahead:
            assert self.go.wait(30)
        self.reads.append(("ahead" if ahead else "now", batch.first))
        return super()._read(batch)


@pytest.fixture
def watched(corpus: Corpus) -> Iterator[Watched]:
    loader = Watched(corpus)
    yield loader
    loader.go.set()
    loader.close()


def same(micros: list[MicroBatch], expected: list[MicroBatch]) -> bool:
    return len(micros) == len(expected) and all(
        (a.tokens == b.tokens).all() and (a.labels == b.labels).all() and a.position == b.position
        for a, b in zip(micros, expected, strict=True)
    )


def test_a_right_prediction_is_used(corpus: Corpus, watched: Watched) -> None:
    (plain,) = loaders(corpus, 1, 2)
    for batch in batches(corpus):
        watched.prefetch(batch)
        watched.prefetch(batch)  # said twice, read once
        assert same(watched.load(msgspec.structs.replace(batch, streak=3)), plain.load(batch))
    assert [how for how, _ in watched.reads] == ["ahead"] * len(list(batches(corpus)))


def test_a_wrong_prediction_is_discarded_without_waiting_for_it(
    corpus: Corpus, watched: Watched
) -> None:
    (plain,) = loaders(corpus, 1, 2)
    first, second, third = list(batches(corpus))[:3]
    watched.go.clear()
    watched.prefetch(second)
    assert same(watched.load(third), plain.load(third))  # while the other is still being read
    watched.prefetch(first)
    watched.prefetch(second)
    watched.go.set()
    assert same(watched.load(second), plain.load(second))
    assert ("now", third.first) in watched.reads and ("ahead", first.first) not in watched.reads


def test_the_same_samples_at_other_positions_are_another_batch(
    corpus: Corpus, watched: Watched
) -> None:
    batch = Batch(first=0, last=2, positions=(0, 1), samples=(4, 5))
    watched.prefetch(batch)
    later = Batch(first=7, last=9, positions=(7, 8), samples=(4, 5))
    assert watched.load(later)[0].position == 7


def test_an_error_while_reading_ahead_is_raised_by_load(corpus: Corpus, watched: Watched) -> None:
    batch = Batch(first=0, last=1, positions=(0,), samples=(10**6,))
    watched.prefetch(batch)
    with pytest.raises(IndexError):
        watched.load(batch)


def test_the_global_generators_are_left_alone(corpus: Corpus) -> None:
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    (loader,) = loaders(corpus, 1, 1)
    for batch in batches(corpus):
        loader.load(batch)
    assert np.random.get_state()[1].tolist() == before


def test_closing_ends_the_thread_and_leaves_a_loader_that_works(
    corpus: Corpus, watched: Watched
) -> None:
    batch = next(batches(corpus))
    watched.prefetch(batch)
    watched.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
    watched.prefetch(batch)
    assert watched.load(batch)[0].position == batch.positions[0]
