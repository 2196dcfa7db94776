"""What a command would do, before it is given. Pure, but for `preview_in_run`.

    state = RunState.of(run)                            # from the run directory
    preview_command(state, command).sentence()          # "back to step 1,200 (memory), 34 steps lost, ..."

Every number comes from the run's own records. Seconds are those that its rows measured. A learning
rate is the one that the same step had. What each command does is in its class; see
`guardrail.decide.control_commands`. This module also words the answers to the guard's question.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from msgspec import structs

from guardrail.core.errors import GuardrailError, UsageError
from guardrail.core.records.commands import Command
from guardrail.core.records.status import Status
from guardrail.core.records.verdicts import Action, Remedy, Verdict
from guardrail.core.text import clean_text
from guardrail.decide.control_commands.preview import Preview
from guardrail.decide.control_commands.registry import command_from
from guardrail.decide.control_commands.restore_preview import (
    never,
    newest_state,
    preview_restore,
)
from guardrail.decide.control_commands.rollback import Rollback
from guardrail.decide.control_commands.run_facts import make_preview
from guardrail.decide.control_commands.stop import Stop
from guardrail.decide.remedies.effects import format_effect
from guardrail.operate.run_state import RunState

if TYPE_CHECKING:
    from guardrail.rundir.run_directory import RunDirectory

__all__ = ["Preview", "choices", "preview_command", "preview_in_run", "rollback_for"]

GO_ON = "go on"


def preview_in_run(run: RunDirectory, command: Command, *, status: Status | None = None) -> Preview:
    """Return what `command` would do in a run, as its directory is now.

    Args:
        status: where it is known better than from the directory.

    Raises:
        UsageError: the directory is damaged, or of another version.
    """
    try:
        return preview_command(RunState.read(run, status=status), command)
    except GuardrailError:
        raise
    except Exception as error:  # whatever a directory of another version, or a damaged one, holds
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise UsageError(
            f"the preview of {command.kind} cannot be made: {clean_text(reason, 200)}"
        ) from error


def preview_command(state: RunState, command: Command) -> Preview:
    """Return what `command` would do if it took effect now."""
    return command_from(command).preview(state)


def rollback_for(
    state: RunState,
    window: tuple[int, int],
    *,
    positions: Sequence[int] = (),
    before_step: int | None = None,
    remedies: Sequence[Remedy] = (),
    settled: Callable[[int], bool] = never,
) -> Preview:
    """Return what the guard's own rollback would do.

    Args:
        window: positions [first, last) that it skips, whichever state it restores.
        positions: of the window that it skips; none: all.
        before_step: the state is older than that step, where there is one.
        remedies: that go with it.
        settled: whether the candidate of a step counts as good; see `Controller.is_settled`.
    """
    found = newest_state(state.states, window[0], before_step=before_step, settled=settled)
    remark = "; ".join(map(format_effect, remedies))
    if found is None:
        return make_preview(
            state,
            Rollback.name,
            value=math.nan,
            possible=False,
            refusal="there is no snapshot or valid checkpoint from before the anomaly",
            remark=remark,
        )
    in_force = [*(remedy for _, remedy in state.remedies), *remedies]
    restored = preview_restore(
        state,
        found,
        command=Rollback.name,
        value=math.nan,
        window=window,
        remedies=in_force,
        positions=positions,
    )
    return structs.replace(restored, remark=remark)


def choices(
    state: RunState,
    verdict: Verdict,
    *,
    first: int,
    last: int,
    settled: Callable[[int], bool] = never,
) -> list[Preview]:
    """Return what the three answers to the guard's question would do: accept, continue, stop.

    Args:
        first, last: positions of the batch under question.
        settled: as `rollback_for` takes it.
    """
    stop = make_preview(
        state, Stop.name, remark=f"saves after step {state.step:,} and ends; --resume asks again"
    )
    proposal = _proposal(state, verdict, settled)
    if verdict.beyond is not None:
        samples = range(first, last)
        return [proposal, _skip_beyond_share(state, verdict, samples, settled), stop]
    return [proposal, _apply_update(state, verdict, first=first, last=last), stop]


def _proposal(state: RunState, verdict: Verdict, settled: Callable[[int], bool]) -> Preview:
    """Return what the guard proposes: a rollback, or else to halt."""
    if verdict.would is Action.ROLLBACK and verdict.window is not None:
        return _proposed_rollback(state, verdict, verdict.window, settled)
    name = ""
    if verdict.would is not None:
        name = verdict.would.value
    remark = f"saves after step {state.step:,} and ends with exit code 3"
    return make_preview(state, name, remark=remark)


def _proposed_rollback(
    state: RunState, verdict: Verdict, window: tuple[int, int], settled: Callable[[int], bool]
) -> Preview:
    return rollback_for(
        state,
        window,
        positions=verdict.positions,
        before_step=verdict.before_step,
        remedies=verdict.remedies,
        settled=settled,
    )


def _apply_update(state: RunState, verdict: Verdict, *, first: int, last: int) -> Preview:
    """Return what it means to continue: a finite update is applied, another is skipped."""
    if all(math.isfinite(finding.value) for finding in verdict.findings):
        remark = f"the update of step {verdict.step:,} is applied, and what it showed is taken as the new normal"
        return make_preview(state, GO_ON, remark=remark)
    remark = f"an update that is not finite is skipped all the same, with positions {first:,} to {last - 1:,}"
    return make_preview(state, GO_ON, remark=remark, samples=last - first)


def _skip_beyond_share(
    state: RunState, verdict: Verdict, batch: range, settled: Callable[[int], bool]
) -> Preview:
    """Return what the guard would do if a user lets it skip more than its share of the data."""
    more = "guard.max_skipped_share is counted anew from there"
    if verdict.beyond is Action.ROLLBACK and verdict.window is not None:
        restored = _proposed_rollback(state, verdict, verdict.window, settled)
        remark = more
        if restored.remark:
            remark = f"{restored.remark}; {more}"
        return structs.replace(restored, command=GO_ON, remark=remark)
    return make_preview(state, GO_ON, samples=state.fresh(batch), remark=more)
