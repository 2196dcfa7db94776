"""TOML -> typed settings; a configuration that cannot run is refused before any process starts.

`[launch] trainer` names the package whose `config` module holds the complete schema (a subclass of
`GuardConfig`), so guardrail reads the sections of a trainer without importing it at module level.
"""

from __future__ import annotations

import copy
import datetime
import importlib
import os
import re
import tomllib
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta

from guardrail.core import secret
from guardrail.core.errors import ConfigError, may_be_secret
from guardrail.core.files import open_file
from guardrail.core.records import METRIC_COLUMNS, UPDATE_NORM, Mode, Remedy
from guardrail.core.renamed_keys import Renamed, present_key, rename_keys
from guardrail.core.schema import MAX_DEPTH, as_tree, refuse_deep, typed
from guardrail.core.secret import SecretRef
from guardrail.core.text import MASK

Positive = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
PositiveFloat = Annotated[float, Meta(gt=0)]
NonNegativeFloat = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]


MAX_FILE_BYTES = 4 << 20  # of a configuration; a complete one has 5 KiB


class Section(Renamed, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """Base of every section: unknown keys are errors, values never change after loading."""


class RunSection(Section, frozen=True, kw_only=True):
    """[run]: what the run is called and where it lives."""

    # Name of the run; the run directory is ROOT/NAME/DATE-NN.
    name: str = "run"
    # Folder of all runs, relative to the working directory.
    root: str = "runs"


class LaunchSection(Section, frozen=True, kw_only=True):
    """[launch]: the processes. Passed to torch elastic, which starts them."""

    RENAMED: ClassVar = {
        f"{wait}_seconds": f"{wait}_timeout"
        for wait in ("node", "setup", "step", "eval", "save", "stop", "collective")
    }

    # Processes on this node; each is one rank with one device.
    processes: Positive = 1
    # "auto" takes CUDA where it is, else the CPU.
    device: typing.Literal["auto", "cpu", "cuda"] = "auto"
    # Package that trains: TRAINER.config holds the schema, `python -m TRAINER` is one rank.
    trainer: str = "trainer"
    # Nodes that take part, and their rendezvous, as torchrun names them.
    nodes: Positive = 1
    node_rank: Natural = 0
    rendezvous_backend: typing.Literal["static", "c10d"] = "c10d"
    rendezvous_endpoint: str = ""
    rendezvous_id: str = ""
    # Seconds to wait for the other nodes, at the start and when one was lost: it may come back
    # until then.
    node_timeout: PositiveFloat = 600.0
    # Times the ranks are started again after a failure before the run ends with exit code 4.
    max_restarts: Natural = 3
    # Seconds without progress after which a rank counts as hung, per phase. One whose process is
    # stopped (SIGSTOP), while the others wait, counts after 30 seconds.
    setup_timeout: PositiveFloat = 1800.0
    step_timeout: PositiveFloat = 600.0
    eval_timeout: PositiveFloat = 1800.0
    save_timeout: PositiveFloat = 1800.0
    # Seconds that a stop may take to save before the ranks are killed.
    stop_timeout: PositiveFloat = 300.0
    # Seconds after which a collective that waits for another rank gives up.
    collective_timeout: PositiveFloat = 600.0
    # Intra-op threads of a CPU rank; 0: OMP_NUM_THREADS where that is set, else cores / processes.
    threads: Natural = 0


class EscalationStep(Section, frozen=True, kw_only=True):
    """[[guard.escalation]]: one remedy for an instability. Remedies are tried in their order."""

    RENAMED: ClassVar = {
        "do": "action",
        "times": "max_uses",
        "hold": "hold_steps",
        "back": "ramp_steps",
    }

    # skip: skip up to `rollback_after_rejections` - 1 consecutive updates before anything else.
    # rollback: restore the last good state and skip the window. widen: skip twice as much, then four
    # times. older: restore a state at least `steps` older. lower_lr, shrink_embedding, tighten_clip:
    # restore, and multiply by `factor`. reset_moments: restore with the optimizer's moments at zero,
    # and the learning rate times `factor`. pause: pause and ask, whether or not a screen is open.
    # halt: save and end with exit code 3.
    action: typing.Literal[
        "skip",
        "rollback",
        "widen",
        "older",
        "lower_lr",
        "shrink_embedding",
        "tighten_clip",
        "reset_moments",
        "pause",
        "halt",
    ]
    # Uses before the next remedy, among consecutive rollbacks (see `reset_budget_after`). Each use is
    # twice as strong: a window twice as long, or the factor squared for twice as many steps.
    max_uses: Positive = 1
    # The factor, the steps for which it holds, and the steps over which it then returns to 1.
    factor: Annotated[float, Meta(gt=0, le=1)] = 0.5
    hold_steps: Natural = 100
    ramp_steps: Natural = 200
    # older: the restored state is at least this many steps older.
    steps: Positive = 50
    # The remedy is not used again within this many applied steps.
    cooldown: Natural = 0


REMEDIES = ("lr", "embed_alpha", "clip", "moments")  # kinds of guard.remedies

ESCALATION = (
    EscalationStep(action="skip"),
    EscalationStep(action="rollback"),
    EscalationStep(action="widen", max_uses=2),
    EscalationStep(action="older"),
    EscalationStep(action="shrink_embedding"),
    # Strong and short: 0.1 for 20 steps and back over 40 costs 36 steps' worth of progress, 0.5 for
    # 100 and back over 200 costs 100, and helps against less.
    EscalationStep(action="lower_lr", max_uses=3, factor=0.1, hold_steps=20, ramp_steps=40),
    EscalationStep(action="tighten_clip"),
    EscalationStep(action="reset_moments", factor=0.1, hold_steps=20, ramp_steps=100),
)


class ShrinkEmbedding(Section, frozen=True, kw_only=True):
    """[guard.shrink_embedding]: smaller embedding gradients where the embedding leads an incident
    (GLM-130B).
    """

    # The embedding gradients are multiplied by this; 1: never. GLM-130B used 0.1. Under Adam it
    # matters while it changes; see tests/bench/alpha.py.
    factor: Annotated[float, Meta(gt=0, le=1)] = 0.5
    # Several shrinks multiply. Their product never falls below this.
    floor: Annotated[float, Meta(gt=0, le=1)] = 0.1
    # Steps for which the factor holds, and steps over which it then returns to 1.
    hold_steps: Natural = 100
    ramp_steps: Natural = 200


class GuardOptions(Section, frozen=True, kw_only=True):
    """[guard]: what is watched, and what is done about it."""

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
    }
    RENAMED_VALUES: ClassVar = {
        "new_data": {"learn": "accept", "leave_out": "skip"},
        "decide": {"sync": "before_step", "lagged": "deferred"},
        "answer_default": {"proposed": "proposal", "go_on": "continue"},
    }

    # "auto" acts by itself. "ask" pauses and asks before a rollback. "advise" only reports what it
    # would do. "off" detects nothing.
    mode: Mode = Mode.AUTO
    # Accepted steps that a detector's baseline covers.
    window: Annotated[int, Meta(ge=16)] = 128
    # Accepted steps before a spike detector trusts its scale. Until then only larger jumps count.
    # Non-finite values are rejected from the first step.
    warmup: Annotated[int, Meta(ge=8)] = 32
    # A step is rejected above this score: the distance of the logarithm from the baseline, in robust
    # standard deviations (median, MAD).
    loss_score: PositiveFloat = 8.0
    grad_score: PositiveFloat = 10.0
    embed_score: PositiveFloat = 10.0
    # Largest share of the data that the guard skips by itself. The data are the distinct samples
    # that the run reads until its end: the corpus, or what `train.steps` need if that is less. A skip
    # or rollback beyond this share is not carried out. In mode "ask", or while a screen is open, the
    # run asks; else it saves and halts (exit code 3). Samples that a user or a list skips do not
    # count. 0: skip nothing. 1: no limit, but some data must be left.
    max_skipped_share: Fraction = 0.03
    # What kind of number the loss is. "positive": a cross-entropy; 0 is impossible, and ratios have a
    # meaning. "signed": a policy loss of reinforcement learning; only NaN, Inf and values a thousand
    # times as large as usual are rejected. "auto": signed if a reward, an advantage, a KL divergence
    # or a probability ratio is among the signals, or if more than 2 of the first 20 losses are 0 or
    # negative.
    loss: typing.Literal["auto", "positive", "signed"] = "auto"
    # A rollback follows this many consecutive rejections. Fewer rejections are skipped one by one.
    rollback_after_rejections: Positive = 3
    # Limit of consecutive rejections whose cause is the data, as the cause test shows. They need no
    # rollback, since no such update was applied. Beyond the limit the run asks or halts. The cause
    # test is repeated at `rollback_after_rejections`, twice that, and so on.
    max_data_skips: Positive = 64
    # What to do when the cause is the data and the batches up to four times `max_data_skips` ahead
    # show the same anomaly: then it is not a bad range of data but new data. "accept": apply it as a
    # new level. "skip": skip it like any bad data.
    new_data: typing.Literal["accept", "skip"] = "accept"
    # Divergence: the median of this many accepted losses is this many robust standard deviations
    # above the lowest such median of the window. A sudden rise is found after half of these steps.
    divergence_score: PositiveFloat = 6.0
    divergence_steps: Positive = 20
    # Batches that a rollback also skips, before the onset and after the last bad batch (PaLM: 100,
    # and 200 to 400).
    skip_before: Natural = 1
    skip_after: Natural = 0
    # Limit of consecutive rollbacks; beyond it the run halts or asks. The count starts again after
    # `reset_budget_after` applied healthy steps.
    max_rollbacks: Natural = 5
    reset_budget_after: Positive = 200
    # The remedies, mildest first. Remedies that do not fit the cause are left out: if the state is
    # the cause no data is skipped; if the data is the cause it is skipped first. The run halts when
    # the last remedy has not helped.
    escalation: tuple[EscalationStep, ...] = ESCALATION
    # Batches that a widened window holds at most.
    max_window: Positive = 512
    # What is done where the embedding leads an incident.
    shrink_embedding: ShrinkEmbedding = ShrinkEmbedding()
    # Remedies that hold from the first step, as the journal of another run states them. They make
    # that run reproducible.
    remedies: tuple[Remedy, ...] = ()
    # fp16: a rollback follows this many consecutive overflows. Fewer are the search for a loss scale
    # (8 overflows divide it by 256). Before `warmup` accepted steps at least 16 are needed.
    rollback_after_overflows: Positive = 8
    # At the first rejected step of an incident, run a few batches again to find whether the data, the
    # model's state or the hardware is the cause. Needs a loop that can run a batch again
    # (`LoopHooks.replay`), as the built-in trainer does.
    cause_test: bool = True
    # Limit of batches that are repeated because the hardware gave other numbers the second time. The
    # count starts again after `reset_budget_after` applied steps. Beyond it the run halts.
    max_retries: Natural = 8
    # Names of further numbers that the loop gives to `step.finish(..., signals={NAME: value})`. They
    # are reduced over the ranks and recorded. A spike in one is a note. A name may be absent from a
    # step.
    extra_signals: tuple[str, ...] = ()
    # "before_step": the host reads a step's numbers before its update is applied. "deferred": the
    # device decides by thresholds that it was given, and the host reads the numbers one step later.
    # A healthy step then waits for nothing, and the results are the same. "deferred" needs fused Adam
    # or AdamW, and fp32 or bf16.
    decide: typing.Literal["before_step", "deferred"] = "before_step"
    # Record the gradient norm of each block of the model: "grad_norm/layers.3" shows where a spike
    # began.
    log_block_norms: bool = False
    # Record the L2 norm of each update, exactly. Costs a copy of the parameters and some time.
    log_update_norm: bool = False
    # A snapshot or checkpoint counts as good after this many applied healthy steps.
    steps_until_good: Natural = 8
    # Ranges [first, last) of positions of the sample order that are known to be unusual. Findings on
    # their batches are only logged and the updates are applied; NaN and Inf are still rejected.
    # `guardrail ctl RUN undo` adds the batches that were rejected.
    allowlist: tuple[tuple[Natural, Natural], ...] = ()
    # Seconds that mode "ask" and the remedy "pause" wait for an answer before `answer_default` is
    # taken. 0: no limit.
    answer_timeout: NonNegativeFloat = 0.0
    # Without an answer: carry out the proposal, continue with the update, or stop.
    answer_default: typing.Literal["proposal", "continue", "stop"] = "proposal"


