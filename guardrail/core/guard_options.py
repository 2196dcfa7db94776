"""[guard]: what the guard detects, and what it does."""

from __future__ import annotations

import typing
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from guardrail.core.late_imports import list_effects, list_remedies, make_detector_sections
from guardrail.core.records.verdicts import Mode, Remedy
from guardrail.core.section import (
    Fraction,
    Natural,
    NonNegativeFloat,
    Positive,
    Section,
)

if typing.TYPE_CHECKING:

    class DetectorSections(Section, frozen=True, kw_only=True):
        """[guard.detectors]: a table for each type of detector settings."""

        def __getattr__(self, name: str) -> Any: ...

    RemedyName = str
else:
    DetectorSections = make_detector_sections()
    RemedyName = typing.Literal[list_remedies()]


class EscalationStep(Section, frozen=True, kw_only=True):
    """[[guard.escalation]]: one remedy for an instability. Remedies are tried in their order."""

    RENAMED: ClassVar = {
        "do": "action",
        "times": "max_uses",
        "hold": "hold_steps",
        "back": "ramp_steps",
    }

    # The remedy. skip: skip up to `rollback_after_rejections` - 1 consecutive updates before
    # anything else. rollback: restore the last good state and skip the window. widen: skip twice as
    # much, then four times. older: restore a state at least `steps` older. lower_lr,
    # shrink_embedding, tighten_clip: restore, and multiply by `factor`. reset_moments: restore with
    # the optimizer's moments at zero, and the learning rate times `factor`. pause: pause and ask,
    # whether or not a screen is open. halt: save and end with exit code 3.
    action: RemedyName
    # Uses before the next remedy, among consecutive rollbacks (see `reset_budget_after`). Each use
    # is twice as strong: a window twice as long, or the factor squared for twice as many steps.
    max_uses: Positive = 1
    # The factor, the steps for which it holds, and the steps over which it then returns to 1.
    factor: Annotated[float, Meta(gt=0, le=1)] = 0.5
    hold_steps: Natural = 100
    ramp_steps: Natural = 200
    # older: the restored state is at least this many steps older.
    steps: Positive = 50
    # The remedy is not used again within this many applied steps.
    cooldown: Natural = 0


EFFECTS = list_effects()  # kinds of guard.remedies

ESCALATION = (
    EscalationStep(action="skip"),
    EscalationStep(action="rollback"),
    EscalationStep(action="widen", max_uses=2),
    EscalationStep(action="older"),
    EscalationStep(action="shrink_embedding"),
    # Strong and short: 0.1 for 20 steps with a ramp of 40 costs the progress of 36 steps. 0.5 for
    # 100 steps with a ramp of 200 costs that of 100, and helps in fewer cases.
    EscalationStep(action="lower_lr", max_uses=3, factor=0.1, hold_steps=20, ramp_steps=40),
    EscalationStep(action="tighten_clip"),
    EscalationStep(action="reset_moments", factor=0.1, hold_steps=20, ramp_steps=100),
)


class ShrinkEmbedding(Section, frozen=True, kw_only=True):
    """[guard.shrink_embedding]: smaller embedding gradients in an incident that begins in the
    embedding (GLM-130B).
    """

    # The embedding gradients are multiplied by this factor. 1: never. GLM-130B used 0.1. With Adam
    # the factor has an effect only while it changes (tests/bench/alpha.py).
    factor: Annotated[float, Meta(gt=0, le=1)] = 0.5
    # Several shrinks multiply. Their product never falls below this.
    floor: Annotated[float, Meta(gt=0, le=1)] = 0.1
    # Steps for which the factor holds, and steps over which it then returns to 1.
    hold_steps: Natural = 100
    ramp_steps: Natural = 200


