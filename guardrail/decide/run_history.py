"""The run state that only the journal holds: a rollback and a crash do not change it. Pure.

The state of a run is checkpoint + journal. The checkpoint holds what a rollback restores (weights,
moments, cursor, detectors). The journal holds the rest: the quarantine, the rollbacks, rates that a
user has set, the present timeline, and the suspect checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from guardrail.core.events.decisions import (
    Diagnosed,
    IncidentChanged,
    RolledBack,
    Skipped,
    Undone,
    VerdictGiven,
)
from guardrail.core.events.event import SENSELESS, Event
from guardrail.core.events.run_state import (
    CheckpointChanged,
    CommandAnswered,
    Ended,
    Restarted,
    Resumed,
    Started,
)
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.spans import Span
from guardrail.core.records.status import Unresolved
from guardrail.core.records.verdicts import Action, Mode, Remedy
from guardrail.decide.control_commands.base import ReplayTarget
from guardrail.decide.control_commands.registry import replay_line
from guardrail.decide.remedies.effects import CLIP, EMBED_ALPHA, LR, compute_factor, resets_moments
from guardrail.decide.rollback import Rollback, rollback_of
from guardrail.decide.step_setting import StepSetting

# Actions that do something about an incident.
ACTS = (Action.SKIP, Action.ROLLBACK, Action.RETRY)
GO_ON = "go_on"  # the answer to a question by which the update is applied
NEW_DATA = "new data"


class Effects(NamedTuple):
    """What one update is made with.

    Attributes:
        lr: factor on the scheduled learning rate.
        embed_alpha: factor on the gradients of the embedding.
        clip: factor on the clipping norm.
        reset: set the optimizer's moments to zero before it.
    """

    lr: float
    embed_alpha: float
    clip: float
    reset: bool


@dataclass(kw_only=True)
class RunHistory(ReplayTarget):
    """Facts of the journal, in order.

    Attributes:
        spans: skipped samples, quarantined again at a start.
        rollbacks: oldest first, without those that were undone.
        remedies: of the decisions that are not undone, each with its span or, for a rollback, its
            timeline.
        pardons: ranges [first, last) of positions that the guard must not reject again.
        branches: (timeline, step): that timeline began after that step, so later steps of older
            timelines are abandoned.
        timeline: the newest one.
        suspects: names of checkpoints that hold steps which a rollback discarded.
        good: names of checkpoints that were confirmed.
        incident: number of the last incident.
        acted: incidents about which something was done: a batch skipped or repeated, a state
            restored.
        let_pass: incident -> why an update was applied although it was bad; see `Unresolved`.
        lines: number of journal lines read.
        unread: number of those that cannot be read: damaged, or of another version.
        seq: number of the newest line.
        run_id: of this run; "" if its journal has none, as an old one.
        saved: steps of the checkpoints that the journal names.
    """

    spans: list[Span] = field(default_factory=list)
    rollbacks: list[Rollback] = field(default_factory=list)
    remedies: list[tuple[Span | int | None, Remedy]] = field(default_factory=list)
    pardons: list[tuple[int, int]] = field(default_factory=list)
    branches: list[tuple[int, int]] = field(default_factory=list)
    timeline: int = 0
    suspects: set[str] = field(default_factory=set)
    good: set[str] = field(default_factory=set)
    lr: StepSetting = field(default_factory=lambda: StepSetting(1.0))
    alpha: StepSetting = field(default_factory=lambda: StepSetting(1.0))
    mode: Mode | None = None
    incident: int = 0
    acted: set[int] = field(default_factory=set)
    let_pass: dict[int, str] = field(default_factory=dict)
    restarts: int = 0
    started: Started | None = None
    ended: str | None = None
    lines: int = 0
    unread: int = 0
    seq: int = 0
    run_id: str = ""
    saved: set[int] = field(default_factory=set)

    @classmethod
    def from_events(cls, events: Iterable[Event]) -> RunHistory:
        """Return the history of a journal; lines that cannot be read are counted and skipped."""
        history = cls()
        for event in events:
            try:
                history.add(event)
            except SENSELESS:
                history.unread += 1
        return history

    def add(self, event: Event) -> None:
        """Read one line. Raises one of SENSELESS if it is damaged."""
        self.lines += 1
        self.seq = event.seq or self.seq + 1  # a line that was just written has no number yet
        self.timeline = max(self.timeline, event.timeline)
        match event:
            case Started():
                self.started = event
                self.run_id = event.run_id
            case Restarted():
                self.restarts += 1
                self.run_id = self.run_id or event.run_id
                self.ended = None
                self._branch(event.timeline, event.step)
            case Skipped():
                self._add_span(event)
                self._add_remedies(event, event.span)
            case RolledBack():
                self._add_rollback(event)
            case Undone():
                self._undo(event)
            case CommandAnswered():
                replay_line(event, self)
            case CheckpointChanged():
                self._add_checkpoint(event)
            case VerdictGiven():
                self._add_verdict(event)
            case Diagnosed() if event.shift or event.borne:
                self._let_pass(event.incident, NEW_DATA)
            case Resumed(answer="go_on"):
                self._let_pass(event.incident, "go on")
            case IncidentChanged():
                event.check_readable("number")
                self.incident = max(self.incident, event.number)
            case Ended():
                self.ended = event.phase

    def _add_checkpoint(self, event: CheckpointChanged) -> None:
        name = event.path.rsplit("/", 1)[-1]
        match event.state:
            case "good":
                self.good.add(name)
            case "suspect":
                self.suspects.add(name)
            case "candidate" | "pruned":
                # A name that is written again belongs to another state of the run.
                self.good.discard(name)
                self.suspects.discard(name)
        if event.state == "candidate" and event.cp_step is not None:
            self.saved.add(event.cp_step)

    def _add_verdict(self, event: VerdictGiven) -> None:
        if event.action in ACTS:
            self._act(event.incident)
        elif event.action == Action.APPLY and event.would not in (None, Action.APPLY):
            self._let_pass(event.incident, Mode.ADVISE.value)

    def _act(self, incident: int | None) -> None:
        if incident is not None:
            self.acted.add(incident)

    def _let_pass(self, incident: int | None, why: str) -> None:
        if incident is not None:
            self.let_pass[incident] = why

    def unresolved(self, one: Unresolved) -> Unresolved:
        """Return an unresolved incident with what was done, and why updates were applied."""
        why, acted = self.let_pass.get(one.incident, ""), one.incident in self.acted
        return msgspec.structs.replace(one, acted=acted, let_pass=why)

    def setting_of(self, factor: str) -> StepSetting:
        """Return what users have set; `factor` is the kind of a remedy, LR or EMBED_ALPHA."""
        return {LR: self.lr, EMBED_ALPHA: self.alpha}[factor]

    def set_factor(self, factor: str, from_step: int, value: float) -> None:
        """Record a factor that a user has set."""
        self.setting_of(factor).set(from_step, value)

    def set_mode(self, mode: Mode) -> None:
        """Record a mode that a user has set."""
        self.mode = mode

    def _add_span(self, event: Skipped | RolledBack) -> None:
        """Skip the samples of a line; something was done about its incident."""
        event.check_readable("span")
        if event.span is not None and event.span not in self.spans:
            self.spans.append(event.span)
        self._act(event.incident)

    def _add_remedies(self, event: Skipped | RolledBack, decision: Span | int | None) -> None:
        event.check_readable("remedies")
        self.remedies += [(decision, remedy) for remedy in event.remedies]

    def _add_rollback(self, event: RolledBack) -> None:
        self._add_span(event)
        if event.new_timeline is None or event.to_step is None:
            raise ValueError(f"line {event.seq}: a rollback to no state")
        self._add_remedies(event, event.new_timeline)
        self._go_back(event.to_step, event.new_timeline)
        # A line that holds no complete rollback counts towards no limit.
        self.rollbacks.append(rollback_of(event))

    def _undo(self, event: Undone) -> None:
        """Undo a decision: its spans are not skipped, its rollbacks do not count, its batches are
        allowed.
        """
        event.check_readable("spans", "rollbacks", "pardons")
        if event.new_timeline is None or event.to_step is None:
            raise ValueError(f"line {event.seq}: an undo to no state")
        gone = [*event.spans, *event.rollbacks]
        self.spans = [span for span in self.spans if span not in event.spans]
        self.rollbacks = [one for one in self.rollbacks if one.new_timeline not in event.rollbacks]
        self.remedies = [pair for pair in self.remedies if pair[0] not in gone]
        self.pardons += event.pardons
        self._go_back(event.to_step, event.new_timeline)

    def _go_back(self, to_step: int, timeline: int) -> None:
        self._branch(timeline, to_step)
        self.lr.rewind(to_step)
        self.alpha.rewind(to_step)

    def effects(self, step: int, settings: GuardOptions) -> Effects:
        """Return the factors of a step's update: those that users have set, and the remedies."""
        remedies = [*settings.remedies, *(remedy for _, remedy in self.remedies)]
        if not remedies:
            return Effects(self.lr.at(step), self.alpha.at(step), 1.0, False)
        return Effects(
            lr=self.lr.at(step) * compute_factor(remedies, LR, step),
            embed_alpha=self.alpha.at(step)
            * compute_factor(remedies, EMBED_ALPHA, step, floor=settings.shrink_embedding.floor),
            clip=compute_factor(remedies, CLIP, step),
            reset=resets_moments(remedies, step),
        )

    def why_not_of_this_run(self, identity: Mapping[str, Any], *, timeline: int, step: int) -> str:
        """Return why a checkpoint is not of this run at this point of its journal; "" if it is.

        One without a run id was made by an older version. It is of this run if the run has no id
        either, or if the journal names a checkpoint of that step.

        Args:
            identity, timeline, step: of its manifest.
        """
        run_id, seq = str(identity.get("run_id") or ""), identity.get("journal_seq")
        if run_id != self.run_id and run_id:
            own = self.run_id or "older than run ids"
            return f"it belongs to another run ({run_id}; this one is {own})"
        if not run_id and self.run_id and step not in self.saved:
            return "it does not say which run it belongs to, and the journal does not name it"
        if isinstance(seq, int) and seq > self.seq:
            return f"it was saved after line {seq} of the journal, which ends with line {self.seq}"
        if timeline > self.timeline:
            return (
                f"it belongs to timeline {timeline}, and the journal has none after {self.timeline}"
            )
        return ""

    def _branch(self, timeline: int, step: int) -> None:
        self.branches.append((timeline, step))
        self.timeline = max(self.timeline, timeline)

    def lives(self, *, timeline: int, step: int) -> bool:
        """Return whether a state of (timeline, step) is part of the present timeline's past."""
        return all(step <= to_step for branch, to_step in self.branches if branch > timeline)
