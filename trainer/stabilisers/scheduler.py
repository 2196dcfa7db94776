"""The scheduler: sets the learning rate of the optimizers before each update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from trainer.stabilisers.zclip import ZClip


class Scheduler:
    """Keeps the learning rate at `schedule(number of the next update)`.

    Its state holds ZClip's statistics too, so that they travel with snapshots. The state is plain
    numbers: `load_state_dict(state_dict())` restores exactly the same learning rate.

    Args:
        schedule: step (from 1) -> learning rate of that update.
        zclip: whose statistics belong to the state; None: not used.
    """

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        schedule: Callable[[int], float],
        *,
        zclip: ZClip | None = None,
    ) -> None:
        if isinstance(optimizer, Optimizer):
            optimizer = [optimizer]
        self.optimizers = list(optimizer)
        self.schedule = schedule
        self.zclip = zclip
        self._set_step(1)

    def step(self) -> None:
        """Set the learning rate of the next update; called after each applied update."""
        self._set_step(self.next_step + 1)

    def _set_step(self, step: int) -> None:
        self.next_step = step
        rate = self.schedule(step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"next_step": self.next_step}
        if self.zclip is not None:
            state["zclip"] = self.zclip.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._set_step(int(state["next_step"]))
        if self.zclip is not None and "zclip" in state:
            self.zclip.load_state_dict(state["zclip"])
