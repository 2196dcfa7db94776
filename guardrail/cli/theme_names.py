"""Names of the screen's themes, for the command line, which must not load the screen."""

from __future__ import annotations

THEMES = ("dark", "light", "colour-blind", "terminal")
ENVIRONMENT = "GUARDRAIL_THEME"
