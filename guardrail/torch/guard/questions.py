"""What the guard writes down when it asks, and the words of a command in its answer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import msgspec

from guardrail.core.errors import GuardrailError
from guardrail.core.records import CommandKind, Mode, Verdict
from guardrail.core.text import plural
from guardrail.decide.questions import CHOICES
from guardrail.decide.sample_order import Batch
from guardrail.operate.preview import choices
from guardrail.operate.run_state import RunState

if TYPE_CHECKING:
    from guardrail.torch.guard.guard import Guard

MODES = list(Mode)


def line_of_question(
    guard: Guard, verdict: Verdict | None, batch: Batch | None, *, deadline: float, default: str
) -> dict[str, Any]:
    """Data of the `paused` line: the evidence, and each choice with what it would do and cost.

    Args:
        deadline: wall time at which the guard answers itself, 0: never; `default`: what it then
        does.
    """
    if verdict is None or verdict.would is None or batch is None:
        return {"proposals": [], "asks": False}
    names = [verdict.would.value, "go on", "stop"]
    data: dict[str, Any] = {
        "asks": True,
        "findings": list(verdict.findings),
        "incident": verdict.incident,
        "onset": verdict.onset,
        "end": batch.last,
        "deadline": deadline,
        "default": default,
    }
    # what the others remember of the journal holds no proposals
    if guard.rank or guard.run is None:
        return {
            "proposals": [{"choice": choice, "action": name} for choice, name in enumerate(names)],
            **data,
        }
    try:
        scene = RunState.of(guard.run, status=guard.account.status())
        previews = choices(
            scene, verdict, first=batch.first, last=batch.last, settled=guard.controller.is_settled
        )
    except (OSError, GuardrailError, KeyError, ValueError):
        previews = []  # a disk that does not answer: the question is asked without the numbers
    by_name = {
        preview.command: msgspec.to_builtins(preview) | {"text": preview.sentence()}
        for preview in previews
    }
    proposals = [
        {"choice": at, "action": name, **by_name.get(name, {})} for at, name in enumerate(names)
    ]
    return {"proposals": proposals, **data}


def worded(kind: CommandKind, value: float) -> str:
    """ "lr x0.5", "skip 20 batches": a command in words."""
    match kind:
        case CommandKind.LR | CommandKind.EMBED_ALPHA:
            return f"{kind.value} x{value:g}"
        case CommandKind.SKIP:
            return f"skip {plural(int(value), 'batch')}"
        case CommandKind.POLICY:
            return f"policy {MODES[int(value)].value}"
        case CommandKind.ROLLBACK:
            return "rollback" if math.isnan(value) else f"rollback to step {value:g}"
        case CommandKind.UNDO:
            return "undo" if math.isnan(value) else f"undo line {value:g}"
        case CommandKind.ANSWER:
            return f"answer {CHOICES[int(value)]}"
    return kind.value
