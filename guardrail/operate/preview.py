"""What a command would do before anybody gives it: where it goes, what it loses, what it leaves
out. Pure.

    scene = Scene.of(run)                             # the run as its directory tells it
    preview.of(scene, command).sentence()             # "back to step 1,200 (memory, good): 34 steps lost, ..."

Every number comes from the run's own records: seconds are those that its rows measured, a learning
rate is the one that the same step had. What the records do not say is NaN, and is left out of the
sentence.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import structs

from guardrail.core.errors import GuardrailError, UsageError
from guardrail.core.format import format_plural
from guardrail.core.records import (
    Action,
    Command,
    CommandKind,
    Mode,
    Phase,
    Record,
    Remedy,
    Shown,
    SnapshotInfo,
    Span,
    Status,
    Unresolved,
    Verdict,
)
from guardrail.core.text import clean_text
from guardrail.decide.questions import Open, how_to_answer, open_question, question_changed
from guardrail.decide.remedies import sentence
from guardrail.decide.run_history import RunHistory
from guardrail.decide.undo import UndoPlan, find
from guardrail.operate.run_state import RunState

if TYPE_CHECKING:
    from guardrail.decide.sample_order import SampleCursor
    from guardrail.rundir.run_directory import RunDirectory

# between the sight of a preview and the effect of its command: as many steps more may be lost
SPARE_SECONDS = 10.0
_GO_BACK = (CommandKind.ROLLBACK.value, CommandKind.UNDO.value, CommandKind.SKIP.value)


class Preview(Record, frozen=True, kw_only=True):
    """What a command would do.

    Attributes:
        command, value: as it would be sent; "go on" and "halt" are further choices of the guard's
        own question.
        possible: False: it would be refused, for the reason in `refusal`.
        step: applied steps now.
        to_step, tier, state, path: the state that it goes back to; None and "" where it goes
        nowhere.
        steps_lost: applied steps that are given up.
        seconds_lost: what they took when they were made; NaN where no row says so.
        window: positions [first, last) that it leaves out, or takes back (undo).
        samples: samples that it leaves out and that were not left out before.
        returned: positions that an undo brings back.
        lr_before, lr: learning rate of the next step, as things are and afterwards; NaN: not known.
        alpha_before, alpha: factor on its embedding gradients, likewise.
        timeline: of the run now; question: journal line of the question that is open, 0: none is.
        steps_lost_most: steps that it may come to lose while training goes on for some seconds
        more.
        instead_of: the factor, or index of the mode, that it replaces; None: it replaces none.
        worked_out: False: nothing is known but the remark.
        remark: one more sentence for a person.
    """

    command: str
    value: float = 0.0
    possible: bool = True
    refusal: str = ""
    step: int = 0
    to_step: int | None = None
    tier: str = ""
    state: str = ""
    path: str = ""
    steps_lost: int = 0
    seconds_lost: float = 0.0
    window: tuple[int, int] | None = None
    samples: int = 0
    returned: int = 0
    lr_before: float = math.nan
    lr: float = math.nan
    alpha_before: float = math.nan
    alpha: float = math.nan
    timeline: int = 0
    question: int = 0
    steps_lost_most: int = 0
    instead_of: float | None = None
    worked_out: bool = True
    remark: str = ""

    def shown(self) -> Shown:
        """What a command that is given at the sight of this holds for."""
        if self.command not in _GO_BACK:
            return Shown(instead_of=self.instead_of)
        return Shown(
            timeline=self.timeline,
            to_step=self.to_step,
            tier=self.tier,
            steps_lost=self.steps_lost,
            steps_lost_most=self.steps_lost_most,
        )

    def sentence(self) -> str:
        """One line for a person."""
        if not self.possible:
            return f"{self.command} would be refused: {self.refusal}"
        parts = []
        if self.to_step is not None:
            state = f", {self.state}" if self.state not in ("", "good") else ""
            lost = f"{self.steps_lost:,} step{'' if self.steps_lost == 1 else 's'}"
            parts.append(
                f"back to step {self.to_step:,} ({self.tier}{state}), {lost}{self._took()} lost"
            )
        if self.samples:
            parts.append(f"{self.samples:,} sample{'' if self.samples == 1 else 's'} left out")
        if self.returned:
            parts.append(f"{self.returned:,} sample{'' if self.returned == 1 else 's'} taken back")
        if self.lr == self.lr:
            rate, before = f"{self.lr:.3g}", f"{self.lr_before:.3g}"
            parts.append(
                f"learning rate {rate}" + (f" instead of {before}" if rate != before else "")
            )
        if self.alpha == self.alpha and self.alpha != self.alpha_before:
            parts.append(f"embedding gradients x{self.alpha:g} instead of x{self.alpha_before:g}")
        if self.remark:
            parts.append(self.remark)
        return f"{self.command}: {', '.join(parts) or 'nothing changes'}"

    def _took(self) -> str:
        seconds = self.seconds_lost
        if not self.steps_lost or seconds != seconds:
            return ""
        return (
            f" ({seconds:.1f} s of training)"
            if seconds < 60
            else f" ({seconds / 60:.1f} min of training)"
        )


def foresee(run: RunDirectory, command: Command, *, status: Status | None = None) -> Preview:
    """`of` the run as its directory is now.

    Args:
        status: where it is known better than the directory says.

    Raises:
        UsageError: it cannot be worked out from what lies in the directory.
    """
    try:
        return of(RunState.of(run, status=status), command)
    except GuardrailError:
        raise
    except Exception as error:  # whatever a directory of another version, or a damaged one, holds
        strerror = error.strerror if isinstance(error, OSError) else None
        reason = clean_text(strerror or f"{type(error).__name__}: {error}", 200)
        raise UsageError(
            f"what {command.kind.value} would do cannot be worked out: {reason}"
        ) from error


def of(scene: RunState, command: Command) -> Preview:
    """What `command` would do if it took effect now."""
    kind, value = command.kind, command.value
    match kind:
        case CommandKind.ROLLBACK:
            return _roll_back(scene, None if math.isnan(value) else int(value))
        case CommandKind.UNDO:
            return undo(scene, find(scene.events, None if math.isnan(value) else int(value)))
        case CommandKind.SKIP:
            return _skip(scene, int(value))
        case CommandKind.LR:
            now = scene.lr_of(scene.step + 1)
            factor = scene.past.lr.at(scene.step + 1)
            after = now / factor * value if factor else math.nan
            remark = f"from step {scene.step + 1:,} on"
            return _plain(
                scene, kind, value, lr_before=now, lr=after, instead_of=factor, remark=remark
            )
        case CommandKind.SHRINK_EMBEDDING:
            setting = scene.past.alpha.at(scene.step + 1)
            before = scene.effects(scene.step + 1).embed_alpha
            after = before / setting * value if setting else math.nan
            remark = f"from step {scene.step + 1:,} on"
            return _plain(scene, kind, value, alpha=after, instead_of=setting, remark=remark)
        case CommandKind.MODE:
            remark = f"{list(Mode)[int(value)].value} instead of {scene.mode.value}"
            return _plain(
                scene, kind, value, instead_of=float(list(Mode).index(scene.mode)), remark=remark
            )
        case CommandKind.ANSWER:
            return _answer(scene, command)
        case CommandKind.STOP:
            return _plain(
                scene,
                kind,
                value,
                remark=f"saves after step {scene.step:,} and ends; a resume goes on there",
            )
        case CommandKind.PAUSE if scene.phase is Phase.PAUSED:
            return _plain(scene, kind, value, possible=False, refusal="training is paused already")
        case CommandKind.RESUME if scene.question:
            return _plain(scene, kind, value, possible=False, refusal=how_to_answer(scene.question))
        case CommandKind.RESUME if scene.phase is not Phase.PAUSED:
            return _plain(scene, kind, value, possible=False, refusal="training is not paused")
        case CommandKind.CHECKPOINT:
            return _plain(scene, kind, value, remark=f"writes the state after step {scene.step:,}")
        case CommandKind.ACCEPT:
            return _accept(scene, value)
    return _plain(scene, kind, value)


def _accept(scene: RunState, value: float) -> Preview:
    one = scene.unresolved
    refusal = not_acceptable(one, asking=scene.end > 0)
    if one is None or refusal:
        return _plain(scene, CommandKind.ACCEPT, value, possible=False, refusal=refusal)
    what = f"incident {one.incident} ({one.sentence()}) is accepted as it is, nothing is restored"
    after = f"states after step {scene.step:,} may become good again, and then older good ones are pruned"
    return _plain(scene, CommandKind.ACCEPT, value, remark=f"{what}; {after}")


def not_acceptable(one: Unresolved | None, *, asking: bool) -> str:
    """Why the run cannot be accepted as it is, as the end of a sentence; "" where it can.

    Args:
        one: the earliest incident that is not over.
        asking: the guard waits for an answer.
    """
    if asking:
        return "the guard has a question open: answer that"
    if one is None:
        return "there is no incident that is not over"
    if one.is_open and not one.let_pass:
        return (
            f"incident {one.incident} is still open, and no update was applied that was found bad"
        )
    return ""


def _answer(scene: RunState, command: Command) -> Preview:
    """What an answer would do: to the question that it names, else to the one that is open."""
    answers, value = asked(scene), command.value
    refusal = "" if int(value) < len(answers) else "no question is open"
    if command.question:
        refusal = question_changed(command.question, Open(scene.question, {})) or refusal
    if refusal:
        return _plain(scene, command.kind, value, possible=False, refusal=refusal)
    return structs.replace(
        answers[int(value)], value=value, question=scene.question, timeline=scene.timeline
    )


def asked(scene: RunState) -> list[Preview]:
    """What the answers to the open question would do, as the guard has journaled it; [] without a
    question.
    """
    paused = open_question(scene.events)
    raw = paused.data.get("proposals") if paused is not None else None
    found = []
    for one in raw if isinstance(raw, list) else []:
        try:
            given = {
                "command": one["action"],
                **{name: one[name] for name in one if name in Preview.__struct_fields__},
            }
            found.append(msgspec.convert(given, Preview, strict=False))
        except (msgspec.ValidationError, TypeError, KeyError):
            return []  # of another version: better no answer than another's
    return found


def rollback_for(
    scene: RunState,
    window: tuple[int, int],
    *,
    positions: Sequence[int] = (),
    before_step: int | None = None,
    remedies: Sequence[Remedy] = (),
    settled: Callable[[int], bool] = lambda step: False,
) -> Preview:
    """What the guard's own rollback would do, which leaves out `window`, or `positions` of it,
    whatever state it finds.

    Args:
        before_step: the state is older than that step, where there is one such.
        remedies: that go with it.
        settled: candidates that will do as well as a good state; see `Controller.is_settled`.
    """
    target = _newest(scene.states, window[0], before=before_step, settled=settled)
    after = _went_back(
        scene, target, remedies=[*scene.past.remedies, *((None, remedy) for remedy in remedies)]
    )
    went = _back_to(
        scene, target, window, after, positions=positions, cause="from before the trouble"
    )
    return structs.replace(went, remark="; ".join(map(sentence, remedies)))


def choices(
    scene: RunState,
    verdict: Verdict,
    *,
    first: int,
    last: int,
    settled: Callable[[int], bool] = lambda step: False,
) -> list[Preview]:
    """What the three answers to the guard's question would do: as proposed, go on, stop.

    Args:
        first, last: positions of the batch under question.
        settled: as `rollback_for` takes it.
    """
    would = verdict.would.value if verdict.would is not None else ""
    if would == CommandKind.ROLLBACK and verdict.window is not None:
        proposed = _rollback_of(scene, verdict, verdict.window, settled)
    else:
        proposed = _named(
            scene, would, remark=f"saves after step {scene.step:,} and ends with exit code 3"
        )
    if verdict.beyond is not None:
        return [
            proposed,
            _allowed(scene, verdict, first=first, last=last, settled=settled),
            _stop(scene),
        ]
    finite = all(math.isfinite(finding.value) for finding in verdict.findings)
    applied = f"the update of step {verdict.step:,} is applied, and what it showed is taken as the new normal"
    left = f"an update that is not finite is left out all the same, with positions {first:,} to {last - 1:,}"
    going_on = _named(
        scene, "go on", remark=applied if finite else left, samples=0 if finite else last - first
    )
    return [proposed, going_on, _stop(scene)]


def _rollback_of(
    scene: RunState, verdict: Verdict, window: tuple[int, int], settled: Callable[[int], bool]
) -> Preview:
    """What the rollback that a verdict names would do; `window` is the verdict's own."""
    return rollback_for(
        scene,
        window,
        positions=verdict.positions,
        before_step=verdict.before_step,
        remedies=verdict.remedies,
        settled=settled,
    )


