"""What refusing a broken file may cost."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ALLOWANCE = 16 << 20  # bytes beyond twice the files
CPU_SECONDS = 1.0  # hundreds of times what a case takes


@contextmanager
def bounded(path: Path) -> Iterator[None]:
    """What happens in the block allocates at most twice the bytes of `path`, a file or a folder, and 16 MiB. It
    takes at most a second of CPU time."""
    files = [path] if path.is_file() else list(path.rglob("*"))
    size = sum(file.lstat().st_size for file in files)
    tracemalloc.start()
    begun = time.process_time()
    try:
        yield
        spent, peak = time.process_time() - begun, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * size + ALLOWANCE
    assert spent < CPU_SECONDS
