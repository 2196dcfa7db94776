"""The argument of a command: the one place that reads it, checks it and words its help.

A command carries one float64, so that it fits the vector that the ranks reduce. An argument says
which numbers make sense, and how a user writes them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from guardrail.core.errors import UsageError
from guardrail.core.text import escape_text

MAX_STEP = 2**53  # steps are sent as float64


@dataclass(frozen=True, kw_only=True)
class Argument(ABC):
    """What a command takes.

    Attributes:
        metavar: how the help writes it: "FACTOR", "[STEP]"; "" for none.
        omitted: the value of a command without an argument; None: the argument is required.
        default: the value that a dialog of the screen offers first; None: there is no such dialog.
    """

    metavar: str = ""
    omitted: float | None = None
    default: float | None = None

    @property
    @abstractmethod
    def expected(self) -> str:
        """Return what is accepted, as the end of "lr takes ..."."""

    @abstractmethod
    def accepts(self, value: float) -> bool:
        """Return whether a command can ever have this value."""

    def read(self, text: str) -> float:
        """Return the number of a text. Raises ValueError."""
        return float(text)

    def write(self, value: float) -> str:
        """Return a value as a user writes it; "" where there is nothing to write."""
        if value != value:
            return ""
        return write_number(value)

    def check(self, command: str, value: float, given: str = "") -> str:
        """Return why `command` cannot have this value; "" if it can.

        Args:
            given: the value as the user wrote it, for the message.
        """
        if self.accepts(value):
            return ""
        return f"{command} takes {self.expected}, not {given or write_number(value)}"

    def parse(self, command: str, text: str | None) -> float:
        """Return the value of `command`.

        Args:
            text: as the user wrote it; None: nothing.

        Raises:
            UsageError: the text is no such value, or is missing.
        """
        if text is None:
            if self.omitted is None:
                raise UsageError(f"{command} needs {self.expected}")
            return self.omitted
        given = escape_text(text, 160)
        try:
            value = self.read(text.strip())
        except ValueError:
            raise UsageError(f"{command} takes {self.expected}, not {given}") from None
        if problem := self.check(command, value, given.strip()):
            raise UsageError(problem)
        return value


@dataclass(frozen=True, kw_only=True)
class NoArgument(Argument):
    """Nothing; the value is 0."""

    omitted: float | None = 0.0

    @property
    def expected(self) -> str:
        return "no value"

    def accepts(self, value: float) -> bool:
        return value == 0

    def write(self, value: float) -> str:
        return ""


@dataclass(frozen=True, kw_only=True)
class Factor(Argument):
    """A number in (0, high]."""

    metavar: str = "FACTOR"
    high: float

    @property
    def expected(self) -> str:
        return f"a factor in (0, {self.high:g}]"

    def accepts(self, value: float) -> bool:
        return 0 < value <= self.high


@dataclass(frozen=True, kw_only=True)
class Count(Argument):
    """A whole number from 1 to `high`.

    Attributes:
        unit: what is counted, in the plural.
    """

    metavar: str = "N"
    high: int
    unit: str

    @property
    def expected(self) -> str:
        return f"1 to {self.high} {self.unit}"

    def accepts(self, value: float) -> bool:
        return is_integer(value) and 1 <= value <= self.high


@dataclass(frozen=True, kw_only=True)
class NumberOrNewest(Argument):
    """A whole number, or none for the newest; none is nan.

    Attributes:
        low: the least number.
        number: what the number is: "a step".
        newest: what nan means: "the newest good one".
    """

    omitted: float | None = math.nan
    low: int
    number: str
    newest: str

    @property
    def expected(self) -> str:
        return f"{self.number}, or nothing for {self.newest}"

    def accepts(self, value: float) -> bool:
        return math.isnan(value) or (is_integer(value) and self.low <= value < MAX_STEP)


@dataclass(frozen=True, kw_only=True)
class Word(Argument):
    """One word of several; its value is the index.

    Attributes:
        words: that are accepted.
        meanings: what each word means, for a dialog.
        takes_numbers: a user may also write the index, as in older versions.
    """

    words: tuple[str, ...]
    meanings: tuple[str, ...] = ()
    takes_numbers: bool = False

    @property
    def expected(self) -> str:
        return f"one of {', '.join(self.words)} (0 to {len(self.words) - 1})"

    def accepts(self, value: float) -> bool:
        return is_integer(value) and 0 <= value < len(self.words)

    def read(self, text: str) -> float:
        if text in self.words:
            return float(self.words.index(text))
        if self.takes_numbers:
            return float(text)
        raise ValueError(text)

    def write(self, value: float) -> str:
        if self.accepts(value):
            return self.words[int(value)]
        return super().write(value)


def is_integer(value: float) -> bool:
    """Return whether a number is finite and has no fraction."""
    return math.isfinite(value) and value == int(value)


def write_number(value: float) -> str:
    """Return 9999999 as "9999999", not as "1e+07"."""
    if is_integer(value) and abs(value) < MAX_STEP:
        return f"{value:.0f}"
    return f"{value:g}"
