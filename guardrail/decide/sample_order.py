"""The sample order, the cursor and the quarantine: which samples a run has met, meets next, and
never meets.

The order is a function of (seed, position): resuming anywhere costs the same as starting.
Everything here is pure integer arithmetic, so that every rank, the report and the tests compute the
same batches.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from guardrail.core.errors import DataError, UsageError
from guardrail.core.ranges import Ranges
from guardrail.core.records import AUTOMATIC, Record, Span
from guardrail.core.text import escape_text

_FAR = 1 << 40  # epochs
LONG = 4096  # positions from which on a range is kept as one
_NEVER = 1 << 62  # an epoch that no run meets
_QUARANTINE_LINE = re.compile(r"(\d{1,18})(?:@(\d{1,18}))?", re.ASCII)
_MASK = (1 << 64) - 1
_GOLDEN, _MIX_A, _MIX_B = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix64(*values: int) -> int:
    """Hash integers to 64 bits (SplitMix64's finaliser, Steele et al. 2014, folded over the
    values).
    """
    state = _GOLDEN
    for value in values:
        state = ((state ^ (value & _MASK)) + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * _MIX_A) & _MASK
        state = ((state ^ (state >> 27)) * _MIX_B) & _MASK
        state ^= state >> 31
    return state


def _mix64_array(values: np.ndarray) -> np.ndarray:
    """The finaliser of `mix64` over a uint64 array; wraps modulo 2^64 as uint64 arithmetic does."""
    state = values + np.uint64(_GOLDEN)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(_MIX_A)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(_MIX_B)
    return np.asarray(state ^ (state >> np.uint64(31)))


class SampleOrder:
    """Position -> sample id, over endless epochs.

    `shuffled` draws another permutation of [0, n) for each epoch: a four-round Feistel network over
    the next power of four, walked until it lands inside (a format-preserving cipher, Black &
    Rogaway 2002). It needs no table, so position 10^12 costs what position 0 costs.

    Args:
        samples: number of samples of the training split, > 0.
        seed: of the permutation; `stream` ignores it.
        shuffled: False gives the samples as they stand in the data, epoch after epoch.

    Raises:
        DataError: there is no sample, or `samples` is no whole number.
    """

    _ROUNDS = 4
    BLOCK = 1024
    KEPT_BLOCKS = 4

    def __init__(self, samples: int, *, seed: int = 0, shuffled: bool = True) -> None:
        if isinstance(samples, bool) or not isinstance(samples, (int, np.integer)) or samples <= 0:
            raise DataError(f"SampleOrder(samples): expected a whole number > 0, got {samples!r}")
        self.n_samples = int(samples)
        self.seed = seed
        self.shuffled = shuffled
        self._half = np.uint64(max(1, ((self.n_samples - 1).bit_length() + 1) // 2))
        self._half_mask = np.uint64((1 << int(self._half)) - 1)
        self._blocks: dict[tuple[int, int], list[int]] = {}  # (epoch, block) -> ids, oldest first

    def epoch(self, position: int) -> int:
        return position // self.n_samples

    def sample(self, position: int) -> int:
        """The sample id at `position` (>= 0)."""
        return self.samples(position, position + 1)[0]

    def samples(self, first: int, last: int) -> list[int]:
        """The sample ids at the positions [first, last)."""
        ids: list[int] = []
        while first < last:
            epoch, offset = divmod(first, self.n_samples)
            block, start = divmod(offset, self.BLOCK)
            found = self.block(epoch, block)[start : start + last - first]
            ids += found
            first += len(found)
        return ids

    def block(self, epoch: int, block: int) -> list[int]:
        """The ids of a whole block of an epoch: numpy takes for a thousand hardly longer than for
        one batch.
        """
        found = self._blocks.get((epoch, block))
        if found is None:
            begin = block * self.BLOCK
            offsets = np.arange(begin, min(begin + self.BLOCK, self.n_samples), dtype=np.uint64)
            found = (self._permuted(offsets, epoch) if self.shuffled else offsets).tolist()
            if len(self._blocks) == self.KEPT_BLOCKS:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[epoch, block] = found
        return found

    def numbers(self, first: int, last: int) -> np.ndarray:
        """As `samples`, int64, of positions within one epoch; keeps no block of them."""
        epoch, offset = divmod(first, self.n_samples)
        offsets = np.arange(offset, offset + last - first, dtype=np.uint64)
        return (self._permuted(offsets, epoch) if self.shuffled else offsets).astype(np.int64)

    def offsets(self, samples: np.ndarray, epoch: int) -> np.ndarray:
        """Where in an epoch samples stand: the inverse of the order. int64, as long as
        `samples`.
        """
        if not self.shuffled:
            return samples.astype(np.int64)
        keys = [np.uint64(mix64(self.seed, epoch, turn)) for turn in range(self._ROUNDS)]
        values = samples.astype(np.uint64)
        walking = np.ones(len(values), dtype=bool)
        while walking.any():
            left, right = values[walking] >> self._half, values[walking] & self._half_mask
            for key in reversed(keys):
                left, right = right ^ (_mix64_array(left ^ key) & self._half_mask), left
            values[walking] = (left << self._half) | right
            walking = values >= np.uint64(self.n_samples)
        return values.astype(np.int64)

    def _permuted(self, values: np.ndarray, epoch: int) -> np.ndarray:
        keys = [np.uint64(mix64(self.seed, epoch, turn)) for turn in range(self._ROUNDS)]
        walking = np.ones(len(values), dtype=bool)
        values = values.copy()
        while walking.any():
            left, right = values[walking] >> self._half, values[walking] & self._half_mask
            for key in keys:
                left, right = right, left ^ (_mix64_array(right ^ key) & self._half_mask)
            values[walking] = (left << self._half) | right
            walking = values >= np.uint64(self.n_samples)
        return values


class Batch(Record, frozen=True, kw_only=True):
    """The samples of one step.

    Attributes:
        first, last: the stretch [first, last) of positions that it takes up, quarantined ones
        included.
        positions: the positions used, ascending; shorter than the batch size only at the end of the
        data.
        samples: their sample ids.
        streak: batches rejected directly before it with no applied update between.
    """

    first: int
    last: int
    positions: tuple[int, ...]
    samples: tuple[int, ...]
    streak: int = 0


class Quarantine:
    """The samples that a run leaves out. It grows, unless a decision of the guard is undone by a
    person.

    A sample met a second time, in epoch e > 0, is left out from epoch e on: its healthy use before
    stays true, and a run that is told so from its beginning makes exactly the same batches. Written
    `ID` (always) or `ID@EPOCH` (from that epoch on), one a line.

    Few samples are kept by their ids. A range of `LONG` positions and more is kept as that range,
    since a skip may hold millions of samples: the order tells for each sample whether it stands
    within.
    """

    def __init__(self) -> None:
        self._from_epoch: dict[int, int] = {}
        self._read: dict[int, int] = {}  # what a list named; no undo reaches it
        self._order: SampleOrder | None = None  # of the ranges
        self._ranges: dict[int, Ranges] = {}  # epoch -> offsets in it
        # (epoch, block) -> what is held, oldest first
        self._blocks: dict[tuple[int, int], list[bool]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, sample: int, epoch: int = 0) -> None:
        known = self._from_epoch.get(sample)
        if known is None and not self._in_ranges(sample):
            self._count += 1
        self._blocks.clear()
        self._from_epoch[sample] = epoch if known is None else min(epoch, known)

    def add_range(self, order: SampleOrder, first: int, last: int) -> None:
        """Add the samples at the positions [first, last), each from the epoch of its position
        on.
        """
        if last - first < LONG:
            for position, sample in enumerate(order.samples(first, last), first):
                self.add(sample, order.epoch(position))
            return
        self._order = order
        self._blocks.clear()
        while first < last:
            epoch, offset = divmod(first, order.n_samples)
            end = min(last, (epoch + 1) * order.n_samples)
            new = self._ranges.setdefault(epoch, Ranges()).add(offset, offset + end - first)
            base = epoch * order.n_samples
            self._count += sum(
                self._not_held(order.numbers(base + a, base + b), epoch) for a, b in new
            )
            first = end

    def _not_held(self, samples: np.ndarray, but: int) -> int:
        """How many samples nothing else holds than the ranges of one epoch."""
        assert self._order is not None
        held = np.isin(
            samples, np.fromiter(self._from_epoch, dtype=np.int64, count=len(self._from_epoch))
        )
        for epoch, ranges in self._ranges.items():
            if epoch != but:
                held |= ranges.holds_each(self._order.offsets(samples, epoch))
        return int(np.count_nonzero(~held))

    def holds(self, sample: int, epoch: int) -> bool:
        start = self._from_epoch.get(sample)
        return (start is not None and start <= epoch) or (
            bool(self._ranges) and self._in_ranges(sample, epoch)
        )

    def _in_ranges(self, sample: int, epoch: int | None = None) -> bool:
        """Whether a range up to an epoch (None: any range) holds a sample."""
        if self._order is None:
            return False
        one = np.array([sample])
        known = [e for e in self._ranges if epoch is None or e <= epoch]
        return any(self._ranges[e].holds(int(self._order.offsets(one, e)[0])) for e in known)

    def held(self, first: int, samples: Sequence[int], order: SampleOrder) -> list[bool]:
        """Which of the samples at the positions from `first` on are held, each in the epoch of its
        position.
        """
        if not self._ranges:
            found = self._from_epoch
            return [found.get(s, _NEVER) <= order.epoch(p) for p, s in enumerate(samples, first)]
        held: list[bool] = []
        while len(held) < len(samples):
            epoch, offset = divmod(first + len(held), order.n_samples)
            block, start = divmod(offset, order.BLOCK)
            held += self._held_block(epoch, block, order)[start : start + len(samples) - len(held)]
        return held

    def _held_block(self, epoch: int, block: int, order: SampleOrder) -> list[bool]:
        """As `held`, of a whole block: numpy takes for a thousand hardly longer than for one
        batch.
        """
        found = self._blocks.get((epoch, block))
        if found is None:
            found = self.held_in(epoch, np.asarray(order.block(epoch, block))).tolist()
            if len(self._blocks) == order.KEPT_BLOCKS:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[epoch, block] = found
        return found

    def held_in(self, epoch: int, samples: np.ndarray) -> np.ndarray:
        """Which samples are held in an epoch: bool, as long as `samples`."""
        held = np.array(
            [self._from_epoch.get(one, _NEVER) <= epoch for one in samples.tolist()], dtype=bool
        )
        for begun, ranges in self._ranges.items():
            if begun <= epoch:
                assert self._order is not None
                held |= ranges.holds_each(self._order.offsets(samples, begun))
        return held

    def _all(self) -> dict[int, int]:
        """Sample -> epoch from which on it is held, the ranges written out."""
        found = dict(self._from_epoch)
        for epoch, ranges in self._ranges.items():
            assert self._order is not None
            base = epoch * self._order.n_samples
            for first, last in ranges.pairs():
                for sample in self._order.numbers(base + first, base + last).tolist():
                    found[sample] = min(epoch, found.get(sample, epoch))
        return found

    def lines(self) -> Iterator[str]:
        for sample, epoch in sorted(self._all().items()):
            yield str(sample) if epoch == 0 else f"{sample}@{epoch}"

    def read(
        self, lines: Iterable[str], *, source: str = "quarantine", samples: int | None = None
    ) -> None:
        """Add what `lines()` wrote; blank lines and `#` comments are passed over.

        Args:
            source: named in errors.
            samples: number of samples there are; an id beyond them belongs to other data.

        Raises:
            UsageError: names the line.
        """
        for number, raw in enumerate(lines, 1):
            text = raw.split("#", 1)[0].strip()
            if not text:
                continue
            parts = _QUARANTINE_LINE.fullmatch(text)
            if parts is None:
                shown = escape_text(repr(text), 80)
                raise UsageError(
                    f"{source}, line {number}: {shown} is not a sample id (ID, or ID@EPOCH)"
                )
            sample = int(parts[1])
            if samples is not None and sample >= samples:
                raise UsageError(
                    f"{source}, line {number}: sample {sample} of {samples}: the list belongs to other data or settings"
                )
            epoch = int(parts[2] or 0)
            self._read[sample] = min(epoch, self._read.get(sample, epoch))
            self.add(sample, epoch)

    def forget(self) -> None:
        """Back to what was read from lists."""
        self._from_epoch = dict(self._read)
        self._ranges.clear()
        self._blocks.clear()
        self._count = len(self._from_epoch)


class LedgerState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What travels with a snapshot. The quarantine does not: it outlives a rollback, and the
    journal holds it.

    `applied` counts applied batches where the batch size depends on them, else it is 0.
    """

    cursor: int
    applied_end: int
    applied: int = 0


