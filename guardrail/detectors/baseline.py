"""The robust baseline of one signal: a centre that follows drift, and a scale that outliers cannot
move.

Everything is measured in logarithms. Units cancel, and a norm that doubles weighs the same at 0.1
and at 10.

centre  Median of the last `FOLLOW` accepted logarithms. It is short, because losses fall fast in
        early training and norms drift for a complete run. It is long enough that a few consecutive
        bad values do not move it.
scale   1.4826 x the median of the deviations of the last `history` accepted steps. The factor makes
        it the standard deviation if the noise is normal (Hampel 1974). The deviation of a value is
        its difference to the centre before it, less the lag. The lag is the median of the last such
        differences: on a steady slope the centre lags by a constant, which is not noise. Without
        this correction it would hide every spike while the loss falls fast.

Scores are taken from the centre without the lag. On a falling signal that is the careful side. When
a fall ends at once, there is no lag that could be wrong.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from typing import Any

MAD_TO_SIGMA = 1.4826
# Values in the centre. Six consecutive outliers would move it. A fall of 1 % a step makes it lag by
# 6 %.
FOLLOW = 12
# Differences in the lag: twice as many, or the lag would follow the noise.
LAG = 2 * FOLLOW
# While a run is young, only the newer half of its values counts, but at least this many. The start
# is nothing like what follows, and must not decide about a short run to its end.
YOUNGEST = 8
# The scale never counts as less than this share of its recent usual value. Otherwise repeated
# numbers (a stuck or rounded signal) would make the next ordinary value a spike.
USUAL_SHARE = 0.5
# "Recent", in lengths of the history; of a young run the last quarter. The mean is geometric, so a
# few high values do not dominate.
USUAL_HISTORIES = 8


class SortedWindow:
    """The last `size` values, in order of arrival and sorted.

    A push costs one bisection and one short memmove.
    """

    __slots__ = ("arrivals", "size", "sorted")

    def __init__(self, size: int, values: Iterable[float] = ()) -> None:
        self.size = size
        self.arrivals: deque[float] = deque(values, maxlen=size)
        self.sorted = sorted(self.arrivals)

    def __len__(self) -> int:
        return len(self.sorted)

    def push(self, value: float) -> None:
        ordered, arrivals = self.sorted, self.arrivals
        if len(ordered) == self.size:
            oldest = arrivals[0]
            arrivals.append(value)  # drops it
            if oldest == value:
                return
            del ordered[bisect_left(ordered, oldest)]
        else:
            arrivals.append(value)
        insort(ordered, value)

    def drop_oldest(self) -> None:
        del self.sorted[bisect_left(self.sorted, self.arrivals.popleft())]

    def median(self) -> float:
        """Return the upper median. It is one of the values, so it scales exactly with the units."""
        return self.sorted[len(self.sorted) >> 1]

    def clear(self) -> None:
        self.arrivals.clear()
        self.sorted.clear()


class Baseline:
    """Centre and scale of the logarithm of one signal.

    Args:
        history: accepted steps in the scale.
        floor: smallest scale, in log units. Changes below a few times this are never reported.

    Attributes:
        count: accepted values since the beginning.
        usual: slow geometric mean of the scale.
        empty: no value was accepted yet; `centre` has no meaning then.
    """

    __slots__ = (
        "_centre",
        "_deviations",
        "_differences",
        "_share",
        "_young",
        "centre",
        "count",
        "empty",
        "floor",
        "history",
        "scale",
        "usual",
    )

    def __init__(self, *, history: int, floor: float) -> None:
        self.history = history
        self.floor = floor
        self._share = 1.0 / (USUAL_HISTORIES * history)
        # accepted values after which nothing depends on `count`
        self._young = max(4 * USUAL_HISTORIES * history, 2 * LAG)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.count = 0
        self.usual = self.floor
        self._centre = SortedWindow(FOLLOW)
        self._differences = SortedWindow(LAG)
        self._deviations = SortedWindow(self.history)
        # Every step reads these, so they are computed when they change.
        self.empty, self.centre, self.scale = True, 0.0, self.floor

    def learn(self, y: float) -> None:
        """Add an accepted logarithm, which must be finite.

        Each signal of each step calls this, so it is written for speed.
        """
        self.count = count = self.count + 1
        centre = self._centre.sorted
        if centre:
            lags = self._differences.sorted
            deviations = self._deviations.sorted
            difference = y - self.centre
            lag = lags[len(lags) >> 1] if lags else 0.0
            self._deviations.push(abs(difference - lag))
            self._differences.push(difference)
            if count <= self._young:
                most = max(YOUNGEST, count >> 1)
                for window in (self._differences, self._deviations):
                    if len(window) > most:
                        window.drop_oldest()
                share = min(1.0, max(4.0 / count, self._share))
            else:
                share = self._share
            now = MAD_TO_SIGMA * deviations[len(deviations) >> 1]
            if now < self.floor:
                now = self.floor
            self.usual = usual = self.usual * (now / self.usual) ** share
            least = USUAL_SHARE * usual
            if now < least:
                now = least
            self.scale = now
        self._centre.push(y)
        self.centre = centre[len(centre) >> 1]
        self.empty = False

    def _compute(self) -> None:
        """Compute what every step reads from the stored values."""
        self.empty = not self._centre.sorted
        self.centre = 0.0 if self.empty else self._centre.median()
        self.scale = self.floor
        if self._deviations.sorted:
            self.scale = max(
                MAD_TO_SIGMA * self._deviations.median(), USUAL_SHARE * self.usual, self.floor
            )

    def recentre(self) -> None:
        """Forget the centre and keep the scale, for a signal on a new level."""
        self._centre.clear()
        self._compute()

    def shift(self, by: float) -> None:
        """Add `by` to each logarithm of the centre, for a signal with another unit from now on."""
        self._centre = SortedWindow(FOLLOW, (y + by for y in self._centre.arrivals))
        self._compute()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {
            "count": self.count,
            "usual": self.usual,
            "centre": list(self._centre.arrivals),
            "differences": list(self._differences.arrivals),
            "deviations": list(self._deviations.arrivals),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state, also one with another length of the history."""
        self.count = int(state["count"])
        self.usual = float(state["usual"])
        self._centre = SortedWindow(FOLLOW, state["centre"])
        self._differences = SortedWindow(LAG, state["differences"])
        self._deviations = SortedWindow(self.history, state["deviations"])
        self._compute()
