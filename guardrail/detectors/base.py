"""What a detector is: numbers in, findings out.

`observe` judges a step and changes nothing. `update` learns from a step whose update was applied.
The verdict is made between the two, so a rejected value never enters its own baseline. A
detector reads no clock, draws no random number and does not depend on the rank: equal observations
give equal findings everywhere.

To add a detector, write one file with one class and add the class to `DETECTORS` in
`guardrail/detectors/build.py`. `tests/support/examples/token_drift.py` is an example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from guardrail.core.records.findings import Finding, FindingKind, Observation, Severity, score_words
from guardrail.core.section import Section

if TYPE_CHECKING:  # the options hold the settings of the detectors, so they are imported after them
    from guardrail.core.guard_options import GuardOptions

# A rejected step in numbers: signal -> log(value / baseline) of its spikes.
LogJumps = Mapping[str, float]


class ReplaySign(Enum):
    """How a batch that is run again shows the anomaly of a finding."""

    HIGH_VALUE = "a value above the limit of the finding"
    UNUSABLE_VALUE = "NaN, Inf, or a number that no model gives"
    SAME_VALUE = "the very same number again"


class DetectorSettings(Section, frozen=True, kw_only=True):
    """Base of the keys of a detector, or of several: a table [guard.detectors.NAME].

    The comment above a key says in which unit it is, what it means, and where it comes from. The
    documentation is made of these comments.

    Attributes:
        table: NAME.
    """

    table: ClassVar[str]

    def check(self, key: str) -> None:
        """Refuse values that do not fit each other.

        Args:
            key: the name of the table in the configuration, for the message.

        Raises:
            ConfigError: names key, value and what would be right.
        """


class Detector:
    """Base of all detectors. A subclass defines the attributes without a value, and `observe`.

    Attributes:
        name: of the detector; the key of its state.
        kind: of its findings.
        signals: names of the signals that it judges. It is asked only about steps that have one of
            them; (): about every step.
        watches: what it judges, for docs/detection.md; "": its signals.
        severities: that its findings can have.
        title: heading of its section in docs/detection.md; detectors with the same one share it.
        help: Markdown text of that section.
        Settings: type of its keys; None: it has no keys.
        keys: all configuration keys that it reads, below [guard].
        damage_is_in_weights: updates that were applied did the damage it reports. `advise` applies
            them and does not roll back, so it resets this detector after each report.
        may_be_allowlisted: `guard.allowlist` and `undo` can turn its findings into notes.
        is_anomaly: a rejection counts towards a rollback. False: it says nothing about the weights.
        dates_onset: a rollback goes back to the onset of its findings.
        judges_one_value: its findings compare the value of one step with a baseline.
        is_harmless_with_clipping: where the loss is normal, clipping the gradients is enough.
        has_unusable_value: the value of its findings is NaN, Inf, or a number that no model gives.
        replay_sign: how a batch that is run again shows the same anomaly.
        needs_positive_loss: it compares ratios of the loss, so it is not asked about a signed one.
    """

    name: ClassVar[str]
    kind: FindingKind
    signals: tuple[str, ...] = ()
    watches: ClassVar[str] = ""
    severities: ClassVar[tuple[Severity, ...]] = (Severity.NOTE,)
    title: ClassVar[str]
    help: ClassVar[str]
    Settings: ClassVar[type[DetectorSettings] | None] = None
    keys: ClassVar[tuple[str, ...]] = ()
    damage_is_in_weights: ClassVar[bool] = False
    may_be_allowlisted: ClassVar[bool] = True
    is_anomaly: ClassVar[bool] = True
    dates_onset: ClassVar[bool] = True
    judges_one_value: ClassVar[bool] = False
    is_harmless_with_clipping: ClassVar[bool] = False
    has_unusable_value: ClassVar[bool] = False
    replay_sign: ClassVar[ReplaySign] = ReplaySign.HIGH_VALUE
    needs_positive_loss: ClassVar[bool] = False

    @classmethod
    def create(cls, parts: DetectorParts) -> Self:
        """Return the detector of a run.

        Args:
            parts: the options of the run, and its other detectors.
        """
        return cls()

    # -- judging and learning ----------------------------------------------------------------------

    def observe(self, obs: Observation) -> list[Finding]:
        """Return the findings about this step; change nothing."""
        raise NotImplementedError

    def update(self, obs: Observation, skipped: Sequence[LogJumps] = ()) -> None:
        """Learn from a step whose update is applied.

        Args:
            skipped: in `advise`, the steps directly before it that `auto` would have skipped. Their
                updates were applied, so the next step shows whether they did harm. The effect of a
                batch that was really skipped is not known.
        """

    def first_suspect_step(self) -> int | None:
        """Return the first applied step that is suspect now; None: no step is.

        States after that step are not called good while this lasts.
        """
        return None

    def band(self) -> tuple[float, float] | None:
        """Return (baseline, limit) in the units of the signal; None: there is none to draw."""
        return None

    def safe_limits(self) -> dict[str, float] | None:
        """Return signal -> value up to which it reports nothing; None: no limit ensures that."""
        return {}

    # -- state -------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything, as after a restart with other data."""

    def begin_level(self, obs: Observation) -> None:
        """Take the values of this step as a new normal level."""
        self.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values; floats are exact through `repr`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state, also one with another length of the history.

        Raises:
            KeyError, TypeError, ValueError: the state does not fit, as of another version.
        """

    # -- findings ----------------------------------------------------------------------------------

    def make_finding(
        self,
        obs: Observation,
        severity: Severity,
        *,
        signal: str,
        value: float,
        baseline: float = 0.0,
        score: float = 0.0,
        threshold: float = 0.0,
        kind: FindingKind | None = None,
        onset: int | None = None,
        ranks: tuple[int, ...] = (),
    ) -> Finding:
        """Return a finding about this step.

        Args:
            kind: default: the kind of the detector.
            onset: first step of the anomaly; default: this step.
        """
        return Finding(
            signal=signal,
            step=obs.step,
            kind=self.kind if kind is None else kind,
            severity=severity,
            value=value,
            baseline=baseline,
            score=score,
            threshold=threshold,
            onset=obs.step if onset is None else onset,
            ranks=ranks,
        )

    @classmethod
    def sentence(cls, finding: Finding) -> str:
        """Return the finding in one line, for the journal and the screen."""
        return (
            f"{finding.signal} {finding.value:.4g}{format_ranks(finding)} "
            f"(normal {finding.baseline:.4g}), {score_words(finding.score, finding.threshold)}"
        )

    @classmethod
    def explain_rollback(cls, finding: Finding) -> str:
        """Return why this finding alone calls for a rollback; "": the policy has the reason."""
        return ""


def format_ranks(finding: Finding) -> str:
    """Return " on rank 1" or " on ranks 1, 3"; "": the finding names no rank."""
    if not finding.ranks:
        return ""
    named = ", ".join(map(str, finding.ranks))
    return f" on rank {named}" if len(finding.ranks) == 1 else f" on ranks {named}"


DetectorT = TypeVar("DetectorT", bound=Detector)
SettingsT = TypeVar("SettingsT", bound=DetectorSettings)


class DetectorParts:
    """The detectors of one run while they are created.

    Attributes:
        options: the [guard] section.
    """

    def __init__(self, options: GuardOptions) -> None:
        self.options = options
        self._created: dict[type[Detector], Detector] = {}

    def settings(self, cls: type[SettingsT]) -> SettingsT:
        """Return the keys of this type, as the configuration has them."""
        settings = getattr(self.options.detectors, cls.table)
        assert isinstance(settings, cls)
        return settings

    def get(self, cls: type[DetectorT]) -> DetectorT:
        """Return the detector of this class, and create it if it does not exist yet.

        A detector that reads the baseline of another one gets it here, in any order.
        """
        detector = self._created.get(cls)
        if detector is None:
            detector = self._created[cls] = cls.create(self)
        assert isinstance(detector, cls)
        return detector
