"""Old import path; use `guardrail.rundir.manifest`."""

from __future__ import annotations

from guardrail.core.old_names import forward

__getattr__ = forward(
    __name__,
    "guardrail.rundir.manifest",
    [
        "FORMAT",
        "MANIFEST",
        "ITEM_BYTES",
        "Shape",
        "Progress",
        "Box",
        "Piece",
        "TensorEntry",
        "FileEntry",
        "RankEntry",
        "Manifest",
        "sealed",
        "read_manifest",
        "covers",
        "verify",
        "HeaderEntry",
        "read_header",
        "fingerprint",
        "checkpoint_name",
        "checkpoint_dirs",
    ],
)
