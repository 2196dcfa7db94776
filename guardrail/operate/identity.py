"""Who sends a command, for the journal: the user, the machine and its terminal."""

from __future__ import annotations

import contextlib
import getpass
import os
import socket

from guardrail.core.text import clean_text

VARIABLE = "GUARDRAIL_WHO"


def sender_name() -> str:
    """Return who sends commands from this process: "ann@vm (pts/3 from 10.0.0.5)".

    $GUARDRAIL_WHO replaces it. Two screens of one user have two names.
    """
    named = clean_text(os.environ.get(VARIABLE, ""), 100).strip()
    if named:
        return named
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())  # a container without an entry for this uid
    place = [_terminal() or f"process {os.getpid()}"]
    if client := os.environ.get("SSH_CONNECTION", "").split(" ")[0]:
        place.append(f"from {clean_text(client, 60)}")
    return f"{user}@{socket.gethostname()} ({' '.join(place)})"


def _terminal() -> str:
    """Return the terminal of this process, as "pts/3"; "" without one."""
    for descriptor in (0, 2, 1):
        with contextlib.suppress(OSError):
            return os.ttyname(descriptor).removeprefix("/dev/")
    return ""