def _stop(scene: RunState) -> Preview:
    return _named(
        scene, "stop", remark=f"saves after step {scene.step:,} and ends; a resume asks again"
    )


def _allowed(
    scene: RunState, verdict: Verdict, *, first: int, last: int, settled: Callable[[int], bool]
) -> Preview:
    """What the guard would do if a user lets it leave out more than its share."""
    more = "guard.max_skipped_share is counted anew from there"
    if verdict.beyond is Action.ROLLBACK and verdict.window is not None:
        went = _rollback_of(scene, verdict, verdict.window, settled)
        return structs.replace(
            went, command="go on", remark="; ".join(filter(None, (went.remark, more)))
        )
    return _named(scene, "go on", samples=scene.fresh(range(first, last)), remark=more)


def undo(scene: RunState, undoing: UndoPlan | str) -> Preview:
    """What taking a decision back would do, or why it cannot be taken back."""
    if isinstance(undoing, str):
        return _plain(scene, CommandKind.UNDO, math.nan, possible=False, refusal=undoing)
    target = (
        _newest(scene.states, undoing.first, candidates=True) if undoing.first is not None else None
    )
    if target is None:
        refusal = f"no snapshot or checkpoint from before journal line {undoing.of} is left"
        return _plain(scene, CommandKind.UNDO, float(undoing.of), possible=False, refusal=refusal)
    gone = [*undoing.spans, *undoing.rollbacks]
    standing = [
        (decision, remedy) for decision, remedy in scene.past.remedies if decision not in gone
    ]
    after = _went_back(scene, target, remedies=standing)
    went = _back_to(scene, target, None, after, command=CommandKind.UNDO, value=float(undoing.of))
    window = (
        (min(s.first for s in undoing.spans), max(s.last for s in undoing.spans))
        if undoing.spans
        else None
    )
    remark = f'undone is "{clean_text(undoing.message, 200)}"'
    return structs.replace(went, window=window, returned=undoing.positions, remark=remark)