class SnapshotSection(Section, frozen=True, kw_only=True):
    """[snapshots]: the ring in host memory."""

    # Steps between two snapshots.
    every: Positive = 10
    # Snapshots kept by each rank, each as large as its parameters and optimizer state; at least 2,
    # since the last good one must outlive the next. 0: no ring, for a machine without that memory.
    # A rollback then goes to a checkpoint, the cause test, without an older state, does not tell
    # data from data x state (a row of rejections calls for a rollback), and only a save holds a
    # copy, until it is written. With a disk so slow that a checkpoint is still being written when
    # its snapshot leaves the ring, up to two copies more are held.
    keep: Natural = 4


class CheckpointSection(Section, frozen=True, kw_only=True):
    """[checkpoint]: the tier on disk."""

    # Steps between two checkpoints.
    every: Positive = 200
    # Good checkpoints kept, beside one older than the longest detection delay. One is not enough:
    # the last good one must outlive the writing of the next.
    keep: Annotated[int, Meta(ge=2)] = 3
    # Seconds between two tries of a save that failed.
    retry_seconds: PositiveFloat = 30.0


class TensorboardSection(Section, frozen=True, kw_only=True):
    """[tensorboard]: the same story as event files."""

    # Written by the supervisor from the run directory; the step does not wait for it.
    enabled: bool = True


