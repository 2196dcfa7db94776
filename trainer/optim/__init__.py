"""The optimizers of the built-in trainer: one file each, plus one line in `registry.OPTIMIZERS`.

A module of this folder that `registry` imports must not import torch at module level. The
configuration reads the registry, and `guardrail doctor --dry-run` works without torch.
"""
