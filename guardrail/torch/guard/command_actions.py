"""What commands can do to a run: the interface, and its implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from guardrail.core.events.decisions import ACCEPTED, IncidentChanged
from guardrail.core.records.spans import Span
from guardrail.core.records.status import Phase, Status
from guardrail.core.records.verdicts import Verdict
from guardrail.decide.undo import UndoPlan
from guardrail.torch.checkpoint.rollback_target import Target
from guardrail.torch.checkpoint.snapshot_manager import SnapshotManager
from guardrail.torch.guard.context import RunContext
from guardrail.torch.guard.quarantine import Quarantine
from guardrail.torch.guard.timeline_switch import TimelineSwitch


class CommandActions(Protocol):
    """What a `CommandHandler` needs of the run. Every rank calls the same methods."""

    def is_stop_requested(self) -> bool:
        """Return whether this process was asked to stop."""
        ...

    def set_phase(self, phase: Phase) -> None:
        """Report what this rank does."""
        ...

    def status(self) -> Status:
        """Return the present state of the run."""
        ...

    def end(self, phase: Phase, reason: str) -> None:
        """Save and end the run."""
        ...

    def poll(self) -> None:
        """Collect finished saves and retry failed writes while training is paused."""
        ...

    def is_retry_due(self) -> bool:
        """Return, on rank 0, whether a failed save is due for a retry."""
        ...

    def failed_save(self) -> int:
        """Return the number of this rank's last save that failed; 0: none."""
        ...

    def note_failed_saves(self, serials: Sequence[int]) -> None:
        """Take `failed_save` of every rank, by rank."""
        ...

    def save_checkpoint(self) -> None:
        """Save the present state."""
        ...

    def accept(self, batch: tuple[int, int]) -> None:
        """Close open incidents; `batch` are the positions [first, last) of the next batch."""
        ...

    def skip(self, span: Span) -> None:
        """Skip the samples of a span."""
        ...

    def find_target(
        self, cursor: int, *, to_step: int | None = None, candidates: bool = False
    ) -> Target | None:
        """Return the newest state before position `cursor`; of step `to_step` if it is given."""
        ...

    def proposed_target(self, verdict: Verdict) -> Target | None:
        """Return the state that the rollback of a verdict would restore now."""
        ...

    def roll_back(self, target: Target, *, window: tuple[int, int], reason: str) -> bool:
        """Restore `target` and skip the positions of `window`; return whether it was done."""
        ...

    def undo(self, plan: UndoPlan, target: Target, lines: Sequence[int]) -> None:
        """Restore `target` and undo the decisions of these journal lines."""
        ...


class GuardActions:
    """The actions on a real run; see `CommandActions`.

    Args:
        end, status, set_phase, is_stop_requested: of the guard.
    """

    def __init__(
        self,
        ctx: RunContext,
        *,
        snapshots: SnapshotManager,
        quarantine: Quarantine,
        timeline_switch: TimelineSwitch,
        end: Callable[[Phase, str], None],
        status: Callable[[], Status],
        set_phase: Callable[[Phase], None],
        is_stop_requested: Callable[[], bool],
    ) -> None:
        self._ctx = ctx
        self._snapshots, self._quarantine = snapshots, quarantine
        self._timeline_switch = timeline_switch
        self._end, self._status = end, status
        self._set_phase, self._is_stop_requested = set_phase, is_stop_requested

    def is_stop_requested(self) -> bool:
        return self._is_stop_requested()

    def set_phase(self, phase: Phase) -> None:
        self._set_phase(phase)

    def status(self) -> Status:
        return self._status()

    def end(self, phase: Phase, reason: str) -> None:
        self._end(phase, reason)

    def poll(self) -> None:
        self._snapshots.write_events()
        self._ctx.recorder.retry()

    def is_retry_due(self) -> bool:
        return self._snapshots.retry_due

    def failed_save(self) -> int:
        return self._snapshots.failed_save

    def note_failed_saves(self, serials: Sequence[int]) -> None:
        self._snapshots.note_failures(serials)

    def save_checkpoint(self) -> None:
        self._snapshots.save_now(self._timeline_switch.facts)

    def accept(self, batch: tuple[int, int]) -> None:
        controller, step = self._ctx.controller, self._ctx.progress.step
        accepted = controller.memory.accept(step, batch)
        for one in [one for one in controller.memory.incidents.ended if one.number in accepted]:
            self._ctx.recorder.write(
                IncidentChanged(number=one.number, state=ACCEPTED, onset=one.onset, at_step=step)
            )
        self._snapshots.note_incident(controller.memory.incidents.since)

    def skip(self, span: Span) -> None:
        self._quarantine.skip(span)

    def find_target(
        self, cursor: int, *, to_step: int | None = None, candidates: bool = False
    ) -> Target | None:
        return self._snapshots.find_target(cursor, to_step=to_step, candidates=candidates)

    def proposed_target(self, verdict: Verdict) -> Target | None:
        assert verdict.window is not None
        return self._snapshots.find_target(
            verdict.window[0],
            before_step=verdict.before_step,
            settled=self._ctx.controller.is_settled,
        )

    def roll_back(self, target: Target, *, window: tuple[int, int], reason: str) -> bool:
        return self._timeline_switch.roll_back(
            window=window,
            onset=target.step + 1,
            reason=reason,
            cause="user",
            target=target,
        )

    def undo(self, plan: UndoPlan, target: Target, lines: Sequence[int]) -> None:
        self._timeline_switch.undo(plan, target, lines)
