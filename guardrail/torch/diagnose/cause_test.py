"""The cause of an incident, found by running a few batches again at its first rejected step.

See guardrail.decide.root_cause for the conclusions.

    1 pass       the batch from the same state with the same RNG state; each rank's own numbers are
                 compared with those of the first time
    1-3 passes   other batches from that state: two healthy ones from before the onset, and the next
    2-5 passes   from an older snapshot of the ring: a healthy batch for comparison, and the batch;
                 if the anomaly began earlier, up to three batches from the onset on
    0-5 passes   if the data is the cause and the next batch shows the anomaly too: batches far
                 ahead, from the present state. If they show it, this is new data and not a bad
                 range of it
    3-4 passes   if the data is the cause, forward only: the loss increase with shuffled labels,
                 here and in healthy batches
    2-20 passes  if the data is the cause and the run will roll back, from the older state: each
                 batch from the onset on, and its rest without the samples that stand out

All decisions use numbers that every rank has, so all ranks decide the same. Afterwards the run
continues as if nothing had been run: see guardrail.torch.diagnose.batch_replay.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import structs

from guardrail.core.records.verdicts import Action, Cause, Diagnosis, Verdict
from guardrail.decide.anomaly_signature import AnomalySignature, ReplayPass
from guardrail.decide.hardware_fault import diagnose_hardware
from guardrail.decide.rollback_window import Applied
from guardrail.decide.root_cause import (
    add_batches_ahead,
    add_label_order,
    diagnose_passes,
)
from guardrail.decide.sample_cursor import Batch, SampleCursor
from guardrail.torch.checkpoint.memory_snapshots import Snapshot, SnapshotRing
from guardrail.torch.checkpoint.snapshot_states import CANDIDATE, GOOD
from guardrail.torch.diagnose.attribution import ORDINARY, find_explaining_positions
from guardrail.torch.diagnose.batch_replay import Replays, build_pass
from guardrail.torch.measure.reduced_step import ReducedStep

EARLIER, FROM_ONSET = 2, 3  # batches of each kind that are run
# Batches ahead that are searched, as a multiple of the consecutive skips allowed: new data reaches
# at least so far.
FAR = 4
# Where batches on the way there are run, as shares of it. They are not multiples of one another, so
# bad data at regular distances is not hit each time.
PLACES = (1.0, 0.618, 0.382, 0.236, 0.146)
# Most batches from the onset on whose samples are examined. In more of them, the bad samples are
# not few.
EXPLAINED = 8


class CauseTest:
    """Finds the cause of an incident.

    Args:
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
        """Return the diagnosis of a rejected step.

        A collective. Call it when the attempt's RNG states and buffers are restored.

        Args:
            batch: of the rejected step.
            reduced: of that step, from the last reduction.
            applied: the last applied batches, oldest first.
            keep_gradients: those of the step may still be applied.
            reach: batches ahead within which new data is searched; 0: not searched.
            end: applied updates after which the run is finished; 0: endless.
        """
        replays, step = self._replays, verdict.step
        anomaly = AnomalySignature.from_findings(verdict.findings)
        first, first_numbers = build_pass(reduced, what="the batch"), replays.gather_rank_numbers()
        onset = min(verdict.onset or step, step)
        earlier = [one for one in applied if one.step < onset]
        usual = self._form_batches(earlier[-max(EARLIER, ORDINARY) :])
        healthy = usual[-EARLIER:]
        with replays.visit(keep_gradients=keep_gradients):
            again = replays.run(batch, step=step, what="the batch")
            broken = diagnose_hardware(
                first_numbers,
                replays.gather_rank_numbers(),
                replays.tolerance,
                sums=(first.signals["loss"], again.signals["loss"]),
                passes=replays.passes,
            )
            if broken is not None:
                return broken
            ahead = self._ledger.peek(batch)
            others = self._run_others(healthy, ahead, step=step)
            lasting = onset < step
            is_everywhere = 2 * sum(map(anomaly.is_shown_by, others)) > len(others)
            older = self._find_older(onset, present=step - 1)
            level: ReplayPass | None = None
            suspects: list[ReplayPass] = []
            if older is not None and (lasting or not is_everywhere):
                tested = self._name_suspects(batch, onset=onset, step=step, applied=applied)
                level, suspects = self._run_older(older, tested, healthy[-1] if healthy else ahead)
            diagnosis = diagnose_passes(
                anomaly,
                again=again,
                others=others,
                suspects=suspects,
                level=level,
                older_step=older.step if older is not None else -1,
                lasting=lasting,
                passes=replays.passes,
            )
            if diagnosis.cause.of_data and anomaly.is_level and reach:
                if end:
                    reach = min(reach, end - step)
                continues = ahead is not None and anomaly.is_shown_by(others[-1])
                diagnosis = self._test_new_data(
                    diagnosis,
                    [batch, ahead] if continues and ahead is not None else [batch],
                    healthy,
                    anomaly=anomaly,
                    reach=reach if continues else 0,
                    step=step,
                )
            goes_back = diagnosis.applied or Action.ROLLBACK in (verdict.action, verdict.would)
            is_bad_data = diagnosis.cause is Cause.DATA and not diagnosis.ahead
            if not is_bad_data or not goes_back or older is None:
                return diagnosis
            bad = [batch]
            if lasting:
                since = [one for one in applied if one.step >= onset]
                bad = [*self._form_batches(since), batch]
            positions = self._find_few(older, bad, usual, level, anomaly)
            return structs.replace(diagnosis, positions=positions, passes=replays.passes)

    def _run_others(
        self, healthy: Sequence[Batch], ahead: Batch | None, *, step: int
    ) -> list[ReplayPass]:
        """Run healthy batches and the next one, which comes last, from the present state."""
        batches = list(healthy)
        if ahead is not None:
            batches.append(ahead)
        passes: list[ReplayPass] = []
        for one in batches:
            what = f"the batch of positions {one.first} to {one.last - 1}"
            passes.append(self._replays.run(one, step=step, what=what))
        return passes

    def _name_suspects(
        self, batch: Batch, *, onset: int, step: int, applied: Sequence[Applied]
    ) -> list[tuple[str, Batch]]:
        """Return (name, batch) of the first batches from the onset on, and of the rejected one."""
        suspects: list[tuple[str, Batch]] = []
        if onset < step:
            since = [one for one in applied if one.step >= onset]
            for one in since[:FROM_ONSET]:
                formed = self._form_batch(one)
                if formed is not None:
                    suspects.append((f"the batch of step {one.step}", formed))
        return [*suspects, ("the batch", batch)]

    def _test_new_data(
        self,
        diagnosis: Diagnosis,
        here: Sequence[Batch],
        healthy: Sequence[Batch],
        *,
        anomaly: AnomalySignature,
        reach: int,
        step: int,
    ) -> Diagnosis:
        """Add to a diagnosis of bad data what batches ahead and the order of labels show.

        Args:
            here: the batch, and the next one if it shows the anomaly too: new data may just begin
                with the batch.
            reach: batches ahead to search; 0: none.
        """
        replays = self._replays
        far: list[tuple[int, ReplayPass]] = []
        if len(here) > 1:
            far = self._run_ahead(here[0], anomaly, reach, step=step)
        diagnosis = add_batches_ahead(diagnosis, anomaly, far, passes=replays.passes)
        gains = [replays.measure_label_order(one, step=step) for one in here]
        usual_gains = [replays.measure_label_order(one, step=step) for one in healthy]
        return add_label_order(diagnosis, gains, usual_gains, passes=replays.passes)

    def _run_ahead(
        self, batch: Batch, anomaly: AnomalySignature, reach: int, *, step: int
    ) -> list[tuple[int, ReplayPass]]:
        """Run some batches after the next one, the farthest first, until two are healthy.

        Returns:
            (number of batches ahead, pass).
        """
        passes: list[tuple[int, ReplayPass]] = []
        # Not the range of the batch: quarantined positions make that longer, and a loader takes at
        # most a full batch.
        size, healthy = len(batch.positions), 0
        for distance in dict.fromkeys(round(share * reach) for share in PLACES):
            first = batch.last + (distance - 1) * size
            limit = self._ledger.limit
            if distance < 2 or (limit is not None and first + size > limit):
                continue
            one = self._ledger.batch_of_range(first, first + size)
            if one is None:
                continue
            result = self._replays.run(one, step=step, what=f"{distance} batches ahead")
            passes.append((distance, result))
            if not anomaly.is_shown_by(result, all_signals=True):
                healthy += 1
            if healthy > 1:
                break
        return passes

    def _find_few(
        self,
        older: Snapshot,
        batches: Sequence[Batch],
        usual: Sequence[Batch],
        level: ReplayPass | None,
        anomaly: AnomalySignature,
    ) -> tuple[int, ...]:
        """Return the positions of the few samples that explain the anomaly of these batches.

        They are examined from an older state. () if there are none such.
        """
        if len(batches) > EXPLAINED:
            return ()
        with self._replays.at_older_state(older):
            return find_explaining_positions(
                batches,
                healthy=usual,
                level=level,
                step=older.step + 1,
                anomaly=anomaly,
                replays=self._replays,
                ledger=self._ledger,
            )

    def _run_older(
        self, older: Snapshot, tested: Sequence[tuple[str, Batch]], compared: Batch | None
    ) -> tuple[ReplayPass | None, list[ReplayPass]]:
        """Run a healthy batch and the tested ones from an older state; return their passes."""
        step = older.step + 1
        level: ReplayPass | None = None
        with self._replays.at_older_state(older):
            if compared is not None:
                level = self._replays.run(compared, step=step, what="another batch")
            return level, [self._replays.run(batch, step=step, what=what) for what, batch in tested]

    def _form_batch(self, applied: Applied) -> Batch | None:
        return self._ledger.batch_of_range(applied.first, applied.last)

    def _form_batches(self, applied: Sequence[Applied]) -> list[Batch]:
        """Return those of the applied batches of which samples are left."""
        formed = [self._form_batch(one) for one in applied]
        return [one for one in formed if one is not None]

    def _find_older(self, onset: int, *, present: int) -> Snapshot | None:
        """Return the newest good snapshot from before the onset, else the oldest candidate.

        Never the present state itself.
        """
        infos = [info for info in self._ring.infos() if info.step < onset and info.step != present]
        good = [info.step for info in infos if info.state == GOOD]
        candidates = [info.step for info in infos if info.state == CANDIDATE]
        if good:
            return self._ring.get(max(good))
        if candidates:
            return self._ring.get(min(candidates))
        return None
