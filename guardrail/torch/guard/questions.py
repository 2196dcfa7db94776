"""The question that the guard asks while training is paused, and its journal line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from guardrail.core.errors import GuardrailError
from guardrail.core.events.run_state import Paused
from guardrail.core.records.status import Status
from guardrail.core.records.verdicts import Verdict
from guardrail.decide.sample_cursor import Batch
from guardrail.operate.preview import choices
from guardrail.operate.run_state import RunState
from guardrail.rundir.run_directory import RunDirectory
from guardrail.torch.guard.context import RunContext

_REMEMBERED = 64  # questions whose end is remembered


class OpenQuestion:
    """What the guard asks, and how earlier questions ended.

    Attributes:
        text: the question; "" while none is open.
        deadline: wall time at which the guard answers itself; 0: never.
        default: what it then does.
        end: of the batch that is under question, else 0.
        ended: number of a question -> how it ended.
    """

    def __init__(self, ctx: RunContext) -> None:
        self._ctx = ctx
        self.text = ""
        self.deadline = 0.0
        self.default = ""
        self.end = 0
        self.ended: dict[int, str] = {}

    @property
    def number(self) -> int:
        """Journal line of the open question; 0: none is open, or its line is not on disk yet."""
        if not self.text:
            return 0
        return self._ctx.recorder.written.get("paused", 0)

    @property
    def is_unwritten(self) -> bool:
        """Whether a question is open whose line is not on disk yet."""
        return bool(self.text) and not self.number

    def open(self, text: str, *, deadline: float, default: str) -> None:
        """Ask; a pause without a question has the text "". The journal line is written next."""
        self._ctx.recorder.written.pop("paused", None)
        self.text, self.deadline, self.default = text, deadline, default

    def close(self, how: str) -> None:
        """End the question. A later answer to it is refused with how it ended."""
        number = self.number
        if number:
            self.ended[number] = how
            self.ended = dict(list(self.ended.items())[-_REMEMBERED:])
        self.text, self.deadline, self.default = "", 0.0, ""
        self.end = 0


def question_line(
    ctx: RunContext,
    text: str,
    verdict: Verdict | None,
    batch: Batch | None,
    *,
    status: Callable[[], Status],
    deadline: float,
    default: str,
) -> Paused:
    """Return the `paused` line: the evidence, and what each choice does and costs.

    Args:
        text: of the question.
        status: of the run, asked on rank 0.
        deadline: wall time at which the guard answers itself, 0: never.
        default: what it then does.
    """
    if verdict is None or verdict.would is None or batch is None:
        return Paused(message=text, asks=False)
    names = [verdict.would.value, "go on", "stop"]
    proposals: list[dict[str, Any]] = [
        {"choice": choice, "action": name} for choice, name in enumerate(names)
    ]
    # Other ranks keep the names of the proposals alone in their copy of the journal.
    if ctx.ranks.rank == 0 and ctx.run is not None:
        _add_previews(proposals, ctx, ctx.run, verdict, batch, status=status)
    return Paused(
        message=text,
        proposals=tuple(proposals),
        asks=True,
        findings=verdict.findings,
        incident=verdict.incident,
        onset=verdict.onset,
        end=batch.last,
        deadline=deadline,
        default=default,
    )


def _add_previews(
    proposals: list[dict[str, Any]],
    ctx: RunContext,
    run: RunDirectory,
    verdict: Verdict,
    batch: Batch,
    *,
    status: Callable[[], Status],
) -> None:
    """Add to each proposal what it does and costs, where the run directory can be read."""
    try:
        state = RunState.read(run, status=status())
        settled = ctx.controller.is_settled
        previews = choices(state, verdict, first=batch.first, last=batch.last, settled=settled)
    except (OSError, GuardrailError, KeyError, ValueError):
        previews = []  # the disk does not respond: the question is asked without the numbers
    by_name = {
        preview.command: msgspec.to_builtins(preview) | {"text": preview.sentence()}
        for preview in previews
    }
    for proposal in proposals:
        proposal |= by_name.get(proposal["action"], {})
