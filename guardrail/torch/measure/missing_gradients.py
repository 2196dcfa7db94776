"""Which parameters have had a gradient, and which have none any more."""

from __future__ import annotations

from collections.abc import Collection, Sequence


class MissingGradients:
    """Finds parameters that had a gradient in some step and have none now.

    Args:
        names: of the trained parameters, in their order.

    Attributes:
        missing: indices of the parameters found last, each reported once.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._had_gradient = [False] * len(self._names)
        self._reported: set[int] = set()
        self.missing: list[int] = []

    def update(self, present: list[bool]) -> bool:
        """Take note which parameters have a gradient now.

        Returns:
            Whether one of them is missing that had a gradient before and is not yet reported.
        """
        if present == self._had_gradient:
            return False
        pairs = list(zip(self._had_gradient, present, strict=True))
        lost = {index for index, (before, now) in enumerate(pairs) if before and not now}
        self.missing = sorted(lost - self._reported)
        self._had_gradient = [before or now for before, now in pairs]
        return bool(self.missing)

    def take_names(self) -> list[str]:
        """Return the names of the `missing` parameters, and report none of them again."""
        names = [self._names[index] for index in self.missing]
        self._reported.update(self.missing)
        self.missing = []
        return names

    def expect_all(self, without: Collection[str]) -> None:
        """Treat every parameter as one that has had a gradient, except those in `without`.

        A resumed run calls this with the names that its checkpoint holds.
        """
        self._had_gradient = [name not in without for name in self._names]

    def names_without_gradient(self) -> list[str]:
        """Return the names of the parameters that have had no gradient in any step so far."""
        pairs = zip(self._names, self._had_gradient, strict=True)
        return [name for name, had_gradient in pairs if not had_gradient]
