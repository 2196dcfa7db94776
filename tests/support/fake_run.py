"""A run that never was: rows, events and status of thousands of steps with a spike, a rollback and
checkpoints.

`python tests/support/fake_run.py ROOT` writes a run directory and prints its path; with `--live` it goes on
with it, answers commands, and spikes now and then, so that the screen can be tried without training
anything.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from guardrail.core.events.decisions import Diagnosed, SamplesTaken
from guardrail.core.events.event import Event
from guardrail.core.records.commands import Command
from guardrail.core.records.findings import Finding, FindingKind, Severity
from guardrail.core.records.signals import METRIC_COLUMNS
from guardrail.core.records.spans import DocumentRef, Span
from guardrail.core.records.status import Phase, SnapshotInfo, Status
from guardrail.core.records.verdicts import Action, Mode
from guardrail.operate.preview import Preview
from guardrail.rundir import journal
from guardrail.rundir.run_directory import RunDirectory
from guardrail.tui.model.run_story import StoryBuilder
from guardrail.tui.model.view import Snapshot
from guardrail.tui.numerics.decimated_series import DecimatedSeries
from guardrail.tui.numerics.series import AXES, choosable_signals
from tests.support.events import make_line

START = 1_795_569_240.0  # 2026-11-25 01:14:00 UTC
STEP_SECONDS = 0.12
BATCH = 16
TOKENS = BATCH * 256
_COLUMN = {name: index for index, name in enumerate(METRIC_COLUMNS)}


class FakeRun:
    """Builds a run step by step; `rows`, `events` and `status` may be looked at at any time."""

    def __init__(
        self, *, name: str = "quickstart/2026-11-25-01", total: int = 6000, seed: int = 0
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.name, self.total = name, total
        self.time, self.step, self.timeline, self.cursor = START, 0, 0, 0
        self.phase, self.mode, self.question, self.disk = Phase.STEP, Mode.AUTO, "", "ok"
        self.lr_factor, self.progress, self.exit_code = 1.0, "", None
        self.incident = 0
        self.chunks: list[np.ndarray] = []
        self.events: list[Event] = []
        self.snapshots: list[SnapshotInfo] = []

    # -- what happens

    def event(self, kind: str, message: str, **data: Any) -> Event:
        plain = msgspec.to_builtins(data)
        event = make_line(
            seq=len(self.events) + 1,
            time=self.time,
            step=self.step,
            timeline=self.timeline,
            kind=kind,
            message=message,
            data=plain,
        )
        if not message and isinstance(event, SamplesTaken | Diagnosed):
            event = msgspec.structs.replace(event, message=event.sentence())
        self.events.append(event)
        return event

    def begin(self) -> FakeRun:
        self.event(
            "started", "started on 2 ranks with 21,337 samples", world=2, seed=0, samples=21337
        )
        return self

    def advance(self, to_step: int, *, checkpoints: int = 200, ring: int = 10) -> FakeRun:
        """Healthy steps up to `to_step`, with snapshots and checkpoints on the way."""
        steps = np.arange(self.step + 1, to_step + 1)
        if not len(steps):
            return self
        self._rows(steps, *self._healthy(steps))
        for at in range(self.step + 1, to_step + 1):
            self._pass(at)
            if checkpoints and at % checkpoints == 0:
                self._checkpoint(at)
            if ring and at % ring == 0 and at > to_step - 4 * ring:
                state = "good" if at <= to_step - 8 else "candidate"
                self._keep(SnapshotInfo(step=at, cursor=self.cursor, timeline=self.timeline, tier="memory",
                                        state=state, time=self.time))  # fmt: skip
        return self

    def spike(
        self, *, length: int = 3, back_to: int | None = None, under_way: bool = False
    ) -> FakeRun:
        """The loss jumps for `length` consecutive batches; the guard skips each, then restores a
        state from before them.

        Args:
            under_way: the last of them was not the one that causes the rollback.
        """
        self.incident += 1
        first, at, last = self.cursor, self.step, self.step + 1
        for index in range(length):
            value = (6.84, 11.5, 9.7, 8.8)[index % 4]
            _, grad, embed, base = self._healthy(np.array([last]))
            finding = Finding(signal="loss", step=last, kind=FindingKind.LOSS_SPIKE,
                              severity=Severity.REJECT, value=value,
                              baseline=float(base[0]), score=4 * value - 9, threshold=8.0, onset=last)  # fmt: skip
            other = msgspec.structs.replace(finding, signal="grad_norm", kind=FindingKind.GRAD_SPIKE,
                                            value=float(grad[0] * 50), baseline=0.71, score=22.8)  # fmt: skip
            self._rows(
                np.array([last]),
                np.array([value]),
                grad * 50,
                embed * 80,
                base,
                verdict=Action.SKIP,
            )
            action = "skip" if index < length - 1 or under_way else "rollback"
            self.event("verdict", f"{action} at step {last}: {finding.sentence()}", action=action, onset=last,
                       findings=[finding, other], incident=self.incident, at_step=last)  # fmt: skip
            if not index:
                self.event(
                    "incident",
                    f"incident {self.incident}: open",
                    number=self.incident,
                    state="open",
                    onset=last,
                )
            if action == "skip":
                self._skip("skipped", self.cursor, self.cursor + BATCH, "rejected", last)
            self.cursor, self.time = self.cursor + BATCH, self.time + STEP_SECONDS
        if under_way:
            return self
        target = (
            back_to
            if back_to is not None
            else max(s.step for s in self.snapshots if s.step < last - 4)
        )
        self._skip("rollback", first, self.cursor, "rollback", last, to_step=target, from_step=at,
                   onset=last, window=[first, self.cursor], tier="memory",
                   new_timeline=self.timeline + 1)  # fmt: skip
        self.snapshots = [s for s in self.snapshots if s.step <= target or s.tier == "disk"]
        self.snapshots = [
            msgspec.structs.replace(s, state="suspect") if s.step > target else s
            for s in self.snapshots
        ]
        self.step, self.timeline = target, self.timeline + 1
        return self

    def _skip(self, kind: str, first: int, last: int, cause: str, step: int, **data: Any) -> None:
        """Write the line of a skip or a rollback, in the words of its event."""
        documents = [
            DocumentRef(path="/data/corpus/0037.txt", first_byte=8192, last_byte=12288),
            DocumentRef(path="/data/corpus/0038.txt"),
            DocumentRef(path="/data/corpus/web.jsonl", record=1207),
        ]
        span = Span(first=first, last=last, origin=cause, step=step)
        self.event(kind, "", span=span, documents=documents, documents_total=3, count=last - first,
                   incident=self.incident, **data)  # fmt: skip

    def recover(self) -> FakeRun:
        self.event("incident", f"incident {self.incident}: recovered", number=self.incident, state="recovered",
                   onset=None)  # fmt: skip
        self.snapshots = [s for s in self.snapshots if s.state != "suspect"]
        return self

    def not_a_number(self) -> FakeRun:
        """One batch whose loss is NaN on rank 1: skipped."""
        at = self.step + 1
        finding = Finding(signal="loss", step=at, kind=FindingKind.NONFINITE, severity=Severity.REJECT, value=math.nan,
                          baseline=2.31, score=math.inf, threshold=0.0, onset=at, ranks=(1,))  # fmt: skip
        self.incident += 1
        bad = np.array([math.nan])
        self._rows(
            np.array([at]), bad, np.array([math.inf]), bad, np.array([2.31]), verdict=Action.SKIP
        )
        self.event("verdict", f"skip at step {at}: loss is NaN on rank 1", action="skip", findings=[finding], onset=at,
                   incident=self.incident, at_step=at)  # fmt: skip
        self.event(
            "incident",
            f"incident {self.incident}: open",
            number=self.incident,
            state="open",
            onset=at,
        )
        self._skip("skipped", self.cursor, self.cursor + BATCH, "rejected", at)
        self.cursor += BATCH
        return self

    def weigh(self) -> FakeRun:
        """What a guard finds out about its newest incident before it asks: tokens, a cause, the
        bad samples.
        """
        at, number = self.step + 1, self.incident
        finding = Finding(signal="embed_grad_norm", step=at, kind=FindingKind.EMBED_SPIKE, severity=Severity.REJECT,
                          value=14.2, baseline=0.2, score=31.0, threshold=8.0, onset=at - 4)  # fmt: skip
        tokens = [
            {"id": 195, "text": "Ã", "share": 0.62, "norm": 11.2, "count": 810},
            {"id": 130, "text": "\\x82", "share": 0.21, "norm": 6.5, "count": 402},
        ]
        self.event("verdict", f"pause at step {at}: {finding.sentence()}", action="pause", would="rollback",
                   onset=at - 4, findings=[finding], tokens=tokens, incident=number, at_step=at)  # fmt: skip
        document = {"path": "/data/corpus/0037.txt", "first_byte": 8192, "last_byte": 12288}
        samples = [{"position": self.cursor + 3, "loss": 11.5, "share": 0.71, "documents": [document],
                    "excerpt": "Ã‚Â Ã‚Â Ã‚Â Ã‚", "odd": ["repeats 0.98", "mis-decoded 0.96"]}]  # fmt: skip
        span = Span(
            first=self.cursor,
            last=self.cursor + BATCH,
            origin="rejected",
            step=at,
            positions=(self.cursor + 3,),
        )
        self.event("skipped", "", span=span, count=1, samples=samples, documents=[document], documents_total=1,
                   incident=number)  # fmt: skip
        reason = "the batch has a spike on the weights of step 1,190 as well, and the batch before it has none"
        self.event("diagnosis", "", cause="data", reason=reason, incident=number, at_step=at)
        return self

    def ask(self, question: str) -> FakeRun:
        self.phase, self.question = Phase.PAUSED, question
        self.event("paused", question, proposals=["rollback", "go on", "stop"])
        return self

    def end(self, phase: Phase, exit_code: int) -> FakeRun:
        self.phase, self.exit_code = phase, exit_code
        self.event(
            "ended", f"{phase.value} at step {self.step:,}", phase=phase.value, exit_code=exit_code
        )
        return self

    # -- what it leaves

    @property
    def rows(self) -> np.ndarray:
        """float64 [n, len(METRIC_COLUMNS)]"""
        return np.concatenate(self.chunks) if self.chunks else np.empty((0, len(METRIC_COLUMNS)))

    @property
    def status(self) -> Status:
        speed = TOKENS / STEP_SECONDS if self.phase is Phase.STEP else 0.0
        return Status(
            run=self.name,
            phase=self.phase,
            step=self.step,
            total_steps=self.total,
            cursor=self.cursor,
            timeline=self.timeline,
            heartbeat=self.time,
            started=START,
            progress=self.progress,
            mode=self.mode,
            disk=self.disk,
            question=self.question,
            tokens=self.step * TOKENS,
            tokens_per_second=speed,
            eta_seconds=(self.total - self.step) * STEP_SECONDS,
            lr_factor=self.lr_factor,
            guard_share=0.004,
            world=2,
            host="node-1",
            pid=4242,
            snapshots=tuple(self.snapshots),
            exit_code=self.exit_code,
        )

    def write(self, root: Path) -> RunDirectory:
        """Write all of it as a run directory under `root`."""
        config = f"[train]\nsteps = {self.total}\n"
        run = RunDirectory.create(root, self.name.split("/")[0], config)
        with run.metrics_writer():
            pass  # writes the names of the columns
        with run.metrics_path.open("ab") as file:
            self.rows.astype("<f8").tofile(file)
        for event in self.events:
            self.append(run, event)
        run.write_status(self.status)
        return run

    @staticmethod
    def append(run: RunDirectory, event: Event) -> None:
        journal.append_event(run.journal_path, event)

    # -- how

    def _healthy(self, steps: np.ndarray) -> tuple[np.ndarray, ...]:
        """loss, grad_norm, embed_grad_norm and the loss without its noise"""
        base = 2.15 + 3.4 * np.exp(-steps / 160) + 0.9 * np.exp(-steps / 900)
        noise = self.rng.normal(0, 1, (3, len(steps)))
        loss = base + 0.045 * noise[0]
        grad = (0.55 + 3 * np.exp(-steps / 120)) * np.exp(0.18 * noise[1])
        return loss, grad, grad * 0.3 * np.exp(0.15 * noise[2]), base

    def _rows(
        self, steps: np.ndarray, loss: np.ndarray, grad: np.ndarray, embed: np.ndarray, base: np.ndarray,
        verdict: Action = Action.APPLY,
    ) -> None:  # fmt: skip
        rows = np.full((len(steps), len(METRIC_COLUMNS)), np.nan)
        level = 0.55 + 3 * np.exp(-steps / 120)
        warm = steps > 32
        values = {
            "first": self.cursor + BATCH * np.arange(len(steps)),
            "last": self.cursor + BATCH * np.arange(1, len(steps) + 1),
            "step": steps, "timeline": self.timeline, "time": self.time + STEP_SECONDS * np.arange(len(steps)),
            "loss": loss, "grad_norm": grad, "embed_grad_norm": embed, "embed_share": (embed / grad) ** 2, "lr": 1e-3,
            "tokens": TOKENS, "step_time": STEP_SECONDS, "verdict": list(Action).index(verdict),
            "loss_baseline": np.where(warm, base, np.nan), "loss_threshold": np.where(warm, base + 0.42, np.nan),
            "grad_norm_baseline": np.where(warm, level, np.nan),
            "grad_norm_threshold": np.where(warm, level * 6, np.nan),
            "embed_grad_norm_baseline": np.where(warm, level * 0.3, np.nan),
            "embed_grad_norm_threshold": np.where(warm, level * 2, np.nan),
        }  # fmt: skip
        for name, column in values.items():
            rows[:, _COLUMN[name]] = column
        self.chunks.append(rows)

    def _pass(self, at: int) -> None:
        self.step, self.cursor, self.time = at, self.cursor + BATCH, self.time + STEP_SECONDS

    def _checkpoint(self, at: int) -> None:
        self.event("checkpoint", f"checkpoint of step {at:,} written, 41 MB", path=f"checkpoints/step-{at:08d}",
                   state="candidate", cp_step=at, bytes=41_000_000)  # fmt: skip
        self._keep(SnapshotInfo(step=at, cursor=self.cursor, timeline=self.timeline, tier="disk", state="good",
                                time=self.time, bytes=41_000_000, path=f"checkpoints/step-{at:08d}"))  # fmt: skip

    def _keep(self, info: SnapshotInfo) -> None:
        """The newest four in memory and three on disk."""
        self.snapshots.append(info)
        for tier, keep in (("memory", 4), ("disk", 3)):
            mine = [s for s in self.snapshots if s.tier == tier]
            self.snapshots = [s for s in self.snapshots if s.tier != tier or s in mine[-keep:]]


class FakeReader:
    """What the screen reads in tests: snapshots put there by hand; keeps the commands it is
    given.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.sent: list[Command] = []
        self.previewed: list[Command] = []
        self.foresees = True  # a preview is there as soon as it is asked for
        self.notes: list[str] = []
        self.chosen: tuple[tuple[str, ...], str] = ((), "step")
        self.closer: tuple[tuple[float, float], ...] = ()
        self.closed = False
        self._notify: Callable[[], None] = lambda: None

    def start(self, notify: Callable[[], None]) -> None:
        self._notify = notify

    def latest(self) -> Snapshot:
        return self.snapshot

    def put(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self._notify()

    def choose_signals(self, signals: tuple[str, ...], axis: str) -> None:
        self.chosen = (signals, axis)  # a snapshot made by hand holds all of them already

    def request_rows(self, ranges: Sequence[tuple[float, float]]) -> None:
        self.closer = tuple(ranges)

    def send(self, command: Command) -> None:
        self.sent.append(command)

    def preview(self, command: Command) -> None:
        self.previewed.append(command)
        if self.foresees:
            preview = Preview(command=command.kind, value=command.value)
            previews = {**self.snapshot.previews, command.id: preview}
            self.put(replace(self.snapshot, previews=previews))

    def write_note(self, text: str) -> None:
        self.notes.append(text)

    def close(self) -> None:
        self.closed = True


def snapshot_of(fake: FakeRun) -> Snapshot:
    """What a reader would make of the run."""
    track, digest = DecimatedSeries(choosable_signals(METRIC_COLUMNS), AXES), StoryBuilder()
    track.add(METRIC_COLUMNS, fake.rows)
    digest.add(fake.events)
    status = fake.status if fake.events else None
    return Snapshot(fake.name, status=status, heard=fake.time, series=track.series(), story=digest.story(),
                    columns=METRIC_COLUMNS)  # fmt: skip


class LiveRun:
    """Goes on with a fake run on disk: steps, heartbeat, answers to commands, a spike now and
    then.
    """

    def __init__(self, fake: FakeRun, run: RunDirectory, *, rate: float, spike_every: int) -> None:
        self.fake, self.run, self.rate, self.spike_every = fake, run, rate, spike_every
        self._rows, self._events = len(fake.chunks), len(fake.events)

    def go(self, seconds: float) -> None:
        """Live for so long, or until a stop."""
        fake, until, beat = self.fake, time.time() + seconds, 0.0
        while time.time() < until and not fake.phase.ended:
            fake.time = time.time()
            for command in self.run.commands_pending():
                self._obey(command)
            if fake.phase is Phase.STEP:
                fake.advance(fake.step + 1)
                if self.spike_every and fake.step % self.spike_every == 0:
                    fake.spike()
                elif self.spike_every and fake.incident and fake.step % self.spike_every == 40:
                    fake.recover()
                if fake.step >= fake.total:
                    fake.end(Phase.FINISHED, 0)
            fake.time = time.time()
            self._flush()
            if time.time() - beat >= 1.0 or fake.phase.ended:
                beat = time.time()
                self.run.write_status(fake.status)
            time.sleep(1 / self.rate)

    def _flush(self) -> None:
        with self.run.metrics_path.open("ab") as file:
            for chunk in self.fake.chunks[self._rows :]:
                chunk.astype("<f8").tofile(file)
        for event in self.fake.events[self._events :]:
            FakeRun.append(self.run, event)
        self._rows, self._events = len(self.fake.chunks), len(self.fake.events)

    def _obey(self, command: Command) -> None:
        fake, reason = self.fake, ""
        match command.kind:
            case "pause" if fake.phase is Phase.STEP:
                fake.phase = Phase.PAUSED
            case "resume" if fake.phase is Phase.PAUSED:
                fake.phase = Phase.STEP
            case "checkpoint":
                fake._checkpoint(fake.step)
            case "lr":
                fake.lr_factor = command.value
            case "mode":
                fake.mode = list(Mode)[int(command.value)]
            case "skip":
                fake.cursor += int(command.value) * BATCH
            case "rollback" if command.value in {s.step for s in fake.snapshots}:
                span = Span(first=fake.cursor, last=fake.cursor, origin="user", step=fake.step)
                fake.event("rollback", f"rolled back to {command.value:.0f} by command", to_step=int(command.value),
                           from_step=fake.step, new_timeline=fake.timeline + 1, span=span)  # fmt: skip
                fake.step, fake.timeline = int(command.value), fake.timeline + 1
                fake.snapshots = [s for s in fake.snapshots if s.step <= fake.step]
            case "stop":
                fake.end(Phase.STOPPED, 130)
            case "answer" if fake.question:
                fake.phase, fake.question = Phase.STEP, ""
            case _:
                reason = f"not possible while {fake.phase.value}"
        self._flush()
        answer = self.run.answer(
            command, applied=not reason, reason=reason, step=fake.step, timeline=fake.timeline
        )
        fake.events.append(answer)
        self._events += 1


def example(until: int = 1284) -> FakeRun:
    """The run of SCREEN.md: an update skipped at 402, a spike at 1,207, all over by `until`."""
    fake = FakeRun().begin().advance(402).not_a_number().advance(430).recover()
    fake.advance(1206).spike().advance(1240).recover()
    return fake.advance(until)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path)
    parser.add_argument(
        "--steps", type=int, default=1284, help="healthy steps after the incidents of the example"
    )
    parser.add_argument("--total", type=int, default=6000)
    parser.add_argument(
        "--live", type=float, default=0.0, metavar="SECONDS", help="go on for so long"
    )
    parser.add_argument("--rate", type=float, default=10.0, help="steps a second while live")
    parser.add_argument(
        "--spike-every", type=int, default=400, help="steps between spikes while live; 0: none"
    )
    parser.add_argument("--ask", action="store_true", help="let the guard ask at the end")
    options = parser.parse_args()
    fake = example(options.steps)
    fake.total = max(options.total, options.steps)
    if options.ask:
        fake.mode = Mode.ASK
        fake.ask(
            "loss 6.84 (normal 2.31), score 27 (limit 8): roll back to 1,270 and skip 18 batches?"
        )
    run = fake.write(options.root)
    print(run.path, flush=True)
    if options.live:
        LiveRun(fake, run, rate=options.rate, spike_every=options.spike_every).go(options.live)


if __name__ == "__main__":
    main()
