"""What others call the signals: a column's name -> the signal that it holds, and how surely.

First come names that are known to mean it; else the words of the name decide. Losses and norms of a
validation, of a part of the model or of the loss, and anything that says how it was summarised, are
never taken for the signal itself.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping

from guardrail.backtest.importers.recorded_log import Log
from guardrail.core.errors import DataError
from guardrail.core.objective import is_policy_loss, policy_name
from guardrail.core.records import (
    EMBED_GRAD_NORM,
    EMBED_SHARE,
    GRAD_NORM,
    LOSS,
    LOSS_SCALE,
    UPDATE_NORM,
)
from guardrail.core.text import clean_text

# signal -> names, the surest first; compared in lower case with every run of other characters than
# letters and digits as one space. Who writes them: Trainer, nanoGPT, Megatron, torchtitan, OLMo,
# llm-foundry, NeMo, fairseq, Lightning.
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
        "policy loss",
        "pg loss",
        "actor pg loss",
        "actor policy loss",
        "act loss",
        "loss policy avg",
        "actor loss",
        "loss pg",
        "ppo loss policy",
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
        "actor grad norm",
        "policy grad norm",
        "actor gn",
    ),
    EMBED_GRAD_NORM: ("embed grad norm", "train embed grad norm"),
    EMBED_SHARE: ("embed share", "train embed share"),
    UPDATE_NORM: ("update norm", "train update norm", "optim total update norm"),
    LOSS_SCALE: ("loss scale", "train loss scale", "grad scale", "loss scale loss scale"),
}
# Signals that are recorded beside them, by the names that trl, verl, OpenRLHF, ms-swift and
# Megatron give them. Nothing judges them unless it is asked for; see `Chooser`.
FURTHER = {
    "value_loss": (
        "critic vf loss",
        "loss value avg",
        "value loss",
        "ppo loss value",
        "critic loss",
        "vf loss",
    ),
    "critic_grad_norm": ("critic grad norm",),
    "reward": (
        "reward",
        "rewards mean",
        "reward mean",
        "mean reward",
        "critic rewards mean",
        "critic score mean",
        "objective scores",
        "env reward mean",
        "rm",
        "objective rlhf reward",
    ),
    "reward_std": ("reward std",),
    "zero_std_frac": ("frac reward zero std", "frac zero std"),
    "advantage": ("mean advantage", "advantage", "advantages mean", "critic advantages mean"),
    "kl": (
        "kl",
        "approx kl",
        "kl divergence",
        "mean kl",
        "actor kl loss",
        "actor ppo kl",
        "critic kl",
        "policy approxkl avg",
        "ppo mean kl",
    ),
    # a sum over the completion, where the others are means over its tokens
    "sequence_kl": ("objective kl",),
    "entropy": ("entropy", "actor entropy", "policy entropy avg", "actor entropy loss"),
    "completion_length": (
        "completion length",
        "completions mean length",
        "response length mean",
        "response length",
        "glen",
    ),
    # completions that were cut off
    "clipped_ratio": ("completions clipped ratio", "response length clip ratio"),
    "clip_frac": (
        "clip ratio region mean",
        "clip ratio",
        "actor pg clipfrac",
        "policy clipfrac avg",
    ),
    "reward_margin": ("rewards margins",),
    "reward_accuracy": ("rewards accuracies",),
    "logps_chosen": ("logps chosen",),
    "logps_rejected": ("logps rejected",),
    "aux_loss": (
        "aux loss",
        "load balancing loss",
        "moe aux loss",
        "lb loss",
        "router aux loss",
        "balance loss",
    ),
    "z_loss": ("z loss", "router z loss"),
    "expert_share": ("expert load max", "router max frac max"),
}
KINDS = ("kind", "split", "phase", "type", "mode")  # columns that say of which kind a row is
# What programs put before the name of a signal.
_PREFIXES = frozenset({"train", "training", "data", "env", "actor", "policy"})
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
    "training global step",
    "global step max steps",  # ms-swift: "750/3690"
    "episode",
)
_NOT_TRAINING = frozenset("val valid validation eval evaluation test dev heldout".split())
_A_PART = frozenset(
    "aux balance balancing router routing z mtp kl reg scale ppl perplexity acc accuracy min max std var best "
    "epoch ema smoothed layer layers block param parameter params weight weights clip clipped threshold baseline "
    "delta ratio time count tokens vf vpred critic rep lb".split()
)
MOST_LISTED = 40  # columns named in an error
_WORD = re.compile(r"[a-z]+|\d+")
_OTHER = re.compile(r"[^a-z0-9]+")


@functools.cache
def rank(name: str) -> tuple[str, int] | None:
    """(signal, how far from sure; 0 is the surest), or None if the name means no signal."""
    plain = plain_name(name)
    for signal, names in KNOWN.items():
        if plain in names:
            return signal, names.index(plain)
    words = set(_WORD.findall(plain))
    if words & _NOT_TRAINING or words & _A_PART or ("entropy" in words and "cross" not in words):
        return None
    if plain.startswith("value") or plain.endswith("loss value avg"):
        return None
    bare = _without_prefix(plain)
    for signal, names in KNOWN.items():
        if bare in names:
            return signal, len(names) + names.index(bare)
    far = 100 + len(words) - 10 * bool(words & {"train", "training"})
    norm = bool(words & {"norm", "gnorm", "gradnorm"}) and bool(
        words & {"grad", "grads", "gradient", "gradients"}
    )
    if norm and words & {"embed", "embedding", "embeddings", "wte"}:
        return EMBED_GRAD_NORM, far
    if norm:
        return GRAD_NORM, far
    if words & {"loss", "nll", "xent", "crossentropy"}:
        return LOSS, far
    return None


@functools.cache
def further(name: str) -> tuple[str, int] | None:
    """(Signal of `FURTHER`, how far from sure) of a column, or None."""
    plain = plain_name(name)
    for candidate, far in ((plain, 0), (_without_prefix(plain), 100)):
        for signal, names in FURTHER.items():
            if candidate in names:
                return signal, far + names.index(candidate)
    return None


@functools.cache
def is_evaluation(name: str) -> bool:
    """Whether a column is of an evaluation: "eval_loss", "val/accuracy", "heldout_reward"."""
    return bool(set(_WORD.findall(plain_name(name))) & _NOT_TRAINING)


def says_evaluation(value: object) -> bool:
    """Whether the kind of a row is an evaluation: "eval", "validation"."""
    return isinstance(value, str) and is_evaluation(value)


def describe(log: Log, names: Iterable[str], chooser: Chooser) -> None:
    """Choose the signals of a log among the names of its columns; DataError as of
    `Chooser.choose_or_refuse`.
    """
    names = list(names)
    log.names = chosen = chooser.choose_or_refuse(names, log.path)
    read = set(chosen.values())
    log.beside = {
        signal: name for signal, name in chooser.beside(names).items() if name not in read
    }
    loss = chosen.get(LOSS, "")
    log.policy = loss if is_policy_loss(loss) else (policy_name(names) or "")


def plain_name(name: str) -> str:
    return _OTHER.sub(" ", name.lower()).strip()


def _without_prefix(plain: str) -> str:
    """ "data actor pg loss" -> "pg loss"."""
    words = plain.split()
    while len(words) > 1 and words[0] in _PREFIXES:
        words = words[1:]
    return " ".join(words)


class ColumnError(DataError):
    """A column that was asked for is not there. `signal` is what it was to hold."""

    def __init__(self, message: str, signal: str) -> None:
        super().__init__(message)
        self.signal = signal


class Chooser:
    """Which columns of a file hold which signals.

    Args:
        given: signal -> column, from the command line or from `guard.extra_signals`; it outranks every
            guess. The column may also be named by its signal in `FURTHER`: "reward" finds
            "critic/rewards/mean".
    """

    def __init__(self, given: Mapping[str, str] | None = None) -> None:
        self._given = dict(given or {})

    def choose(self, names: Iterable[str]) -> dict[str, str]:
        """signal -> name, for the names of a file. The first of two equally sure names is taken."""
        names = list(names)
        best: dict[str, tuple[int, str]] = {}
        for name in names:
            found = rank(name)
            if found is not None and (found[0] not in best or found[1] < best[found[0]][0]):
                best[found[0]] = found[1], name
        given = self._found(names)
        taken = set(given.values())
        return {signal: name for signal, (_, name) in best.items() if name not in taken} | given

    def _found(self, names: list[str]) -> dict[str, str]:
        """signal -> name, of the columns that were asked for and are there."""
        beside = self.beside(names)
        found = ((signal, c if c in names else beside.get(c)) for signal, c in self._given.items())
        return {signal: name for signal, name in found if name is not None}

    def beside(self, names: Iterable[str]) -> dict[str, str]:
        """Signal of `FURTHER` -> name, for the names of a file."""
        best: dict[str, tuple[int, str]] = {}
        for name in names:
            found = further(name)
            if found is not None and (found[0] not in best or found[1] < best[found[0]][0]):
                best[found[0]] = found[1], name
        return {signal: name for signal, (_, name) in best.items()}

    def choose_or_refuse(self, names: Iterable[str], path: str) -> dict[str, str]:
        """As `choose`; a DataError that lists the columns if none is a signal, or one that was
        asked for is missing.
        """
        names = list(names)
        chosen = self.choose(names)
        listed = ", ".join(clean_text(name, 40) for name in names[:MOST_LISTED]) or "none"
        listed += ", ..." if len(names) > MOST_LISTED else ""
        found = self._found(names)
        for signal, column in self._given.items():
            if signal not in found:
                missing = (
                    f"there is no column {clean_text(column, 60)!r} for {clean_text(signal, 60)}"
                )
                raise ColumnError(f"{path}: {missing}; there are {listed}", signal)
        if not chosen:
            raise DataError(
                f"{path}: no column looks like a training loss or a gradient norm; there are {listed}"
                "\n  hint: --column loss=NAME says which one it is"
            )
        return chosen


def step_name(names: Iterable[str]) -> str | None:
    """The column that counts steps."""
    plain: dict[str, str] = {}
    for name in names:
        plain.setdefault(plain_name(name), name)
    return next((plain[known] for known in STEPS if known in plain), None)