class NotifySection(Section, frozen=True, kw_only=True):
    """[notify]: messages about the run, sent by the supervisor. Each way that is set is used; a
    failure never harms the run.

    `command`, `webhook` and `apprise` are secrets: { env = "NAME" } or { file = "PATH" } says where
    one stands. One that is written out is masked in the run's copy of the configuration, and a
    resume needs it again.
    """

    # A shell command, or a list of words: gets the event as JSON on its standard input, and
    # GUARDRAIL_EVENT, _TEXT, _MESSAGE, _NAME, _DIRECTORY, _HOST, _STEP and _SEQ in its environment.
    # The words of a list can be seen in the process list of the machine while it runs.
    command: str | tuple[str, ...] | SecretRef = ""
    # http:// or https:// address that the same JSON is posted to; its field "text" is what chat
    # services show.
    webhook: str | SecretRef = ""
    # Addresses as apprise writes them, such as "slack://..." (`pip install 'guardrail[notify]'`).
    apprise: tuple[str | SecretRef, ...] = ()
    # What is told: incidents and how they end, the guard's questions, a disk that fails, ranks that
    # fail, the end.
    on: tuple[
        typing.Literal[
            "incident",
            "recovered",
            "offset",
            "accepted",
            "recurred",
            "rollback",
            "undo",
            "paused",
            "degraded",
            "restored",
            "hung",
            "ranks_failed",
            "finished",
            "stopped",
            "halted",
            "failed",
        ],
        ...,
    ] = ("incident", "paused", "degraded", "hung", "ranks_failed", "finished", "halted", "failed")
    # Seconds that one way may take.
    seconds: PositiveFloat = 10.0

    def __repr__(self) -> str:
        return f"NotifySection({secret.masked({'notify': msgspec.to_builtins(self)})['notify']})"

    def check(self) -> None:
        """Refuse references that name nothing and addresses that are none. Raises ConfigError."""
        for name in ("command", "webhook"):
            if isinstance(value := getattr(self, name), SecretRef):
                value.check(f"notify.{name}")
        for index, address in enumerate(self.apprise):
            if isinstance(address, SecretRef):
                address.check(f"notify.apprise[{index}]")
        if isinstance(self.webhook, str) and self.webhook and not secret.is_masked(self.webhook):
            check_webhook(self.webhook)

    def resolved(self, *, base: Path) -> NotifySection:
        """With absolute paths of the files that hold secrets."""

        def absolute(value: Any) -> Any:
            if not isinstance(value, SecretRef) or not value.file:
                return value
            return SecretRef(file=str(base / os.path.expanduser(value.file)))

        return msgspec.structs.replace(
            self,
            command=absolute(self.command),
            webhook=absolute(self.webhook),
            apprise=tuple(map(absolute, self.apprise)),
        )


