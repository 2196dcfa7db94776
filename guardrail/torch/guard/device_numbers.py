"""Numbers of the optimizer and of the loss scale that may be on the device.

They go to the host together with the step's packed vector, so they cost no wait of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from guardrail.torch.measure.loss_scaler import LossScale
from guardrail.torch.measure.reduction import pack_numbers


class DeviceNumbers:
    """The learning rate and the loss scale of a step.

    Args:
        optimizer: the one whose first learning rate is reported.
        scale: of fp16; None: nothing scales the loss.
    """

    def __init__(self, optimizer: Optimizer, scale: LossScale | None) -> None:
        self._optimizer, self._scale = optimizer, scale

    def tensors(self) -> list[Tensor]:
        """Return the numbers that are tensors, each 0-d: the learning rate, then the loss scale."""
        tensors = []
        rate = self._optimizer.param_groups[0]["lr"]
        if isinstance(rate, Tensor):
            tensors.append(rate)
        if self._scale is not None:
            tensors += self._scale.tensors()
        return tensors

    def read_with(self, vector: Tensor) -> tuple[list[float], float]:
        """Read a packed vector and these numbers. The host waits for the device once.

        Returns:
            (the values of the vector, the learning rate without any remedy).
        """
        values = pack_numbers(vector, self.tensors()).tolist()
        rate = self.take(values[len(vector) :], host_rate=self.host_rate())
        return values[: len(vector)], rate

    def host_rate(self) -> float | None:
        """Return the learning rate without any remedy; None: it is one of `tensors`."""
        rate = self._optimizer.param_groups[0]["lr"]
        if isinstance(rate, Tensor):
            return None
        return float(rate)

    def take(self, values: Sequence[float], *, host_rate: float | None) -> float:
        """Take over the values of `tensors`; return the learning rate without any remedy."""
        rest = list(values)
        if host_rate is None:
            host_rate = rest.pop(0)
        if self._scale is not None and rest:
            self._scale.take(*rest)
        return host_rate
