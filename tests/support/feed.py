"""Feeds made-up runs to the pure core: observations from plain numbers, and a whole run without a
tensor.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.findings import Observation
from guardrail.core.records.signals import EMBED_GRAD_NORM, GRAD_NORM, LOSS
from guardrail.core.records.spans import Span
from guardrail.core.records.verdicts import Action, Verdict
from guardrail.decide.controller import Controller
from guardrail.decide.rollback import Rollback
from guardrail.decide.sample_cursor import SampleCursor
from guardrail.decide.sample_order import SampleOrder

BATCH = 16


def obs(
    step: int, loss: float | None = None, grad: float | None = None, **fields: Any
) -> Observation:
    """An observation of batch number `step` with the signals that are given."""
    signals = {
        name: value for name, value in ((LOSS, loss), (GRAD_NORM, grad)) if value is not None
    }
    if "embed" in fields:
        signals[EMBED_GRAD_NORM] = fields.pop("embed")
    fields.setdefault("first", (step - 1) * BATCH)
    fields.setdefault("last", fields["first"] + BATCH)
    return Observation(step=step, signals=signals, **fields)


def noisy(level: float, *, seed: int = 0, noise: float = 0.02) -> Callable[[int], float]:
    """step -> level with log-normal noise; the same for the same step."""
    return lambda step: level * math.exp(random.Random(seed * 1_000_003 + step).gauss(0.0, noise))


def healthy_loss(step: int) -> float:
    """A loss that falls from about 11 to 2 with 2 % noise."""
    return noisy(2.0 + 9.0 * math.exp(-step / 40.0))(step)


def warmed(controller: Controller, steps: int = 200) -> int:
    """Feed a healthy run; returns the step that comes next."""
    for step in range(1, steps + 1):
        verdict = controller.observe(
            obs(step, healthy_loss(step), noisy(0.5, seed=1, noise=0.2)(step))
        )
        assert verdict.action is Action.APPLY and verdict.accepted, verdict
    return steps + 1


def through_json(state: Any) -> Any:
    return json.loads(json.dumps(state))


def plain(verdict: Verdict) -> str:
    """A verdict as text in which NaN equals NaN."""
    return repr(verdict)


class JudgedSteps:
    """A run that a controller judges step by step. A rejected batch does not advance the step."""

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self.step, self.cursor, self.streak = 1, 0, 0

    def judge(self, signals: dict[str, float], *, overflow: bool = False) -> Verdict:
        """Give the controller the signals of the next batch."""
        seen = Observation(
            step=self.step,
            first=self.cursor,
            last=self.cursor + BATCH,
            signals=signals,
            streak=self.streak,
            overflow=overflow,
        )
        verdict = self.controller.observe(seen)
        self.cursor += BATCH
        if verdict.action is Action.APPLY:
            self.step, self.streak = self.step + 1, 0
        else:
            self.streak += 1
        return verdict


class Trainer:
    """A whole run around ledger and controller without a tensor: what the guard does, in forty
    lines.

    The weights are a number, `poison`: each applied bad sample raises the loss of every later step
    by 0.1. So what was applied shows in the numbers, and a rollback that is not exact would show
    too.

    Args:
        bad: sample ids that raise the loss of their batch to 9.
        every: steps between two snapshots; the first is taken at step 0.
        crash_at: attempts (calls of `attempt`) at which the process dies and resumes from snapshot
        + journal.
    """

    def __init__(
        self,
        settings: GuardOptions,
        *,
        bad: Iterable[int] = (),
        samples: int = 100_000,
        every: int = 10,
        crash_at: Iterable[int] = (),
        quarantine: Iterable[str] = (),
        leak: Callable[[int], float] = lambda step: 0.0,
    ) -> None:
        self.settings, self.bad, self.every = settings, set(bad), every
        self.samples, self.crash_at, self.leak = samples, set(crash_at), leak
        self.ledger = self._ledger(quarantine)
        self.controller = Controller(settings)
        self.step, self.poison, self.attempts = 0, 0.0, 0
        self.applied: dict[int, tuple[int, ...]] = {}
        self.losses: dict[int, float] = {}
        self.verdicts: list[Verdict] = []
        self.journal: list[Span] = []
        self.rollbacks: list[Rollback] = []
        self.saved: dict[int, Any] = {}
        self.halted = False
        self._save()

    def _ledger(self, quarantine: Iterable[str] = ()) -> SampleCursor:
        ledger = SampleCursor(SampleOrder(samples=self.samples, seed=3), batch_size=BATCH)
        ledger.quarantine.read(quarantine)
        return ledger

    def _save(self) -> None:
        self.saved[self.step] = (
            self.step,
            self.poison,
            self.ledger.state(),
            through_json(self.controller.state_dict()),
        )

    def _restore(self, step: int) -> None:
        self.step, self.poison, ledger, controller = self.saved[step]
        self.ledger.restore(ledger)
        self.controller.load_state_dict(controller)
        self.saved = {at: saved for at, saved in self.saved.items() if at <= step}

    def crash(self) -> None:
        """Only snapshots and the journal survive."""
        self.ledger = self._ledger()
        for span in self.journal:
            self.ledger.skip_span(span)
        self.controller = Controller(self.settings)
        self.controller.memory.load_rollbacks(self.rollbacks)
        self._restore(max(self.saved))

    def run(self, steps: int) -> Trainer:
        while self.step < steps and not self.halted:
            self.attempts += 1
            if self.attempts in self.crash_at:
                self.crash()
            self.attempt()
        return self

    def attempt(self) -> None:
        batch = self.ledger.next_batch()
        assert batch is not None
        bad = sum(sample in self.bad for sample in batch.samples)
        step = self.step + 1
        loss = noisy(2.0)(batch.first) + 0.1 * self.poison + self.leak(step) + (7.0 if bad else 0.0)
        seen = obs(
            step,
            loss,
            noisy(0.5, seed=1)(batch.first),
            first=batch.first,
            last=batch.last,
            streak=batch.streak,
        )
        verdict = self.controller.observe(seen)
        self.verdicts.append(verdict)
        if verdict.action is Action.APPLY:
            self.step, self.poison = step, self.poison + bad
            self.ledger.advance(batch, applied=True)
            self.applied[step], self.losses[step] = batch.samples, loss
            if step % self.every == 0:
                self._save()
        elif verdict.action is Action.SKIP:
            self._leave_out(Span(first=batch.first, last=batch.last, origin="rejected", step=step))
            self.ledger.advance(batch, applied=False)
        elif verdict.action is Action.ROLLBACK:
            assert (
                verdict.window is not None
                and verdict.before_step is not None
                and verdict.onset is not None
            )
            target = max(at for at in self.saved if at < verdict.before_step)
            self.rollbacks.append(
                Rollback(
                    from_step=self.step, to_step=target, onset=verdict.onset, window=verdict.window
                )
            )
            self._leave_out(
                Span(first=verdict.window[0], last=verdict.window[1], origin="rollback", step=step)
            )
            self._restore(target)
            self.controller.memory.load_rollbacks(self.rollbacks)
        else:
            self.halted = True

    def _leave_out(self, span: Span) -> None:
        self.journal.append(span)
        self.ledger.skip_span(span)

    def story(self, steps: int) -> tuple[list[tuple[int, ...]], list[float], list[str]]:
        """What the weights have met, the losses of it, and what was left out."""
        steps_made = range(1, steps + 1)
        return (
            [self.applied[s] for s in steps_made],
            [self.losses[s] for s in steps_made],
            self.quarantined(),
        )

    def quarantined(self) -> list[str]:
        return list(self.ledger.quarantine.lines())


def going_back(stretches: Sequence[tuple[int, int]]) -> tuple[list[float], list[float]]:
    """(Steps, timelines) of the rows of a run that goes `back` to a step and makes `length` more,
    again and again.
    """
    steps: list[float] = []
    timelines: list[float] = []
    at = 0
    for timeline, (back, length) in enumerate(stretches):
        at = min(at, back) if timeline else 0
        steps += range(at + 1, at + length + 1)
        timelines += [timeline] * length
        at += length
    return steps, timelines
