"""A text that identifies the weights of a checkpoint."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from dovetail.checkpoint.checkpoint import Checkpoint

SAMPLE = 4096  # bytes of each tensor, or of each place in a file
SAMPLES = 64  # places in a file


def identity(checkpoint: Checkpoint) -> str:
    """A digest of the configuration and, of every tensor, its name, format, shape and first bytes of all parts.

    It does not change when the files move. Not every byte is read, so it tells models apart, but it does not
    detect a forgery.
    """
    found = hashlib.sha256(repr(checkpoint.config).encode())
    for name in sorted(checkpoint.names()):
        tensor = checkpoint.tensor(name)
        found.update(f"\0{name} {tensor.format} {tensor.shape} ".encode())
        for part in (tensor.data, *tensor.parts.values(), *tensor.shared.values()):
            found.update(part.reshape(-1)[:SAMPLE].tobytes())
    return found.hexdigest()


def files_identity(files: Sequence[Path]) -> str:
    """A digest of the files' sizes, times of change, and samples from all over them. It takes milliseconds.

    It does not change when the files move. It tells changed files from what they were, but it does not detect a
    forgery. Raises OSError.
    """
    found = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            at = os.fstat(file.fileno())
            found.update(f"{path.name} {at.st_size} {at.st_mtime_ns} ".encode())
            for i in range(SAMPLES):
                file.seek(max(0, at.st_size - SAMPLE) * i // (SAMPLES - 1))
                found.update(file.read(SAMPLE))
    return found.hexdigest()
