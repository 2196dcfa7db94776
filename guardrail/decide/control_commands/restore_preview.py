"""What a command that restores a state would do: which state, what is discarded and skipped. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from guardrail.core.records.status import SnapshotInfo
from guardrail.core.records.verdicts import Remedy
from guardrail.decide.control_commands.preview import Preview
from guardrail.decide.control_commands.run_facts import RecordedFacts, make_preview

# Time between a look at a preview and the effect of its command. As many steps more may be lost.
SPARE_SECONDS = 10.0


def never(step: int) -> bool:
    """Return False: no candidate counts as good."""
    return False


def newest_state(
    states: Sequence[SnapshotInfo],
    cursor: int,
    *,
    to_step: int | None = None,
    before_step: int | None = None,
    candidates: bool = False,
    settled: Callable[[int], bool] = never,
) -> SnapshotInfo | None:
    """Return the state that the guard would restore; the same choice as `SnapshotManager.target`.

    Good snapshots in memory come first, then good checkpoints on disk, then candidates likewise.

    Args:
        cursor: the state has read no position after this one.
        to_step: only the state of this step.
        before_step: only older states, where there is one; else any.
        candidates: candidates count as good ones.
        settled: whether the candidate of a step counts as good; see `Controller.is_settled`.
    """
    allowed = [("good",), ("good", "candidate")]
    if candidates:
        allowed = [("good", "candidate")]
    for kinds in allowed:
        for tier in ("memory", "disk"):
            fit = []
            for info in states:
                is_allowed = info.state in kinds
                is_allowed |= info.state == "candidate" and settled(info.step)
                if not is_allowed or info.tier != tier or info.cursor > cursor:
                    continue
                if to_step is not None and info.step != to_step:
                    continue
                if before_step is not None and info.step >= before_step:
                    continue
                fit.append(info)
            if fit:
                return max(fit, key=lambda info: (info.step, info.timeline))
    if before_step is None:
        return None
    return newest_state(states, cursor, to_step=to_step, candidates=candidates)


def preview_restore(
    run: RecordedFacts,
    state: SnapshotInfo,
    *,
    command: str,
    value: float,
    window: tuple[int, int] | None,
    remedies: Sequence[Remedy],
    positions: Sequence[int] = (),
) -> Preview:
    """Return what restoring a state would do.

    Args:
        command, value: for which it is restored.
        window: positions [first, last) that are skipped; None: none.
        remedies: that are in force afterwards.
        positions: of the window that are skipped; none: all.
    """
    samples = 0
    if window is not None:
        samples = run.fresh(positions or range(*window))
    rates = run.rates_after(state.step, remedies)
    lost = run.step - state.step
    return make_preview(
        run,
        command,
        value=value,
        to_step=state.step,
        tier=state.tier,
        state=state.state,
        path=state.path,
        steps_lost=lost,
        steps_lost_most=lost + run.steps_in(SPARE_SECONDS),
        seconds_lost=run.seconds_since(state.step),
        window=window,
        samples=samples,
        lr=rates.lr,
        alpha=rates.embedding,
    )
