"""Packages that only some of the work needs, and how to install one that is missing."""

from __future__ import annotations

import importlib.util

from guardrail.core.errors import UsageError

# Package -> the extra of guardrail that installs it.
EXTRA_OF = {
    "accelerate": "trainer",
    "apprise": "notify",
    "matplotlib": "plot",
    "tensorboard": "tensorboard",
    "textual_serve": "web",
    "tokenizers": "trainer",
    "torch": "trainer",
    "transformers": "hf",
    "wandb": "wandb",
    "zstandard": "trainer",
}


class MissingPackage(UsageError):
    """A package that the requested work needs is not installed.

    Attributes:
        package: its import name.
    """

    def __init__(self, package: str, purpose: str) -> None:
        self.package = package
        super().__init__(
            f"{purpose} needs {package}, which is not installed\n  hint: {install_hint(package)}"
        )


def is_installed(package: str) -> bool:
    """Return whether a package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # sys.modules holds None for it: its import is blocked
        return False


def install_hint(package: str) -> str:
    """Return the command that installs a package of `EXTRA_OF`."""
    return f"pip install 'guardrail[{EXTRA_OF[package]}]'"


def require_package(package: str, purpose: str) -> None:
    """Raise MissingPackage unless a package is installed.

    Args:
        purpose: what needs it, as the subject of a sentence: "--plot", "the TensorBoard importer".
    """
    if not is_installed(package):
        raise MissingPackage(package, purpose)
