"""Skip data for the rest of the run. The journal line is written first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from guardrail.core.events.decisions import Skipped
from guardrail.core.records.spans import MAX_NAMED, Span
from guardrail.core.records.verdicts import Remedy
from guardrail.torch.guard.context import RunContext
from guardrail.torch.guard.hooks import DescribeSamples


class Quarantine:
    """Skips data, and limits how much the guard may skip by itself.

    Args:
        describe_samples: for the journal, called on rank 0; None: the documents are not known.
        total_steps: applied updates after which the run is finished; 0: only the data ends it.
    """

    def __init__(
        self,
        ctx: RunContext,
        *,
        describe_samples: DescribeSamples | None = None,
        total_steps: int = 0,
    ) -> None:
        self._ctx = ctx
        self._is_described = describe_samples is not None
        self.describe_samples: DescribeSamples | None = None
        if ctx.ranks.rank == 0:
            self.describe_samples = describe_samples
        self._total_steps = total_steps
        self._data_size: int | None = None  # samples of which the guard may skip a share

    def skip(self, span: Span, remedies: Sequence[Remedy] = (), **more: Any) -> None:
        """Write the journal line, then quarantine the samples of a span."""
        line = Skipped(**self.fields_of(span), remedies=tuple(remedies), **more)
        self._ctx.recorder.write(line)
        self._ctx.order.skip_span(span)

    def fields_of(self, span: Span) -> dict[str, Any]:
        """Return the fields of a span for its journal line: samples and, on rank 0, their documents.

        Called on every rank. The others wait while rank 0 looks up the documents.
        """
        ctx = self._ctx
        ids = ctx.order.samples_of(span)
        data: dict[str, Any] = {
            "span": span,
            "count": len(ids),
            "incident": ctx.progress.incident,
        }
        if self._is_described and ids:
            documents, total = ctx.ranks.run_together(lambda: self._documents_of(ids))
            if self.describe_samples is not None:
                data["documents"] = tuple(documents[:MAX_NAMED])
                data["documents_total"] = total
        return data

    def _documents_of(self, ids: Sequence[int]) -> tuple[list[dict[str, Any]], int]:
        if self.describe_samples is None:
            return [], 0
        return self.describe_samples(ids)

    def over_share(self, span: Span) -> str:
        """Return why the guard may not skip a span by itself; "" where it may.

        See `guard.max_skipped_share`.
        """
        order = self._ctx.order
        if self._data_size is None:
            self._data_size = order.data_size(self._total_steps)
        share = self._ctx.config.guard.max_skipped_share
        return order.why_guard_may_not_skip(span, share=share, data=self._data_size)
