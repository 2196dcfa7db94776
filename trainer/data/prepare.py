"""Sources -> a corpus in the cache: found there, waited for, or built and committed by one rename.

CACHE/NAME/          a corpus; NAME is a hash of the settings and of the source files (no content)
CACHE/NAME.lock      held by the process that builds it
CACHE/NAME.tmp-PID/  an unfinished corpus; it is never read
CACHE/tokenizers/    trained BPE vocabularies
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from guardrail.core.errors import DataError
from guardrail.core.files import sync_folder
from trainer.config.sections import DataSection
from trainer.data.build import Builder
from trainer.data.corpus import FORMAT, inspect_corpus
from trainer.data.progress import Progress, ReportProgress, Stop
from trainer.data.shards import SHARD_BYTES
from trainer.data.sources import discover
from trainer.data.tokenizer import load_tokenizer
from trainer.sources.base import ResolvedSources
from trainer.sources.registry import SOURCES, source_of_entry

# What is done, of a process that waits for another one.
WAITING_TO_BUILD = "waiting for another process that tokenizes the same text"
WAITING_FOR_CORPUS = "waiting for the corpus"
_POLL_SECONDS = 0.05


def cache_folder(data: DataSection) -> Path:
    """Return data.cache, else $XDG_CACHE_HOME/guardrail, else ~/.cache/guardrail."""
    if data.cache:
        return Path(os.path.abspath(os.path.expanduser(data.cache)))
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "guardrail"


def prepare_corpus(
    data: DataSection, *, progress: ReportProgress, stop: Stop, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Return the folder of the corpus that `data` describes; build it if the cache does not have it.

    Any number of processes may call this at once: one builds, the others wait for it.

    Args:
        progress: called with (what is done, share that is done) a few times per second.
        stop: called every few milliseconds; true ends the work at once.
        shard_bytes: largest size of a file of tokens.

    Raises:
        DataError: no usable document in the sources, or a cache that cannot be written.
        Interrupted: `stop` returned true. No unfinished corpus is left.
    """
    pulse = Progress(progress, stop)
    found = discover(data.sources, pulse)
    folder = cache_folder(data) / _name(data, found)
    if inspect_corpus(folder)[0] is not None:
        return folder
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(folder, pulse):
            index, damage = inspect_corpus(folder)
            if index is None:
                if not folder.exists():
                    damage = ""
                _build(data, found, folder, damage, pulse, shard_bytes)
    except OSError as error:
        raise DataError(
            f"cannot write the cache {folder.parent}: {error.strerror or error}\n"
            "  hint: set data.cache to another folder"
        ) from error
    return folder


prepare = prepare_corpus  # its old name


def wait_for_corpus(
    data: DataSection, *, stop: Stop, seconds: float, builder: Callable[[], object] = lambda: None
) -> Path:
    """Wait for the corpus that another process builds with `prepare_corpus`; return its folder.

    Args:
        seconds: the longest time without progress of the other process.
        builder: returns its progress; any value that changes.

    Raises:
        DataError: no corpus and no progress for `seconds`.
        Interrupted: `stop` returned true.
    """
    pulse = Progress(lambda text, share: None, stop, WAITING_FOR_CORPUS)
    folder = cache_folder(data) / _name(data, discover(data.sources, pulse))
    reached, since = builder(), time.monotonic()
    while True:
        index, damage = inspect_corpus(folder)
        if index is not None:
            return folder
        if (now := builder()) != reached:
            reached, since = now, time.monotonic()
        if time.monotonic() - since >= seconds:
            raise DataError(
                f"no corpus in {folder} ({damage}): the process that builds it made no progress for "
                f"{seconds:.0f} s\n  hint: see the log of rank 0, or raise launch.setup_timeout"
            )
        pulse()
        time.sleep(_POLL_SECONDS)


def _name(data: DataSection, found: ResolvedSources) -> str:
    """Return the name of a corpus: 32 hex digits of a hash of everything that it depends on."""
    tokenizer = data.tokenizer
    if tokenizer == "bpe":
        tokenizer = f"bpe {data.vocabulary}"
    elif tokenizer != "bytes":
        tokenizer = load_tokenizer(Path(tokenizer), name=tokenizer).identity
    settings = (
        FORMAT,
        tokenizer,
        data.sequence_length,
        data.eval_fraction,
        data.text_field,
        data.max_document_bytes,
    )
    digest = hashlib.sha256(repr(settings).encode())
    used = {source_of_entry(entry).name for entry in data.sources}
    for source in SOURCES:
        if source.name in used:
            digest.update(source.version().encode())
    for file in found.files:
        entry = repr((file.path, file.key, file.size, file.mtime_ns))
        digest.update(entry.encode("utf-8", "backslashreplace"))
    if found.empty:  # the report of a corpus names them
        digest.update(repr(found.empty).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()[:32]


@contextlib.contextmanager
def _locked(folder: Path, pulse: Progress) -> Iterator[None]:
    """Hold the lock of a corpus. Its file is kept: another process may wait for it already."""
    descriptor = os.open(
        folder.with_name(folder.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
    )
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                pulse.text = WAITING_TO_BUILD
                pulse()
                time.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)


def _build(
    data: DataSection,
    found: ResolvedSources,
    folder: Path,
    damage: str,
    pulse: Progress,
    shard_bytes: int,
) -> None:
    """Build a corpus in a temporary folder and rename it. Called with the lock held."""
    if damage:
        print(
            f"guardrail: the corpus in {folder} is damaged ({damage}); it is tokenised again",
            file=sys.stderr,
        )
    for leftover in folder.parent.glob(f"{folder.name}.tmp-*"):
        shutil.rmtree(leftover)
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    temporary.mkdir(mode=0o700)
    try:
        Builder(
            data, found, temporary, cache=folder.parent, pulse=pulse, shard_bytes=shard_bytes
        ).build(rebuilt=damage)
        sync_folder(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(temporary, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