def _newest(
    states: Sequence[SnapshotInfo],
    cursor: int,
    to_step: int | None = None,
    *,
    before: int | None = None,
    candidates: bool = False,
    settled: Callable[[int], bool] = lambda step: False,
) -> SnapshotInfo | None:
    """As the guard chooses (Tiers.target): good ones of the ring, good ones on disk, then
    candidates likewise; older than step `before`, or else whatever there is. A candidate that is
    `settled` counts as good."""
    for wanted in (("good", "candidate"),) if candidates else (("good",), ("good", "candidate")):
        for tier in ("memory", "disk"):
            fit = [
                info
                for info in states
                if info.tier == tier
                and (info.state in wanted or (info.state == "candidate" and settled(info.step)))
                and info.cursor <= cursor
                and (to_step is None or info.step == to_step)
                and (before is None or info.step < before)
            ]
            if fit:
                return max(fit, key=lambda info: (info.step, info.timeline))
    return _newest(states, cursor, to_step, candidates=candidates) if before is not None else None


def _went_back(
    scene: RunState,
    target: SnapshotInfo | None,
    *,
    remedies: Iterable[tuple[Span | int | None, Remedy]] | None = None,
) -> RunHistory:
    """The rates that hold once the run has gone back: what was set by hand later holds from there
    on.
    """
    past = scene.past
    after = RunHistory(lr=copy.deepcopy(past.lr), alpha=copy.deepcopy(past.alpha))
    after.remedies = list(past.remedies if remedies is None else remedies)
    if target is not None:
        after.lr.rewind(target.step)
        after.alpha.rewind(target.step)
    return after


