"""observe(step) -> verdict: the state machine that every rank runs on the same reduced numbers.

Two kinds of memory, kept apart on purpose:

    state   detectors and the recent batches. Travels with each snapshot and rolls back with it (`state_dict`).
            Only applied steps change it, and overflows of the loss scale, which are counted: a rejected batch leaves
            no trace in it.
    facts   rollbacks done, incidents, pardons, batches that were left out without suspicion. They outlive a rollback;
            the journal holds them, and `rebuild` reads them back after a crash.

Together: a controller that was loaded from a checkpoint and rebuilt from the journal reaches the verdicts of one that
never stopped.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from msgspec import convert, structs

from guardrail.advice import Advice
from guardrail.answering import Answer, Case, answer
from guardrail.config import GuardSection
from guardrail.detectors.base import Detector, Jumps
from guardrail.detectors.divergence import Divergence
from guardrail.detectors.growth import CLIMB
from guardrail.detectors.no_tokens import NoTokens
from guardrail.detectors.resume import ROWS, resume_jumps
from guardrail.detectors.scale import ScaleCollapse, overflows
from guardrail.detectors.share import Share
from guardrail.detectors.spike import LOOK_BACK, ONSET_SHARE, Spike
from guardrail.detectors.standard import NAMED, TOGETHER, USUAL, build, build_named
from guardrail.detectors.stuck import Stuck
from guardrail.detectors.together import Together
from guardrail.diagnoses import Diagnoses, diagnosis_of, signals_of
from guardrail.enough import MOST, fit
from guardrail.incidents import CLOSED, OPEN, RECURRED, Incidents
from guardrail.policy import UNSUSPECTED, Rollback, by_severity, field_of, is_trouble, rejects, rollback_of, untouched
from guardrail.records import (
    GRAD_NORM,
    LOSS,
    LOSS_SCALE,
    Action,
    Cause,
    Curve,
    Diagnosis,
    Event,
    Finding,
    Kind,
    Mode,
    Observation,
    Severity,
    Verdict,
)
from guardrail.window import Applied

# Detectors of damage in the weights. `advise` does not go back, so what they said once they would say for ever.
LASTING = ("divergence", "growth", "embed_growth", "update_growth")
# An update with these has no meaning, whoever wishes for it.
UNPARDONABLE = frozenset({Kind.NONFINITE, Kind.NO_TOKENS, Kind.SCALE_COLLAPSE})
SPIKES = (Kind.LOSS_SPIKE, Kind.GRAD_SPIKE, Kind.EMBED_SPIKE, Kind.UPDATE_SPIKE, Kind.SPIKE)
# Verdicts of which no replay asks the cause.
UNASKED = (Action.APPLY, Action.OVERFLOW, Action.RETRY)
# Of the run itself: such trouble comes again. Hardware and the unknown say nothing of the next batch.
CAUSES = (Cause.DATA, Cause.STATE, Cause.DATA_AND_STATE)
# Findings on further signals in one verdict.
MOST_NAMED = 3
# Claims about norms alone: where the loss has nothing of it, clipping is all that the update needs.
NORMS = frozenset({Kind.GRAD_SPIKE, Kind.EMBED_SPIKE})
QUIET = 0.5  # share of the way to its limit below which a loss has nothing of it


class Watch(NamedTuple):
    """The detectors of a step's signals; what each step asks of them is looked up once."""

    observe: tuple[Callable[[Observation], list[Finding]], ...]
    accept: tuple[Callable[[Observation, Sequence[Jumps]], None], ...]


