"""Threads that share one engine take turns, in the order in which they came."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from types import TracebackType

from dovetail.core.errors import ForkError


class Turns:
    """A lock as a context manager, not reentrant. First come, first served: whoever asks again goes to the end.

    The first in line has the turn; the one that leaves wakes it. Every operation on the line is atomic, so a
    finalizer that runs in between finds nothing half done. ForkError in a child of the process that made it.
    """

    def __init__(self) -> None:
        self._line: deque[threading.Lock] = deque()
        self._threads: set[int] = set()
        self._process = os.getpid()

    @property
    def queued(self) -> int:
        """Threads that have the turn or wait for it."""
        return len(self._line)

    @property
    def mine(self) -> bool:
        """Whether this thread has the turn, or waits for it further up its stack."""
        return threading.get_ident() in self._threads

    def __enter__(self) -> None:
        if os.getpid() != self._process:
            raise ForkError(
                f"this engine was made in process {self._process} and used in its forked child {os.getpid()}, "
                f"where its threads do not exist; load it in the child, or start the child with 'spawn'"
            )
        thread, own = threading.get_ident(), threading.Lock()
        if thread in self._threads:
            raise RuntimeError("this thread has the turn already")
        own.acquire()
        self._threads.add(thread)
        self._line.append(own)
        try:
            if self._line[0] is not own:
                own.acquire()  # released when it is the first
        except BaseException:
            self._leave(own)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(self._line[0])

    def _leave(self, own: threading.Lock) -> None:
        self._line.remove(own)
        self._threads.discard(threading.get_ident())
        with contextlib.suppress(IndexError, RuntimeError):  # nobody waits, or the first has seen that it is
            self._line[0].release()
