"""The robust baseline of one signal: a centre that follows drift and a scale that outliers cannot
move.

Everything is measured in logarithms, so that units cancel and a norm that doubles weighs the same
at 0.1 and at 10.

    centre  median of the last `FOLLOW` accepted logarithms. Short, because losses fall fast in early training and
            norms drift for a whole run; long enough that a few bad values in a row do not move it.
    scale   1.4826 x median of the deviations of the last `window` accepted steps (1.4826 makes it the standard
            deviation if the noise is normal, Hampel 1974). A value's deviation is taken from the centre as it stood
            before it, less the lag: the median of the last such differences. On a steady slope the centre lags by
            a constant, which is no noise; left in, it would hide every spike of the first steps' fast fall.

Scores themselves are taken from the centre without the lag. On a falling signal that is the careful
side, and when a fall ends at once there is no lag to be wrong about.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from typing import Any

MAD_TO_SIGMA = 1.4826
# Values in the centre: six outliers in a row would move it; a fall of 1 % a step makes it lag by 6
# %.
FOLLOW = 12
# Differences in the lag: twice as many, or the lag would follow the noise that it is to be told
# from.
LAG = 2 * FOLLOW
# While a run is young only the younger half of what it has shown counts, but at least this many
# values: the start is nothing like what follows, and a short run must not be judged by it to its
# end.
YOUNGEST = 8
# The scale never counts as less than this share of what has been usual of late. A stretch of
# repeated numbers (a stuck or rounded signal) would otherwise make the next ordinary value a spike.
USUAL_SHARE = 0.5
# "Of late", in windows; of a young run the last quarter. The mean is geometric, so that a few high
# values do not rule.
USUAL_WINDOWS = 8


class SortedWindow:
    """The last `size` values, in order of arrival and sorted. A push costs one bisection and one
    short memmove.
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
        """The upper median; a value that was really seen, so that it scales exactly with the
        units.
        """
        return self.sorted[len(self.sorted) >> 1]

    def clear(self) -> None:
        self.arrivals.clear()
        self.sorted.clear()


class Baseline:
    """Centre and scale of a signal's logarithm.

    Args:
        window: accepted steps in the scale.
        floor: least scale that counts, in log units: changes below a few times this are nobody's
        business.
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
        "scale",
        "usual",
        "window",
    )

    def __init__(self, *, window: int, floor: float) -> None:
        self.window = window
        self.floor = floor
        self._share = 1.0 / (USUAL_WINDOWS * window)
        # accepted values after which nothing depends on `count`
        self._young = max(4 * USUAL_WINDOWS * window, 2 * LAG)
        self.reset()

    def reset(self) -> None:
        self.count = 0  # accepted values since the beginning
        self.usual = self.floor  # slow geometric mean of the scale
        self._centre = SortedWindow(FOLLOW)
        self._differences = SortedWindow(LAG)
        self._deviations = SortedWindow(self.window)
        # What every step asks for, computed when it changes; `centre` means nothing while `empty`.
        self.empty, self.centre, self.scale = True, 0.0, self.floor

    def learn(self, y: float) -> None:
        """Add an accepted logarithm (finite). Called for each signal of each step, so it is written
        for speed.
        """
        self.count = count = self.count + 1
        centre = self._centre.sorted
        if centre:
            lags = self._differences.sorted
            deviations = self._deviations.sorted
            difference = y - self.centre
            self._deviations.push(
                abs(difference - lags[len(lags) >> 1]) if lags else abs(difference)
            )
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
            self.scale = now if now > least else least
        self._centre.push(y)
        self.centre = centre[len(centre) >> 1]
        self.empty = False

    def _settle(self) -> None:
        self.empty = not self._centre.sorted
        self.centre = 0.0 if self.empty else self._centre.median()
        self.scale = self.floor
        if self._deviations.sorted:
            self.scale = max(
                MAD_TO_SIGMA * self._deviations.median(), USUAL_SHARE * self.usual, self.floor
            )

    def recentre(self) -> None:
        """Forget the centre, keep the scale: the signal stands on a new level."""
        self._centre.clear()
        self._settle()

    def shift(self, by: float) -> None:
        """The signal is measured in another unit from now on: `by` is added to each logarithm."""
        self._centre = SortedWindow(FOLLOW, (y + by for y in self._centre.arrivals))
        self._settle()

    def state_dict(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "usual": self.usual,
            "centre": list(self._centre.arrivals),
            "differences": list(self._differences.arrivals),
            "deviations": list(self._deviations.arrivals),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = int(state["count"])
        self.usual = float(state["usual"])
        self._centre = SortedWindow(FOLLOW, state["centre"])
        self._differences = SortedWindow(LAG, state["differences"])
        self._deviations = SortedWindow(self.window, state["deviations"])
        self._settle()
