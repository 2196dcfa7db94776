"""Groups the skipped documents of an incident by file, with a remark about unusual text."""

from __future__ import annotations

import os
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence

from guardrail.core.errors import GuardrailError
from guardrail.core.text import clean_text
from guardrail.decide.undo import merge_ranges
from guardrail.report.formats import relative_path
from guardrail.report.incident import Document, Incident, SkippedFile
from guardrail.rundir.run_directory import RunDirectory

MAX_EXCERPTS = 3  # of a file
_DIGITS = re.compile(r"\d[\d.,]*")
_PATTERN = re.compile(r"[*?\[]")


def find_data_folder(run: RunDirectory) -> str:
    """Return the folder that holds all of `data.sources` of a run; "" if there is none or it is not
    known.
    """
    try:
        data = tomllib.loads(run.config_text()).get("data", {})
        if isinstance(data, dict):
            sources = data.get("sources", [])
        else:
            sources = []
    except (GuardrailError, OSError, ValueError, RecursionError):
        return ""
    named = [source for source in sources if isinstance(source, str) and os.path.isabs(source)]
    folders = [_folder_of(source) for source in named]
    if not folders:
        return ""
    folder = os.path.commonpath(folders)
    if folder == os.sep:
        return ""
    return clean_text(folder)


def _folder_of(source: str) -> str:
    """Return the folder of a source. A source without a suffix and without a pattern is a folder
    itself.
    """
    if pattern := _PATTERN.search(source):
        return os.path.dirname(source[: pattern.start()] + "x")
    if os.path.splitext(source)[1]:
        return os.path.dirname(source)
    return source.rstrip(os.sep)


def group_by_file(incident: Incident, folder: str) -> tuple[SkippedFile, ...]:
    """Return the files of an incident's skipped documents, sorted by path."""
    if not incident.samples:
        return ()
    documents: dict[str, list[Document]] = {}
    remarks: dict[str, list[str]] = {}
    for document in incident.documents:
        documents.setdefault(document.path, []).append(document)
    for sample in incident.named:
        for document in sample.documents:
            documents.setdefault(document.path, []).append(document)
            remarks.setdefault(document.path, []).extend(sample.odd)
    return tuple(
        _make_file(path, documents[path], remarks.get(path, []), folder)
        for path in sorted(documents)
    )


def _make_file(
    path: str, documents: Sequence[Document], remarks: Iterable[str], folder: str
) -> SkippedFile:
    records = {document.record for document in documents if document.record}
    ranges: dict[int, list[tuple[int, int]]] = {}
    for document in documents:
        ranges.setdefault(document.record, []).append((document.first_byte, document.last_byte))
    size = sum(
        max(0, last - first) for pieces in ranges.values() for first, last in merge_ranges(pieces)
    )
    excerpts = [document.excerpt for document in documents if document.excerpt]
    return SkippedFile(
        path=path,
        shown=relative_path(path, folder),
        bytes=size,
        records=len(records),
        remark=typical_remark(remarks),
        excerpts=tuple(dict.fromkeys(excerpts[:MAX_EXCERPTS])),
    )


def typical_remark(remarks: Iterable[str]) -> str:
    """Return the most frequent kind of remark, with the median of its numbers."""
    known = list(remarks)
    if not known:
        return ""
    kinds = Counter(_DIGITS.sub("#", remark) for remark in known)
    kind = kinds.most_common(1)[0][0]
    same = sorted((r for r in known if _DIGITS.sub("#", r) == kind), key=_first_number)
    return same[len(same) // 2]


def _first_number(remark: str) -> float:
    found = _DIGITS.search(remark)
    try:
        if found:
            return float(found[0].replace(",", "").rstrip("."))
        return 0.0
    except ValueError:
        return 0.0
