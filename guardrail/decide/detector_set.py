"""The detectors of one run, and which of them judge the signals of a step. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from msgspec import structs

from guardrail.core.guard_options import GuardOptions
from guardrail.core.objective import find_policy_signal
from guardrail.core.records.findings import Finding, Observation, Severity
from guardrail.detectors.base import Detector, LogJumps
from guardrail.detectors.build import OWN_SIGNALS, build_detectors
from guardrail.detectors.impossible import Impossible
from guardrail.detectors.joint_cusum import JointCusum
from guardrail.detectors.loss_scale import ScaleCollapse
from guardrail.detectors.no_tokens import NoTokens
from guardrail.detectors.restart import Restart
from guardrail.detectors.resume_jump import ResumeJump
from guardrail.detectors.signed_loss import LossKind, SignedLoss
from guardrail.detectors.spike_settings import SpikeSettings
from guardrail.detectors.spikes import NAMED, LossSpike, NamedSpike

# Severity of a loss of exactly 0.
ZERO_LOSS = {
    LossKind.UNKNOWN: Severity.NOTE,
    LossKind.DOUBTFUL: Severity.NOTE,
    LossKind.POSITIVE: Severity.REJECT,
    LossKind.SIGNED: None,
}
# Findings about further signals in one verdict.
MOST_NAMED = 3


class ActiveDetectors(NamedTuple):
    """The methods of the detectors that judge a step with certain signals, looked up once."""

    observe: tuple[Callable[[Observation], list[Finding]], ...]
    update: tuple[Callable[[Observation, Sequence[LogJumps]], None], ...]


class DetectorSet:
    """The detectors of a run by name.

    The detector of a further signal is added at the first step that has the signal.

    Attributes:
        detectors: name -> detector, in the order in which they are asked.
        loss_is_signed: whether the loss of the last judged step is treated as signed.
        signed_loss, loss_spike, joint_cusum, loss_scale: some of them.
        no_tokens, resume_jump, restart: detectors that are asked only when they apply.
    """

    def __init__(self, options: GuardOptions) -> None:
        self.detectors, parts = build_detectors(options)
        self._spike_settings = parts.settings(SpikeSettings)
        self.signed_loss = parts.get(SignedLoss)
        self.loss_spike = parts.get(LossSpike)
        self.joint_cusum = parts.get(JointCusum)
        self.loss_scale = parts.get(ScaleCollapse)
        self.no_tokens = parts.get(NoTokens)
        self.resume_jump = parts.get(ResumeJump)
        self.restart = parts.get(Restart)
        self._impossible = parts.get(Impossible)
        self._by_signals: dict[tuple[str, ...], ActiveDetectors] = {}
        self._use_loss_kind()

    def _use_loss_kind(self) -> None:
        """Choose the detectors that judge the loss from now on."""
        self._loss_kind = kind = self.signed_loss.loss_kind
        self.loss_is_signed = self.signed_loss.is_signed
        self._by_signals.clear()
        if kind is LossKind.SIGNED:
            for detector in self.detectors.values():
                if detector.needs_positive_loss:
                    detector.reset()
        self._impossible.zero_loss = ZERO_LOSS[kind]

    def select(self, obs: Observation) -> ActiveDetectors:
        """Return the detectors that judge one of the step's signals; most logs have few of them."""
        names = tuple(obs.signals)
        if self.signed_loss.loss_kind is not self._loss_kind:
            self._use_loss_kind()
        active = self._by_signals.get(names)
        if active is None:
            self._add_named(names)
            if find_policy_signal(names) is not None:
                self.signed_loss.declare()
                self._use_loss_kind()
            chosen = [one for one in self.detectors.values() if self._is_active(one, names)]
            active = self._by_signals[names] = ActiveDetectors(
                tuple(one.observe for one in chosen),
                tuple(one.update for one in chosen if type(one).update is not Detector.update),
            )
        return active

    def _add_named(self, signals: Sequence[str]) -> None:
        """Add the detectors of further signals that are new."""
        for signal in signals:
            if signal not in OWN_SIGNALS and NAMED + signal not in self.detectors:
                self.detectors[NAMED + signal] = NamedSpike(signal, self._spike_settings)

    def _is_active(self, detector: Detector, signals: Sequence[str]) -> bool:
        """Return whether a detector judges steps with these signals."""
        if detector.signals and set(signals).isdisjoint(detector.signals):
            return False
        if self.signed_loss.is_signed:
            return not detector.needs_positive_loss
        # The spike detector of the loss reports the values that are not positive to it.
        return detector is not self.signed_loss or self._loss_kind is not LossKind.POSITIVE

    def limit_named(self, findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
        """Return the findings with the first few about further signals.

        Where the norm of every layer jumps, the most severe of them are enough.

        Args:
            findings: most severe first.
        """
        named = [finding for finding in findings if NAMED + finding.signal in self.detectors]
        dropped = named[MOST_NAMED:]
        return tuple(finding for finding in findings if finding not in dropped)

    # -- what is known -----------------------------------------------------------------------------

    def bands(self) -> dict[str, tuple[float, float]]:
        """Return signal -> (baseline, limit) of the next step, in the units of the signal."""
        bands = {}
        for name, detector in self.detectors.items():
            band = detector.band()
            if band is not None:
                bands[name.removeprefix(NAMED)] = band
        return bands

    def safe_limits(self, like: Observation) -> dict[str, float] | None:
        """Return signal -> value up to which no detector reports anything about the next step.

        None: there are no such limits.

        Args:
            like: the next step, with the names of its signals.
        """
        limits: dict[str, float] = {}
        for detector in self.detectors.values():
            own = detector.safe_limits()
            if own is None:
                return None
            limits |= own
        if not like.signals.keys() <= limits.keys():
            return None
        limits = {signal: value for signal, value in limits.items() if signal in like.signals}
        high = structs.replace(like, signals=limits)
        if any(observe(high) for observe in self.select(like).observe):
            return None
        return limits

    def first_suspect_step(self) -> int | None:
        """Return the first step that some detector suspects; None: no step is suspect."""
        suspected = (detector.first_suspect_step() for detector in self.detectors.values())
        return min((step for step in suspected if step is not None), default=None)

    # -- state -------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Let all detectors begin anew."""
        for detector in self.detectors.values():
            detector.reset()
        self._use_loss_kind()

    def reset_weight_detectors(self) -> None:
        """Let the detectors of damage in the weights begin anew."""
        for detector in self.detectors.values():
            if detector.damage_is_in_weights:
                detector.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return name -> state of the detector."""
        return {name: detector.state_dict() for name, detector in self.detectors.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Take over a state.

        Returns:
            The detectors that it does not fit, as of another version: they begin anew.
        """
        self.detectors = {
            name: one for name, one in self.detectors.items() if not name.startswith(NAMED)
        }
        self._by_signals.clear()
        self._add_named([name.removeprefix(NAMED) for name in state if name.startswith(NAMED)])
        anew = []
        for name, detector in self.detectors.items():
            if name not in state and not detector.state_dict():
                continue  # it has no state
            try:
                detector.load_state_dict(state[name])
            except (KeyError, TypeError, ValueError):
                detector.reset()
                anew.append(name)
        self._use_loss_kind()
        return anew
