"""Named tones -> styles, one set for each theme; NO_COLOR keeps their attributes only.

A tone never carries a meaning alone: a symbol or a word stands beside it. Colour-blind viewers can
distinguish all hues; one set is exactly that of Okabe and Ito ("Color Universal Design", 2008).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.style import Style
from textual.theme import Theme

from guardrail.tui.model.view import CHARTS

BAND = ".band"  # suffix of a tone that lies on the detector's band
TERMINAL = "ansi-dark"  # textual's name of the theme with the colours of the terminal

_DARK = {
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
    "abandoned": "#8a97a3",
    "threshold": "#a8823f",
    "loss": "#5fb3ea",
    "grad_norm": "#e8c25a",
    "embed_grad_norm": "#c79bea",
    "embed_share": "#e39ac4",
    "lr": "#8fd6c0",
    "throughput": "#9fb4e8",
    "raw": "#56646f",
}
_LIGHT = {
    "plain": "#1f2a33",
    "strong": "bold #0b1217",
    "dim": "#5a6772",
    "faint": "#a9b4bd",
    "good": "bold #0a7d54",
    "warn": "bold #a85a00",
    "bad": "bold #c0341d",
    "calm": "bold #43525e",
    "accent": "#0b6bb0",
    "key": "bold #0b6bb0",
    "abandoned": "#75818b",
    "threshold": "#94701c",
    "loss": "#0b6bb0",
    "grad_norm": "#8f6b00",
    "embed_grad_norm": "#7b3fb0",
    "embed_share": "#b03f86",
    "lr": "#0a7d54",
    "throughput": "#4056b0",
    "raw": "#a3afb9",
}
_OKABE_ITO = {
    "plain": "#d9d9d9",
    "strong": "bold #ffffff",
    "dim": "#9a9a9a",
    "faint": "#595959",
    "good": "bold #009e73",
    "warn": "bold #e69f00",
    "bad": "bold #d55e00",
    "calm": "bold #b3b3b3",
    "accent": "#56b4e9",
    "key": "bold #56b4e9",
    "abandoned": "#9a9a9a",
    "threshold": "#e69f00",
    "loss": "#56b4e9",
    "grad_norm": "#f0e442",
    "embed_grad_norm": "#cc79a7",
    "embed_share": "#d9d9d9",
    "lr": "#009e73",
    "throughput": "#0072b2",
    "raw": "#595959",
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
    "abandoned": "dim default",
    "threshold": "dim yellow",
    "loss": "cyan",
    "grad_norm": "yellow",
    "embed_grad_norm": "magenta",
    "embed_share": "magenta",
    "lr": "green",
    "throughput": "blue",
    "raw": "dim default",
}


def _styles(names: Mapping[str, str], band: str) -> dict[str, Style]:
    styles = {name: Style.parse(text) for name, text in names.items()}
    ground = Style.parse(band) if band else Style()
    return styles | {name + BAND: style + ground for name, style in styles.items()}


def _theme(
    name: str, tones: Mapping[str, str], background: str, panel: str, *, dark: bool = True
) -> Theme:
    colour = {tone: text.split()[-1] for tone, text in tones.items()}
    return Theme(
        name=f"guardrail-{name}",
        primary=colour["accent"],
        secondary=colour["dim"],
        warning=colour["warn"],
        error=colour["bad"],
        success=colour["good"],
        accent=colour["accent"],
        foreground=colour["plain"],
        background=background,
        surface=background,
        panel=panel,
        dark=dark,
    )


_OURS = (
    (_theme("dark", _DARK, "#10151a", "#182129"), _styles(_DARK, "on #1b2731")),
    (_theme("light", _LIGHT, "#fbfcfd", "#e6ecf1", dark=False), _styles(_LIGHT, "on #e2ecf4")),
    (_theme("colour-blind", _OKABE_ITO, "#0b0b0b", "#1a1a1a"), _styles(_OKABE_ITO, "on #1c232b")),
)
OURS = tuple(theme for theme, _ in _OURS)
ANSI = _styles(_ANSI, "")
_STYLES = {theme.name: styles for theme, styles in _OURS}
# Name of a theme -> its name in textual.
THEMES = {theme.name.removeprefix("guardrail-"): theme.name for theme in OURS} | {
    "terminal": TERMINAL
}


def theme_styles(theme: str) -> Mapping[str, Style]:
    """Return the styles of a theme by its name in textual; else those of the terminal."""
    return _STYLES.get(theme, ANSI)


def curve_tone(signal: str, among: Sequence[str]) -> str:
    """Return the tone of a curve: its own, else one by its position among the charts."""
    if signal in CHARTS:
        return signal
    position = among.index(signal) if signal in among else 0
    return CHARTS[position % len(CHARTS)]
