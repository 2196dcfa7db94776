"""The cause of an incident, found by running a few batches again at its first rejected step; see
guardrail.decide.root_cause.

    1 pass      the batch from the same state with the same dice, each rank's own numbers beside those of the first time
    1-3 passes  other batches from that state: two healthy ones from before the onset, and the next one
    2-5 passes  from an older snapshot of the ring: a healthy batch for comparison, and the batch at hand, or, where the
                trouble began earlier, up to three from the onset on
    0-5 passes  where the data is to blame and the next batch is in trouble, from the state at hand: batches far ahead.
                In the same trouble: it is no bad stretch, but what the data now is
    3-4 passes  where the data is to blame, forward alone: what the order of labels is worth to the model, here and in
                healthy batches
    2-20 passes where the data is to blame and the run is to go back for it, from there: each batch
                from the onset on, and what is left of it without the samples that stand out

All that is decided is decided on numbers that every rank has, so that all decide alike. Afterwards
the run goes on as if nothing had been run: see guardrail.torch.diagnose.batch_replay.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import structs

from guardrail.core.records import Action, Cause, Diagnosis, Verdict
from guardrail.decide.rollback_window import Applied
from guardrail.decide.root_cause import (
    AnomalySignature,
    ReplayPass,
    ahead_of,
    hardware,
    judge,
    structure_of,
)
from guardrail.decide.sample_cursor import Batch, SampleCursor
from guardrail.torch.checkpoint.memory_snapshots import Snapshot, SnapshotRing
from guardrail.torch.checkpoint.snapshot_states import CANDIDATE, GOOD
from guardrail.torch.diagnose.attribution import ORDINARY, explaining
from guardrail.torch.diagnose.batch_replay import Replays, pass_of
from guardrail.torch.measure.reduced_step import ReducedStep

EARLIER, FROM_ONSET = 2, 3  # batches of each kind that are run
# times as many batches ahead as may be left out in a row: data of another kind reaches at least so
# far
FAR = 4
# Where batches on the way there are looked at, as shares of it: no multiples of one another, so
# that bad data which comes again and again is not met each time.
PLACES = (1.0, 0.618, 0.382, 0.236, 0.146)
# batches from the onset on, at most, of which the samples are looked at; more are no matter of a
# few
EXPLAINED = 8


class CauseTest:
    """Args:
    replays: runs the passes.
    ledger: forms the batches; only read.
    ring: older states; only read.
    """

    def __init__(self, replays: Replays, *, ledger: SampleCursor, ring: SnapshotRing) -> None:
        self._replays, self._ledger, self._ring = replays, ledger, ring

    def run(
        self,
        batch: Batch,
        *,
        verdict: Verdict,
        reduced: ReducedStep,
        applied: Sequence[Applied],
        keep_gradients: bool,
        reach: int = 0,
        end: int = 0,
    ) -> Diagnosis:
        """A collective. Call it when the attempt's own dice and buffers are back where they were
        before it.

        Args:
            batch: of the rejected step.
            reduced: of that step, the last reduction that was done.
            applied: the last applied batches, oldest first.
            keep_gradients: those of the step may still be applied.
            reach: batches ahead within which is looked whether the data has become another kind; 0:
            nobody looks.
            end: applied updates after which the run is finished; 0: endless.
        """
        replays, step = self._replays, verdict.step
        trouble = AnomalySignature.of(verdict.findings)
        first, own = pass_of(reduced, what="the batch"), replays.own()
        onset = min(verdict.onset or step, step)
        before = [self._again(one) for one in applied if one.step < onset][
            -max(EARLIER, ORDINARY) :
        ]
        usual = [one for one in before if one is not None]
        healthy = usual[-EARLIER:]
        with replays.visit(keep_gradients=keep_gradients):
            again = replays.run(batch, step=step, what="the batch")
            loss = tuple(one.signals["loss"] for one in (first, again))
            broken = hardware(
                own,
                replays.own(),
                replays.tolerance,
                sums=(loss[0], loss[1]),
                passes=replays.passes,
            )
            if broken is not None:
                return broken
            ahead = self._ledger.peek(batch)
            others = [
                replays.run(
                    one, step=step, what=f"the batch of positions {one.first} to {one.last - 1}"
                )
                for one in [*healthy, *([ahead] if ahead is not None else [])]
            ]
            lasting = onset < step
            everywhere = 2 * sum(map(trouble.shown_by, others)) > len(others)
            older = self._older(onset, present=step - 1)
            level: ReplayPass | None = None
            suspects: list[ReplayPass] = []
            if older is not None and (lasting or not everywhere):
                asked = [("the batch", batch)]
                if lasting:
                    since = [(one.step, self._again(one)) for one in applied if one.step >= onset][
                        :FROM_ONSET
                    ]
                    asked = [
                        *((f"the batch of step {n}", one) for n, one in since if one is not None),
                        *asked,
                    ]
                level, suspects = self._from(older, asked, healthy[-1] if healthy else ahead)
            diagnosis = judge(
                trouble,
                again=again,
                others=others,
                suspects=suspects,
                level=level,
                older_step=older.step if older is not None else -1,
                lasting=lasting,
                passes=replays.passes,
            )
            if diagnosis.cause.of_data and trouble.of_level and reach:
                goes_on = ahead is not None and trouble.shown_by(others[-1])
                far = (
                    self._far(batch, trouble, min(reach, end - step) if end else reach, step=step)
                    if goes_on
                    else []
                )
                diagnosis = ahead_of(diagnosis, trouble, far, passes=replays.passes)
                # With the first batch another kind may just begin.
                here = [batch, ahead] if goes_on and ahead is not None else [batch]
                gains, usual_gains = (
                    [replays.structure(one, step=step) for one in some] for some in (here, healthy)
                )
                diagnosis = structure_of(diagnosis, gains, usual_gains, passes=replays.passes)
            goes_back = diagnosis.applied or Action.ROLLBACK in (verdict.action, verdict.would)
            if (
                diagnosis.cause is not Cause.DATA
                or diagnosis.ahead
                or not goes_back
                or older is None
            ):
                return diagnosis
            bad = [*self._since(onset, applied), batch] if lasting else [batch]
            few = self._few(older, bad, usual, level, trouble)
            return structs.replace(diagnosis, positions=few, passes=replays.passes)

    def _far(
        self, batch: Batch, trouble: AnomalySignature, reach: int, *, step: int
    ) -> list[tuple[int, ReplayPass]]:
        """(Batches ahead, pass) of some behind the next one, the farthest first; two that are
        healthy are enough.
        """
        found: list[tuple[int, ReplayPass]] = []
        size, healthy = batch.last - batch.first, 0
        for distance in dict.fromkeys(round(share * reach) for share in PLACES):
            first = batch.last + (distance - 1) * size
            within = self._ledger.limit is None or first + size <= self._ledger.limit
            if (
                distance < 2
                or not within
                or (one := self._ledger.batch_of_range(first, first + size)) is None
            ):
                continue
            seen = self._replays.run(one, step=step, what=f"{distance} batches ahead")
            found.append((distance, seen))
            healthy += not trouble.shown_by(seen, wholly=True)
            if healthy > 1:
                break
        return found

    def _few(
        self,
        older: Snapshot,
        batches: Sequence[Batch],
        usual: Sequence[Batch],
        level: ReplayPass | None,
        trouble: AnomalySignature,
    ) -> tuple[int, ...]:
        """The few samples that explain the trouble of these batches, as an older state shows it."""
        if len(batches) > EXPLAINED:
            return ()
        with self._replays.older(older):
            return explaining(
                batches,
                healthy=usual,
                level=level,
                step=older.step + 1,
                trouble=trouble,
                replays=self._replays,
                ledger=self._ledger,
            )

    def _since(self, onset: int, applied: Sequence[Applied]) -> list[Batch]:
        """The batches that were applied from the onset on."""
        found = [self._again(one) for one in applied if one.step >= onset]
        return [one for one in found if one is not None]

    def _from(
        self, older: Snapshot, asked: Sequence[tuple[str, Batch]], compared: Batch | None
    ) -> tuple[ReplayPass | None, list[ReplayPass]]:
        """(A healthy batch, those asked about) from an older state."""
        step = older.step + 1
        with self._replays.older(older):
            level = (
                self._replays.run(compared, step=step, what="another batch")
                if compared is not None
                else None
            )
            return level, [self._replays.run(batch, step=step, what=what) for what, batch in asked]

    def _again(self, applied: Applied) -> Batch | None:
        return self._ledger.batch_of_range(applied.first, applied.last)

    def _older(self, onset: int, *, present: int) -> Snapshot | None:
        """The newest good snapshot from before the onset, else the oldest candidate; not the state
        at hand itself.
        """
        fit = [info for info in self._ring.infos() if info.step < onset and info.step != present]
        good = [info.step for info in fit if info.state == GOOD]
        candidates = [info.step for info in fit if info.state == CANDIDATE]
        if good:
            return self._ring.get(max(good))
        return self._ring.get(min(candidates)) if candidates else None
