"""Names of the signals of a step, and the columns of metrics.bin."""

from __future__ import annotations

from typing import NamedTuple

LOSS = "loss"  # nats a token, mean over the global batch


GRAD_NORM = "grad_norm"  # L2 norm of all gradients before clipping


EMBED_GRAD_NORM = "embed_grad_norm"  # L2 norm of the embedding gradients before clipping


EMBED_SHARE = "embed_share"  # embed_grad_norm^2 / grad_norm^2, in [0, 1]


UPDATE_NORM = "update_norm"  # L2 norm of the optimizer's last update, where it is measured


LOSS_SCALE = "loss_scale"  # what fp16 multiplies the loss by before the backward pass


class Column(NamedTuple):
    """A column of metrics.bin, and the curves that trackers draw of it; "": no such curve.

    Attributes:
        curve: "GROUP/NAME" of the values whose update was applied.
        rejected_curve: the same of the values whose update was rejected.
        shows_nan: a NaN is a result, so it is in the curve. Elsewhere it means "not measured".
    """

    name: str
    curve: str = ""
    rejected_curve: str = ""
    shows_nan: bool = False


# All are float64. There is one row per attempted step; rejected steps have one too.
COLUMNS = (
    Column("step"),
    Column("timeline"),
    Column("time"),
    Column("first"),
    Column("last"),
    Column(LOSS, "train/loss", "guard/rejected_loss", shows_nan=True),
    Column(GRAD_NORM, "train/grad_norm", "guard/rejected_grad_norm", shows_nan=True),
    Column(EMBED_GRAD_NORM, "train/embed_grad_norm", "guard/rejected_embed_grad_norm"),
    Column(EMBED_SHARE, "train/embed_share"),
    Column("lr", "train/lr"),
    Column("tokens"),
    Column("step_time", "train/step_time"),
    Column("step_time_max"),
    Column("slowest_rank"),
    Column("guard_time"),
    Column("verdict"),  # index into list(Action); in `advise` always 0
    Column("loss_baseline"),
    Column("loss_threshold", "guard/loss_threshold"),
    Column("grad_norm_baseline"),
    Column("grad_norm_threshold", "guard/grad_norm_threshold"),
    Column("embed_grad_norm_baseline"),
    Column("embed_grad_norm_threshold", "guard/embed_grad_norm_threshold"),
    Column("eval_loss"),  # NaN: no evaluation after this step
    Column(LOSS_SCALE),  # NaN without fp16
)
METRIC_COLUMNS = tuple(column.name for column in COLUMNS)
