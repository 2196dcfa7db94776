"""The batch size as a function of the step: constant, or growing with the tokens read.

GPT-3 grew its batch from 32 K to 3.2 M tokens. The size depends on the step alone. A rollback, a
restart or a skipped batch therefore cannot change it.
"""

from __future__ import annotations

from bisect import bisect_right

import msgspec


class BatchPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Stages with a constant batch size each.

    Attributes:
        firsts: first step of each stage, ascending, the first one 1.
        sizes: samples of a batch in each stage, ascending.
    """

    firsts: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def constant(cls, size: int) -> BatchPlan:
        """Return the plan of one stage."""
        return cls(firsts=(1,), sizes=(size,))

    @classmethod
    def growing(cls, *, start: int, by: int, size: int, samples: int) -> BatchPlan:
        """Return a plan that grows linearly with the samples, as Megatron's rampup_batch_size.

        Args:
            start, size: samples of the first and of the full batch.
            by: samples by which the batch grows each time; divides size - start.
            samples: after which the batch has its full size. Each stage gets an equal share of
                them, rounded up to complete batches.
        """
        sizes = tuple(range(start, size, by))
        share = samples / max(1, len(sizes))
        firsts = [1]
        for stage in sizes:
            firsts.append(firsts[-1] + max(1, -int(-share // stage)))
        return cls(firsts=tuple(firsts), sizes=(*sizes, size))

    def __call__(self, step: int) -> int:
        """Return the samples of the batch of a step; steps count from 1."""
        return self.sizes[max(0, bisect_right(self.firsts, step) - 1)]

    def samples_in(self, steps: int) -> int:
        """Return the samples of the first `steps` applied batches together."""
        total = 0
        ends = (*self.firsts[1:], steps + 1)
        for first, end, size in zip(self.firsts, ends, self.sizes, strict=True):
            total += max(0, min(end, steps + 1) - first) * size
        return total

    def steps_for(self, samples: float) -> int:
        """Return the fewest steps whose batches hold at least `samples`."""
        for index, (first, size) in enumerate(zip(self.firsts, self.sizes, strict=True)):
            before = self.samples_in(first - 1)
            steps = first - 1 + max(0, -int(-(samples - before) // size))
            if index + 1 == len(self.firsts) or steps < self.firsts[index + 1]:
                return steps
        raise AssertionError("a plan has a last stage")
