"""The guard: what a training loop calls.

Old import path of its names; use `guardrail.Guard` and `guardrail.Step`.
"""

from __future__ import annotations

from guardrail.core.old_names import forward

__getattr__ = forward(__name__, "guardrail.torch.guard.guard", ["Guard", "Step"])
