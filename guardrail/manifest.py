"""Old import path; use `guardrail.rundir.manifest`."""

from __future__ import annotations

from guardrail.core.old_names import forward

__getattr__ = forward(
    __name__,
    "guardrail.rundir.manifest",
    [
        "FORMAT",
        "MANIFEST",
        "Box",
        "Piece",
        "TensorEntry",
        "FileEntry",
        "RankEntry",
        "Manifest",
        "sealed",
        "read_manifest",
        "covers",
    ],
    renamed={
        "ITEM_BYTES": "guardrail.rundir.safetensors_header.ITEM_BYTES",
        "Shape": "guardrail.rundir.safetensors_header.Shape",
        "HeaderEntry": "guardrail.rundir.safetensors_header.HeaderEntry",
        "read_header": "guardrail.rundir.safetensors_header.read_header",
        "Progress": "guardrail.rundir.verification.Progress",
        "verify": "guardrail.rundir.verification.verify",
        "fingerprint": "guardrail.rundir.verification.fingerprint",
        "checkpoint_name": "guardrail.rundir.checkpoint_folders.checkpoint_name",
        "checkpoint_dirs": "guardrail.rundir.checkpoint_folders.checkpoint_dirs",
    },
)
