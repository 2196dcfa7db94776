"""Old import path; use `guardrail.Action`, `guardrail.Finding`, `guardrail.Verdict` or a module of
`guardrail.core.records`.
"""

from __future__ import annotations

from guardrail.core.old_names import forward

_PLACES = {
    "record": ["Record", "field_of"],
    "signals": [
        "LOSS",
        "GRAD_NORM",
        "EMBED_GRAD_NORM",
        "EMBED_SHARE",
        "UPDATE_NORM",
        "LOSS_SCALE",
        "METRIC_COLUMNS",
    ],
    "findings": ["Severity", "Observation", "Finding", "score_words"],
    "verdicts": ["Action", "Mode", "Cause", "Diagnosis", "Remedy", "Verdict"],
    "commands": ["Shown", "Command"],
    "spans": ["AUTOMATIC", "MAX_NAMED", "Span", "DocumentRef"],
    "status": ["SnapshotInfo", "Phase", "Unresolved", "Status", "RankStatus", "NodeStatus"],
}

__getattr__ = forward(
    __name__,
    "guardrail.core.records",
    [],
    renamed={
        **{
            name: f"guardrail.core.records.{module}.{name}"
            for module, names in _PLACES.items()
            for name in names
        },
        "Kind": "guardrail.core.records.findings.FindingKind",
        "Curve": "guardrail.core.records.verdicts.LossTrend",
        "Outcome": "guardrail.core.records.verdicts.RecoveryResult",
        "CommandKind": "guardrail.decide.control_commands.old_kinds.CommandKind",
        "Event": "guardrail.core.events.event.Event",
        "SENSELESS": "guardrail.core.events.event.SENSELESS",
    },
)
