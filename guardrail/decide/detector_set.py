"""The detectors of one run, and which of them watch the signals of a step. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from msgspec import structs

from guardrail.core.guard_options import GuardOptions
from guardrail.core.objective import policy_name
from guardrail.core.records import Finding, Observation, Severity
from guardrail.detectors.base import Detector, LogJumps
from guardrail.detectors.build import NAMED, POSITIVE_LOSS, SIGNED_LOSS, USUAL, build, build_named
from guardrail.detectors.embedding_share import EmbeddingShare
from guardrail.detectors.nonfinite import NonFinite
from guardrail.detectors.signed_loss import LossKind, SignedLoss
from guardrail.detectors.spike import Spike
from guardrail.detectors.stuck import Stuck

# What a loss of exactly 0 is worth.
ZERO = {
    LossKind.UNKNOWN: Severity.NOTE,
    LossKind.DOUBTFUL: Severity.NOTE,
    LossKind.POSITIVE: Severity.REJECT,
    LossKind.SIGNED: None,
}
# Findings on further signals in one verdict.
MOST_NAMED = 3


class ActiveDetectors(NamedTuple):
    """The detectors of a step's signals; what each step asks of them is looked up once."""

    observe: tuple[Callable[[Observation], list[Finding]], ...]
    accept: tuple[Callable[[Observation, Sequence[LogJumps]], None], ...]


class DetectorSet:
    """The detectors of a run by name, those of further signals among them as soon as one is met."""

    def __init__(self, settings: GuardOptions) -> None:
        self._settings = settings
        self.detectors = build(settings)
        self._by_signals: dict[tuple[str, ...], ActiveDetectors] = {}
        signed_loss = self.detectors[SIGNED_LOSS]
        assert isinstance(signed_loss, SignedLoss)
        self.signed_loss = signed_loss  # knows whether the loss is signed
        self._use_loss_kind()

    def _use_loss_kind(self) -> None:
        """Which detectors judge the loss from now on."""
        self._loss_kind = kind = self.signed_loss.kind
        self.loss_is_signed = self.signed_loss.signed  # as of the last step that was judged
        self._by_signals.clear()
        if kind is LossKind.SIGNED:
            for name in POSITIVE_LOSS:
                self.detectors[name].reset()
        nonfinite = self.detectors["nonfinite"]
        assert isinstance(nonfinite, NonFinite)
        nonfinite.zero = ZERO[kind]

    def of(self, obs: Observation) -> ActiveDetectors:
        """The detectors that watch one of the step's signals; most logs hold few of them."""
        names = tuple(obs.signals)
        if self.signed_loss.kind is not self._loss_kind:
            self._use_loss_kind()
        watch = self._by_signals.get(names)
        if watch is None:
            for signal in names:
                if signal not in USUAL and NAMED + signal not in self.detectors:
                    self.detectors[NAMED + signal] = build_named(signal, self._settings)
            if policy_name(names) is not None:
                self.signed_loss.declare()
                self._use_loss_kind()
            concerned = {
                name: d
                for name, d in self.detectors.items()
                if not d.signals or not obs.signals.keys().isdisjoint(d.signals)
            }
            for name in self._asleep():
                concerned.pop(name, None)
            watch = ActiveDetectors(
                tuple(d.observe for d in concerned.values()),
                tuple(d.accept for d in concerned.values()),
            )
            self._by_signals[names] = watch
        return watch

    def _asleep(self) -> tuple[str, ...]:
        """The detectors that are not asked, since the loss is of another kind."""
        if self.signed_loss.signed:
            return POSITIVE_LOSS
        # The detector of spikes tells it of the values that are not positive.
        return (SIGNED_LOSS,) if self._loss_kind is LossKind.POSITIVE else ()

    def foremost(self, findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
        """Where every layer's norm jumps, the foremost of them are evidence enough."""
        named = [finding for finding in findings if NAMED + finding.signal in self.detectors]
        return tuple(f for f in findings if f not in named[MOST_NAMED:])

    def reset(self) -> None:
        """All begin anew."""
        for detector in self.detectors.values():
            detector.reset()
        self._use_loss_kind()

    def bands(self) -> dict[str, tuple[float, float]]:
        """signal -> (baseline, threshold) that the next step meets, in the signal's own units."""
        known = (
            (name.removeprefix(NAMED), detector.band()) for name, detector in self.detectors.items()
        )
        return {name: band for name, band in known if band is not None}

    def safe_limits(self, like: Observation) -> dict[str, float] | None:
        """Signal -> a value up to which no detector says a word of the next step, if all keep to
        it; None: no telling.

        Args:
            like: the next step, with the names of its signals.
        """
        most: dict[str, float] = {}
        for detector in self.detectors.values():
            if isinstance(detector, Stuck) and detector.due:
                return None
            if isinstance(detector, SignedLoss) and detector.signed:
                return None  # a loss that is too low is found as well
            if isinstance(detector, Spike | EmbeddingShare) and detector.signals[0] in like.signals:
                most[detector.signals[0]] = detector.ceiling()
        if most.keys() != like.signals.keys():
            return None
        high = structs.replace(like, signals=most)
        return None if any(observe(high) for observe in self.of(like).observe) else most

    def first_suspect_step(self) -> int | None:
        """The first step that some detector suspects; those of further signals only take note."""
        suspected = (
            d.first_suspect_step()
            for name, d in self.detectors.items()
            if not name.startswith(NAMED)
        )
        return min((step for step in suspected if step is not None), default=None)

    def state_dict(self) -> dict[str, Any]:
        return {name: detector.state_dict() for name, detector in self.detectors.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Go back to a state. Returns the detectors that it does not fit, as of another version:
        they begin anew.
        """
        anew = []
        signals = [name.removeprefix(NAMED) for name in state if name.startswith(NAMED)]
        named: dict[str, Detector] = {
            NAMED + signal: build_named(signal, self._settings) for signal in signals
        }
        self.detectors = {
            n: d for n, d in self.detectors.items() if not n.startswith(NAMED)
        } | named
        self._by_signals.clear()
        for name, detector in self.detectors.items():
            try:
                detector.load_state_dict(state[name])
            except (KeyError, TypeError, ValueError):
                detector.reset()
                anew.append(name)
        self._use_loss_kind()
        return anew
