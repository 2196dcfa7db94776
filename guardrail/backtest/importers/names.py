"""Finds the signals of a log by the names that other programs give to their columns.

Known names come first. Otherwise the words of a name decide. These are never taken for a signal:
losses and norms of a validation, of a part of the model or of the loss, and statistics over steps.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping

from guardrail.backtest.importers.recorded_log import Log
from guardrail.core.errors import DataError
from guardrail.core.objective import find_policy_signal, is_policy_loss
from guardrail.core.records.signals import (
    EMBED_GRAD_NORM,
    EMBED_SHARE,
    GRAD_NORM,
    LOSS,
    LOSS_SCALE,
    UPDATE_NORM,
)
from guardrail.core.text import clean_text

# Signal -> names as `normalize` returns them, the surest first. They are those of Trainer, nanoGPT,
# Megatron, torchtitan, OLMo, llm-foundry, NeMo, fairseq and Lightning.
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
# Further signals, by the names of trl, verl, OpenRLHF, ms-swift and Megatron. They are judged only
# if the user asks for it; see `Chooser`.
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
    # a sum over the tokens of a completion; the others are means
    "sequence_kl": ("objective kl",),
    "entropy": ("entropy", "actor entropy", "policy entropy avg", "actor entropy loss"),
    "completion_length": (
        "completion length",
        "completions mean length",
        "response length mean",
        "response length",
        "glen",
    ),
    # share of the completions that were cut off
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
# Words of a part of the loss or the model, of a summary over steps, or of another quantity.
_A_PART = frozenset(
    "aux balance balancing router routing z mtp kl reg scale ppl perplexity acc accuracy min max"
    " std var best epoch ema smoothed layer layers block param parameter params weight weights clip"
    " clipped threshold baseline delta ratio time count tokens vf vpred critic rep lb".split()
)
MOST_LISTED = 40  # columns named in an error
# Ranks of a name: 0 is the surest. A known name comes before a guess.
_AFTER_PREFIX = 100  # a further signal whose name begins with a known prefix
_GUESS = 100  # a name that is not known, and whose words decide
_WORD = re.compile(r"[a-z]+|\d+")
_OTHER = re.compile(r"[^a-z0-9]+")


@functools.cache
def rank_signal(name: str) -> tuple[str, int] | None:
    """Return (signal, rank; 0 is the surest) of a column, or None if its name means no signal."""
    plain = normalize(name)
    for signal, names in KNOWN.items():
        if plain in names:
            return signal, names.index(plain)
    words = set(_WORD.findall(plain))
    if words & _NOT_TRAINING or words & _A_PART or ("entropy" in words and "cross" not in words):
        return None
    if plain.startswith("value") or plain.endswith("loss value avg"):
        return None  # of the value model in reinforcement learning
    bare = _without_prefix(plain)
    for signal, names in KNOWN.items():
        if bare in names:
            return signal, len(names) + names.index(bare)
    return _guess_signal(words)


def _guess_signal(words: set[str]) -> tuple[str, int] | None:
    """Return the signal of a name that is not known. Fewer words are surer."""
    rank = _GUESS + len(words)
    if words & {"train", "training"}:
        rank -= 10
    is_norm = bool(words & {"norm", "gnorm", "gradnorm"})
    if is_norm and words & {"grad", "grads", "gradient", "gradients"}:
        if words & {"embed", "embedding", "embeddings", "wte"}:
            return EMBED_GRAD_NORM, rank
        return GRAD_NORM, rank
    if words & {"loss", "nll", "xent", "crossentropy"}:
        return LOSS, rank
    return None


@functools.cache
def rank_further(name: str) -> tuple[str, int] | None:
    """Return (signal of `FURTHER`, rank) of a column, or None."""
    plain = normalize(name)
    for candidate, rank in ((plain, 0), (_without_prefix(plain), _AFTER_PREFIX)):
        for signal, names in FURTHER.items():
            if candidate in names:
                return signal, rank + names.index(candidate)
    return None


@functools.cache
def is_evaluation(name: str) -> bool:
    """Return whether a column is of an evaluation: "eval_loss", "val/accuracy", "heldout_reward"."""
    return bool(set(_WORD.findall(normalize(name))) & _NOT_TRAINING)


def says_evaluation(value: object) -> bool:
    """Return whether the kind of a row is an evaluation: "eval", "validation"."""
    return isinstance(value, str) and is_evaluation(value)


def choose_signals(log: Log, names: Iterable[str], chooser: Chooser) -> None:
    """Set the names of a log: its signals, further signals, and the sign of reinforcement learning.

    Raises:
        DataError: as `Chooser.choose_or_refuse`.
    """
    names = list(names)
    log.names = chooser.choose_or_refuse(names, log.path)
    read = set(log.names.values())
    further = chooser.choose_further(names)
    log.further = {signal: name for signal, name in further.items() if name not in read}
    loss = log.names.get(LOSS, "")
    if is_policy_loss(loss):
        log.policy_column = loss
    else:
        log.policy_column = find_policy_signal(names) or ""


def normalize(name: str) -> str:
    """Return a name in lower case, with one space for each run of other characters."""
    return _OTHER.sub(" ", name.lower()).strip()


def _without_prefix(plain: str) -> str:
    """Return "pg loss" for "data actor pg loss"."""
    words = plain.split()
    while len(words) > 1 and words[0] in _PREFIXES:
        words = words[1:]
    return " ".join(words)


class ColumnError(DataError):
    """A column that the user chose does not exist. `signal` is the signal that it was chosen for."""

    def __init__(self, message: str, signal: str) -> None:
        super().__init__(message, kind="no_column")
        self.signal = signal


class Chooser:
    """Chooses the columns of a file that hold signals.

    Args:
        given: signal -> column, from the command line or from `guard.extra_signals`. It comes
            before every guess. The column may also be named by its signal in `FURTHER`: "reward"
            finds "critic/rewards/mean".
    """

    def __init__(self, given: Mapping[str, str] | None = None) -> None:
        self._given = dict(given or {})

    def choose(self, names: Iterable[str]) -> dict[str, str]:
        """Return signal -> column. The first of two equally sure columns is taken."""
        names = list(names)
        given = self._find_given(names)
        taken = set(given.values())
        best = _choose_best(names, rank_signal)
        return {signal: name for signal, name in best.items() if name not in taken} | given

    def choose_further(self, names: Iterable[str]) -> dict[str, str]:
        """Return signal of `FURTHER` -> column."""
        return _choose_best(names, rank_further)

    def choose_or_refuse(self, names: Iterable[str], path: str) -> dict[str, str]:
        """Return as `choose`.

        Raises:
            ColumnError: a column that the user chose is missing. Both errors list the columns.
            DataError: no column is a signal.
        """
        names = list(names)
        chosen = self.choose(names)
        listed = ", ".join(clean_text(name, 40) for name in names[:MOST_LISTED]) or "none"
        if len(names) > MOST_LISTED:
            listed += ", ..."
        found = self._find_given(names)
        for signal, column in self._given.items():
            if signal not in found:
                missing = (
                    f"there is no column {clean_text(column, 60)!r} for {clean_text(signal, 60)}"
                )
                raise ColumnError(f"{path}: {missing}; there are {listed}", signal)
        if not chosen:
            raise DataError(
                f"{path}: no column looks like a training loss or a gradient norm; there are {listed}"
                "\n  hint: --column loss=NAME says which one it is",
                kind="no_signal",
            )
        return chosen

    def _find_given(self, names: list[str]) -> dict[str, str]:
        """Return signal -> column, of the columns that the user chose and that exist."""
        further = self.choose_further(names)
        found = {}
        for signal, column in self._given.items():
            if column in names:
                found[signal] = column
            elif column in further:
                found[signal] = further[column]
        return found


def _choose_best(
    names: Iterable[str], rank_of: Callable[[str], tuple[str, int] | None]
) -> dict[str, str]:
    """Return signal -> its surest column."""
    best: dict[str, tuple[int, str]] = {}
    for name in names:
        found = rank_of(name)
        if found is None:
            continue
        signal, rank = found
        if signal not in best or rank < best[signal][0]:
            best[signal] = rank, name
    return {signal: name for signal, (_, name) in best.items()}


def find_step_column(names: Iterable[str]) -> str | None:
    """Return the column that counts steps, or None."""
    columns: dict[str, str] = {}
    for name in names:
        columns.setdefault(normalize(name), name)
    for known in STEPS:
        if known in columns:
            return columns[known]
    return None
