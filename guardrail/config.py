"""Old import path; use `guardrail.GuardConfig`, `guardrail.load_config` or `guardrail.core.config`."""

from __future__ import annotations

from guardrail.core.old_names import forward

__getattr__ = forward(
    __name__,
    "guardrail.core.config",
    [
        "Positive",
        "Natural",
        "PositiveFloat",
        "NonNegativeFloat",
        "Fraction",
        "MAX_FILE_BYTES",
        "Section",
        "RunSection",
        "LaunchSection",
        "REMEDIES",
        "SnapshotSection",
        "CheckpointSection",
        "TensorboardSection",
        "NotifySection",
        "check_webhook",
        "load",
        "SettingsT",
        "checked",
        "checked_guard",
        "load_guard",
        "parse",
        "build",
        "schema_of",
        "dump",
        "source_of",
        "shown_override",
    ],
    renamed={
        "Settings": "GuardConfig",
        "GuardSection": "GuardOptions",
        "RungSection": "EscalationStep",
        "LADDER": "ESCALATION",
    },
)
