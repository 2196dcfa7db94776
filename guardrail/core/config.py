"""TOML -> typed settings. A configuration that cannot run is refused before any process starts.

`[launch] trainer` names the package whose `config` module holds the complete schema, a subclass of
`GuardConfig`. So guardrail reads the sections of a trainer without importing it at module level.

Every function below gives each key and value its present name (`renamed_keys`) once, before it
converts the tree.
"""

from __future__ import annotations

import copy
import importlib
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from guardrail.core import section_checks
from guardrail.core.errors import ConfigError
from guardrail.core.guard_options import GuardOptions
from guardrail.core.overrides import apply_override, find_source, mask_override
from guardrail.core.renamed_keys import rename_keys
from guardrail.core.schema import convert_tree, refuse_deep, to_plain_tree
from guardrail.core.section import Section
from guardrail.core.sections import (
    CheckpointSection,
    LaunchSection,
    NotifySection,
    RunSection,
    SnapshotSection,
    TensorboardSection,
)
from guardrail.core.toml_file import read_toml


class GuardConfig(Section, frozen=True, kw_only=True):
    """Base of a trainer's complete schema.

    A subclass may extend `completed`, `resolved`, `check` and `check_machine`.
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
        """Return a parsed file with the defaults that it names, such as a preset's.

        Raises:
            ConfigError: the file names defaults that do not exist.
        """
        return tree

    def resolved(self, *, base: Path) -> GuardConfig:
        """Return a copy with absolute paths, so that it holds in every working directory."""
        root = str(base / os.path.expanduser(self.run.root))
        run = msgspec.structs.replace(self.run, root=root)
        return msgspec.structs.replace(self, run=run, notify=self.notify.resolved(base=base))

    def check(self, *, base: Path) -> None:
        """Refuse impossible combinations. Raises ConfigError.

        Args:
            base: folder of relative paths.
        """
        guard = self.guard
        section_checks.check_detectors(guard)
        section_checks.check_snapshots(self.snapshots, guard)
        section_checks.check_extra_signals(guard.extra_signals)
        section_checks.check_escalation(guard.escalation)
        section_checks.check_allowlist(guard.allowlist)
        section_checks.check_remedies(guard.remedies)
        section_checks.check_node_rank(self.launch)
        self.notify.check()
        section_checks.check_rendezvous(self.launch)

    def check_machine(self) -> None:
        """Refuse what this machine cannot hold. Raises ConfigError.

        Separate from `check`: a small machine can read the configuration of a large one.
        """


# -- from a file


def load_trainer_config(
    path: str | os.PathLike[str], *, overrides: Sequence[str] = (), of_run: bool = False
) -> GuardConfig:
    """Read, override, convert and check a complete configuration.

    Args:
        path: the TOML file.
        overrides: "section.key=value" strings, the value as TOML (a bare word counts as a string).
        of_run: as for `read_toml`.

    Raises:
        ConfigError: names file, key, value, expectation and the nearest valid key.
    """
    tree = read_toml(Path(path), of_run=of_run)
    base = Path.cwd()
    return build_config(tree, file=str(path), overrides=overrides, base=base, notice=not of_run)


def load_config(path: str | os.PathLike[str], *, overrides: Sequence[str] = ()) -> GuardConfig:
    """Read, override, convert and check a configuration of a custom loop or of a trainer.

    A file that holds only sections of `GuardConfig`, and names no `launch.trainer`, is that of a
    custom loop. Any other one must be complete, as for `load_trainer_config`.

    Args:
        path: the TOML file.
        overrides: "section.key=value" strings, the value as TOML (a bare word counts as a string).

    Raises:
        ConfigError: names file, key, value, expectation and the nearest valid key.
    """
    tree = read_toml(Path(path))
    names_trainer = _trainer_named(tree) is not None
    sections = {*tree, *(text.partition(".")[0].strip() for text in overrides)}
    schema: type[GuardConfig] | None = None
    if not names_trainer and sections <= set(GuardConfig.__struct_fields__):
        schema = GuardConfig
    return build_config(tree, file=str(path), overrides=overrides, base=Path.cwd(), schema=schema)


def is_custom_loop(file: Path) -> bool:
    """Return whether a run's config.toml is that of a custom loop, not of a trainer.

    `guardrail launch` writes the sections of its trainer too. False if the file cannot be read.
    """
    try:
        tree = read_run_tables(file)
    except ConfigError:
        return False
    # A `GuardConfig` that was stored by a custom loop names the default trainer.
    names_other = _trainer_named(tree) not in (None, LaunchSection().trainer)
    return not names_other and set(tree) <= set(GuardConfig.__struct_fields__)


def _trainer_named(tree: Mapping[str, Any]) -> Any:
    """Return `launch.trainer` of a parsed file; None: it has none."""
    launch = tree.get("launch", {})
    if not isinstance(launch, dict):
        return None
    return launch.get("trainer")


def load_guard_options(
    path: str | os.PathLike[str] | None = None,
    *,
    overrides: Sequence[str] = (),
    of_run: bool = False,
) -> GuardOptions:
    """Return only the [guard] section, for a run that is not started.

    Other sections of the file need not fit this machine.

    Args:
        path: a complete configuration, or a file that holds nothing but [guard]; None: the
            defaults.
        overrides: "guard.key=value" strings.
        of_run: as for `read_toml`. A run may have stored no [guard]: then it has the defaults.

    Raises:
        ConfigError: as for `load_trainer_config`.
    """
    tree: dict[str, Any] = {"guard": {}}
    file = "--set"
    if path is not None:
        file = str(path)
        tree = read_toml(Path(path), of_run=of_run)
    if "guard" not in tree and not of_run:
        names = ", ".join(tree) or "none"
        raise ConfigError("a section [guard]", file=file, hint=f"it has {names}")
    kept = {name: tree[name] for name in ("guard", "snapshots") if name in tree}
    kept = rename_keys(kept, GuardConfig, file=file, notice=not of_run)
    for text in overrides:
        if not text.strip().startswith("guard."):
            raise ConfigError(
                "a key of [guard]",
                file="--set",
                value=mask_override(text),
                hint="e.g. --set guard.max_rollbacks=3",
            )
        apply_override(kept, text, GuardConfig)
    try:
        settings = convert_tree(kept, GuardConfig, file=file)
        settings.check(base=Path.cwd())
    except ConfigError as error:
        source = find_source(error.key, file=file, overrides=overrides, schema=GuardConfig)
        raise error.at(source) from error
    return settings.guard


def read_run_tables(file: Path) -> dict[str, Any]:
    """Return the tables of a run's config.toml, unchecked, with the present name of each key.

    For the sections of `GuardConfig`. The trainer's package is not imported.

    Raises:
        ConfigError: as for `read_toml`.
    """
    tables: dict[str, Any] = rename_keys(
        read_toml(file, of_run=True), GuardConfig, file="config.toml"
    )
    return tables


# -- from a tree


def build_config(
    tree: dict[str, Any],
    *,
    file: str,
    overrides: Sequence[str] = (),
    base: Path,
    notice: bool = True,
    schema: type[GuardConfig] | None = None,
) -> GuardConfig:
    """Return the checked settings of a parsed TOML tree plus overrides.

    Args:
        notice: print the present name of each key that is given under an old one.
        schema: of the result; None: the one that `launch.trainer` names.

    Raises:
        ConfigError: names file, key, value, expectation and the nearest valid key.
    """
    refuse_deep(tree, file=file)
    given = copy.deepcopy(tree)
    for text in overrides:
        apply_override(given, text)
    try:
        if schema is None:
            schema = find_schema(given, file=file)
    except ConfigError as error:
        raise error.at(find_source(error.key, file=file, overrides=overrides)) from error
    try:
        tree = rename_keys(tree, schema, file=file, notice=notice)
        for text in overrides:
            apply_override(tree, text, schema)
        settings = convert_tree(schema.completed(tree), schema, file=file)
        settings.check(base=base)
        settings = settings.resolved(base=base)
    except ConfigError as error:
        source = find_source(error.key, file=file, overrides=overrides, schema=schema)
        raise error.at(source) from error
    return settings


def find_schema(tree: dict[str, Any], *, file: str) -> type[GuardConfig]:
    """Return the class `Config` of the package that `[launch] trainer` names.

    Raises:
        ConfigError: the package cannot be imported, or has no such class.
    """
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
    """Return the sentences of the trainer's config module about a configuration.

    Args:
        function: "outline": what the settings need of their machines, without reading any.
            "remarks": where they differ from published practice, with the source.

    Returns:
        No sentence where the module has no such function.
    """
    module = importlib.import_module(f"{settings.launch.trainer}.config")
    answer: Callable[[GuardConfig], list[str]] | None = getattr(module, function, None)
    return [] if answer is None else answer(settings)


# -- from Python

SettingsT = typing.TypeVar("SettingsT", bound="GuardConfig")


def check_settings(settings: SettingsT | Mapping[str, Any], schema: type[SettingsT]) -> SettingsT:
    """Return settings built in Python, converted and checked as a TOML file would be.

    Text becomes a Mode, ranges hold. Only the sections of `GuardConfig` are checked against one
    another: call `settings.check` for all of them.

    Args:
        settings: an instance of `schema`, or a dictionary of sections.

    Raises:
        ConfigError: names key, value and expectation.
    """
    if isinstance(settings, schema):
        schema = type(settings)
    elif not isinstance(settings, Mapping):
        hint = ""
        if isinstance(settings, GuardOptions):
            hint = f"{schema.__name__}(guard=...) takes a {type(settings).__name__}"
        raise ConfigError(
            f"{schema.__name__}(...), or a dictionary of sections",
            key="settings",
            value=settings,
            hint=hint,
        )
    tree = to_plain_tree(settings)
    refuse_deep(tree, file="")
    result = convert_tree(rename_keys(tree, schema, file=""), schema, file="")
    GuardConfig.check(result, base=Path.cwd())
    return result


def check_guard_options(section: GuardOptions) -> GuardOptions:
    """Return a [guard] section built in Python, converted and checked. Raises ConfigError."""
    return check_settings({"guard": section, "snapshots": {"keep": 0}}, GuardConfig).guard
