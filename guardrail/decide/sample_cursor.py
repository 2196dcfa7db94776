"""The cursor of a run: sample order and quarantine -> the next batch."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import numpy as np

from guardrail.core.errors import DataError
from guardrail.core.records.record import Record
from guardrail.core.records.spans import AUTOMATIC, Span
from guardrail.decide.quarantine import Quarantine
from guardrail.decide.sample_order import SampleOrder

_FAR = 1 << 40  # epochs
_LOOK_AHEAD = 4096  # batches of growing size that are counted one by one


class Batch(Record, frozen=True, kw_only=True):
    """The samples of one step.

    Attributes:
        first, last: the range [first, last) of positions that it covers, quarantined ones included.
        positions: the positions used, ascending; fewer than the batch size only at the end of the
            data.
        samples: their sample ids.
        streak: number of batches rejected right before it, with no applied update in between.
    """

    first: int
    last: int
    positions: tuple[int, ...]
    samples: tuple[int, ...]
    streak: int = 0


class CursorState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The part of `SampleCursor` that a snapshot holds.

    The quarantine is not part of it: it stays after a rollback, and the journal has it. `applied`
    counts applied batches if the batch size depends on them, else it is 0.
    """

    cursor: int
    applied_end: int
    applied: int = 0


class SampleCursor:
    """Returns the next batch of a run, and skips spans of samples.

    Args:
        order: the sample order.
        batch_size: samples of a global batch, or a function that gives those of step 1, 2, ...
        limit: position at which the data ends (epochs * samples); None: it never ends.

    Attributes:
        skipped_by_guard: samples that the guard has skipped by itself, since a user last allowed
            more than `guard.max_skipped_share`.
        applied: number of applied batches, if the batch size depends on it. A skipped batch does
            not make the next one larger.
        applied_end: end of the last applied batch. The rejected spans between it and the next batch
            are the streak. A crash does not change the streak: after a restart the journal has the
            same spans.
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
        self.skipped_by_guard = 0
        self.cursor = 0
        self.applied = 0
        self.applied_end = 0
        # (first, position where the next batch begins), ascending.
        self._rejected: list[tuple[int, int]] = []

    @property
    def batch_size(self) -> int:
        """Return the number of samples of the next batch."""
        if callable(self._size):
            return self._size(self.applied + 1)
        return self._size

    def batches_left(self) -> int:
        """Return the number of batches up to the end of the data, if no more samples are skipped.

        0 where the data has no end.
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
        """Return the next batch without quarantined samples; None at the end of the data.

        Does not move the cursor.

        Raises:
            DataError: all samples of an epoch are quarantined.
        """
        positions: list[int] = []
        samples: list[int] = []
        position = self.cursor
        consecutive_held = 0
        size = self.batch_size
        while len(positions) < size and (self.limit is None or position < self.limit):
            end = position + size - len(positions)
            if self.limit is not None:
                end = min(end, self.limit)
            found = self.order.samples(position, end)
            held = self.quarantine.are_held(position, found, self.order)
            for sample, is_held in zip(found, held, strict=True):
                if is_held:
                    consecutive_held += 1
                else:
                    consecutive_held = 0
                    positions.append(position)
                    samples.append(sample)
                position += 1
            # The only usable sample may be the first of one epoch and the last of the next. Two
            # epochs of held samples contain one epoch in which all are held. The quarantine does
            # not shrink from one epoch to the next.
            if consecutive_held >= 2 * self.order.n_samples:
                raise DataError(
                    f"all {self.order.n_samples} samples of the training split are quarantined"
                )
        if not positions:
            return None
        # The span of a rejected batch begins with the first position that the batch used.
        first = positions[0]
        return Batch(
            first=first,
            last=position,
            positions=tuple(positions),
            samples=tuple(samples),
            streak=self._count_streak(first),
        )

    def peek(self, batch: Batch) -> Batch | None:
        """Return the batch that follows `batch` if it is applied; None at the end of the data.

        Does not move the cursor.
        """
        state = self.state()
        self.advance(batch, applied=True)
        try:
            return self.next_batch()
        except DataError:
            return None  # raised again when that batch is needed
        finally:
            self.restore(state)

    def batch_of_range(self, first: int, last: int) -> Batch | None:
        """Return the samples at positions [first, last) that are not quarantined; None if none."""
        return self.batch_of_positions(range(first, last))

    def batch_of_positions(self, positions: Iterable[int]) -> Batch | None:
        """Return the samples at ascending positions that are not quarantined; None if none."""
        kept: list[int] = []
        samples: list[int] = []
        for position in positions:
            sample = self.order.sample(position)
            if not self.quarantine.holds(sample, self.order.epoch(position)):
                kept.append(position)
                samples.append(sample)
        if not kept:
            return None
        return Batch(
            first=kept[0], last=kept[-1] + 1, positions=tuple(kept), samples=tuple(samples)
        )

    def _count_streak(self, first: int) -> int:
        """Return the number of rejected spans between the last applied batch and `first`."""
        begin = bisect_left(self._rejected, (self.applied_end, 0))
        return sum(end <= first for _, end in self._rejected[begin:])

    def advance(self, batch: Batch, *, applied: bool) -> None:
        """Move the cursor to the end of `batch`."""
        self.cursor = batch.last
        if applied:
            self.applied_end = batch.last
            if callable(self._size):
                self.applied += 1

    def skip_span(self, span: Span) -> int:
        """Quarantine the samples of a span; return how many were new.

        The caller has written the span to the journal before.
        """
        before = len(self.quarantine)
        if span.positions:
            for position, sample in zip(span.positions, self.samples_of(span), strict=True):
                self.quarantine.add(sample, self.order.epoch(position))
        else:
            self.quarantine.add_range(self.order, span.first, span.last)
        new = len(self.quarantine) - before
        self.spans.append(span)
        if span.allowed:
            self.skipped_by_guard = 0
        elif span.origin in AUTOMATIC:
            self.skipped_by_guard += new
        if span.origin == "rejected":
            # A batch that loses only some samples is formed again from the same position, so the
            # next batch begins there.
            insort(self._rejected, (span.first, span.first if span.positions else span.last))
        elif span.origin == "rollback":
            # Rejections that a rollback has answered do not count towards the next rollback.
            self._rejected = [
                (first, last)
                for first, last in self._rejected
                if not (span.first <= first and last <= span.last)
            ]
        return new

    def data_size(self, total_steps: int = 0) -> int:
        """Return the number of distinct samples that the run reads until it ends.

        Args:
            total_steps: applied updates after which it ends; 0: it ends with the data.
        """
        most = self.order.n_samples
        if self.limit is not None:
            most = min(most, self.limit)
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

    def why_guard_may_not_skip(self, span: Span, *, share: float, data: int) -> str:
        """Return why the guard may not skip a span by itself; "" where it may.

        Args:
            share: largest share of the data that it may skip; see `guard.max_skipped_share`.
            data: number of samples that this is a share of; see `data_size`.
        """
        never = self.order.epoch(max(span.last, self.cursor)) + _FAR
        samples = np.array(sorted(set(self.samples_of(span))))
        new = int(np.count_nonzero(~self.quarantine.held_in_epoch(never, samples)))
        if not new:
            return ""
        count, most = self.skipped_by_guard + new, math.floor(share * data + 1e-9)
        if count > most:
            return (
                f"{count:,} of {data:,} samples would be skipped, "
                f"and guard.max_skipped_share = {share:g} allows {most:,}"
            )
        return self.why_user_may_not_skip(span.first, span.last)

    def why_user_may_not_skip(self, first: int, last: int) -> str:
        """Return why positions [first, last) cannot be skipped: no sample would be left.

        "" where some are left.
        """
        count = self.order.n_samples
        if last - first + len(self.quarantine) < count:
            return ""
        gone, after = np.array(self.order.samples(first, last)), self.order.epoch(last) + 1
        for begin in range(0, count, 1 << 16):
            some = np.arange(begin, min(begin + (1 << 16), count))
            if not (np.isin(some, gone) | self.quarantine.held_in_epoch(after, some)).all():
                return ""
        return f"all {count:,} samples of the training split would be skipped"

    def rejected_positions(self, first: int, last: int) -> set[int]:
        """Return the positions that rejected updates have skipped within [first, last)."""
        positions: set[int] = set()
        for span in self.spans:
            if span.origin == "rejected" and first <= span.first and span.last <= last:
                positions.update(span.positions or range(span.first, span.last))
        return positions

    def samples_of(self, span: Span) -> list[int]:
        """Return the ids of the samples of a span, in the order of its positions."""
        if span.positions:
            return [self.order.sample(position) for position in span.positions]
        return self.order.samples(span.first, span.last)

    def undo_skips(self, spans: Iterable[Span]) -> int:
        """Undo `skip_span` of these spans; return how many samples are no longer quarantined.

        A sample that another span or a list also holds stays quarantined. The caller has written
        the undo to the journal before.
        """
        undone = list(spans)
        before = len(self.quarantine)
        remaining = [span for span in self.spans if span not in undone]
        self.quarantine.reset_to_lists()
        self.spans, self._rejected, self.skipped_by_guard = [], [], 0
        for span in remaining:
            self.skip_span(span)
        return before - len(self.quarantine)

    def state(self) -> CursorState:
        """Return what a snapshot holds of the cursor."""
        return CursorState(cursor=self.cursor, applied_end=self.applied_end, applied=self.applied)

    def restore(self, state: CursorState | dict[str, Any]) -> None:
        """Set the cursor to that of a snapshot. The quarantine stays as it is."""
        if isinstance(state, dict):
            state = msgspec.convert(state, CursorState)
        self.cursor, self.applied_end, self.applied = state.cursor, state.applied_end, state.applied
