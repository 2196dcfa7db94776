"""The places of all numbers in the packed vector of one step.

The vector has these parts, in this order:

- `HEAD`: sums over the ranks;
- squared gradient norms of the blocks of the model, if they are asked for;
- a pair (sum, number of ranks that gave it) of each further number;
- `PER_RANK` slots of each rank. Only that rank writes them, so a NaN of one rank leaves the slots
  of the others intact. Flags are 0 or 1 and name their rank.

After the reduction, `StepReduction.start` appends the square roots of the squared norms.
"""

from __future__ import annotations

from collections.abc import Sequence

HEAD = (
    "loss_sum",
    "tokens",
    "grad_sq",
    "embed_sq",
    "command_kind",
    "command_value",
    "stop",
    "incomplete",
    "graded",
    "lacking",
)
FLAGS = ("nonfinite_loss", "nonfinite_grad", "nonfinite_local")
PER_RANK = (*FLAGS, "step_time", "failed_save")
HEAD_SLOTS = {name: slot for slot, name in enumerate(HEAD)}
RANK_SLOTS = {name: slot for slot, name in enumerate(PER_RANK)}


class PackedVector:
    """Indices into the vector of one rank.

    Args:
        rank, world: of the default process group.
        blocks: number of blocks of the model whose norms are measured.
        named: number of further numbers.

    Attributes:
        blocks_start, named_start, ranks_start: first slots of the parts after `HEAD`.
        own_start: first slot of this rank.
        length: slots before the square roots.
    """

    def __init__(self, *, rank: int, world: int, blocks: int, named: int) -> None:
        self.blocks_start = len(HEAD)
        self.named_start = self.blocks_start + blocks
        self.ranks_start = self.named_start + 2 * named
        self.own_start = self.ranks_start + rank * len(PER_RANK)
        self.length = self.ranks_start + world * len(PER_RANK)

    def named_slot(self, index: int) -> int:
        """Return the slot of the sum of a further number; its count of ranks is in the next one."""
        return self.named_start + 2 * index

    def read_ranks(self, values: Sequence[float], name: str) -> tuple[float, ...]:
        """Return one number of `PER_RANK` for each rank."""
        first = self.ranks_start + RANK_SLOTS[name]
        return tuple(values[first : self.length : len(PER_RANK)])

    def flagged_ranks(self, values: Sequence[float], name: str) -> tuple[int, ...]:
        """Return the ranks whose flag `name` is set."""
        flags = self.read_ranks(values, name)
        if not any(flags):  # of thousands of ranks, in nearly every step
            return ()
        return tuple(rank for rank, flag in enumerate(flags) if flag)