class Controller:
    """Detectors, policy and memory of one run.

    Args:
        settings: the [guard] section.
        mode: overrides `settings.mode`.
    """

    def __init__(self, settings: GuardSection, *, mode: Mode | None = None) -> None:
        self.settings = settings
        self.mode = settings.mode if mode is None else mode
        self._no_tokens = NoTokens()
        self.detectors = build(settings)
        self._scale: ScaleCollapse = self.detectors[LOSS_SCALE]  # type: ignore[assignment]
        self._by_signals: dict[tuple[str, ...], Watch] = {}
        self.incidents = Incidents(confirm=settings.confirm)
        self.rollbacks: list[Rollback] = []
        self.diagnoses = Diagnoses()
        # Stretches [first, last) of positions whose batches are applied whatever is found, as far as it is finite.
        self.pardons: list[tuple[int, int]] = list(settings.pardon)
        # Rejected for want of labels: no sign of trouble.
        self._empty_spans: set[tuple[int, int]] = set()
        # Reaches back to the earliest onset that a detector can name, and `window_before` batches further.
        reach = settings.window_before + max(LOOK_BACK, Divergence.MEMORY * settings.divergence_steps, CLIMB) + 1
        if any(rung.do == "widen" for rung in settings.ladder):
            reach += settings.window_max // 2
        self._history: deque[Applied] = deque(maxlen=reach)
        self._losses: deque[tuple[int, float]] = deque(maxlen=2 * MOST)  # (step, loss) of the last accepted steps
        self._overflows = 0  # in a row, directly before the next step
        self._asks_again = False  # of the newest verdict: whether it is still the data
        self._advice = Advice()
        self._resumed = 0  # rows that are still to be held against what was before a resume
        self._jumped: set[str] = set()  # signals of which a jump has been told

    # -- one step ------------------------------------------------------------------------------------------------

    def observe(self, obs: Observation) -> Verdict:
        """Judge one step. In APPLY the step is taken as applied; anything else changes no state but for overflows."""
        if obs.overflow or overflows(obs):
            return self._overflowed(obs if obs.overflow else structs.replace(obs, overflow=True))
        if self.mode is Mode.OFF:
            self._overflows = 0
            self._history.append(Applied(obs.step, obs.first, obs.last))
            return Verdict(action=Action.APPLY, step=obs.step)
        findings: list[Finding] = []
        if self._history and obs.step < self._history[-1].step:
            findings.append(_restarted(obs))
            self._went_back(obs.step)
        if self.mode is Mode.ADVISE and self._advice.left_out:
            obs = structs.replace(obs, streak=len(self._advice.left_out))
        watch = self._watch(obs)
        if obs.tokens > 0:
            for observe in watch.observe:
                if found := observe(obs):
                    findings += found
            if self.incidents.open and not rejects(findings):
                findings += self._wary(obs)
            if self._resumed:
                findings += self._after_resume(obs)
        else:
            # Without a label token the loss is 0/0: every other claim about it would be noise.
            findings = self._no_tokens.observe(obs)
        if not findings:
            return self._healthy(obs, watch)
        evidence = self._foremost(by_severity(findings))
        if evidence[0].severity is Severity.NOTE:
            return self._healthy(obs, watch, evidence, f"noted: {evidence[0].sentence()}")
        if self._pardoned(obs, evidence):
            return self._pardon(obs, evidence)
        return self._rejected(obs, evidence)

    def _wary(self, obs: Observation) -> list[Finding]:
        """While an incident of known cause is open, one step that both signals count to it is enough.

        Where the data is to blame, more of it is likely and a batch left out costs little: any step with which a row
        might begin. Where it is the state, the run would go back for it.
        """
        known = self.diagnoses.of.get(self.incidents.number)
        together = self.detectors[TOGETHER]
        assert isinstance(together, Together)
        if known is None or known.cause not in CAUSES:
            return []
        counts = together.counts(obs)
        wary = counts > 0.0 if known.cause.of_data else together.high(obs, ONSET_SHARE)
        return together.findings(obs, to_spare=counts, onset=obs.step) if wary else []

    def _foremost(self, findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
        """Where every layer's norm jumps, the foremost of them are evidence enough."""
        named = [finding for finding in findings if NAMED + finding.signal in self.detectors]
        return tuple(f for f in findings if f not in named[MOST_NAMED:])

    def _watch(self, obs: Observation) -> Watch:
        """The detectors that watch one of the step's signals; most logs hold few of them."""
        names = tuple(obs.signals)
        watch = self._by_signals.get(names)
        if watch is None:
            for signal in names:
                if signal not in USUAL and NAMED + signal not in self.detectors:
                    self.detectors[NAMED + signal] = build_named(signal, self.settings)
            concerned = [
                d for d in self.detectors.values() if not d.signals or not obs.signals.keys().isdisjoint(d.signals)
            ]
            watch = Watch(tuple(d.observe for d in concerned), tuple(d.accept for d in concerned))
            self._by_signals[names] = watch
        return watch

    def _healthy(
        self,
        obs: Observation,
        watch: Watch,
        findings: tuple[Finding, ...] = (),
        reason: str = "",
    ) -> Verdict:
        left_out = self._advice.left_out
        for accept in watch.accept:
            accept(obs, left_out)
        self._history.append(Applied(obs.step, obs.first, obs.last))
        loss = obs.signals.get(LOSS)
        if loss is not None and math.isfinite(loss):
            self._losses.append((obs.step, loss))
        self._overflows = 0
        self._advice.accepted()
        if not self.incidents.open and not findings:
            return Verdict(action=Action.APPLY, step=obs.step)
        number, state = self.incidents.healthy(obs.step, self._losses, every_step=self.mode is not Mode.ADVISE)
        return Verdict(
            action=Action.APPLY,
            step=obs.step,
            findings=findings,
            reason=reason,
            incident=number,
            incident_state=state,
            outcome=self.incidents.outcome if state in CLOSED else None,
        )

    def _overflowed(self, obs: Observation) -> Verdict:
        """Too high a loss scale, until it has been lowered often enough: then it is not the scale.

        Such an update is left out in every mode; it is the loss scaler's arithmetic and no opinion of the guard.
        """
        self._overflows += 1
        if self.mode is not Mode.OFF and (found := self._scale.collapsed(obs, self._overflows)) is not None:
            return self._rejected(obs, (found,))
        scale = obs.signals.get(LOSS_SCALE, 0.0)
        reason = f"the gradients overflow at a loss scale of {scale:g}"
        return Verdict(action=Action.OVERFLOW, step=obs.step, reason=reason, accepted=False)

    def _rejected(self, obs: Observation, findings: tuple[Finding, ...]) -> Verdict:
        trouble = is_trouble(findings)
        # What nobody has said the meaning of does not say how far to go back either.
        onset = max(1, min(finding.onset for finding in findings if finding.kind is not Kind.SPIKE))
        streak = self._streak(obs)
        if streak and self.mode is Mode.ADVISE:
            onset = min(onset, self._advice.since)  # `auto` would still be at that step
        number, state = (
            self.incidents.trouble(obs.step, onset, curve=None if self.incidents.open else self._curve(onset))
            if trouble
            else (None, "")
        )
        return self._answer(obs, findings, onset=onset, number=number, state=state)

    def _answer(
        self, obs: Observation, findings: tuple[Finding, ...], *, onset: int, number: int | None, state: str
    ) -> Verdict:
        """What is done about a rejected step, by what is known of its incident."""
        case = Case(
            obs=obs,
            findings=findings,
            onset=onset,
            streak=self._streak(obs),
            rollbacks=[*self.rollbacks, *self._advice.rollbacks],
            diagnosis=self.diagnoses.now(number, self.rollbacks) if number is not None else None,
            history=self._history,
            overflows=self._overflows,
            settings=self.settings,
        )
        action, row = case.action(), case.row
        self._asks_again = untouched(case.diagnosis) and (
            case.too_long or _is_due(case.streak + 1, self.settings.persist)
        )
        # The same place again, before enough healthy steps have gone by since the run went back for it.
        again = bool(row) and case.applied - row[-1].from_step < self.incidents.confirm
        if action in (Action.ROLLBACK, Action.HALT) and again:
            if self._new_level(obs, findings):
                return self._adopt(obs, findings)
            state = state or RECURRED
        done = answer(case, action)
        taken, would = done.action, None
        if self.mode is Mode.ADVISE:
            taken, would = Action.OVERFLOW if obs.overflow else Action.APPLY, done.action
            self._advise(done, obs, findings, onset)
        elif (self.mode is Mode.ASK and done.action in (Action.ROLLBACK, Action.HALT)) or done.rung == "pause":
            taken, would = Action.PAUSE, done.action
        elif number is None:
            self._empty_spans.add((obs.first, obs.last))
        return Verdict(
            action=taken,
            step=obs.step,
            findings=findings,
            onset=onset,
            window=done.window,
            positions=done.positions if done.action is Action.ROLLBACK else (),
            before_step=done.before,
            reason=done.reason,
            would=would,
            accepted=False,
            incident=number,
            incident_state=state,
            rung=done.rung if number is not None else "",
            remedies=done.remedies,
            cause=case.cause,
        )

    def incident_line(self, verdict: Verdict) -> tuple[str, dict[str, Any]]:
        """(Message, data) of the `incident` line of a verdict that turns an incident."""
        number, state, outcome = verdict.incident, verdict.incident_state, verdict.outcome
        lost = sum(one.from_step - one.to_step for one in self.rollbacks if one.incident == number)
        data: dict[str, Any] = {"number": number, "state": state, "onset": verdict.onset, "steps_lost": lost}
        message = f"incident {number}: {state}"
        if state not in CLOSED:
            data["curve"] = self.incidents.curve
            return (f"{message}, {lost} steps are made again so far" if state == RECURRED else message), data
        if outcome is not None:
            data |= {name: getattr(outcome, name) for name in ("expected", "got", "noise", "offset")}
            message += (
                f": loss {outcome.got:.4g} against {outcome.expected:.4g} that its curve before step "
                f"{self.incidents.onset} leads to, noise {outcome.noise:.2g}"
            )
        return message + (f"; {lost} steps were made again" if lost else ""), data

    def _curve(self, onset: int) -> Curve | None:
        return fit([pair for pair in self._losses if pair[0] < onset])

    # -- what cannot be rejected ---------------------------------------------------------------------------------

    def ceilings(self, like: Observation) -> dict[str, float] | None:
        """Signal -> a value up to which the next step is applied without a word, if all keep to it, the loss above 0.

        All detectors speak of what is high, whichever signal it is, so they are asked about the one step in which every
        signal is as high as it may be: what says nothing of that says nothing of any step below it. `Stuck` alone
        speaks of a number that is the same; while it would, there is no answer.

        Args:
            like: the next step, with the names of its signals; their values do not matter.

        Returns:
            None where it cannot be said: in other modes than `auto` and `ask`, while an incident is open, right behind
            a resume, and wherever a detector has something to say of the step with the high values.
        """
        if self.mode not in (Mode.AUTO, Mode.ASK) or self.incidents.open or self._resumed or not self._history:
            return None
        watch = self._watch(like)
        most: dict[str, float] = {}
        for detector in self.detectors.values():
            if isinstance(detector, Stuck) and detector.due:
                return None
            if isinstance(detector, Spike | Share) and detector.signals[0] in like.signals:
                most[detector.signals[0]] = detector.ceiling()
        if most.keys() != like.signals.keys():
            return None
        high = structs.replace(like, signals=most)
        return None if any(observe(high) for observe in watch.observe) else most

    # -- a new level ---------------------------------------------------------------------------------------------

    def _new_level(self, obs: Observation, findings: Iterable[Finding]) -> bool:
        """Whether norms alone are high, and the loss has nothing of it.

        Called where that has come back behind a rollback: then no batch is to blame and no harm is done. It is where
        this run now is, and the clip keeps the updates as long as they were.
        """
        grave = [finding for finding in findings if finding.severity is not Severity.NOTE]
        loss = self.detectors[LOSS]
        quiet = LOSS in obs.signals and isinstance(loss, Spike) and not loss.raised(obs, QUIET)
        return quiet and all(finding.kind in NORMS and finding.severity is Severity.REJECT for finding in grave)

    def _adopt(self, obs: Observation, findings: tuple[Finding, ...]) -> Verdict:
        """Applied, and the norms begin a new baseline at this level."""
        for finding in findings:
            detector = self.detectors.get(finding.signal)
            if finding.severity is Severity.REJECT and isinstance(detector, Spike | Share):
                detector.adopt(obs)
        notes = tuple(
            structs.replace(f, kind=Kind.LEVEL_SHIFT, severity=Severity.NOTE) if f.kind in NORMS else f
            for f in findings
        )
        reason = f"level shift: {findings[0].sentence()}, again behind a rollback while the loss is as usual: accepted"
        return self._healthy(obs, self._watch(obs), notes, reason)

    # -- the cause -----------------------------------------------------------------------------------------------

    def wants_cause(self, verdict: Verdict) -> bool:
        """Whether a replay should look for the cause of this verdict's incident, before the verdict takes effect.

        Once for each trouble of an incident (see guardrail.diagnoses); again after one that has told nothing, or that
        the hardware does not repeat itself, and where update after update is left out because the data is to blame.
        """
        if not self.settings.cause_test or self.mode not in (Mode.AUTO, Mode.ASK) or verdict.incident is None:
            return False
        if verdict.action in UNASKED:
            return False
        return self._asks_again or self.diagnoses.untold(verdict, self.rollbacks)

    def reconsider(self, obs: Observation, verdict: Verdict, diagnosis: Diagnosis) -> Verdict:
        """The verdict in the light of what a replay has shown; `verdict` is what `observe` has said of `obs`.

        The data, alone or with this state: leave it out, however often in a row, as far as `skips` allows; go back only
        where an update of it is in the weights. The state: no batch is to blame, so go back and leave nothing out. The
        hardware: form the same batch again, and halt where that has happened too often.
        """
        assert verdict.incident is not None and verdict.onset is not None
        self.diagnoses.learn(
            verdict.incident,
            diagnosis,
            onset=verdict.onset,
            step=verdict.step,
            signals=signals_of(verdict.findings),
            rollbacks=self.rollbacks,
        )
        if diagnosis.cause is Cause.HARDWARE:
            return self.diagnoses.unsound(verdict, diagnosis, settings=self.settings, mode=self.mode)
        return self._answer(
            obs, verdict.findings, onset=verdict.onset, number=verdict.incident, state=verdict.incident_state
        )

    # -- pardons -------------------------------------------------------------------------------------------------

    def _pardoned(self, obs: Observation, findings: Iterable[Finding]) -> bool:
        """Whether a person has said that this batch is to be applied. No pardon lets a NaN into the weights."""
        within = any(first < obs.last and obs.first < last for first, last in self.pardons)
        return within and not any(f.kind in UNPARDONABLE and f.severity is not Severity.NOTE for f in findings)

    def _pardon(self, obs: Observation, findings: tuple[Finding, ...]) -> Verdict:
        """Applied; a jump enters no baseline. What has stayed up is the new normal, or the next batch would say it."""
        lasting = any(finding.severity is Severity.PERSISTENT for finding in findings)
        if lasting:
            self.overrule(obs)
        else:
            self._history.append(Applied(obs.step, obs.first, obs.last))
            self._overflows = 0
        return Verdict(
            action=Action.APPLY,
            step=obs.step,
            findings=tuple(structs.replace(finding, severity=Severity.NOTE) for finding in findings),
            reason=f"pardoned: {findings[0].sentence()}",
            accepted=lasting,
        )

    def _after_resume(self, obs: Observation) -> list[Finding]:
        self._resumed -= 1
        spikes = (spike for spike in (self.detectors[LOSS], self.detectors[GRAD_NORM]) if isinstance(spike, Spike))
        findings = [f for f in resume_jumps(obs, spikes) if f.signal not in self._jumped]
        self._jumped.update(f.signal for f in findings)
        return findings

    def resumed(self) -> None:
        """The process is a new one; call it when the state has been loaded. Jumps of the next rows will be noted.

        No part of the state: whether a run was resumed must not show in what it does.
        """
        self._resumed, self._jumped = ROWS, set()

    def overrule(self, obs: Observation) -> None:
        """A person had the update applied that the last verdict rejected.

        What it showed is taken as the new normal: detectors learn anew, so that they do not reject each step that
        follows. Call it instead of a second `observe`.
        """
        for detector in self.detectors.values():
            detector.reset()
            detector.accept(obs)
        self._history.append(Applied(obs.step, obs.first, obs.last))
        self._overflows = 0

    def set_mode(self, mode: Mode) -> None:
        """Takes effect with the next step. Leaving `off`, detectors begin anew: what they knew is out of date."""
        if self.mode is Mode.OFF and mode is not Mode.OFF:
            for detector in self.detectors.values():
                detector.reset()
        if mode is not Mode.ADVISE:
            self._advice = Advice()
        self.mode = mode

    # -- the window ----------------------------------------------------------------------------------------------

    def _streak(self, obs: Observation) -> int:
        """Troubled batches rejected directly before this one; those that say nothing of the weights do not count."""
        if self.mode is Mode.ADVISE:
            return self._advice.streak
        end = self._history[-1].last if self._history else 0
        empty = sum(end <= first and last <= obs.first for first, last in self._empty_spans)
        return max(0, obs.streak - empty)

    @property
    def applied(self) -> tuple[Applied, ...]:
        """The last batches whose updates were applied, oldest first."""
        return tuple(self._history)

    # -- what is known -------------------------------------------------------------------------------------------

    def bands(self) -> dict[str, tuple[float, float]]:
        """signal -> (baseline, threshold) that the next step meets, in the signal's own units."""
        known = ((name.removeprefix(NAMED), detector.band()) for name, detector in self.detectors.items())
        return {name: band for name, band in known if band is not None}

    @property
    def healthy_through(self) -> int:
        """The newest applied step that no detector suspects, 0 if there is none."""
        if not self._history:
            return 0
        last = self._history[-1].step
        if self.mode is Mode.OFF:
            return last
        suspected = (d.suspect_from() for name, d in self.detectors.items() if not name.startswith(NAMED))
        return min((step - 1 for step in suspected if step is not None), default=last)

    # -- state: rolls back ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; floats are exact through `repr`. Independent of what is done with the controller afterwards."""
        return {
            "detectors": {name: detector.state_dict() for name, detector in self.detectors.items()},
            "history": [list(structs.astuple(batch)) for batch in self._history],
            "losses": [list(pair) for pair in self._losses],
            "overflows": self._overflows,
            "advice": self._advice.state_dict(),
            # Only a recorded log can be resumed in the middle of what is one state.
            "resumed": [self._resumed, *sorted(self._jumped)] if self.mode is Mode.ADVISE and self._resumed else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Go back to a state. Returns the detectors that it does not fit, as of another version: they begin anew."""
        anew = []
        signals = [name.removeprefix(NAMED) for name in state["detectors"] if name.startswith(NAMED)]
        named: dict[str, Detector] = {NAMED + signal: build_named(signal, self.settings) for signal in signals}
        self.detectors = {n: d for n, d in self.detectors.items() if not n.startswith(NAMED)} | named
        self._by_signals.clear()
        for name, detector in self.detectors.items():
            try:
                detector.load_state_dict(state["detectors"][name])
            except (KeyError, TypeError, ValueError):
                detector.reset()
                anew.append(name)
        self._history.clear()
        self._history.extend(Applied(*batch) for batch in state["history"])
        self._losses.clear()
        self._losses.extend((int(step), float(loss)) for step, loss in state.get("losses", ()))
        self._overflows = int(state.get("overflows", 0))
        advise = self.mode is Mode.ADVISE
        self._advice = Advice.of(state["advice"]) if advise else Advice()
        self._resumed, *jumped = (advise and state.get("resumed")) or (0,)
        self._jumped = set(jumped)
        return anew

    # -- facts: outlive a rollback -------------------------------------------------------------------------------

    def pardon(self, stretches: Iterable[tuple[int, int]]) -> None:
        """Do not reject batches with a position in these stretches [first, last) again: a person took that back."""
        self.pardons += [(first, last) for first, last in stretches]

    def load_rollbacks(self, rollbacks: Iterable[Rollback | Mapping[str, Any]]) -> None:
        """All rollbacks of the run, oldest first, as records or as the data of `rollback` events."""
        self.rollbacks = [one if isinstance(one, Rollback) else rollback_of(one) for one in rollbacks]

    def rebuild(self, events: Iterable[Event]) -> None:
        """Take the facts over from the journal's events, in order. Replaces what was known."""
        self.rollbacks, self._empty_spans, self.pardons = [], set(), list(self.settings.pardon)
        self.diagnoses = Diagnoses()
        began: list[int] = []  # timelines that the rollbacks began
        self.incidents = Incidents(confirm=self.settings.confirm)
        open_number = onset = step = number = 0
        curve: Curve | None = None
        for event in events:
            data = event.data
            if event.kind == "rollback":
                self.rollbacks.append(rollback_of(data))
                began.append(int(data.get("new_timeline", event.timeline + 1)))
            elif event.kind == "undo":
                stand = [at for at, timeline in enumerate(began) if timeline not in data["rollbacks"]]
                self.rollbacks, began = [self.rollbacks[at] for at in stand], [began[at] for at in stand]
                self.pardons += [(int(first), int(last)) for first, last in data["pardons"]]
            elif event.kind == "cause":
                at = int(data.get("at_step") or event.step + 1)
                self.diagnoses.learn(
                    int(data["incident"]),
                    diagnosis_of(data),
                    onset=int(data.get("onset") or at),
                    step=at,
                    signals=data.get("signals") or (),
                    rollbacks=self.rollbacks,
                )
            elif event.kind == "incident":
                number = max(number, int(data["number"]))
                is_open = data.get("state") in (OPEN, RECURRED)
                raw = data.get("curve")
                curve = raw if raw is None or isinstance(raw, Curve) else convert(raw, Curve)
                open_number, onset = (int(data["number"]), int(data.get("onset") or 0)) if is_open else (0, 0)
            elif event.kind == "verdict":
                if data.get("incident") is not None and (data.get("action") != Action.APPLY or data.get("would")):
                    step = max(step, int(data.get("at_step") or event.step))
                kinds = {field_of(finding, "kind") for finding in data.get("findings") or ()}
                if data.get("action") == Action.SKIP and kinds and kinds <= UNSUSPECTED:
                    first, last = data["window"]
                    self._empty_spans.add((int(first), int(last)))
        self.incidents.resume(number, is_open=bool(open_number), onset=onset, step=step, curve=curve)

    # -- advise --------------------------------------------------------------------------------------------------

    def _advise(self, done: Answer, obs: Observation, findings: tuple[Finding, ...], onset: int) -> None:
        """Book what `auto` would have done. Nothing was done, so the run goes on from the bad state."""
        advice, action = self._advice, done.action
        advice.rejected(obs.step, trouble=is_trouble(findings), jumps=_jumps(findings))
        if action in (Action.ROLLBACK, Action.HALT):
            advice.streak = 0
            if action is Action.ROLLBACK:
                advice.rollbacks.append(
                    Rollback(
                        from_step=obs.step - 1,
                        to_step=max(0, onset - 1),
                        onset=onset,
                        window=done.window,
                        rung=done.rung,
                    )
                )
            if any(finding.severity is Severity.PERSISTENT for finding in findings):
                for name in LASTING:
                    self.detectors[name].reset()
        if len(advice.left_out) >= self.settings.warmup:
            # So long a stretch is where the run is now. Learn that, instead of the same alarm for ever.
            for detector in self.detectors.values():
                detector.reset()
            advice.left_out.clear()

    def _went_back(self, step: int) -> None:
        """The step counter of a recorded log went back; a live run restores a state and never sees this.

        By less than half it was resumed from a checkpoint, and its level should be what it was. Otherwise another run
        begins in the same log, of which nothing that was learnt says anything.
        """
        if 2 * step < self._history[-1].step:
            for detector in self.detectors.values():
                detector.reset()
            self._history.clear()
            self._losses.clear()
            self._overflows = 0
            self._advice = Advice()
        while self._losses and self._losses[-1][0] >= step:
            self._losses.pop()
        while self._history and self._history[-1].step >= step:
            self._history.pop()
        if self._history:
            self.resumed()  # not far back, where the loss may have been another


def _is_due(rejections: int, persist: int) -> bool:
    """At `persist` in a row, at twice that, at four times that, ..."""
    times, rest = divmod(rejections, persist)
    return rest == 0 and times > 0 and times & (times - 1) == 0


def _restarted(obs: Observation) -> Finding:
    return Finding(
        signal="step",
        step=obs.step,
        kind=Kind.RESTART,
        severity=Severity.NOTE,
        value=obs.step,
        baseline=0.0,
        score=0.0,
        threshold=0.0,
        onset=obs.step,
    )


def _jumps(findings: Iterable[Finding]) -> dict[str, float]:
    """The spikes among findings: signal -> log(value / baseline)."""
    return {f.signal: math.log(f.value / f.baseline) for f in findings if f.kind in SPIKES}
