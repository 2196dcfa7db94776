"""Faults from inside a rank, for tests/bench/restarts.py. Python imports this module by itself
where it is on the path.

RESTARTS_FAULT names what strikes, RESTARTS_RANK whom, RESTARTS_MARK the file that says that it has
struck: once a run.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time

MARK, STRIKE = os.environ.get("RESTARTS_MARK", ""), os.environ.get("RESTARTS_MARK", "") + ".strike"


def strike_once() -> bool:
    with contextlib.suppress(FileExistsError):
        os.close(os.open(MARK, os.O_CREAT | os.O_EXCL))
        return True
    return False


def die_in_save(name: str) -> None:
    """Killed at the moment at which a file or folder whose path contains `name` is renamed into
    place.
    """

    def hook(event: str, arguments: tuple) -> None:
        if event == "os.rename" and name in os.fsdecode(arguments[1]) and strike_once():
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run_out_of_memory() -> None:
    """A MemoryError in the main thread as soon as the file STRIKE is there."""

    def wait() -> None:
        while not os.path.exists(STRIKE):
            time.sleep(0.02)
        if strike_once():
            main = ctypes.c_ulong(threading.main_thread().ident or 0)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(MemoryError))

    threading.Thread(target=wait, daemon=True).start()


def install() -> None:
    kind, name = os.environ.get("RESTARTS_FAULT", ""), os.environ.get("RESTARTS_NAME", "")
    if not kind or os.environ.get("RANK", "") != os.environ.get("RESTARTS_RANK", "-"):
        return
    if kind == "save":
        die_in_save(name)
    elif kind == "memory":
        run_out_of_memory()


install()
