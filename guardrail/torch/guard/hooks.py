"""What a training loop may give the guard besides model and data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from guardrail.torch.diagnose.attribution import Texts
from guardrail.torch.diagnose.batch_replay import LabelOrderLosses, Replay
from guardrail.torch.diagnose.embedding_tokens import DescribeTokens

# Sample ids -> (documents as dicts, number of documents).
DescribeSamples = Callable[[Sequence[int]], tuple[list[dict[str, Any]], int]]


@dataclass(frozen=True, kw_only=True)
class LoopHooks:
    """Functions of a training loop that the guard calls. All are optional.

    Attributes:
        replay: (batch, step, rows) -> (loss sum, label tokens, nominal tokens): runs forward and
            backward over this rank's share of any batch; see guardrail.torch.diagnose.batch_replay.
            With it the guard looks for the cause of an incident. Called on every rank.
        label_order_gain: (batch, step) -> (loss sum, loss sum with the labels of each row in
            another order, label tokens) of this rank's share. With it the guard distinguishes text
            of another kind from random labels. Called on every rank.
        rerun_forward: runs the forward passes of this rank's share of the last batch again, with
            the same RNG state. Called on every rank after a non-finite loss, to find the module
            that it came from.
        describe_samples: sample ids -> (documents as dicts, number of documents), for the journal.
            Called on rank 0.
        sample_texts: sample ids -> their texts as the model read them, to describe what is unusual
            about them. Called on rank 0.
        describe_tokens: (token ids, sample ids of a batch) -> of each token a dict with "text" and
            "count", for the journal of an incident of the embedding. Called on rank 0.
        fixed_batch_loss: returns the loss on one fixed batch, the same on every rank. Stored with a
            checkpoint and compared after a resume. Called on every rank.
        scheduled_lr: step -> the scheduled learning rate, compared after a resume.
        fingerprints: a dictionary of names and values that are stored with a checkpoint. A resume
            with another "data" is refused; any other change is noted.
    """

    replay: Replay | None = None
    label_order_gain: LabelOrderLosses | None = None
    rerun_forward: Callable[[], None] | None = None
    describe_samples: DescribeSamples | None = None
    sample_texts: Texts | None = None
    describe_tokens: DescribeTokens | None = None
    fixed_batch_loss: Callable[[], float] | None = None
    scheduled_lr: Callable[[int], float] | None = None
    fingerprints: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class RankLayout:
    """How the model and the data are spread over the ranks.

    Attributes:
        device: that computes; None: where the parameters lie, which is the host when they are
            offloaded.
        counts_loss: whether this rank's loss and tokens enter the sums; False on all but one of the
            ranks that compute the same loss, as those of a tensor-parallel group do.
        shard_ranks: the consecutive ranks that hold the same part of the model as this one, such as
            a stage of a pipeline; None: all.
    """

    device: torch.device | None = None
    counts_loss: bool = True
    shard_ranks: range | None = None
