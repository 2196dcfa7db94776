"""Named tones -> styles: one set in full colour, one of the terminal's own sixteen; NO_COLOR leaves their attributes.

A tone is never the only carrier of a meaning: a glyph or a word stands beside it. The full set keeps to hues that
colour-blind eyes tell apart (Okabe and Ito, "Color Universal Design", 2008): blue, orange, vermillion, bluish green.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.style import Style
from textual.theme import Theme

BACKGROUND, PANEL = "#10151a", "#182129"

THEME = Theme(
    name="guardrail",
    primary="#5fb3ea",
    secondary="#8a97a3",
    warning="#f2a33a",
    error="#ff7a55",
    success="#3ecf9b",
    accent="#5fb3ea",
    foreground="#d5dde4",
    background=BACKGROUND,
    surface=BACKGROUND,
    panel=PANEL,
    dark=True,
)

_FULL = {
    "plain": "#d5dde4",
    "strong": "bold #f2f6f9",
    "dim": "#8a97a3",
    "faint": "#4d5964",
    "good": "bold #3ecf9b",
    "warn": "bold #f2a33a",
    "bad": "bold #ff7a55",
    "calm": "bold #a9b8c6",
    "accent": "#5fb3ea",
    "key": "bold #5fb3ea",
    "cursor": "bold #10151a on #5fb3ea",
    "ghost": "#8a97a3",
    "threshold": "#a8823f",
    "loss": "#5fb3ea",
    "grad_norm": "#e8c25a",
    "embed_grad_norm": "#c79bea",
    "embed_share": "#e39ac4",
    "lr": "#8fd6c0",
    "throughput": "#9fb4e8",
    "raw": "#56646f",
}
# "bright_black" is invisible in some schemes; the attribute `dim` is not.
_ANSI = {
    "plain": "default",
    "strong": "bold default",
    "dim": "dim default",
    "faint": "dim default",
    "good": "bold green",
    "warn": "bold yellow",
    "bad": "bold red",
    "calm": "bold default",
    "accent": "cyan",
    "key": "bold cyan",
    "cursor": "bold reverse",
    "ghost": "dim default",
    "threshold": "dim yellow",
    "loss": "cyan",
    "grad_norm": "yellow",
    "embed_grad_norm": "magenta",
    "embed_share": "magenta",
    "lr": "green",
    "throughput": "blue",
    "raw": "dim default",
}
CURVES = ("loss", "grad_norm", "embed_grad_norm", "embed_share", "lr", "throughput")
BAND = ".band"  # suffix of a tone that lies on the detector's band
_BAND_BACKGROUND = "#1b2731"


def _styles(names: Mapping[str, str], band: str) -> dict[str, Style]:
    styles = {name: Style.parse(text) for name, text in names.items()}
    ground = Style.parse(band) if band else Style()
    return styles | {name + BAND: style + ground for name, style in styles.items()}


FULL = _styles(_FULL, f"on {_BAND_BACKGROUND}")
ANSI = _styles(_ANSI, "")


def tone_of(signal: str, among: Sequence[str]) -> str:
    """The tone of a curve: its own, else one by its place."""
    if signal in CURVES:
        return signal
    return CURVES[(among.index(signal) if signal in among else 0) % len(CURVES)]
