"""What a cause test measured, as numbers under names. Plain immutable data."""

from __future__ import annotations

import msgspec


class _Slots(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """Base: immutable, keyword-only, tolerant of fields of a newer version."""


class SameBatch(_Slots, frozen=True, kw_only=True):
    """The rejected batch run again from the same state.

    Attributes:
        repeated: it gave the same number again.
        first, again: the value of `signal` at first, and in the second run.
        where: "rank 1 (vm)"; "" where the number repeated.
    """

    signal: str
    repeated: bool
    first: float
    again: float
    where: str = ""


class OtherBatches(_Slots, frozen=True, kw_only=True):
    """Other batches run from the same state: how many spiked too, above `limit`."""

    tested: int
    spiked: int
    values: tuple[float, ...] = ()
    limit: float | None = None


class OlderState(_Slots, frozen=True, kw_only=True):
    """The batch (or those since the onset) run from the older state of `step`.

    Attributes:
        spiked: it spiked from there too.
        other_batch: value of a healthy batch from that state.
    """

    step: int
    spiked: bool
    values: tuple[float, ...] = ()
    other_batch: float | None = None


class BatchesAhead(_Slots, frozen=True, kw_only=True):
    """Batches that come later, run from the same state."""

    tested: int
    spiked: int
    nearest: int
    farthest: int


class LabelOrder(_Slots, frozen=True, kw_only=True):
    """Loss increase (nats per token) when the labels of each row are shuffled, here and in normal
    text; about 0 where the text has no structure.
    """

    here: float
    normal: float


class CauseEvidence(_Slots, frozen=True, kw_only=True):
    """The tests that were made; None: that one was not made, or the journal does not say."""

    same_batch: SameBatch | None = None
    other_batches: OtherBatches | None = None
    older_state: OlderState | None = None
    batches_ahead: BatchesAhead | None = None
    label_order: LabelOrder | None = None

    @property
    def is_empty(self) -> bool:
        return self == CauseEvidence()
