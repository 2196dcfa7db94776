"""Old import path; use `guardrail.Action`, `guardrail.Finding`, `guardrail.Verdict` or `guardrail.core.records`."""

from __future__ import annotations

from guardrail.core.old_names import forward

__getattr__ = forward(
    __name__,
    "guardrail.core.records",
    [
        "LOSS",
        "GRAD_NORM",
        "EMBED_GRAD_NORM",
        "EMBED_SHARE",
        "UPDATE_NORM",
        "LOSS_SCALE",
        "AUTOMATIC",
        "MAX_NAMED",
        "Action",
        "Cause",
        "Severity",
        "Mode",
        "Record",
        "Observation",
        "Finding",
        "score_words",
        "Diagnosis",
        "Remedy",
        "Verdict",
        "Shown",
        "Command",
        "Span",
        "DocumentRef",
        "SnapshotInfo",
        "field_of",
        "Phase",
        "Unresolved",
        "Status",
        "RankStatus",
        "NodeStatus",
        "METRIC_COLUMNS",
    ],
    renamed={
        "Kind": "FindingKind",
        "Curve": "LossTrend",
        "Outcome": "RecoveryResult",
        "CommandKind": "guardrail.decide.control_commands.old_kinds.CommandKind",
        "Event": "guardrail.core.events.event.Event",
        "SENSELESS": "guardrail.core.events.event.SENSELESS",
    },
)