_LOOK_AHEAD = 4096  # batches of growing size that are counted one by one


class SampleCursor:
    """Order + cursor + quarantine -> the next batch.

    Args:
        order: the sample order.
        batch_size: samples of a global batch, or a function that gives those of step 1, 2, ...
        limit: positions after which the data ends (epochs * samples), None: endless.
    """

    def __init__(
        self,
        order: SampleOrder,
        *,
        batch_size: int | Callable[[int], int],
        limit: int | None = None,
    ) -> None:
        self.order = order
        self._size = batch_size
        self.limit = limit
        self.quarantine = Quarantine()
        self.spans: list[Span] = []
        # Samples that the guard itself has left out since a user last allowed it more than its
        # share.
        self.left_out_alone = 0
        self.cursor = 0
        # Applied batches, if sizes go by them: a batch that is left out does not make the next one
        # larger.
        self.applied = 0
        # End of the last applied batch. Rejected spans between it and the next batch are the
        # streak, which a crash cannot change: after a restart the journal puts the same spans
        # there.
        self.applied_end = 0
        # (first, from where on the next batch begins), ascending.
        self._rejected: list[tuple[int, int]] = []

    @property
    def batch_size(self) -> int:
        """Samples of the next batch."""
        return self._size(self.applied + 1) if callable(self._size) else self._size

    def batches_left(self) -> int:
        """Batches up to the end of the data, if none of their samples is skipped; 0 where it has no
        end.
        """
        if self.limit is None:
            return 0
        left, batches = self.limit - self.cursor, 0
        size = self.batch_size
        while callable(self._size) and 0 < left and batches < _LOOK_AHEAD:
            size = self._size(self.applied + 1 + batches)
            left, batches = left - size, batches + 1
        return batches + max(0, -(-left // size))

    def next_batch(self) -> Batch | None:
        """The next batch of the order that is not quarantined, or None at the end of the data.

        Does not move the cursor. Raises DataError when a whole epoch holds nothing but quarantined
        samples.
        """
        positions: list[int] = []
        samples: list[int] = []
        position = self.cursor
        barren = 0
        size = self.batch_size
        while len(positions) < size and (self.limit is None or position < self.limit):
            stretch = position + size - len(positions)
            stretch = stretch if self.limit is None else min(stretch, self.limit)
            found = self.order.samples(position, stretch)
            for sample, held in zip(
                found, self.quarantine.held(position, found, self.order), strict=True
            ):
                if held:
                    barren += 1
                else:
                    barren = 0
                    positions.append(position)
                    samples.append(sample)
                position += 1
            # The last usable sample may stand first in one epoch and last in the next. Two epochs'
            # worth without one hold a whole barren epoch, and no quarantine shrinks from one epoch
            # to the next.
            if barren >= 2 * self.order.n_samples:
                raise DataError(
                    f"all {self.order.n_samples} samples of the training split are quarantined"
                )
        if not positions:
            return None
        # `first` is the first position used: the stretch that a rejected batch quarantines begins
        # with it.
        first = positions[0]
        return Batch(
            first=first,
            last=position,
            positions=tuple(positions),
            samples=tuple(samples),
            streak=self._streak(first),
        )

    def after(self, batch: Batch) -> Batch | None:
        """The batch that follows `batch` if it is applied; None at the end of the data. Nothing
        moves.
        """
        position = self.state()
        self.passed(batch, applied=True)
        try:
            return self.next_batch()
        except DataError:
            return None  # said when that batch is really wanted
        finally:
            self.restore(position)

    def stretch(self, first: int, last: int) -> Batch | None:
        """What is not quarantined of the positions [first, last) as a batch; None where nothing is
        left.
        """
        return self.chosen(range(first, last))

    def chosen(self, positions: Iterable[int]) -> Batch | None:
        """What is not quarantined of ascending positions as a batch; None where nothing is left."""
        kept = [
            (p, s)
            for p in positions
            if not self.quarantine.holds(s := self.order.sample(p), self.order.epoch(p))
        ]
        if not kept:
            return None
        return Batch(
            first=kept[0][0],
            last=kept[-1][0] + 1,
            positions=tuple(position for position, _ in kept),
            samples=tuple(sample for _, sample in kept),
        )

    def _streak(self, first: int) -> int:
        """Rejected spans between the last applied batch and the one that begins with position
        `first`.
        """
        begin = bisect_left(self._rejected, (self.applied_end, 0))
        return sum(end <= first for _, end in self._rejected[begin:])

    def passed(self, batch: Batch, *, applied: bool) -> None:
        """Move the cursor behind `batch`."""
        self.cursor = batch.last
        if applied:
            self.applied_end = batch.last
            if callable(self._size):
                self.applied += 1

    def leave_out(self, span: Span) -> int:
        """Quarantine the samples of a span; returns how many were new. The journal has the span
        already.
        """
        before = len(self.quarantine)
        if span.positions:
            for position, sample in zip(span.positions, self.samples_of(span), strict=True):
                self.quarantine.add(sample, self.order.epoch(position))
        else:
            self.quarantine.add_range(self.order, span.first, span.last)
        self.spans.append(span)
        if span.allowed:
            self.left_out_alone = 0
        elif span.origin in AUTOMATIC:
            self.left_out_alone += len(self.quarantine) - before
        if span.origin == "rejected":
            # What is left of a batch that lost some samples is formed again from the same place: it
            # comes after it.
            insort(self._rejected, (span.first, span.first if span.positions else span.last))
        elif span.origin == "rollback":
            # What a rollback has answered does not count again towards the next one.
            self._rejected = [
                r for r in self._rejected if not (span.first <= r[0] and r[1] <= span.last)
            ]
        return len(self.quarantine) - before

    def data_size(self, total_steps: int = 0) -> int:
        """Distinct samples that the run reads until it ends: all there are, or fewer where it ends
        before.

        Args:
            total_steps: applied updates after which it ends; 0: only the data ends it.
        """
        most = self.order.n_samples if self.limit is None else min(self.order.n_samples, self.limit)
        if not total_steps:
            return most
        if not callable(self._size):
            return min(most, total_steps * self._size)
        positions = 0
        for step in range(1, total_steps + 1):
            positions += self._size(step)
            if positions >= most:
                return most
        return positions

    def over_share(self, span: Span, *, share: float, data: int) -> str:
        """Why the guard may not leave a span out by itself; "" where it may.

        Args:
            share: of the data that it may leave out; see `guard.max_skipped_share`.
            data: samples that this is a share of; see `data_size`.
        """
        never = self.order.epoch(max(span.last, self.cursor)) + _FAR
        samples = np.array(sorted(set(self.samples_of(span))))
        fresh = int(np.count_nonzero(~self.quarantine.held_in(never, samples)))
        if not fresh:
            return ""
        count, most = self.left_out_alone + fresh, math.floor(share * data + 1e-9)
        if count > most:
            return (
                f"{count:,} of {data:,} samples would be skipped, "
                f"and guard.max_skipped_share = {share:g} allows {most:,}"
            )
        return self.nothing_left(span.first, span.last)

    def nothing_left(self, first: int, last: int) -> str:
        """Why a person cannot leave the positions [first, last) out: no sample would be left. ""
        where some are.
        """
        count = self.order.n_samples
        if last - first + len(self.quarantine) < count:
            return ""
        gone, after = np.array(self.order.samples(first, last)), self.order.epoch(last) + 1
        for begin in range(0, count, 1 << 16):
            some = np.arange(begin, min(begin + (1 << 16), count))
            if not (np.isin(some, gone) | self.quarantine.held_in(after, some)).all():
                return ""
        return f"all {count:,} samples of the training split would be left out"

    def rejected(self, first: int, last: int) -> set[int]:
        """The positions that rejected updates within [first, last) have left out."""
        within = [
            s for s in self.spans if s.origin == "rejected" and first <= s.first and s.last <= last
        ]
        return {
            position
            for span in within
            for position in span.positions or range(span.first, span.last)
        }

    def samples_of(self, span: Span) -> list[int]:
        """The ids of the samples that a span means, in the order of its positions."""
        if span.positions:
            return [self.order.sample(position) for position in span.positions]
        return self.order.samples(span.first, span.last)

    def take_back(self, spans: Iterable[Span]) -> int:
        """Undo `leave_out` of these spans; returns how many samples are no longer quarantined.

        A sample that another span or the list of a file leaves out as well stays out. The journal
        has it already.
        """
        back = list(spans)
        before = len(self.quarantine)
        remaining = [span for span in self.spans if span not in back]
        self.quarantine.forget()
        self.spans, self._rejected, self.left_out_alone = [], [], 0
        for span in remaining:
            self.leave_out(span)
        return before - len(self.quarantine)

    def state(self) -> LedgerState:
        return LedgerState(cursor=self.cursor, applied_end=self.applied_end, applied=self.applied)

    def restore(self, state: LedgerState | dict[str, Any]) -> None:
        """Go back to a snapshot's cursor; the quarantine keeps all that it has learnt."""
        if isinstance(state, dict):
            state = msgspec.convert(state, LedgerState)
        self.cursor, self.applied_end, self.applied = state.cursor, state.applied_end, state.applied
