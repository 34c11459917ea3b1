"""The finished part of a batch: result lines that are appended one by one and survive a crash."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from dovetail.core.errors import ConfigError
from dovetail.host.files import replacing

SYNC_SECONDS = 1.0
PREFIX = "batch_req_"


class Journal:
    """Results by row key, in OUTPUT.partial while the batch runs and in OUTPUT when it is complete.

    Opening it finds what an earlier run finished, in either file. A line that a crash left incomplete is cut off.
    Results with an error do not count as finished. When `add` returns, a row survives the end of the process; at
    most a second later it survives a power cut. ConfigError if another process holds the journal, or if it cannot
    be written.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.partial = output.with_name(output.name + ".partial")
        self._places: dict[str, tuple[IO[bytes], int]] = {}
        self._synced = time.monotonic()
        with self._explained(output):
            self._file = open(self.partial, "a+b", buffering=0)  # noqa: SIM115  # closed in `close`
            self._earlier: IO[bytes] | None = None
            self._lock()
            try:
                with contextlib.suppress(FileNotFoundError):
                    self._earlier = open(output, "rb")  # noqa: SIM115
                    self._index(self._earlier)
                self._file.truncate(self._index(self._file))
            except BaseException:
                self.close()
                raise
        self.found = len(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def add(self, key: str, record: dict[str, Any]) -> None:
        """Append a result."""
        line = json.dumps({"id": PREFIX + key, **record}, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with self._explained(self.partial):
            offset = self._file.seek(0, os.SEEK_END)
            written = 0
            while written < len(line):
                written += self._file.write(line[written:]) or 0
            now = time.monotonic()
            if now - self._synced >= SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = now
        self._places[key] = (self._file, offset)

    def publish(self, keys: Iterable[str]) -> None:
        """Write the results of `keys`, in this order, as OUTPUT, whole or not at all; the journal is then gone."""
        with self._explained(self.output):
            with replacing(self.output) as file:
                for key in keys:
                    source, offset = self._places[key]
                    file.write(_line_at(source, offset))
            self.partial.unlink()

    def close(self) -> None:
        """Close the files. A journal without any finished row is removed."""
        if os.fstat(self._file.fileno()).st_nlink and not self._file.seek(0, os.SEEK_END):
            self.partial.unlink(missing_ok=True)
        for file in (self._file, self._earlier):
            if file is not None:
                file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ConfigError(f"{self.partial}: another process is writing this batch") from None

    def _index(self, file: IO[bytes]) -> int:
        """Note where finished rows are. Returns the length of the part of the file that is whole."""
        offset = 0
        for line in _lines(file):
            try:
                record = json.loads(line)
                key, error = record["id"].removeprefix(PREFIX), record["error"]
            except (ValueError, TypeError, KeyError, AttributeError):
                break
            if error is None and line.endswith(b"\n"):
                self._places[key] = (file, offset)
            if not line.endswith(b"\n"):
                break
            offset += len(line)
        return offset

    @contextlib.contextmanager
    def _explained(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = "; what is finished is kept, run the same command again" if error.errno == errno.ENOSPC else ""
            raise ConfigError(f"{path}: cannot be written: {error.strerror or error}{kept}") from error


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    with open(os.dup(file.fileno()), "rb") as buffered:
        buffered.seek(0)
        yield from buffered


def _line_at(file: IO[bytes], offset: int) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        more = os.pread(file.fileno(), 1 << 16, offset + len(data))
        if not more:
            raise RuntimeError("a finished row is no longer in the journal")
        data += more[: end + 1] if (end := more.find(b"\n")) >= 0 else more
    return data
