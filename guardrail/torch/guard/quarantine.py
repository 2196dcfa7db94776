"""Leaving data out, on the record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from guardrail.core.records import MAX_NAMED, Remedy, Span

if TYPE_CHECKING:
    from guardrail.torch.guard.guard import Guard

Describe = Callable[[Sequence[int]], tuple[list[dict[str, Any]], int]]


class Quarantine:
    """What a guard leaves out.

    Args:
        describe: sample ids -> (documents as dicts, number of documents), for the journal. Called
        on rank 0.
    """

    def __init__(self, guard: Guard, describe: Describe | None) -> None:
        self._guard = guard
        self._describes = describe is not None
        self.describe = describe if guard.rank == 0 else None

    def leave_out(self, span: Span, remedies: Sequence[Remedy] = (), **more: Any) -> None:
        """Journal first, then quarantine."""
        guard = self._guard
        data = self.told(span) | more
        if remedies:
            data["remedies"] = list(remedies)
        guard.say("left_out", f"left out {amount(data)}", **data)
        guard.ledger.leave_out(span)

    def told(self, span: Span) -> dict[str, Any]:
        """What a journal line says of a span: its samples, and on rank 0 the documents that they
        come from.
        """
        guard = self._guard
        ids = guard.ledger.samples_of(span)
        data: dict[str, Any] = {"span": span, "count": len(ids), "incident": guard.incident}
        # on every rank alike: the others wait while rank 0 looks its documents up
        if self._describes and ids:
            documents, total = guard.slow_work(
                lambda: self.describe(ids) if self.describe is not None else ([], 0)
            )
            if self.describe is not None:
                data |= {"documents": documents[:MAX_NAMED], "documents_total": total}
        return data


def amount(data: dict[str, Any]) -> str:
    """ "64 samples of 2 documents (0357.txt, 0358.txt)", from the data of a `left_out` event."""
    total = data.get("documents_total", 0)
    samples = f"{data['count']} sample{'' if data['count'] == 1 else 's'}"
    if not total:
        return samples
    names = list(dict.fromkeys(str(d["path"]).rsplit("/", 1)[-1] for d in data["documents"]))
    more = ", ..." if len(names) > 3 or total > len(data["documents"]) else ""
    return f"{samples} of {total} document{'s' if total > 1 else ''} ({', '.join(names[:3])}{more})"
