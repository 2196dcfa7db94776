"""Old import path; use `guardrail.torch.checkpoint.safetensors_file`."""

from __future__ import annotations

from guardrail.torch.checkpoint.safetensors_file import read_parts

__all__ = ["read_parts"]
