"""Names of the signals of a step, and the columns of metrics.bin."""

from __future__ import annotations

LOSS = "loss"  # nats a token, mean over the global batch


GRAD_NORM = "grad_norm"  # L2 norm of all gradients before clipping


EMBED_GRAD_NORM = "embed_grad_norm"  # L2 norm of the embedding gradients before clipping


EMBED_SHARE = "embed_share"  # embed_grad_norm^2 / grad_norm^2, in [0, 1]


UPDATE_NORM = "update_norm"  # L2 norm of the optimizer's last update, where it is measured


LOSS_SCALE = "loss_scale"  # what fp16 multiplies the loss by before the backward pass


# Columns of metrics.bin, all float64. One row per attempted step; rejected steps have one too.
METRIC_COLUMNS = (
    "step",
    "timeline",
    "time",
    "first",
    "last",
    LOSS,
    GRAD_NORM,
    EMBED_GRAD_NORM,
    EMBED_SHARE,
    "lr",
    "tokens",
    "step_time",
    "step_time_max",
    "slowest_rank",
    "guard_time",
    "verdict",  # index into list(Action); in `advise` always 0
    "loss_baseline",
    "loss_threshold",
    "grad_norm_baseline",
    "grad_norm_threshold",
    "embed_grad_norm_baseline",
    "embed_grad_norm_threshold",
    "eval_loss",  # NaN: no evaluation after this step
    LOSS_SCALE,  # NaN without fp16
)