def _roll_back(scene: RunState, to_step: int | None) -> Preview:
    target = _newest(scene.states, scene.cursor - 1, to_step)
    where = f"of step {to_step:,}" if to_step is not None else "of an earlier step"
    window = (target.cursor, max(scene.cursor, scene.end)) if target is not None else None
    value = math.nan if to_step is None else float(to_step)
    if window is not None and (refusal := scene.nothing_left(window)):
        return _plain(scene, CommandKind.ROLLBACK, value, possible=False, refusal=refusal)
    return _back_to(scene, target, window, _went_back(scene, target), value=value, cause=where)


def _back_to(
    scene: RunState,
    target: SnapshotInfo | None,
    window: tuple[int, int] | None,
    after: RunHistory,
    *,
    command: CommandKind = CommandKind.ROLLBACK,
    value: float = math.nan,
    positions: Sequence[int] = (),
    cause: str = "",
) -> Preview:
    if target is None:
        return _plain(
            scene,
            command,
            value,
            possible=False,
            refusal=f"there is no snapshot or valid checkpoint {cause}",
        )
    return _plain(
        scene,
        command,
        value,
        to_step=target.step,
        tier=target.tier,
        state=target.state,
        path=target.path,
        steps_lost=scene.step - target.step,
        steps_lost_most=scene.step - target.step + scene.steps_in(SPARE_SECONDS),
        seconds_lost=scene.seconds_since(target.step),
        window=window,
        samples=scene.fresh(positions or range(*window)) if window else 0,
        lr=scene.lr_of(target.step + 1, after),
        alpha=scene.effects(target.step + 1, after).embed_alpha,
    )


