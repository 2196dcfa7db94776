"""TOML -> typed settings; a configuration that cannot run is refused before any process starts.

`[launch] trainer` names the package whose `config` module holds the complete schema (a subclass of
`GuardConfig`), so guardrail reads the sections of a trainer without importing it at module level.
"""

from __future__ import annotations

import copy
import importlib
import os
import tomllib
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from guardrail.core import secret
from guardrail.core.errors import ConfigError
from guardrail.core.files import open_file
from guardrail.core.guard_options import REMEDIES, GuardOptions
from guardrail.core.overrides import override, shown_override, source_of
from guardrail.core.records import METRIC_COLUMNS, UPDATE_NORM, Mode, Remedy
from guardrail.core.renamed_keys import rename_keys
from guardrail.core.schema import as_tree, refuse_deep, typed
from guardrail.core.section import Section
from guardrail.core.sections import (
    CheckpointSection,
    LaunchSection,
    NotifySection,
    RunSection,
    SnapshotSection,
    TensorboardSection,
)

MAX_FILE_BYTES = 4 << 20  # of a configuration; a complete one has 5 KiB


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
        for name, least in (("from_step", 1), ("hold_steps", 0), ("ramp_steps", 0)):
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
        override(kept, text, GuardConfig)
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
        override(given, text)
    try:
        if schema is None:
            schema = schema_of(given, file=file)
    except ConfigError as error:
        raise error.at(source_of(error.key, file=file, overrides=overrides)) from error
    try:
        tree = rename_keys(tree, schema, file=file, notice=notice)
        for text in overrides:
            override(tree, text, schema)
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
