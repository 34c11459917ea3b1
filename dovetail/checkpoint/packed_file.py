"""A file of packed weights: as the native kernels read them, so that it is mapped into memory instead of read.

After its header (`hub.packed`) it holds the tensors. Each begins at a multiple of 4096 bytes, so that parts can be
read past the page cache, and has a checksum of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dovetail.host.files import replacing
from dovetail.hub.packed import Origin, Unusable, header, read_header
from dovetail.ops import cpu

ALIGNMENT = 4096  # bytes; where a disk's sectors begin
# A file system that keeps pages of 2 MiB makes them of writes that are as large and begin at multiples of that.
_WRITE = 4 << 20  # bytes
_SYNC = 64 << 20  # bytes between syncs: no flood of the disk, and an end that comes soon when it is asked for
_WIDEST = (1 << 64) - 1  # a checksum that takes no less room than any other
_TAIL = 8192  # zeros behind the last tensor, because kernels fetch ahead


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


def load(path: Path, origin: Origin, threads: int) -> Contents:
    """Map the file and check every byte that will be used. Raises Unusable or OSError.

    The whole file is read for that, on so many threads. Processes that map one file share its memory.
    """
    with open(path, "rb") as file:
        found, tensors, length = read_header(file)
        if found != origin:
            raise Unusable(_difference(found, origin))
        try:
            places, start = {name: _Place(**place) for name, place in tensors.items()}, _up(length)
        except (TypeError, AttributeError) as error:
            raise Unusable("another version wrote the file") from error
        size = os.fstat(file.fileno()).st_size
        end = max((p.offset + p.bytes for p in places.values()), default=0)
        if size < start + end:
            raise Unusable("the file is cut short")
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
    begin, pieces = _beginning(origin, packed), _tensor_pieces(packed)
    with replacing(path) as file:
        done = synced = 0
        for group in _groups([begin, *pieces]):
            _write_all(file.fileno(), group)
            done += sum(map(len, group))
            advance(done)
            if done - synced >= _SYNC:
                os.fdatasync(file.fileno())
                synced = done


def file_bytes(origin: Origin, packed: Mapping[str, Any]) -> int:
    """The size of the file that `store` would write, or a little more."""
    return len(_beginning(origin, packed, sums=False)) + sum(map(len, _tensor_pieces(packed)))


def _up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _beginning(origin: Origin, packed: Mapping[str, Any], sums: bool = True) -> bytes:
    """The bytes before the first tensor. Without sums they are of use only for their number, which may be more."""
    places, at = {}, 0
    for name, p in packed.items():
        checksum = cpu.native().checksums([(p.address, p.bytes)], 1)[0] if sums else _WIDEST
        places[name] = asdict(_Place(p.format, p.n, p.k, at, p.bytes, checksum))
        at += _up(p.bytes)
    data = header(origin, places)
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
    for piece in pieces:
        rest = memoryview(piece)
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


def _difference(found: Origin, wanted: Origin) -> str:
    if found.layout != wanted.layout:
        return "another version wrote the file"
    if found.source != wanted.source:
        return "the model has changed since"
    return "the file holds other values"
