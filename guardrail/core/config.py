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
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from guardrail.core import secret
from guardrail.core.errors import ConfigError, may_be_secret
from guardrail.core.files import open_file
from guardrail.core.records import METRIC_COLUMNS, UPDATE_NORM, Mode, Remedy
from guardrail.core.schema import MAX_DEPTH, as_tree, refuse_deep, typed
from guardrail.core.secret import SecretRef
from guardrail.core.text import MASK

Positive = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
PositiveFloat = Annotated[float, Meta(gt=0)]
NonNegativeFloat = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]


MAX_FILE_BYTES = 4 << 20  # of a configuration; a complete one has 5 KiB


class Section(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """Base of every section: unknown keys are errors, values never change after loading."""


class RunSection(Section, frozen=True, kw_only=True):
    """[run]: what the run is called and where it lives."""

    # Name of the run; the run directory is ROOT/NAME/DATE-NN.
    name: str = "run"
    # Folder of all runs, relative to the working directory.
    root: str = "runs"


class LaunchSection(Section, frozen=True, kw_only=True):
    """[launch]: the processes. Passed to torch elastic, which starts them."""

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
    node_seconds: PositiveFloat = 600.0
    # Times the ranks are started again after a failure before the run ends with exit code 4.
    max_restarts: Natural = 3
    # Seconds without progress after which a rank counts as hung, per phase. One whose process is
    # stopped (SIGSTOP), while the others wait, counts after 30 seconds.
    setup_seconds: PositiveFloat = 1800.0
    step_seconds: PositiveFloat = 600.0
    eval_seconds: PositiveFloat = 1800.0
    save_seconds: PositiveFloat = 1800.0
    # Seconds that a stop may take to save before the ranks are killed.
    stop_seconds: PositiveFloat = 300.0
    # Seconds after which a collective that waits for another rank gives up.
    collective_seconds: PositiveFloat = 600.0
    # Intra-op threads of a CPU rank; 0: OMP_NUM_THREADS where that is set, else cores / processes.
    threads: Natural = 0


class EscalationStep(Section, frozen=True, kw_only=True):
    """[[guard.ladder]]: one answer to an instability. Rungs are gone up in their order."""

    # skip: leave updates out, up to `persist` - 1 in a row, before anything else. rollback: go
    # back, leave the window out. widen: leave out twice as much, then four times. older: go back
    # `steps` further. lower_lr, shrink_embedding, tighten_clip: go back and multiply by `factor`.
    # reset_moments: go back with the optimizer's moments at zero, and the learning rate times
    # `factor`. pause: park and ask, whether or not a screen is open. halt: save and end with exit
    # code 3.
    do: typing.Literal[
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
    # Times that it is taken before the next rung, counted among rollbacks in a row (see
    # healthy_after). Each time is twice as strong: a window twice as long; a factor squared, for
    # twice as many steps.
    times: Positive = 1
    # What is multiplied, for how many steps, and over how many more steps the factor then returns
    # to 1.
    factor: Annotated[float, Meta(gt=0, le=1)] = 0.5
    hold: Natural = 100
    back: Natural = 200
    # older: steps further back, at least.
    steps: Positive = 50
    # Applied steps after it was taken within which it is passed over.
    cooldown: Natural = 0


REMEDIES = ("lr", "embed_alpha", "clip", "moments")  # kinds of guard.remedies

LADDER = (
    EscalationStep(do="skip"),
    EscalationStep(do="rollback"),
    EscalationStep(do="widen", times=2),
    EscalationStep(do="older"),
    EscalationStep(do="shrink_embedding"),
    # Strong and short: 0.1 for 20 steps and back over 40 costs 36 steps' worth of progress, 0.5 for
    # 100 and back over 200 costs 100, and helps against less.
    EscalationStep(do="lower_lr", times=3, factor=0.1, hold=20, back=40),
    EscalationStep(do="tighten_clip"),
    EscalationStep(do="reset_moments", factor=0.1, hold=20, back=100),
)


class GuardOptions(Section, frozen=True, kw_only=True):
    """[guard]: what is watched, and what is done about it."""

    # auto: acts; ask: parks and asks before a rollback; advise: only says what it would do; off: no
    # detection.
    mode: Mode = Mode.AUTO
    # Accepted steps that make up a detector's baseline.
    window: Annotated[int, Meta(ge=16)] = 128
    # Accepted steps before a spike detector is sure of its scale; until then only larger jumps
    # count, and non-finite values are caught from the first step.
    warmup: Annotated[int, Meta(ge=8)] = 32
    # Distance of the logarithm from the baseline in robust sigmas (median, MAD) above which a step
    # is rejected.
    loss_score: PositiveFloat = 8.0
    grad_score: PositiveFloat = 10.0
    embed_score: PositiveFloat = 10.0
    # Share of the data that the guard skips by itself. The data are the distinct samples that the
    # run reads until its end: the corpus, or what `train.steps` need where that is less. A skip or
    # rollback that would go beyond it is not done: the run asks in the mode `ask` and while a
    # screen is open, else it saves and halts (exit code 3). What a user or a list skips does not
    # count. 0: it skips nothing; 1: no limit, but some data must be left.
    max_skipped_share: Fraction = 0.03
    # What kind of number the loss is. "positive": a cross-entropy, of which 0 is impossible and
    # ratios mean something. "signed": a policy loss of reinforcement learning; only NaN, Inf and
    # numbers a thousand times as large as usual are acted on. "auto": signed if a reward, an
    # advantage, a KL divergence or a probability ratio is among the signals, or if more than 2 of
    # the first 20 losses are 0 or negative.
    loss: typing.Literal["auto", "positive", "signed"] = "auto"
    # Rejections in a row, nothing applied between, that call for a rollback.
    persist: Positive = 3
    # Rejections in a row that a replay puts down to the data, before the run asks or halts: nothing
    # of them is in the weights, so they call for no rollback. Whether it is still the data is asked
    # again at `persist`, twice that, ...
    skips: Positive = 64
    # Where the batches that are looked at, up to four times `skips` ahead, are in the same trouble,
    # it is no bad stretch but what the data now is. "learn": apply it, as a new level; "leave_out":
    # as any data that is to blame.
    shift: typing.Literal["learn", "leave_out"] = "learn"
    # Divergence: the median of this many accepted losses stands this many robust sigmas above the
    # lowest such median of the window. A sudden step is found after more than half of these steps.
    divergence_score: PositiveFloat = 6.0
    divergence_steps: Positive = 20
    # Batches that a rollback leaves out before the onset and after the last bad batch (PaLM: 100
    # and 200-400).
    window_before: Natural = 1
    window_after: Natural = 0
    # Rollbacks in a row without `healthy_after` applied steps between them, before the run halts
    # (or asks).
    rollbacks: Natural = 5
    healthy_after: Positive = 200
    # What is done, mildest first; each rung is one line. Rungs that do not fit the cause are passed
    # over: where the state is to blame no data is left out, where data is, leaving it out comes
    # first. When the last one has not helped, or `rollbacks` in a row, the run halts.
    ladder: tuple[EscalationStep, ...] = LADDER
    # Batches that a widened window holds at most.
    window_max: Positive = 512
    # Where the embedding leads an incident its gradients are multiplied by this (1: never), not
    # below the floor in all, for `embed_hold` steps, and return to full size over `embed_back` more
    # (GLM-130B: 0.1). Under Adam this matters while it changes; see tests/bench/alpha.py.
    embed_factor: Annotated[float, Meta(gt=0, le=1)] = 0.5
    embed_floor: Annotated[float, Meta(gt=0, le=1)] = 0.1
    embed_hold: Natural = 100
    embed_back: Natural = 200
    # Remedies that hold from the beginning, as the journal of another run tells them: to make the
    # same run again.
    remedies: tuple[Remedy, ...] = ()
    # fp16: overflows in a row that are no longer the search for a loss scale (8 divide it by 256):
    # the gradients themselves are broken, which calls for a rollback. Before `warmup` accepted
    # steps it takes at least 16.
    overflows: Positive = 8
    # At the first rejected step of an incident a few batches are run again, to tell data, state and
    # hardware apart; for loops that hand the guard a way to run a batch, as the built-in trainer
    # does.
    cause_test: bool = True
    # Batches that are formed again because the hardware gave other numbers the second time, without
    # `healthy_after` applied steps between them, before the run halts.
    retries: Natural = 8
    # Further numbers that the loop hands to `step.finish(..., signals={NAME: value})`, reduced and
    # recorded with the others; each has a detector of spikes that notes them. One that is missing
    # at a step is passed over.
    signals: tuple[str, ...] = ()
    # "sync": the host reads a step's numbers before its update is applied; "lagged": the device
    # decides by thresholds that it was given, and the host reads a step later: no wait in a healthy
    # step, and the same results. Needs fused Adam or AdamW; not in fp16.
    gate: typing.Literal["sync", "lagged"] = "sync"
    # Measure the gradient norm of each block of the model besides: "grad_norm/layers.3" tells where
    # a spike began.
    layers: bool = False
    # Measure the L2 norm of each update, exactly: costs a copy of the parameters, in memory and in
    # time.
    update_norm: bool = False
    # Applied healthy steps after which a snapshot or checkpoint counts as good.
    confirm: Natural = 8
    # Stretches [first, last) of positions of the sample order whose batches are applied whatever is
    # found, as far as it is finite: data that is known to be odd. `guardrail ctl RUN undo` does the
    # same for what was rejected.
    pardon: tuple[tuple[Natural, Natural], ...] = ()
    # Seconds that `ask` and the rung `pause` wait for an answer before they take `ask_default`; 0:
    # for ever.
    ask_seconds: NonNegativeFloat = 0.0
    # Without an answer in time: do as proposed, go on with the update, or stop.
    ask_default: typing.Literal["proposed", "go_on", "stop"] = "proposed"


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
        if guard.mode is not Mode.OFF and snapshots.keep and guard.confirm > reach:
            raise ConfigError(
                f"at most snapshots.every * (snapshots.keep - 1) = {reach}",
                key="guard.confirm",
                value=guard.confirm,
                hint="no snapshot would live long enough to be called good; raise snapshots.keep",
            )
        for name in guard.signals:
            if (
                name in METRIC_COLUMNS
                or name == UPDATE_NORM
                or guard.signals.count(name) > 1
                or not name.strip()
            ):
                raise ConfigError("names of their own, each once", key="guard.signals", value=name)
        ends = [at for at, rung in enumerate(guard.ladder) if rung.do in ("pause", "halt")]
        if ends and ends[0] + 1 < len(guard.ladder):
            raise ConfigError(
                "the last rung",
                key=f"guard.ladder[{ends[0]}].do",
                value=guard.ladder[ends[0]].do,
                hint="no rung behind it would ever be taken",
            )
        if any(rung.do == "skip" for rung in guard.ladder[1:]):
            raise ConfigError("skip on the first rung, or on none", key="guard.ladder", value=None)
        for first, last in guard.pardon:
            if first >= last:
                raise ConfigError(
                    "stretches [first, last) that are not empty",
                    key="guard.pardon",
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
    return build(tree, file=str(path), overrides=overrides, base=Path.cwd())


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
    for text in overrides:
        if not text.strip().startswith("guard."):
            shown = shown_override(text)
            raise ConfigError(
                "a key of [guard]", file="--set", value=shown, hint="e.g. --set guard.loss_score=6"
            )
        _override(kept, text)
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
    tree: dict[str, Any], *, file: str, overrides: Sequence[str] = (), base: Path
) -> GuardConfig:
    """A parsed TOML tree plus overrides -> checked settings of the schema that `launch.trainer`
    names.
    """
    refuse_deep(tree, file=file)
    tree = copy.deepcopy(tree)
    for text in overrides:
        _override(tree, text)
    try:
        schema = schema_of(tree, file=file)
        settings = typed(schema.completed(tree), schema, file=file)
        settings.check(base=base)
        settings = settings.resolved(base=base)
    except ConfigError as error:
        raise error.at(source_of(error.key, file=file, overrides=overrides)) from error
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


def source_of(key: str, *, file: str, overrides: Sequence[str]) -> str:
    """Where the value of a key came from: "--set" if an override set it, or something in it or
    around it; or `file`.
    """
    return (
        "--set"
        if any(_same_branch(".".join(_override_parts(text)), key) for text in overrides)
        else file
    )


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


def _override(tree: dict[str, Any], text: str) -> None:
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
    at = tree
    for part in parts[:-1]:
        at = at.setdefault(part, {})
        if not isinstance(at, dict):
            raise ConfigError(
                "a key inside a section", file="--set", key=key.strip(), value=shown_override(raw)
            )
    at[parts[-1]] = value
