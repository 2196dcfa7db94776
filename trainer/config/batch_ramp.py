"""The batch size as a function of the step: constant, or growing with the tokens seen (GPT-3: 32 K
to 3.2 M).

A function of the step alone, so a rollback or a restart cannot put it out of step, and a batch left
out does not move it.
"""

from __future__ import annotations

from bisect import bisect_right

import msgspec


class BatchPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Stages of a constant batch size each.

    Attributes:
        firsts: first step of each stage, ascending, the first one 1.
        sizes: samples of a batch in each stage, ascending.
    """

    firsts: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def constant(cls, size: int) -> BatchPlan:
        return cls(firsts=(1,), sizes=(size,))

    @classmethod
    def growing(cls, *, start: int, by: int, size: int, samples: int) -> BatchPlan:
        """From `start` to `size` in equal increments `by`, linear in samples, as Megatron's
        rampup_batch_size has it.

        Args:
            start, by, size: samples of a batch; size - start is a multiple of `by`.
            samples: after which the batch has its full size; each stage gets its share, rounded up
            to whole batches.
        """
        sizes = tuple(range(start, size, by))
        share = samples / max(1, len(sizes))
        firsts = [1]
        for stage in sizes:
            firsts.append(firsts[-1] + max(1, -int(-share // stage)))
        return cls(firsts=tuple(firsts), sizes=(*sizes, size))

    def __call__(self, step: int) -> int:
        """Samples of the batch of this step, from 1."""
        return self.sizes[max(0, bisect_right(self.firsts, step) - 1)]

    def samples_in(self, steps: int) -> int:
        """Samples of the first `steps` applied batches together."""
        total = 0
        for index, (first, size) in enumerate(zip(self.firsts, self.sizes, strict=True)):
            end = self.firsts[index + 1] if index + 1 < len(self.firsts) else steps + 1
            total += max(0, min(end, steps + 1) - first) * size
        return total

    def steps_for(self, samples: float) -> int:
        """The fewest steps whose batches hold at least `samples`."""
        for index, (first, size) in enumerate(zip(self.firsts, self.sizes, strict=True)):
            before = self.samples_in(first - 1)
            steps = first - 1 + max(0, -int(-(samples - before) // size))
            if index + 1 == len(self.firsts) or steps < self.firsts[index + 1]:
                return steps
        raise AssertionError("a plan has a last stage")
