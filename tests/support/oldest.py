"""Print the oldest versions that pyproject.toml allows, as pip constraints: `name==version` a line.

`make oldest` installs these versions in an environment of its own and runs the tests there.
"""

from __future__ import annotations

import tomllib

from packaging.requirements import Requirement

from tests.support.places import ROOT


def oldest_versions(pyproject: str) -> list[str]:
    """Return one constraint for each direct dependency, sorted by name.

    Tools that check the code (mypy, ruff, import-linter) and the tools of the tests stay at their
    newest versions: they do not run with the user's code.

    Raises:
        ValueError: a dependency has no lower bound.
    """
    project = tomllib.loads(pyproject)["project"]
    lines = list(project["dependencies"])
    for extra, requirements in project["optional-dependencies"].items():
        if extra not in ("dev", "docs"):
            lines += requirements
    constraints = []
    for line in lines:
        requirement = Requirement(line)
        lowest = [part.version for part in requirement.specifier if part.operator == ">="]
        if len(lowest) != 1:
            raise ValueError(f"{line}: expected one lower bound (>=)")
        constraints.append(f"{requirement.name}=={lowest[0]}")
    return sorted(constraints)


if __name__ == "__main__":
    print("\n".join(oldest_versions((ROOT / "pyproject.toml").read_text())))
