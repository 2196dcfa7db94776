"""Versions that the journal and the status name."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch

VERSIONS = {
    "python": platform.python_version(),
    "torch": torch.__version__,
    "guardrail": version("guardrail"),
}
