"""The folder of packed weights: what its files say of themselves, and which of them go.

Such a file begins with a magic line, the length and SHA-256 of its header, and the header (JSON). What follows is
`checkpoint.packed_file`'s.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from dovetail.host.files import home

SUFFIX = ".packed"
_PREFIX = struct.Struct("<16sQ32s")
_MAGIC = b"dovetail packed\n"
_LIMIT = 64 << 20  # bytes of a header


class Unusable(Exception):
    """Why a file of packed weights cannot be used."""


@dataclass(frozen=True)
class Origin:
    """Of what weights were packed. Files whose origins differ hold other weights.

    model: the checkpoint's path, for people. source: identifies its files. values: how their values were changed
    before they were packed. layout: the number of the packed layout.
    """

    model: str = field(compare=False)
    source: str
    values: str
    layout: int


@dataclass(frozen=True)
class PackedEntry:
    """A file of packed weights. model: the path of the checkpoint, or "" if the file does not say.

    used: when it was last loaded or written, in seconds since 1970.
    """

    path: Path
    size: int
    model: str
    used: float

    @property
    def orphaned(self) -> bool:
        """Whether the model is gone."""
        return not os.path.exists(self.model)


def packed_home() -> Path:
    """The folder of packed weights."""
    return home() / "packed"


def header(origin: Origin, tensors: Mapping[str, Any]) -> bytes:
    """The beginning of a file: its origin, and what JSON can say of its tensors."""
    text = json.dumps({"origin": asdict(origin), "tensors": tensors}).encode()
    return _PREFIX.pack(_MAGIC, len(text), hashlib.sha256(text).digest()) + text


def read_header(file: IO[bytes]) -> tuple[Origin, dict[str, Any], int]:
    """The origin, what is said of the tensors, and the bytes of the header. Raises Unusable."""
    prefix = file.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size:
        raise Unusable("the file is cut short")
    magic, length, digest = _PREFIX.unpack(prefix)
    if magic != _MAGIC:
        raise Unusable("the file holds something else, or is of another version")
    text = file.read(length) if length <= _LIMIT else b""
    if hashlib.sha256(text).digest() != digest:
        raise Unusable("the file's header is damaged")
    try:
        values = json.loads(text)
        return Origin(**values["origin"]), values["tensors"], _PREFIX.size + length
    except (ValueError, KeyError, TypeError) as error:
        raise Unusable("another version wrote the file") from error


def packed_files(folder: Path) -> list[PackedEntry]:
    """The files in `folder`, the one that was used longest ago first."""
    found = []
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            status, model = os.fstat(file.fileno()), ""
            with contextlib.suppress(Unusable):
                model = read_header(file)[0].model
            found.append(PackedEntry(path, status.st_size, model, status.st_mtime))
    return sorted(found, key=lambda entry: entry.used)


def remove_packed(folder: Path, models: Sequence[Path] = ()) -> tuple[int, int]:
    """Delete packed weights of `models` (files or folders), and those whose model is gone.

    Returns the bytes freed of both. Raises OSError.
    """
    wanted = {f(m) for m in models for f in (os.path.abspath, os.path.realpath)}
    freed = orphaned = 0
    for entry in packed_files(folder):
        names = {f(p) for p in (Path(entry.model), *Path(entry.model).parents) for f in (str, os.path.realpath)}
        mine = bool(wanted & names)
        if entry.orphaned or mine:
            entry.path.unlink(missing_ok=True)
            freed, orphaned = freed + entry.size * mine, orphaned + entry.size * (not mine)
    return freed, orphaned


def make_room(folder: Path, own: Path, room: int) -> None:
    """Delete files until those other than `own` take at most `room` bytes, and those whose model is gone.

    Those that were used longest ago go first. Raises OSError.
    """
    others = [entry for entry in packed_files(folder) if entry.path != own]
    total = sum(entry.size for entry in others)
    for entry in sorted(others, key=lambda e: (not e.orphaned, e.used)):
        if entry.orphaned or total > room:
            entry.path.unlink(missing_ok=True)
            total -= entry.size
