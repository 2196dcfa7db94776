"""Old import path; use `guardrail.GuardConfig`, `guardrail.load_config` or `guardrail.core.config`."""

from __future__ import annotations

from guardrail.core.old_names import forward

__getattr__ = forward(
    __name__,
    "guardrail.core.config",
    [
        "MAX_FILE_BYTES",
        "load",
        "SettingsT",
        "checked",
        "checked_guard",
        "load_guard",
        "parse",
        "build",
        "schema_of",
        "dump",
    ],
    renamed={
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
        "REMEDIES": "guardrail.core.guard_options.REMEDIES",
        "RunSection": "guardrail.core.sections.RunSection",
        "LaunchSection": "guardrail.core.sections.LaunchSection",
        "SnapshotSection": "guardrail.core.sections.SnapshotSection",
        "CheckpointSection": "guardrail.core.sections.CheckpointSection",
        "TensorboardSection": "guardrail.core.sections.TensorboardSection",
        "NotifySection": "guardrail.core.sections.NotifySection",
        "check_webhook": "guardrail.core.sections.check_webhook",
        "source_of": "guardrail.core.overrides.source_of",
        "shown_override": "guardrail.core.overrides.shown_override",
    },
)
