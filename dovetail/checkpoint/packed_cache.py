"""Packed weights that are kept for the next start: which files there are, how many, and when they are written."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import re
import sys
import threading
from pathlib import Path
from typing import Any

from dovetail.checkpoint.checkpoint import Checkpoint
from dovetail.checkpoint.identity import files_identity
from dovetail.checkpoint.packed_file import file_bytes, load, store
from dovetail.host.files import exclusive_or_not, free_bytes
from dovetail.host.units import format_size
from dovetail.hub.packed import SUFFIX, Origin, Unusable, make_room
from dovetail.ops import cpu
from dovetail.show.progress import note, transfer

FREE = 1 << 30  # bytes that are left free on the disk
_LOCK = ".lock"
_PATIENCE = 1.0  # seconds before progress is shown
_running: set[PackedCache] = set()  # that write
_untold: list[str] = []  # notes


class _Abandoned(Exception):
    """Writing was ended before its time."""


class PackedCache:
    """Packed weights of one model: those that its file has, and others, which are added and written by `save`.

    folder: of all such files. limit: of their bytes together. values: see `Origin`. A cache that cannot be read or
    written is no error: there is one note, and the model goes on without it.
    """

    def __init__(self, checkpoint: Checkpoint, folder: Path, limit: int, values: str) -> None:
        place = str(Path(os.path.abspath(checkpoint.path)))
        self.path = folder / _file_name(place, values)
        self.limit = limit
        self._place, self._values, self._files = place, values, checkpoint.files
        self._origin: Origin | None = None
        self._packed: dict[str, Any] = {}
        self._fresh = False
        self._thread: threading.Thread | None = None
        self.abandoned = threading.Event()
        self._ended = threading.Event()  # a thread whose `join` was interrupted seems to have ended
        self._total = self.written = 0

    def open(self, threads: int) -> None:
        """Load the file, checking it with so many threads."""
        try:
            self._origin = Origin(self._place, files_identity(self._files), self._values, cpu.native().layout())
            found = load(self.path, self._origin, threads)
        except FileNotFoundError:
            return
        except (Unusable, OSError) as error:
            note(f"packed weights of {self._place} are made again: {getattr(error, 'strerror', '') or error}")
            return
        if found.damaged:
            note(f"packed weights of {self._place} are damaged ({', '.join(found.damaged[:3])}) and made again")
        self._packed, self._fresh = found.packed, bool(found.damaged)
        with contextlib.suppress(OSError):
            os.utime(self.path)  # says when it was last used

    def get(self, name: str, shape: tuple[int, ...]) -> Any | None:
        """The packed weights of a tensor, if there are any."""
        found = self._packed.get(name)
        return found if found is not None and (found.n, found.k) == shape else None

    def add(self, name: str, packed: Any) -> None:
        """Weights that were packed now."""
        self._packed[name] = packed
        self._fresh = True

    def save(self) -> None:
        """Begin to write what was added, in a thread of low priority. The process waits for it at its end."""
        if not self._fresh or self._origin is None or self._thread is not None:
            return
        thread = threading.Thread(target=self._write, name="packed weights")
        _running.add(self)
        try:
            thread.start()
        except RuntimeError as error:  # the system gives no more threads
            _running.discard(self)
            _tell(f"packed weights are not kept: {error}; {_OFF}")
            return
        self._thread = thread

    def finish(self, progress: bool = False) -> None:
        """Wait until all is written. Ctrl-C ends it; then nothing is kept.

        progress: show it, if it takes longer than a second and stderr is a terminal.
        """
        if self._thread is None:
            return
        try:
            if not self._ended.wait(_PATIENCE if progress and sys.stderr.isatty() else None):
                with transfer("Keeping packed weights", self._total) as advance:
                    while not self._ended.wait(0.1):
                        advance(self.written)
            self._thread.join()
        except KeyboardInterrupt:
            self.abandon()

    def abandon(self) -> None:
        """End the writing now. Nothing of it stays."""
        self.abandoned.set()
        if self._thread is not None:
            self._ended.wait()
            self._thread.join()

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # on Linux, of this thread
        try:
            with exclusive_or_not(self.path.parent / _LOCK) as mine:
                if mine:  # else another process writes, perhaps the same
                    self._store()
        except _Abandoned:
            pass
        except OSError as error:
            _tell(f"packed weights are not kept: {error.strerror or error} ({self.path.parent}); {_OFF}")
        finally:
            _running.discard(self)
            self._ended.set()

    def _store(self) -> None:
        assert self._origin is not None
        folder = self.path.parent
        self._total = file_bytes(self._origin, self._packed)
        if self._total > self.limit:
            _tell(
                f"packed weights are not kept: they take {format_size(self._total)}, and all together may take "
                f"{format_size(self.limit)}; raise --packed-cache-size, or {_OFF}"
            )
            return
        for leftover in folder.glob(".*.part"):  # of processes that were killed: whoever writes holds the lock
            leftover.unlink(missing_ok=True)
        make_room(folder, self.path, self.limit - self._total)
        free = free_bytes(folder)
        if free < self._total + FREE:
            _tell(
                f"packed weights are not kept: they take {format_size(self._total)}, and {format_size(free)} are "
                f"free in {folder}; free some, or {_OFF}"
            )
            return
        store(self.path, self._origin, self._packed, self._advance)

    def _advance(self, written: int) -> None:
        self.written = written
        if self.abandoned.is_set():
            raise _Abandoned


_OFF = "use --packed-cache off"


def finish(progress: bool = False) -> None:
    """Wait for all caches that are being written, and say what went wrong. See `PackedCache.finish`."""
    for cache in running():
        cache.finish(progress)
    while _untold:
        note(_untold.pop(0))


def running() -> list[PackedCache]:
    """The caches that are being written."""
    return list(_running)


@atexit.register  # something is running only if Ctrl-C has come while the interpreter waited
def abandon() -> None:
    """End the writing of all caches, and say what went wrong."""
    for cache in running():
        cache.abandon()
    finish()


def _tell(text: str) -> None:
    """A note from the thread that writes. On a terminal it waits, because an answer may be shown there."""
    if sys.stderr.isatty():
        _untold.append(text)
    else:
        note(text)


def _file_name(place: str, values: str) -> str:
    """One for each model and kind of values; a model that changes in its place takes the same again."""
    digest = hashlib.sha256(f"{os.path.realpath(place)}\0{values}".encode(errors="surrogateescape")).hexdigest()
    label = re.sub(r"[^A-Za-z0-9._-]", "_", Path(place).name)[:80]
    return f"{label}-{digest[:16]}{SUFFIX}"
