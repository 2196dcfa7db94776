"""Ports of the loopback for groups of ranks."""

from __future__ import annotations

import itertools
import os
import socket

# Below what Linux hands out by itself (from 32768 on): such a port may go to any connection between
# the moment it is found free and the moment rank 0 listens on it. Each worker of a test session has
# a part of its own.
_FIRST, _PART, _PARTS = 12_000, 1_000, 20
_turns = itertools.count(os.getpid() * 37)  # of two sessions at once, each begins somewhere else


def free_port() -> int:
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for turn in itertools.islice(_turns, _PART):
        port = _FIRST + worker % _PARTS * _PART + turn % _PART
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise OSError(f"no free port from {_FIRST} on")
