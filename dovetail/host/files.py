"""Files that are either whole or absent: atomic replacement, exclusive locks, disk space, files cut into parts."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from dovetail.core.errors import ModelError
from dovetail.host.units import format_size

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
DISK_ERRORS = _FULL + _REFUSED
_PART = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})(\.[a-z]+)", re.ASCII | re.DOTALL)
_REMEDY = "set DOVETAIL_HOME to a folder you own, on a disk with room"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Write `path` through a temporary name in its folder: synced and renamed on success, gone on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            # mkstemp makes files private; a written result follows the user's umask like any other.
            os.fchmod(file.fileno(), user_mode())
        publish(Path(temporary), path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def publish(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path` on the same disk so that a crash leaves the old or the new file, whole."""
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


@contextlib.contextmanager
def exclusive(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock file `path`; `waiting` is called if it is taken. The lock dies with its holder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def exclusive_or_not(path: Path) -> Iterator[bool]:
    """Hold the lock file `path` if nobody else does, and say whether this is so. Waits for nobody."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def free_bytes(directory: Path) -> int:
    """Bytes that this user may still write in `directory`, which need not exist yet."""
    return shutil.disk_usage(_existing(directory)).free


def require_space(directory: Path, needed: int, what: str, remedy: str = _REMEDY) -> None:
    """Raise ModelError with both numbers and `remedy` unless `needed` bytes are free in `directory`."""
    free = free_bytes(directory)
    if free < needed:
        raise ModelError(_full_message(directory, needed, free, what, remedy))


@contextlib.contextmanager
def explaining(directory: Path, needed: int, what: str, remedy: str = _REMEDY) -> Iterator[None]:
    """Turn the system's refusals to write in `directory` into a ModelError that ends in `remedy`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise ModelError(_full_message(directory, needed, free_bytes(directory), what, remedy)) from error
        raise ModelError(f"cannot write {what} to {directory}: {error.strerror or error}; {remedy}") from error


def tree_bytes(path: Path) -> int:
    """Bytes of the regular files under `path`, links not followed; files that vanish meanwhile count zero."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


class FilePart(NamedTuple):
    """A file's place among the parts of a larger one, as its name has it: part `number` of `total`, from 1 on."""

    stem: str
    number: int
    total: int
    suffix: str

    def name(self, number: int) -> str:
        """The name of another part."""
        return f"{self.stem}-{number:05d}-of-{self.total:05d}{self.suffix}"

    def names(self) -> list[str]:
        """The names of all parts, in order."""
        return [self.name(number) for number in range(1, self.total + 1)]


def file_part(name: str) -> FilePart | None:
    """What `model-00002-of-00003.gguf` says; None for a name that is not a part's. Folders before it are kept."""
    match = _PART.fullmatch(name)
    if match is None or not 1 <= int(match[2]) <= int(match[3]):
        return None
    return FilePart(match[1], int(match[2]), int(match[3]), match[4])


def model_bytes(path: Path) -> int:
    """Bytes of a model on disk: a folder, a file, or the first of a file's parts with the others beside it."""
    if path.is_dir():
        return tree_bytes(path)
    part = file_part(path.name)
    return sum(path.with_name(name).stat().st_size for name in (part.names() if part else [path.name]))


def _full_message(directory: Path, needed: int, free: int, what: str, remedy: str) -> str:
    return (
        f"not enough disk space for {what}: {format_size(needed)} needed, {format_size(free)} free "
        f"in {directory}; free some (`dovetail list`, `dovetail rm`) or {remedy}"
    )


def _existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def user_mode() -> int:
    """The permissions that the user's umask gives a new file."""
    # The mask can only be read by setting it.
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o666 & ~mask


def home() -> Path:
    """The cache folder: $DOVETAIL_HOME, else $XDG_CACHE_HOME/dovetail, else ~/.cache/dovetail."""
    if chosen := os.environ.get("DOVETAIL_HOME"):
        return Path(chosen).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser() / "dovetail"
    return Path.home() / ".cache" / "dovetail"
