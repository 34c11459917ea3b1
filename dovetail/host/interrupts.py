"""Ctrl-C between steps, never inside one: half a step would leave pages and requests in disagreement."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def uninterrupted() -> Iterator[list[int]]:
    """Finish the block, then raise the KeyboardInterrupt that came meanwhile.

    Gives the list of signals noted so far: a loop inside the block ends when it is no longer empty.

    Off the main thread, and where the program handles SIGINT itself, nothing is changed.
    """
    pending: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield pending
        return

    def note(number: int, frame: FrameType | None) -> None:
        pending.append(number)

    signal.signal(signal.SIGINT, note)
    try:
        yield pending
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pending:
        raise KeyboardInterrupt
