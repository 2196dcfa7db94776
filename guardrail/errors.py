"""Old import path; use `guardrail.GuardrailError` or `guardrail.core.errors`."""

from __future__ import annotations

from guardrail.core.old_names import forward

__getattr__ = forward(
    __name__,
    "guardrail.core.errors",
    [
        "ExitCode",
        "GuardrailError",
        "UsageError",
        "ConfigError",
        "may_be_secret",
        "hide_assignments",
        "DataError",
        "RunDirectoryError",
        "Halted",
        "WorkersFailed",
        "DiskRefuses",
        "CheckFailed",
        "CheckpointInvalid",
        "Interrupted",
    ],
)
