"""What others call the signals: a column's name -> the signal that it holds, and how surely.

First come names that are known to mean it; else the words of the name decide. Losses and norms of a validation, of a
part of the model or of the loss, and anything that says how it was summarised, are never taken for the signal itself.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping

from guardrail.errors import DataError
from guardrail.records import EMBED_GRAD_NORM, EMBED_SHARE, GRAD_NORM, LOSS, LOSS_SCALE, UPDATE_NORM
from guardrail.text import clean

# signal -> names, the surest first; compared in lower case with every run of other characters than letters and digits
# as one space. Who writes them: Trainer, nanoGPT, Megatron, torchtitan, OLMo, llm-foundry, NeMo, fairseq, Lightning.
KNOWN = {
    LOSS: (
        "loss",
        "train loss",
        "training loss",
        "lm loss",
        "train lm loss",
        "lm loss training lm loss",
        "loss metrics global avg loss",
        "train ce loss",
        "train crossentropyloss",
        "train cross entropy",
        "loss train cross entropy",
        "loss train total",
        "reduced train loss",
        "train loss step",
        "loss train",
        "train inner loss",
        "trl",
        "ce loss",
        "lm loss value",
    ),
    GRAD_NORM: (
        "grad norm",
        "train grad norm",
        "gradient norm",
        "train gradient norm",
        "global grad norm",
        "gradnorm",
        "grad norm grad norm",
        "optim total grad norm",
        "l2 norm grad global",
        "grad 2 0 norm total",
        "grad 2 norm total",
        "train inner gnorm",
        "gnorm",
        "total norm",
        "norm",
    ),
    EMBED_GRAD_NORM: ("embed grad norm", "train embed grad norm"),
    EMBED_SHARE: ("embed share", "train embed share"),
    UPDATE_NORM: ("update norm", "train update norm", "optim total update norm"),
    LOSS_SCALE: ("loss scale", "train loss scale", "grad scale", "loss scale loss scale"),
}
STEPS = (
    "step",
    "global step",
    "trainer global step",
    "train global step",
    "iteration",
    "iter",
    "steps",
    "iterations",
    "train step",
    "num updates",
    "update",
    "it",
)
_NOT_TRAINING = frozenset("val valid validation eval evaluation test dev heldout".split())
_A_PART = frozenset(
    "aux balance balancing router routing z mtp kl reg scale ppl perplexity acc accuracy min max std var best "
    "epoch ema smoothed layer layers block param parameter params weight weights clip clipped threshold baseline "
    "delta ratio time count tokens".split()
)
_WORD = re.compile(r"[a-z]+|\d+")
_OTHER = re.compile(r"[^a-z0-9]+")


@functools.cache
def rank(name: str) -> tuple[str, int] | None:
    """(signal, how far from sure; 0 is the surest), or None if the name means no signal."""
    plain = _OTHER.sub(" ", name.lower()).strip()
    for signal, names in KNOWN.items():
        if plain in names:
            return signal, names.index(plain)
    words = set(_WORD.findall(plain))
    if words & _NOT_TRAINING or words & _A_PART:
        return None
    far = 100 + len(words) - 10 * bool(words & {"train", "training"})
    norm = bool(words & {"norm", "gnorm", "gradnorm"}) and bool(words & {"grad", "grads", "gradient", "gradients"})
    if norm and words & {"embed", "embedding", "embeddings", "wte"}:
        return EMBED_GRAD_NORM, far
    if norm:
        return GRAD_NORM, far
    if words & {"loss", "nll", "xent", "crossentropy"}:
        return LOSS, far
    return None


class Chooser:
    """Which columns of a file hold which signals.

    Args:
        given: signal -> column, from the command line; it outranks every guess.
    """

    def __init__(self, given: Mapping[str, str] | None = None) -> None:
        self._given = {column: signal for signal, column in (given or {}).items()}

    def choose(self, names: Iterable[str]) -> dict[str, str]:
        """signal -> name, for the names of a file. The first of two equally sure names is taken."""
        best: dict[str, tuple[int, str]] = {}
        for name in names:
            found = (self._given[name], -1) if name in self._given else rank(name)
            if found is not None and (found[0] not in best or found[1] < best[found[0]][0]):
                best[found[0]] = found[1], name
        return {signal: name for signal, (_, name) in best.items()}

    def choose_or_refuse(self, names: Iterable[str], path: str) -> dict[str, str]:
        """As `choose`; DataError that lists the columns if none is a signal."""
        names = list(names)
        chosen = self.choose(names)
        if not chosen:
            listed = ", ".join(clean(name, 40) for name in names[:12]) + (", ..." if len(names) > 12 else "")
            raise DataError(
                f"{path}: no column looks like a training loss or a gradient norm; there are {listed or 'none'}"
                "\n  hint: --column loss=NAME says which one it is"
            )
        return chosen


def step_name(names: Iterable[str]) -> str | None:
    """The column that counts steps."""
    plain: dict[str, str] = {}
    for name in names:
        plain.setdefault(_OTHER.sub(" ", name.lower()).strip(), name)
    return next((plain[known] for known in STEPS if known in plain), None)
