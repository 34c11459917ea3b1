"""A file of packed weights: as the native kernels read them, so that it is mapped into memory instead of read.

It holds a magic line, the length and SHA-256 of the header, the header (JSON), and the tensors. Each tensor begins at
a multiple of 4096 bytes, so that parts can be read past the page cache. Each has a checksum of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from dovetail.host.files import replacing
from dovetail.ops import cpu

SUFFIX = ".packed"
ALIGNMENT = 4096  # bytes; where a disk's sectors begin
_PREFIX = struct.Struct("<16sQ32s")
_MAGIC = b"dovetail packed\n"
_HEADER_LIMIT = 64 << 20  # bytes
# A file system that keeps pages of 2 MiB makes them of writes that are as large and begin at multiples of that.
_WRITE = 4 << 20  # bytes
_SYNC = 64 << 20  # bytes between syncs: no flood of the disk, and an end that comes soon when it is asked for
_TAIL = 8192  # zeros behind the last tensor, because kernels fetch ahead


class Unusable(Exception):
    """Why a file of packed weights cannot be used."""


@dataclass(frozen=True)
class Origin:
    """Of what the weights were made. Files whose origins differ hold other weights.

    model: the checkpoint's path, for people. source: identifies its files. values: how their values were changed
    before they were packed. layout: the number of the packed layout.
    """

    model: str = field(compare=False)
    source: str
    values: str
    layout: int


@dataclass(frozen=True)
class _Place:
    """A tensor in the file: its format and shape, where it begins after the header, its bytes and checksum."""

    format: str
    n: int
    k: int
    offset: int
    bytes: int
    checksum: int


@dataclass(frozen=True)
class Contents:
    """What could be used of a file: packed weights by name, and the names of those that are damaged."""

    packed: dict[str, Any]
    damaged: list[str]


def read_origin(path: Path) -> Origin:
    """Of what a file was made. Raises Unusable or OSError."""
    with open(path, "rb") as file:
        return _read_header(file)[0]


def load(path: Path, origin: Origin, threads: int) -> Contents:
    """Map the file and check every byte that will be used. Raises Unusable or OSError.

    The whole file is read for that, on so many threads. Processes that map one file share its memory.
    """
    with open(path, "rb") as file:
        found, places, start = _read_header(file)
        if found != origin:
            raise Unusable(_difference(found, origin))
        size = os.fstat(file.fileno()).st_size
        end = max((p.offset + p.bytes for p in places.values()), default=0)
        if size < start + end:
            raise Unusable("it is cut short")
        try:
            mapping = cpu.native().Mapping(file.fileno(), size)
            packed = {name: mapping.packed(p.format, p.n, p.k, start + p.offset) for name, p in places.items()}
        except (ValueError, RuntimeError) as error:  # a place outside of the file; the system maps no file here
            raise Unusable(str(error)) from error
    sums = cpu.native().checksums([(p.address, p.bytes) for p in packed.values()], threads)
    damaged = [name for name, s in zip(packed, sums, strict=True) if s != places[name].checksum]
    return Contents({name: p for name, p in packed.items() if name not in damaged}, damaged)


def store(
    path: Path, origin: Origin, packed: Mapping[str, Any], advance: Callable[[int], None] = lambda done: None
) -> None:
    """Write all of `packed` to `path`, which then is whole, or as it was. Raises OSError.

    advance: told the bytes that are written. What it raises ends the writing.
    """
    header, pieces = _header(origin, packed), _tensor_pieces(packed)
    with replacing(path) as file:
        done = synced = 0
        for group in _groups([header, *pieces]):
            _write_all(file.fileno(), group)
            done += sum(map(len, group))
            advance(done)
            if done - synced >= _SYNC:
                os.fdatasync(file.fileno())
                synced = done


def file_bytes(origin: Origin, packed: Mapping[str, Any]) -> int:
    """The size of the file that `store` would write."""
    return len(_header(origin, packed, sums=False)) + sum(map(len, _tensor_pieces(packed)))


def _up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _header(origin: Origin, packed: Mapping[str, Any], sums: bool = True) -> bytes:
    """The bytes before the first tensor. Without sums only their number is right."""
    places, at = {}, 0
    for name, p in packed.items():
        checksum = cpu.native().checksums([(p.address, p.bytes)], 1)[0] if sums else 0
        places[name] = [p.format, p.n, p.k, at, p.bytes, f"{checksum:016x}"]
        at += _up(p.bytes)
    text = json.dumps({"origin": asdict(origin), "tensors": places}).encode()
    data = _PREFIX.pack(_MAGIC, len(text), hashlib.sha256(text).digest()) + text
    return data.ljust(_up(len(data)), b"\0")


def _tensor_pieces(packed: Mapping[str, Any]) -> list[memoryview]:
    """All tensors, each filled up to the alignment, and the tail."""
    zeros = memoryview(bytes(max(ALIGNMENT, _TAIL)))
    pieces = []
    for p in packed.values():
        pieces += [memoryview(p.data), zeros[: _up(p.bytes) - p.bytes]]
    return [*pieces, zeros[:_TAIL]]


def _groups(pieces: Sequence[bytes | memoryview]) -> Iterator[list[memoryview]]:
    """The same bytes in groups of `_WRITE` bytes, but for the last and for groups of very many pieces."""
    group: list[memoryview] = []
    room = _WRITE
    for piece in map(memoryview, pieces):
        rest = piece
        while len(rest):
            group.append(rest[:room])
            rest, room = rest[room:], room - len(group[-1])
            if room == 0 or len(group) == 512:
                yield group
                group, room = [], _WRITE
    if group:
        yield group


def _write_all(file: int, group: Sequence[memoryview]) -> None:
    rest = list(group)
    while rest:
        done = os.writev(file, rest)
        while rest and done >= len(rest[0]):
            done -= len(rest.pop(0))
        if done:
            rest[0] = rest[0][done:]


def _read_header(file: IO[bytes]) -> tuple[Origin, dict[str, _Place], int]:
    """The origin, the tensors, and where the first of them begins. Raises Unusable."""
    prefix = file.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size:
        raise Unusable("it is cut short")
    magic, length, digest = _PREFIX.unpack(prefix)
    if magic != _MAGIC:
        raise Unusable("it is no file of packed weights")
    text = file.read(length) if length <= _HEADER_LIMIT else b""
    if hashlib.sha256(text).digest() != digest:
        raise Unusable("its header is damaged")
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        values = json.loads(text)
        places = {name: _Place(*p[:5], checksum=int(p[5], 16)) for name, p in values["tensors"].items()}
        return Origin(**values["origin"]), places, _up(_PREFIX.size + length)
    raise Unusable("another version wrote it")


def _difference(found: Origin, wanted: Origin) -> str:
    if found.layout != wanted.layout:
        return "another version wrote it"
    if found.source != wanted.source:
        return "the model has changed since"
    return "its values are others"