def _skip(scene: RunState, batches: int) -> Preview:
    if scene.ledger is None or not scene.rows:
        return _plain(
            scene,
            CommandKind.SKIP,
            batches,
            remark=f"the next {format_plural(batches, 'batch')} {'is' if batches == 1 else 'are'} left out",
        )
    last = scene.rows[-1]
    ledger = scene.ledger
    size = len(_usable(ledger, last.first, last.last))
    end, left = scene.cursor, batches * max(1, size)
    while left > 0 and end < scene.cursor + 64 * batches * max(1, size):
        end += left
        left = batches * max(1, size) - len(_usable(ledger, scene.cursor, end))
    first = next(iter(_usable(ledger, scene.cursor, end)), scene.cursor)
    if refusal := scene.nothing_left((first, end)):
        return _plain(scene, CommandKind.SKIP, batches, possible=False, refusal=refusal)
    return _plain(
        scene,
        CommandKind.SKIP,
        batches,
        window=(first, end),
        samples=scene.fresh(range(first, end)),
    )


def _usable(ledger: SampleCursor, first: int, last: int) -> list[int]:
    """The positions of [first, last) that are not quarantined."""
    order = ledger.order
    held = ledger.quarantine.held(first, order.samples(first, last), order)
    return [position for position, out in enumerate(held, first) if not out]


def _plain(scene: RunState, command: CommandKind, value: float, **fields: Any) -> Preview:
    return _named(scene, command.value, value=float(value), **fields)


def _named(scene: RunState, command: str, **fields: Any) -> Preview:
    alpha = scene.effects(scene.step + 1).embed_alpha
    now = {"lr_before": scene.lr_of(scene.step + 1), "alpha_before": alpha}
    where = {"step": scene.step, "timeline": scene.timeline, "question": scene.question}
    return Preview(**{"command": command, **where, **now, **fields})
