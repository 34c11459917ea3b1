"""A file of weights, mapped to memory."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dovetail.core.errors import ModelError


class MappedFile:
    """The bytes of a file, which are read from disk when somebody looks at them.

    The mapping is private: pages are shared with the page cache until somebody writes to them by mistake. Raises
    ModelError if the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self.bytes = os.fstat(file.fileno()).st_size
                self.map = _map(file.fileno(), self.bytes) if self.bytes else None
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: cannot be read: {error}") from error

    @property
    def view(self) -> memoryview:
        return memoryview(self.map if self.map is not None else b"")

    def array(self, name: str, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """uint8 [nbytes] from `offset`, which lie in the file, not copied. `name` is what errors call them."""
        try:
            size = os.stat(self.path).st_size
        except OSError:
            size = self.bytes  # unlinked while mapped: the mapping keeps the bytes
        if size < offset + nbytes:
            # Reading pages past the end would end the process (SIGBUS). This check prevents it, except in a race.
            raise ModelError(f"{self.path}: shrank to {size} bytes after it was opened; {name!r} is gone")
        if not nbytes:
            return np.zeros(0, np.uint8)
        return np.frombuffer(self.view, np.uint8, nbytes, offset)

    def release(self, offset: int, nbytes: int) -> None:
        """Take bytes out of this process' memory, until they are read again."""
        if self.map is not None and hasattr(self.map, "madvise"):
            begin = offset // mmap.PAGESIZE * mmap.PAGESIZE
            self.map.madvise(mmap.MADV_DONTNEED, begin, offset + nbytes - begin)


def _map(file: int, size: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(file, size, access=mmap.ACCESS_COPY)
    # Reserve no swap; otherwise the system refuses files larger than memory.
    reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
    return mmap.mmap(file, size, flags=mmap.MAP_PRIVATE | reserve, prot=mmap.PROT_READ | mmap.PROT_WRITE)
