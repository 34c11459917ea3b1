"""A text that identifies the weights of a checkpoint."""

from __future__ import annotations

import hashlib

from dovetail.checkpoint.checkpoint import Checkpoint

SAMPLE = 4096  # bytes of each tensor


def identity(checkpoint: Checkpoint) -> str:
    """A digest of the configuration and, of every tensor, its name, format, shape and first bytes.

    It does not change when the files move. Not every byte is read, so it tells models apart, but it does not
    detect a forgery.
    """
    found = hashlib.sha256(repr(checkpoint.config).encode())
    for name in sorted(checkpoint.names()):
        tensor = checkpoint.tensor(name)
        found.update(f"\0{name} {tensor.format} {tensor.shape} ".encode())
        found.update(tensor.data.reshape(-1)[:SAMPLE].numpy().tobytes())
    return found.hexdigest()
