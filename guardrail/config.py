"""Old import path; use `guardrail.GuardConfig`, `guardrail.load_config` or `guardrail.core.config`."""

from __future__ import annotations

from guardrail.core.old_names import forward

__getattr__ = forward(
    __name__,
    "guardrail.core.config",
    [
        "SettingsT",
        "load_config",
    ],
    renamed={
        "load": "load_trainer_config",
        "checked": "check_settings",
        "checked_guard": "check_guard_options",
        "load_guard": "load_guard_options",
        "build": "build_config",
        "schema_of": "find_schema",
        "MAX_FILE_BYTES": "guardrail.core.toml_file.MAX_FILE_BYTES",
        "parse": "guardrail.core.toml_file.read_toml",
        "dump": "guardrail.core.toml_file.dump_toml",
        "Settings": "GuardConfig",
        "GuardSection": "guardrail.core.guard_options.GuardOptions",
        "RungSection": "guardrail.core.guard_options.EscalationStep",
        "LADDER": "guardrail.core.guard_options.ESCALATION",
        "Positive": "guardrail.core.section.Positive",
        "Natural": "guardrail.core.section.Natural",
        "PositiveFloat": "guardrail.core.section.PositiveFloat",
        "NonNegativeFloat": "guardrail.core.section.NonNegativeFloat",
        "Fraction": "guardrail.core.section.Fraction",
        "Section": "guardrail.core.section.Section",
        "REMEDIES": "guardrail.core.guard_options.EFFECTS",
        "RunSection": "guardrail.core.sections.RunSection",
        "LaunchSection": "guardrail.core.sections.LaunchSection",
        "SnapshotSection": "guardrail.core.sections.SnapshotSection",
        "CheckpointSection": "guardrail.core.sections.CheckpointSection",
        "TensorboardSection": "guardrail.core.sections.TensorboardSection",
        "NotifySection": "guardrail.core.sections.NotifySection",
        "check_webhook": "guardrail.core.sections.check_webhook",
        "source_of": "guardrail.core.overrides.find_source",
        "shown_override": "guardrail.core.overrides.mask_override",
    },
)