def check_webhook(address: str) -> None:
    """Refuse what is no address, without repeating it. Raises ConfigError."""
    if not re.fullmatch(r"https?://[^/\s]\S*", address) or not address.isascii():
        raise ConfigError(
            "an http:// or https:// address without spaces", key="notify.webhook", value=address
        )


class GuardConfig(Section, frozen=True, kw_only=True):
    """Base of a trainer's complete schema; `resolved`, `check` and `check_machine` may be extended
    there.
    """

    run: RunSection = RunSection()
    launch: LaunchSection = LaunchSection()
    guard: GuardOptions = GuardOptions()
    snapshots: SnapshotSection = SnapshotSection()
    checkpoint: CheckpointSection = CheckpointSection()
    tensorboard: TensorboardSection = TensorboardSection()
    notify: NotifySection = NotifySection()

    @classmethod
    def completed(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """A parsed file with the defaults that it asks for by name, such as a preset's. Raises
        ConfigError.
        """
        return tree

    def resolved(self, *, base: Path) -> GuardConfig:
        """A copy that means the same from any working directory: relative paths made absolute."""
        root = str(base / os.path.expanduser(self.run.root))
        run = msgspec.structs.replace(self.run, root=root)
        return msgspec.structs.replace(self, run=run, notify=self.notify.resolved(base=base))

    def check(self, *, base: Path) -> None:
        """Refuse impossible combinations. `base` resolves relative paths. Raises ConfigError."""
        guard, snapshots = self.guard, self.snapshots
        if guard.warmup > guard.window:
            raise ConfigError(
                f"at most guard.window ({guard.window})",
                key="guard.warmup",
                value=guard.warmup,
                hint="the warm-up fills the window",
            )
        if snapshots.keep == 1:
            raise ConfigError(
                "0, or 2 and more",
                key="snapshots.keep",
                value=1,
                hint="0: back to checkpoints alone",
            )
        reach = snapshots.every * (snapshots.keep - 1)
        if guard.mode is not Mode.OFF and snapshots.keep and guard.steps_until_good > reach:
            raise ConfigError(
                f"at most snapshots.every * (snapshots.keep - 1) = {reach}",
                key="guard.steps_until_good",
                value=guard.steps_until_good,
                hint="no snapshot would live long enough to be called good; raise snapshots.keep",
            )
        for name in guard.extra_signals:
            if (
                name in METRIC_COLUMNS
                or name == UPDATE_NORM
                or guard.extra_signals.count(name) > 1
                or not name.strip()
            ):
                raise ConfigError(
                    "names of their own, each once", key="guard.extra_signals", value=name
                )
        ends = [at for at, rung in enumerate(guard.escalation) if rung.action in ("pause", "halt")]
        if ends and ends[0] + 1 < len(guard.escalation):
            raise ConfigError(
                "the last rung",
                key=f"guard.escalation[{ends[0]}].action",
                value=guard.escalation[ends[0]].action,
                hint="no rung behind it would ever be taken",
            )
        if any(rung.action == "skip" for rung in guard.escalation[1:]):
            raise ConfigError(
                "skip on the first rung, or on none", key="guard.escalation", value=None
            )
        for first, last in guard.allowlist:
            if first >= last:
                raise ConfigError(
                    "stretches [first, last) that are not empty",
                    key="guard.allowlist",
                    value=[first, last],
                )
        _check_remedies(guard.remedies)
        if self.launch.node_rank >= self.launch.nodes:
            raise ConfigError(
                f"less than launch.nodes ({self.launch.nodes})",
                key="launch.node_rank",
                value=self.launch.node_rank,
                hint="nodes count from 0",
            )
        self.notify.check()
        if self.launch.nodes > 1 and not self.launch.rendezvous_endpoint:
            raise ConfigError(
                "HOST:PORT of the first node",
                key="launch.rendezvous_endpoint",
                value="",
                hint="launch.nodes is greater than 1",
            )

    def check_machine(self) -> None:
        """Refuse what the machine that launches cannot hold. Apart from `check`, so that a
        configuration for a large machine can be read on a small one. Raises ConfigError."""


def load(
    path: str | os.PathLike[str], *, overrides: Sequence[str] = (), of_run: bool = False
) -> GuardConfig:
    """Read, override, type and check a configuration.

    Args:
        path: the TOML file.
        overrides: "section.key=value" strings, the value as TOML (a bare word counts as a string).
        of_run: as for `parse`.

    Raises:
        ConfigError: names file, key, value, expectation and the nearest valid key.
    """
    file = Path(path)
    tree = parse(file, of_run=of_run)
    base = Path.cwd()
    return build(tree, file=str(path), overrides=overrides, base=base, notice=not of_run)


def load_config(path: str | os.PathLike[str], *, overrides: Sequence[str] = ()) -> GuardConfig:
    """Read, override, type and check a configuration of a custom loop or of a trainer.

    A file that holds sections of `GuardConfig` alone, and names no `launch.trainer`, is that of a
    custom loop. Any other one must be complete, as for `load`.

    Args:
        path: the TOML file.
        overrides: "section.key=value" strings, the value as TOML (a bare word counts as a string).

    Raises:
        ConfigError: names file, key, value, expectation and the nearest valid key.
    """
    tree = parse(Path(path))
    launch = tree.get("launch", {})
    names_trainer = isinstance(launch, dict) and "trainer" in launch
    sections = {*tree, *(text.partition(".")[0].strip() for text in overrides)}
    schema: type[GuardConfig] | None = None
    if not names_trainer and sections <= set(GuardConfig.__struct_fields__):
        schema = GuardConfig
    return build(tree, file=str(path), overrides=overrides, base=Path.cwd(), schema=schema)


def _check_remedies(remedies: Sequence[Remedy]) -> None:
    for index, remedy in enumerate(remedies):
        key = f"guard.remedies[{index}]"
        if remedy.kind not in REMEDIES:
            raise ConfigError(f"one of {', '.join(REMEDIES)}", key=f"{key}.kind", value=remedy.kind)
        if remedy.kind != "moments" and not 0 < remedy.value <= 1:
            raise ConfigError(
                "a factor above 0 and at most 1", key=f"{key}.value", value=remedy.value
            )
        for name, least in (("from_step", 1), ("hold", 0), ("back", 0)):
            if getattr(remedy, name) < least:
                raise ConfigError(
                    f"at least {least}", key=f"{key}.{name}", value=getattr(remedy, name)
                )


SettingsT = typing.TypeVar("SettingsT", bound="GuardConfig")


def checked(settings: SettingsT | Mapping[str, Any], schema: type[SettingsT]) -> SettingsT:
    """Settings built in Python, converted and checked as a TOML file would be: text becomes a Mode,
    ranges hold.

    Only the sections of `schema` itself are checked against one another: call `settings.check` for
    all of them.

    Args:
        settings: an instance of `schema`, or a dictionary of sections.

    Raises:
        ConfigError: names key, value and expectation.
    """
    if isinstance(settings, Section) and not isinstance(settings, schema):
        name = type(settings).__name__
        raise ConfigError(
            f"{schema.__name__}(...), or a dictionary of sections",
            key="settings",
            value=settings,
            hint=f"{schema.__name__}(guard=...) takes a {name}"
            if isinstance(settings, GuardOptions)
            else "",
        )
    result = typed(
        as_tree(settings), type(settings) if isinstance(settings, schema) else schema, file=""
    )
    GuardConfig.check(result, base=Path.cwd())
    return result


def checked_guard(section: GuardOptions) -> GuardOptions:
    """A [guard] section built in Python, converted and checked. Raises ConfigError."""
    return checked({"guard": section, "snapshots": {"keep": 0}}, GuardConfig).guard


def load_guard(
    path: str | os.PathLike[str] | None = None,
    *,
    overrides: Sequence[str] = (),
    of_run: bool = False,
) -> GuardOptions:
    """The [guard] section alone, for a run that is not started: other sections of the file need not
    fit this machine.

    Args:
        path: a complete configuration, or a file that holds nothing but [guard]; None: the
        defaults.
        overrides: "guard.key=value" strings.
        of_run: as for `parse`.

    Raises:
        ConfigError: as for `load`.
    """
    tree = {"guard": {}} if path is None else parse(Path(path), of_run=of_run)
    if "guard" not in tree:
        raise ConfigError(
            "a section [guard]", file=str(path), hint=f"it has {', '.join(tree) or 'none'}"
        )
    kept: dict[str, Any] = {name: tree[name] for name in ("guard", "snapshots") if name in tree}
    kept = rename_keys(kept, GuardConfig, file=str(path), notice=not of_run)
    for text in overrides:
        if not text.strip().startswith("guard."):
            shown = shown_override(text)
            raise ConfigError(
                "a key of [guard]", file="--set", value=shown, hint="e.g. --set guard.loss_score=6"
            )
        _override(kept, text, GuardConfig)
    file = "--set" if path is None else str(path)
    try:
        settings = typed(kept, GuardConfig, file=file)
        settings.check(base=Path.cwd())
    except ConfigError as error:
        raise error.at(source_of(error.key, file=file, overrides=overrides)) from error
    return settings.guard


def parse(file: Path, *, of_run: bool = False) -> dict[str, Any]:
    """A TOML file as a tree of plain values. Raises ConfigError.

    Args:
        of_run: the file belongs to a run directory and must be a regular file. Any other one may be
            a pipe, as in `guardrail launch <(make_config)`.
    """
    try:
        with open_file(file) if of_run else open(file, "rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
        text = content.decode("utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a name that no file can have
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"a readable TOML file ({reason})", file=str(file)) from error
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"a TOML file of at most {MAX_FILE_BYTES >> 20} MiB", file=str(file))
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ConfigError(
            "valid TOML (too many brackets within each other)", file=str(file)
        ) from error
    except ValueError as error:
        raise ConfigError(f"valid TOML ({_reason(error)})", file=str(file)) from error


def _reason(error: ValueError) -> str:
    """What tomllib says; of numbers with thousands of digits the interpreter speaks instead, of its
    own settings.
    """
    return (
        str(error)
        if isinstance(error, tomllib.TOMLDecodeError)
        else "a number with too many digits"
    )


def build(
    tree: dict[str, Any],
    *,
    file: str,
    overrides: Sequence[str] = (),
    base: Path,
    notice: bool = True,
    schema: type[GuardConfig] | None = None,
) -> GuardConfig:
    """A parsed TOML tree plus overrides -> checked settings of the schema that `launch.trainer`
    names, or of the given one.

    Args:
        notice: print the present name of each key that is given under an old one.
    """
    refuse_deep(tree, file=file)
    given = copy.deepcopy(tree)
    for text in overrides:
        _override(given, text)
    try:
        if schema is None:
            schema = schema_of(given, file=file)
    except ConfigError as error:
        raise error.at(source_of(error.key, file=file, overrides=overrides)) from error
    try:
        tree = rename_keys(tree, schema, file=file, notice=notice)
        for text in overrides:
            _override(tree, text, schema)
        settings = typed(schema.completed(tree), schema, file=file)
        settings.check(base=base)
        settings = settings.resolved(base=base)
    except ConfigError as error:
        source = source_of(error.key, file=file, overrides=overrides, schema=schema)
        raise error.at(source) from error
    return settings


def schema_of(tree: dict[str, Any], *, file: str) -> type[GuardConfig]:
    """The schema class `Config` of the package that `[launch] trainer` names."""
    launch = tree.get("launch", {})
    package = launch.get("trainer", "trainer") if isinstance(launch, dict) else "trainer"
    try:
        module = importlib.import_module(f"{package}.config")
        schema: type[GuardConfig] = module.Config
    except (ImportError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            "an importable package whose `config` module has a class `Config`",
            file=file,
            key="launch.trainer",
            value=package,
            hint=str(error),
        ) from error
    return schema


def ask_trainer(settings: GuardConfig, function: str) -> list[str]:
    """What the trainer's config module says of a configuration: sentences; [] where it has no such
    function.

    Args:
        function: "outline": what the settings ask of their machines, without looking at any;
            "remarks": where they leave published practice, with the source.
    """
    module = importlib.import_module(f"{settings.launch.trainer}.config")
    answer: Callable[[GuardConfig], list[str]] | None = getattr(module, function, None)
    return [] if answer is None else answer(settings)


def dump(settings: GuardConfig) -> str:
    """The complete configuration as TOML: it starts the same run again. Secrets that are written
    out are masked.
    """
    import tomli_w

    return tomli_w.dumps(secret.masked(_without_none(msgspec.to_builtins(settings))))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_none(v) for v in value]
    return value


