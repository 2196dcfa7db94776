"""The schema of the fake trainer: how long it pretends to train, and how it misbehaves."""

from typing import Literal

from guardrail.core.config import GuardConfig
from guardrail.core.section import Section


class FakeSection(Section, frozen=True, kw_only=True):
    steps: int = 20
    seconds: float = 0.02
    # exit: status 1; hang: the main thread stops; freeze: the process stops; deaf: ignores every
    # stop; silent: ends with 0 and says nothing; forks: leaves a child behind; chatty: a megabyte
    # of notes; usage: refuses its configuration; full: fills the disk of the run directory and
    # fails; lock: as freeze, and holds the journal; record: status 1, and the exception in torch's
    # error file.
    fault: Literal[
        "",
        "exit",
        "hang",
        "freeze",
        "deaf",
        "silent",
        "forks",
        "chatty",
        "usage",
        "full",
        "lock",
        "record",
    ] = ""
    rank: int = 1
    step: int = 5
    # The fault strikes in the first so many starts of the ranks.
    starts: int = 1
    # No rank gets more than ten steps ahead of another.
    lockstep: bool = False
    # Each step ends with an all-reduce of torch's, as of a real trainer.
    gloo: bool = False
    # Seconds before the rank registers.
    import_seconds: float = 0.0


class Config(GuardConfig, frozen=True, kw_only=True):
    fake: FakeSection = FakeSection()
