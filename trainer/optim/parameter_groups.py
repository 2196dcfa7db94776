"""Which parameters an optimizer trains, and with which weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that need a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def decay_groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups in which only matrices have weight decay.

    Matrices are all parameters of two or more dimensions. Embeddings are among them: most
    configurations tie the input embedding to the output matrix, and it is treated the same when it
    is not tied. Norm weights and biases have no decay. A parameter that two modules share is in one
    group, once.
    """
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of the linear layers in `model.blocks`, the matrices that Muon is for.

    Embeddings, the output matrix and tables of positions are outside the blocks. In a module
    without `blocks` all linear layers count.
    """
    root = model.module if isinstance(model, DistributedDataParallel) else model
    found: dict[int, nn.Parameter] = {}
    for module in getattr(root, "blocks", root).modules():
        # transformers' GPT-2 calls a linear layer with a transposed weight Conv1D.
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            weight = module.get_parameter("weight")
            if weight.requires_grad and weight.ndim == 2:
                found[id(weight)] = weight
    return list(found.values())