class GuardOptions(Section, frozen=True, kw_only=True):
    """[guard]: what the guard detects, and what it does."""

    RENAMED: ClassVar = {
        "persist": "rollback_after_rejections",
        "skips": "max_data_skips",
        "rollbacks": "max_rollbacks",
        "retries": "max_retries",
        "overflows": "rollback_after_overflows",
        "confirm": "steps_until_good",
        "healthy_after": "reset_budget_after",
        "pardon": "allowlist",
        "shift": "new_data",
        "gate": "decide",
        "layers": "log_block_norms",
        "update_norm": "log_update_norm",
        "signals": "extra_signals",
        "ask_seconds": "answer_timeout",
        "ask_default": "answer_default",
        "window_before": "skip_before",
        "window_after": "skip_after",
        "window_max": "max_window",
        "ladder": "escalation",
        "embed_factor": "shrink_embedding.factor",
        "embed_floor": "shrink_embedding.floor",
        "embed_hold": "shrink_embedding.hold_steps",
        "embed_back": "shrink_embedding.ramp_steps",
        "window": "detectors.spike.history",
        "warmup": "detectors.spike.min_history",
        "loss_score": "detectors.spike.loss_threshold",
        "grad_score": "detectors.spike.grad_threshold",
        "embed_score": "detectors.spike.embed_threshold",
        "divergence_score": "detectors.divergence.threshold",
        "divergence_steps": "detectors.divergence.steps",
    }
    RENAMED_VALUES: ClassVar = {
        "new_data": {"learn": "accept", "leave_out": "skip"},
        "decide": {"sync": "before_step", "lagged": "deferred"},
        "answer_default": {"proposed": "proposal", "go_on": "continue"},
    }

    # "auto" acts by itself. "ask" pauses and asks before a rollback. "advise" only reports what it
    # would do. "off" detects nothing.
    mode: Mode = Mode.AUTO
    # Largest share of the data that the guard skips by itself. The data are the distinct samples
    # that the run reads until its end: the corpus, or what `train.steps` need if that is less. A
    # skip or rollback beyond this share is not carried out. In mode "ask", or while a screen is
    # open, the run asks; else it saves and halts (exit code 3). Samples that a user or a list skips
    # do not count. 0: skip nothing. 1: no limit, but some data must be left.
    max_skipped_share: Fraction = 0.03
    # What kind of number the loss is. "positive": a cross-entropy; 0 is impossible, and ratios have
    # a meaning. "signed": a policy loss of reinforcement learning; only NaN, Inf and values a
    # thousand times as large as usual are rejected. "auto": signed if a reward, an advantage, a KL
    # divergence or a probability ratio is among the signals, or if more than 2 of the first 20
    # losses are 0 or negative.
    loss: typing.Literal["auto", "positive", "signed"] = "auto"
    # A rollback follows this many consecutive rejections. Fewer rejections are skipped one by one.
    rollback_after_rejections: Positive = 3
    # Limit of consecutive rejections whose cause is the data, as the cause test shows. They need no
    # rollback, since no such update was applied. Beyond the limit the run asks or halts. The cause
    # test is repeated at `rollback_after_rejections`, twice that, and so on.
    max_data_skips: Positive = 64
    # What to do when the cause is the data and the batches up to four times `max_data_skips` ahead
    # show the same anomaly: then it is not a bad range of data but new data. "accept": apply it as
    # a new level. "skip": skip it like any bad data.
    new_data: typing.Literal["accept", "skip"] = "accept"
    # Batches that a rollback also skips, before the onset and after the last bad batch (PaLM: 100,
    # and 200 to 400).
    skip_before: Natural = 1
    skip_after: Natural = 0
    # Limit of consecutive rollbacks; beyond it the run halts or asks. The count starts again after
    # `reset_budget_after` applied healthy steps.
    max_rollbacks: Natural = 5
    reset_budget_after: Positive = 200
    # The remedies, mildest first. Remedies that do not fit the cause are not used: if the state is
    # the cause, no data is skipped; if the data is the cause, it is skipped first. The run halts
    # when the last remedy has not helped.
    escalation: tuple[EscalationStep, ...] = ESCALATION
    # Largest number of batches in a widened window.
    max_window: Positive = 512
    # Smaller embedding gradients in an incident that begins in the embedding.
    shrink_embedding: ShrinkEmbedding = ShrinkEmbedding()
    # Thresholds and histories of the detectors.
    detectors: DetectorSections = DetectorSections()
    # Remedies of another run, as its journal lists them. They apply from the first step, to
    # reproduce that run.
    remedies: tuple[Remedy, ...] = ()
    # fp16: a rollback follows this many consecutive overflows. Fewer are the search for a loss
    # scale (8 overflows divide it by 256). Before `detectors.spike.min_history` accepted steps at
    # least 16 are needed.
    rollback_after_overflows: Positive = 8
    # At the first rejected step of an incident, run a few batches again to find whether the data,
    # the model's state or the hardware is the cause. Needs a loop that can run a batch again
    # (`LoopHooks.replay`), as the built-in trainer does.
    cause_test: bool = True
    # Limit of batches that are repeated because the hardware gave other numbers the second time.
    # The count starts again after `reset_budget_after` applied steps. Beyond it the run halts.
    max_retries: Natural = 8
    # Names of further numbers that the loop gives to `step.finish(..., signals={NAME: value})`.
    # They are reduced over the ranks and recorded. A spike in one is a note. A name may be absent
    # from a step.
    extra_signals: tuple[str, ...] = ()
    # "before_step": the host reads a step's numbers before its update is applied. "deferred": the
    # device decides by thresholds that it was given, and the host reads the numbers one step later.
    # A healthy step then waits for nothing, and the results are the same. "deferred" needs fused
    # Adam or AdamW, and fp32 or bf16.
    decide: typing.Literal["before_step", "deferred"] = "before_step"
    # Record the gradient norm of each block of the model: "grad_norm/layers.3" shows where a spike
    # began.
    log_block_norms: bool = False
    # Record the exact L2 norm of each update. Costs a copy of the parameters and some time.
    log_update_norm: bool = False
    # A snapshot or checkpoint counts as good after this many applied healthy steps.
    steps_until_good: Natural = 8
    # Ranges [first, last) of positions of the sample order that are known to be unusual. Findings
    # on their batches are only logged and the updates are applied; NaN and Inf are still rejected.
    # `guardrail ctl RUN undo` adds the batches that were rejected.
    allowlist: tuple[tuple[Natural, Natural], ...] = ()
    # Seconds that mode "ask" and the remedy "pause" wait for an answer before `answer_default` is
    # taken. 0: no limit.
    answer_timeout: NonNegativeFloat = 0.0
    # What to do without an answer: carry out the proposal, continue with the update, or stop.
    answer_default: typing.Literal["proposal", "continue", "stop"] = "proposal"
