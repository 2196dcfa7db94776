"""The states of snapshots and checkpoints, as the journal and the status write them."""

from __future__ import annotations

CANDIDATE = "candidate"  # too few healthy steps have followed it
GOOD = "good"  # a rollback may use it
SUSPECT = "suspect"  # it holds steps of an incident or of an abandoned timeline
INVALID = "invalid"  # its files are damaged
FOREIGN = "foreign"  # of another run
