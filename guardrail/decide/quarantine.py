"""The quarantine: the samples that a run skips, and from which epoch on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from guardrail.core.errors import UsageError
from guardrail.core.ranges import Ranges
from guardrail.core.text import escape_text
from guardrail.decide.sample_order import SampleOrder

LONG_RANGE = 4096  # number of positions from which on a range is kept as a range
_NEVER = 1 << 62  # an epoch that no run reaches
_LINE = re.compile(r"(\d{1,18})(?:@(\d{1,18}))?", re.ASCII)


class Quarantine:
    """The samples that a run skips. It only grows, except when a user undoes a decision.

    A sample that is skipped in epoch e > 0 is quarantined from epoch e on: its use in earlier
    epochs stays as it was. A run that has the list from its start makes exactly the same batches.
    Written `ID` (always) or `ID@EPOCH` (from that epoch on), one per line.

    Few samples are kept by their ids. `LONG_RANGE` positions or more are kept as a range, because
    one skip may hold millions of samples; the order computes whether a sample is in the range.
    """

    def __init__(self) -> None:
        self._from_epoch: dict[int, int] = {}
        self._listed: dict[int, int] = {}  # sample -> epoch, read from lists; no undo removes it
        self._order: SampleOrder | None = None  # that the ranges refer to
        self._ranges: dict[int, Ranges] = {}  # epoch -> offsets in it
        # (epoch, block) -> which of its samples are held, oldest first
        self._blocks: dict[tuple[int, int], list[bool]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, sample: int, epoch: int = 0) -> None:
        """Quarantine a sample from an epoch on."""
        known = self._from_epoch.get(sample)
        if known is None and not self._in_ranges(sample):
            self._count += 1
        self._blocks.clear()
        if known is not None:
            epoch = min(epoch, known)
        self._from_epoch[sample] = epoch

    def add_range(self, order: SampleOrder, first: int, last: int) -> None:
        """Quarantine the samples at positions [first, last), each from the position's epoch on."""
        if last - first < LONG_RANGE:
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
            for begin, stop in new:
                samples = order.sample_array(base + begin, base + stop)
                self._count += self._count_held_by(samples, epoch)
            first = end

    def _count_held_by(self, samples: np.ndarray, only: int) -> int:
        """Return how many of the samples only the ranges of one epoch hold."""
        assert self._order is not None
        ids = np.fromiter(self._from_epoch, dtype=np.int64, count=len(self._from_epoch))
        held = np.isin(samples, ids)
        for epoch, ranges in self._ranges.items():
            if epoch != only:
                held |= ranges.holds_each(self._order.find_offsets(samples, epoch))
        return int(np.count_nonzero(~held))

    def holds(self, sample: int, epoch: int) -> bool:
        """Return whether a sample is quarantined in an epoch."""
        start = self._from_epoch.get(sample)
        if start is not None and start <= epoch:
            return True
        return bool(self._ranges) and self._in_ranges(sample, epoch)

    def _in_ranges(self, sample: int, epoch: int | None = None) -> bool:
        """Return whether a range of an epoch up to `epoch` (None: any) holds a sample."""
        if self._order is None:
            return False
        one = np.array([sample])
        for begun, ranges in self._ranges.items():
            if epoch is not None and begun > epoch:
                continue
            if ranges.holds(int(self._order.find_offsets(one, begun)[0])):
                return True
        return False

    def are_held(self, first: int, samples: Sequence[int], order: SampleOrder) -> list[bool]:
        """Return which samples are held, each in the epoch of its position.

        Args:
            first: position of the first sample; the others follow it.
        """
        if not self._ranges:
            starts = self._from_epoch
            return [starts.get(s, _NEVER) <= order.epoch(p) for p, s in enumerate(samples, first)]
        held: list[bool] = []
        while len(held) < len(samples):
            epoch, offset = divmod(first + len(held), order.n_samples)
            block, start = divmod(offset, order.BLOCK)
            held += self._held_block(epoch, block, order)[start : start + len(samples) - len(held)]
        return held

    def _held_block(self, epoch: int, block: int, order: SampleOrder) -> list[bool]:
        """Return which samples of one block of an epoch are held; see `SampleOrder.block`."""
        held = self._blocks.get((epoch, block))
        if held is None:
            held = self.held_in_epoch(epoch, np.asarray(order.block(epoch, block))).tolist()
            if len(self._blocks) == order.KEPT_BLOCKS:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[epoch, block] = held
        return held

    def held_in_epoch(self, epoch: int, samples: np.ndarray) -> np.ndarray:
        """Return which samples are held in an epoch, bool, as long as `samples`."""
        starts = self._from_epoch
        held = np.array([starts.get(one, _NEVER) <= epoch for one in samples.tolist()], dtype=bool)
        for begun, ranges in self._ranges.items():
            if begun <= epoch:
                assert self._order is not None
                held |= ranges.holds_each(self._order.find_offsets(samples, begun))
        return held

    def _expanded(self) -> dict[int, int]:
        """Return sample -> epoch from which on it is held, including the samples of ranges."""
        starts = dict(self._from_epoch)
        for epoch, ranges in self._ranges.items():
            assert self._order is not None
            base = epoch * self._order.n_samples
            for first, last in ranges.pairs():
                for sample in self._order.sample_array(base + first, base + last).tolist():
                    starts[sample] = min(epoch, starts.get(sample, epoch))
        return starts

    def lines(self) -> Iterator[str]:
        """Return the list that `read` reads, one sample per line, sorted by id."""
        for sample, epoch in sorted(self._expanded().items()):
            yield str(sample) if epoch == 0 else f"{sample}@{epoch}"

    def read(
        self, lines: Iterable[str], *, source: str = "quarantine", samples: int | None = None
    ) -> None:
        """Add the samples of a list that `lines()` wrote. Blank lines and `#` comments are allowed.

        Args:
            source: name of the list in errors.
            samples: number of samples of the data; a larger id belongs to other data.

        Raises:
            UsageError: names the line.
        """
        for number, raw in enumerate(lines, 1):
            text = raw.split("#", 1)[0].strip()
            if not text:
                continue
            parts = _LINE.fullmatch(text)
            if parts is None:
                shown = escape_text(repr(text), 80)
                raise UsageError(
                    f"{source}, line {number}: {shown} is not a sample id. Use ID or ID@EPOCH."
                )
            sample = int(parts[1])
            if samples is not None and sample >= samples:
                raise UsageError(
                    f"{source}, line {number}: sample {sample}, but the data has {samples} samples."
                    " Use the list of a run with the same data and the same settings of it."
                )
            epoch = int(parts[2] or 0)
            self._listed[sample] = min(epoch, self._listed.get(sample, epoch))
            self.add(sample, epoch)

    def reset_to_lists(self) -> None:
        """Remove all samples except those that `read` added."""
        self._from_epoch = dict(self._listed)
        self._ranges.clear()
        self._blocks.clear()
        self._count = len(self._from_epoch)