def _present(parts: list[str], value: Any, schema: type[msgspec.Struct]) -> tuple[list[str], Any]:
    """The present name of an overridden key, and of its value."""
    tree = value
    for part in reversed(parts):
        tree = {part: tree}
    tree = rename_keys(tree, schema, file="--set", notice=True)
    new = present_key(".".join(parts), schema).split(".")
    for part in new:
        tree = tree[part]
    return new, tree


def _override_value(raw: str) -> Any:
    """A TOML value, or else the text itself: a bare word, a path, "007", and a name that looks like
    a date.
    """
    try:
        parsed = tomllib.loads(f"v = {raw}")
    except (ValueError, RecursionError):
        return raw
    is_date = isinstance(parsed["v"], datetime.date | datetime.time)
    return raw if is_date or len(parsed) > 1 else parsed["v"]


def source_of(
    key: str,
    *,
    file: str,
    overrides: Sequence[str],
    schema: type[msgspec.Struct] | None = None,
) -> str:
    """Where the value of a key came from: "--set" if an override set it, or something in it or
    around it; or `file`.
    """
    for text in overrides:
        named = present_key(".".join(_override_parts(text)), schema or GuardConfig)
        if _same_branch(named, key):
            return "--set"
    return file


def _override_parts(text: str) -> list[str]:
    """The parts of the key that an override names."""
    return [part.strip() for part in text.partition("=")[0].split(".")]


