"""A terminal monitor and stability controller for PyTorch language-model training.

The names below are public. Everything else is private by convention: modules, functions and
attributes may change in any version.

Names are loaded at their first use, so `import guardrail` loads neither torch nor numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from guardrail.core.config import GuardConfig as GuardConfig
    from guardrail.core.config import load_config as load_config
    from guardrail.core.errors import GuardrailError as GuardrailError
    from guardrail.core.records.findings import Finding as Finding
    from guardrail.core.records.verdicts import Action as Action
    from guardrail.core.records.verdicts import Verdict as Verdict
    from guardrail.decide.sample_order import SampleOrder as SampleOrder
    from guardrail.rundir.run_directory import RunDirectory as RunDirectory
    from guardrail.torch.guard.guard import Guard as Guard
    from guardrail.torch.guard.hooks import LoopHooks as LoopHooks
    from guardrail.torch.guard.hooks import RankLayout as RankLayout
    from guardrail.torch.guard.step import Step as Step

_MODULES = {
    "Action": "guardrail.core.records.verdicts",
    "Finding": "guardrail.core.records.findings",
    "Guard": "guardrail.torch.guard.guard",
    "GuardConfig": "guardrail.core.config",
    "GuardrailError": "guardrail.core.errors",
    "LoopHooks": "guardrail.torch.guard.hooks",
    "RankLayout": "guardrail.torch.guard.hooks",
    "RunDirectory": "guardrail.rundir.run_directory",
    "SampleOrder": "guardrail.decide.sample_order",
    "Step": "guardrail.torch.guard.step",
    "Verdict": "guardrail.core.records.verdicts",
    "load_config": "guardrail.core.config",
}

__all__ = [
    "Action",
    "Finding",
    "Guard",
    "GuardConfig",
    "GuardrailError",
    "LoopHooks",
    "RankLayout",
    "RunDirectory",
    "SampleOrder",
    "Step",
    "Verdict",
    "load_config",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    from guardrail.core.packages import require_package

    if _MODULES[name].startswith("guardrail.torch."):
        require_package("torch", f"guardrail.{name}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
