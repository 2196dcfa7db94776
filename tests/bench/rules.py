"""Published rules of other systems, from their formulas and with their defaults, as baselines.

Each takes the loss and the gradient norm of one record (None: not logged) and returns None or a
verdict. The verdict is what the rule does: a skipped or clipped update is a skip, a restart or a
rollback is a rollback.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable
from typing import Protocol

SKIP, ROLLBACK = "skip", "rollback"


class Rule(Protocol):
    def observe(self, loss: float | None, norm: float | None) -> str | None: ...


class _Window:
    """The last `size` values with their mean and unbiased standard deviation, in constant work.

    A NaN inside makes both NaN, as it does in a tensor.
    """

    def __init__(self, size: int) -> None:
        self.values: deque[float] = deque()
        self.size = size
        self._bad = 0
        self._since = 0
        self._sum = self._squares = self._shift = 0.0

    def push(self, value: float) -> None:
        self.values.append(value)
        self._count(value, 1)
        if len(self.values) > self.size:
            self._count(self.values.popleft(), -1)
        self._since += 1
        if self._since >= self.size:  # rounding must not add up
            self._since = 0
            finite = [v for v in self.values if math.isfinite(v)]
            self._shift = finite[0] if finite else 0.0
            self._sum = math.fsum(v - self._shift for v in finite)
            self._squares = math.fsum((v - self._shift) ** 2 for v in finite)

    def _count(self, value: float, sign: int) -> None:
        if not math.isfinite(value):
            self._bad += sign
            return
        self._sum += sign * (value - self._shift)
        self._squares += sign * (value - self._shift) ** 2

    def mean_and_sigma(self) -> tuple[float, float]:
        n = len(self.values)
        if self._bad or n < 2:
            return math.nan, math.nan
        mean = self._sum / n
        return self._shift + mean, math.sqrt(max(0.0, (self._squares - n * mean * mean) / (n - 1)))


class OlmoSkipStep:
    """OLMo-core, optim/skip_step_optimizer.py: apply iff loss and norm are within 6 sigma of the
    last 128.

    With fewer than 64 values everything is applied. Outliers enter the window.
    """

    WINDOW, LEAST, SIGMA = 128, 64, 6.0

    def __init__(self) -> None:
        self._windows = _Window(self.WINDOW), _Window(self.WINDOW)

    def observe(self, loss: float | None, norm: float | None) -> str | None:
        apply = True
        for window, value in zip(self._windows, (loss, norm), strict=True):
            if value is None:
                continue
            if len(window.values) >= self.LEAST:
                mean, sigma = window.mean_and_sigma()
                apply &= value - mean <= self.SIGMA * sigma  # false for NaN
            window.push(value)
        return None if apply else SKIP


class ZClip:
    """ZClip (Kumar et al. 2025): a norm over 2.5 sigma of its moving average is clipped. EMA 0.97,
    25 to begin with.
    """

    ALPHA, THRESHOLD, WARM_UP, EPSILON = 0.97, 2.5, 25, 1e-6

    def __init__(self) -> None:
        self._warm: list[float] = []
        self._mean = self._variance = 0.0

    def observe(self, loss: float | None, norm: float | None) -> str | None:
        if norm is None:
            return None
        if len(self._warm) < self.WARM_UP:
            self._warm.append(norm)
            if len(self._warm) == self.WARM_UP:
                self._mean = sum(self._warm) / self.WARM_UP
                self._variance = sum((v - self._mean) ** 2 for v in self._warm) / self.WARM_UP
            return None
        sigma = math.sqrt(self._variance) if self._variance >= 0 else math.nan
        z = (norm - self._mean) / (sigma + self.EPSILON)
        clipped = self._mean + self.THRESHOLD**2 * sigma / z if z > self.THRESHOLD else norm
        self._mean = self.ALPHA * self._mean + (1 - self.ALPHA) * clipped
        self._variance = (
            self.ALPHA * self._variance + (1 - self.ALPHA) * (clipped - self._mean) ** 2
        )
        return SKIP if z > self.THRESHOLD else None


class KillLossSpike:
    """llm-foundry: five consecutive losses of at least twice the mean of the window end the run.

    Args:
        records: of the run; the window is 5 % of it, at least 100.
    """

    PATIENCE, FACTOR, LEAST, SHARE = 5, 2.0, 100, 0.05

    def __init__(self, records: int) -> None:
        self._window: deque[float] = deque(maxlen=max(self.LEAST, int(self.SHARE * records)))
        self._sum = 0.0
        self._count = 0

    def observe(self, loss: float | None, norm: float | None) -> str | None:
        if loss is None:
            return None
        window = self._window
        full = len(window) == window.maxlen
        self._count = (
            self._count + 1 if full and loss >= self.FACTOR * self._sum / len(window) else 0
        )
        if full:
            self._sum -= window[0]
        window.append(loss)
        self._sum += loss
        return ROLLBACK if self._count >= self.PATIENCE else None


class LightningSpikeDetection:
    """lightning.fabric SpikeDetection: above the last one and off the mean of 10 by twice that
    mean; or not finite.
    """

    WINDOW, ATOL_FACTOR = 10, 2.0

    def __init__(self) -> None:
        self._window: deque[float] = deque(maxlen=self.WINDOW)
        self._last = math.inf

    def observe(self, loss: float | None, norm: float | None) -> str | None:
        if loss is None:
            return None
        if not math.isfinite(loss):
            return ROLLBACK
        spike = False
        if len(self._window) == self.WINDOW and loss > self._last:
            mean = sum(self._window) / self.WINDOW
            spike = abs(loss - mean) >= self.ATOL_FACTOR * mean
        if spike:
            return ROLLBACK
        self._window.append(loss)
        self._last = loss
        return None


class MegatronSpiky:
    """Megatron-LM rerun_state_machine.is_unexpectedly_large: ten times the maximum of the first
    100, NaN or Inf.
    """

    FIRST, FACTOR = 100, 10.0

    def __init__(self) -> None:
        self._most = -math.inf
        self._seen = 0

    def observe(self, loss: float | None, norm: float | None) -> str | None:
        if loss is None:
            return None
        if not math.isfinite(loss):
            return ROLLBACK
        if self._seen < self.FIRST:
            self._seen += 1
            self._most = max(self._most, loss)
            return None
        return ROLLBACK if loss >= self.FACTOR * self._most else None


class Arc:
    """ARC 5.2 (arc-training), loss and gradient thresholds after 50 records of calibration."""

    CALIBRATION, RECENT, FACTOR, SIGMAS, LOSS_FLOOR, NORM_FLOOR = 50, 5, 10.0, 10.0, 10.0, 100.0

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._recent: deque[float] = deque(maxlen=self.RECENT)
        self._loss_limit = self._norm_limit = math.inf

    def observe(self, loss: float | None, norm: float | None) -> str | None:
        bad = [value for value in (loss, norm) if value is not None and not math.isfinite(value)]
        if bad:
            return ROLLBACK
        fired = False
        if loss is not None:
            if len(self._losses) < self.CALIBRATION:
                self._losses.append(loss)
                if len(self._losses) == self.CALIBRATION:
                    self._loss_limit = max(self.LOSS_FLOOR, self._limit(self._losses))
            else:
                mean = sum(self._recent) / len(self._recent)
                fired |= loss > max(self.LOSS_FLOOR, self.FACTOR * mean) or loss > self._loss_limit
            if not fired:
                self._recent.append(loss)
        if norm is not None:
            if len(self._norms) < self.CALIBRATION:
                self._norms.append(norm)
                if len(self._norms) == self.CALIBRATION:
                    self._norm_limit = max(self.NORM_FLOOR, self._limit(self._norms))
            else:
                fired |= norm > self._norm_limit
        return ROLLBACK if fired else None

    def _limit(self, values: list[float]) -> float:
        mean = statistics.fmean(values)
        return mean + self.SIGMAS * max(statistics.stdev(values), 0.1 * mean)


class FlagScale:
    """FlagScale: a loss more than 20 % above the last accepted one is skipped."""

    RISE = 0.2

    def __init__(self) -> None:
        self._last: float | None = None

    def observe(self, loss: float | None, norm: float | None) -> str | None:
        if loss is None:
            return None
        if self._last is not None and loss > (1 + self.RISE) * self._last:
            return SKIP
        self._last = loss
        return None


class InternEvo:
    """InternEvo: a loss of more than 1.5 times the one before raises an alert."""

    FACTOR = 1.5

    def __init__(self) -> None:
        self._last: float | None = None

    def observe(self, loss: float | None, norm: float | None) -> str | None:
        if loss is None:
            return None
        fired = self._last is not None and loss > self.FACTOR * self._last
        self._last = loss
        return SKIP if fired else None


class RobustZ:
    """A simple rule: median and MAD of the logarithms of the last 128, 8 sigma, spikes
    kept out.
    """

    WINDOW, LEAST, SIGMA = 128, 32, 8.0

    def __init__(self) -> None:
        self._signals = _Sorted(self.WINDOW), _Sorted(self.WINDOW)

    def observe(self, loss: float | None, norm: float | None) -> str | None:
        fired = False
        logs: list[tuple[_Sorted, float]] = []
        for window, value in zip(self._signals, (loss, norm), strict=True):
            if value is None:
                continue
            if not math.isfinite(value):
                fired = True
            elif value > 0:
                y = math.log(value)
                logs.append((window, y))
                if len(window) >= self.LEAST:
                    centre, scale = window.median_and_mad()
                    fired |= y - centre > self.SIGMA * max(1.4826 * scale, 1e-4)
        if fired:
            return SKIP
        for window, y in logs:
            window.push(y)
        return None


class _Sorted:
    def __init__(self, size: int) -> None:
        self._arrived: deque[float] = deque()
        self._sorted: list[float] = []
        self._size = size

    def __len__(self) -> int:
        return len(self._sorted)

    def push(self, value: float) -> None:
        self._arrived.append(value)
        insort(self._sorted, value)
        if len(self._arrived) > self._size:
            del self._sorted[bisect_left(self._sorted, self._arrived.popleft())]

    def median_and_mad(self) -> tuple[float, float]:
        median = statistics.median(self._sorted)
        return median, statistics.median(abs(value - median) for value in self._sorted)


# name -> a new rule for a run of so many records
RULES: dict[str, Callable[[int], Rule]] = {
    "OLMo skip-step": lambda records: OlmoSkipStep(),
    "ZClip": lambda records: ZClip(),
    "FlagScale": lambda records: FlagScale(),
    "InternEvo": lambda records: InternEvo(),
    "Lightning SpikeDetection": lambda records: LightningSpikeDetection(),
    "ARC thresholds": lambda records: Arc(),
    "Megatron spiky": lambda records: MegatronSpiky(),
    "KillLossSpike": KillLossSpike,
    "plain robust z": lambda records: RobustZ(),
}