def _same_branch(one: str, other: str) -> bool:
    """Whether a key is, holds or lies in the other: guard, guard.window; data.sources,
    data.sources[0].
    """
    shorter, longer = sorted((one, other), key=len)
    return longer == shorter or (
        bool(shorter) and longer.startswith((f"{shorter}.", f"{shorter}["))
    )


def shown_override(text: str) -> str:
    """An override, or a part of one, for a message: nothing of one that may hold a secret."""
    return MASK if may_be_secret(text) or may_be_secret(text.partition("=")[0].strip()) else text


def _override(tree: dict[str, Any], text: str, schema: type[msgspec.Struct] | None = None) -> None:
    """Set one key of the tree.

    Args:
        schema: the key and the value are renamed as it says; None: they stay as they are.
    """
    key, equals, raw = text.partition("=")
    parts = _override_parts(text)
    if (
        not equals
        or not 2 <= len(parts) <= MAX_DEPTH
        or not all(re.fullmatch(r"[\w-]{1,100}", p) for p in parts)
    ):
        shown = shown_override(text)
        raise ConfigError(
            "SECTION.KEY=VALUE", file="--set", value=shown, hint="e.g. --set train.steps=500"
        )
    value = _override_value(raw.strip())
    if schema is not None:
        parts, value = _present(parts, value, schema)
    at = tree
    for part in parts[:-1]:
        at = at.setdefault(part, {})
        if not isinstance(at, dict):
            raise ConfigError(
                "a key inside a section", file="--set", key=key.strip(), value=shown_override(raw)
            )
    at[parts[-1]] = value
