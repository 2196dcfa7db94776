"""Files: atomic replacement, reads that never wait, and JSON with NaN and Inf."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import secrets
import stat
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

FILE_MODE = 0o600
FOLDER_MODE = 0o700
PROBE_BYTES = 1 << 16  # more than fits into the space that a file system reserves for its metadata
LONGEST_NAME = 255  # bytes of a file name, on nearly every file system
_BLOCK = 4096  # bytes that a file of one byte takes on a disk, at least
TEMPORARY = ".tmp-"  # prefix of a file that has not been renamed into place yet

_NO_NUMBER = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def why_unreachable(path: str | os.PathLike[str]) -> str:
    """Return why no file can exist or be seen at a path, such as "File name too long"; else ""."""
    try:
        os.stat(path)
    # The system stops at the first missing folder, so the later parts are checked here.
    except (FileNotFoundError, NotADirectoryError):
        if any(len(os.fsencode(part)) > LONGEST_NAME for part in Path(path).parts):
            return os.strerror(errno.ENAMETOOLONG)
        return ""
    except OSError as error:
        return error.strerror or str(error)
    except ValueError:  # a NUL
        return "no file can have this name"
    return ""


def replace_file(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Replace the content of a file. Readers see the old content or the new, never a part.

    Args:
        sync: sync file and folder, so the content survives a power failure once this returns.

    Raises:
        OSError: the file was not replaced; the temporary file is removed.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        descriptor = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE
        )
        try:
            write_all(descriptor, data)
            if sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if sync:
        sync_folder(path.parent)


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file to read its bytes.

    Raises:
        OSError: it is anything else. Opening a pipe may wait forever.
    """
    return open(path, "rb", opener=_open_regular)


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of a regular file. Raises OSError as `open_file` does."""
    with open_file(path) as file:
        return file.read()


def _open_regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        refuse_special(descriptor, path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def refuse_special(descriptor: int, path: str | os.PathLike[str]) -> None:
    """Raise OSError where `path`, open as `descriptor`, is not a regular file."""
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))


def why_unwritable(folder: Path) -> str:
    """Return why a folder takes no file, such as "No space left on device"; "" if it does.

    Writes a file to find out: free space does not show a quota, permissions do not show a read-only
    mount.
    """
    probe = folder / f"{TEMPORARY}probe-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
        try:
            write_all(descriptor, bytes(PROBE_BYTES))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        return error.strerror or str(error)
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return ""


def overwrite_file(path: Path, data: bytes) -> None:
    """Write over a file in place, for a full disk without room for a second file.

    Readers may see a mixture of both contents.

    Args:
        data: text that may end in blanks: they fill the rest of a longer file.

    Raises:
        OSError: `data` does not fit into the blocks of the file, or the disk refuses this too.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        refuse_special(descriptor, path)
        size = os.fstat(descriptor).st_size
        if len(data) > -(-size // _BLOCK) * _BLOCK:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_all(descriptor, data.ljust(size))
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`, in as many writes as the system needs. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def sync_folder(path: Path) -> None:
    """Make a rename in `path` survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def encode_json(value: Any) -> bytes:
    """Return strict JSON of records, paths, numpy scalars and plain data.

    NaN, Infinity and -Infinity become the strings "nan", "inf" and "-inf". JSON has no number for
    them, and null would not show which one it was. `as_float` and msgspec's lax conversion read
    them back. Lone surrogates, as in file names that are not UTF-8, become backslash escapes.
    """
    return msgspec.json.encode(_jsonable(msgspec.to_builtins(value, enc_hook=_builtin)))


def as_float(value: Any) -> float:
    """Return a number from JSON, also "nan", "inf" and "-inf"; NaN for anything else.

    An integer too large for a float becomes infinite.
    """
    if isinstance(value, str):
        return _NO_NUMBER.get(value, math.nan)
    if not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def as_int(value: Any, default: int = 0) -> int:
    """Return an integer of at most 64 bits from JSON; `default` for anything else."""
    if isinstance(value, float) and math.isfinite(value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        return default
    if not -(2**63) <= value < 2**63:
        return default
    return value


def _builtin(value: Any) -> Any:
    """Return a value of another type as plain data: arrays and numpy scalars by value, else text.

    No journal line may be lost because of a type.
    """
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "size", None) == 1:
        return item()
    tolist = getattr(value, "tolist", None)
    return tolist() if callable(tolist) else str(value)


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value):
            return "nan"
        return "inf" if value > 0 else "-inf"
    if isinstance(value, str):
        return _encodable(value)
    if isinstance(value, dict):
        return {_encodable(str(key)): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return value


def _encodable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text
