"""GGUF v2/v3 files, memory mapped: header checks, lazily decoded metadata, raw tensor blocks.

Everything that a file says is checked against its bytes before it is used. The header is read once. Of each
metadata entry only type and position are kept, so memory is proportional to the number of entries. String arrays
(vocabularies, merges) are decoded when they are asked for.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dovetail.checkpoint.mapped import MappedFile
from dovetail.core.errors import ModelError
from dovetail.ops.dequant import BLOCKS
from dovetail.ops.stored import CUT_SHORT, StoredTensor

MAX_ENTRIES = 1 << 15  # metadata keys, and tensors: each costs a few hundred bytes of Python objects
MAX_STRING = 1 << 20  # bytes of one string value (chat templates and licences are tens of kilobytes)
MAX_ARRAY_STRINGS = 1 << 21  # strings in all arrays together: bounds the time of the walk
MAX_NAME = 64

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_SCALAR = {kind: struct.Struct("<" + code) for kind, code in _SCALARS.items()}
_NUMPY = {
    kind: np.dtype(name).newbyteorder("<")
    for kind, name in zip(
        _SCALARS, ("u1", "i1", "u2", "i2", "u4", "i4", "f4", "u1", "u8", "i8", "f8"), strict=True
    )
}
_TYPE_NAMES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "string", "array")
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

# What numbers in a file mean.
FORMATS = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS", 30: "BF16",
    39: "MXFP4",
}  # fmt: skip
_REMOVED = frozenset({4, 5, 31, 32, 33, 36, 37, 38})


class Entry(NamedTuple):
    """Where a metadata value lies: its type, the element type and length of an array, the offset of its
    bytes.
    """

    kind: int
    element: int
    length: int
    offset: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's table row, checked: `shape` in torch order, `offset` from the start of the file, `nbytes`
    long.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def _map(path: Path) -> MappedFile:
    file = MappedFile(path)
    if file.bytes < 24:
        raise ModelError(f"{path}: {file.bytes} bytes, but a GGUF header alone has 24; {CUT_SHORT}")
    return file


class _Cursor:
    """Bounds-checked little-endian reads. Every failure names the field being read and its offset."""

    def __init__(self, buffer: memoryview, path: Path) -> None:
        self.buffer, self.path, self.size, self.at = buffer, path, len(buffer), 0
        self.array_strings = 0

    def fail(self, what: str, why: str, at: int | None = None) -> ModelError:
        return ModelError(f"{self.path}: {what} at offset {self.at if at is None else at}: {why}")

    def need(self, count: int, what: str) -> int:
        """Check that `count` more bytes are there, and return where they begin."""
        start = self.at
        if count > self.size - start:
            raise self.fail(what, f"needs {count} bytes, {self.size - start} are left; {CUT_SHORT}")
        self.at = start + count
        return start

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.buffer, self.need(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.buffer, self.need(8, what))[0])

    def text(self, what: str, longest: int) -> str:
        start = self.at
        length = self.u64(what + " length")
        if length > longest:
            raise self.fail(what, f"length {length} exceeds the limit of {longest} bytes", start)
        begin = self.need(length, what)
        try:
            return str(self.buffer[begin : begin + length], "utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(what, "is not UTF-8", begin) from error

    def skip_strings(self, count: int, what: str) -> None:
        """Walk over `count` length-prefixed strings."""
        self.array_strings += count
        if self.array_strings > MAX_ARRAY_STRINGS or count > (self.size - self.at) // 8:
            raise self.fail(what, f"{count} strings do not fit in the bytes left (or exceed {MAX_ARRAY_STRINGS})")
        at, buffer, unpack = self.at, self.buffer, _U64.unpack_from
        try:
            for _ in range(count):
                at += 8 + unpack(buffer, at)[0]
        except (struct.error, OverflowError, IndexError, ValueError) as error:
            raise self.fail(what, f"a string runs past the end of the file; {CUT_SHORT}") from error
        if at > self.size:
            raise self.fail(what, f"a string runs past the end of the file; {CUT_SHORT}")
        self.at = at

    def value(self, kind: int, what: str) -> Entry:
        """Check the value that follows and step over it."""
        if kind in _SCALAR:
            start = self.need(_SCALAR[kind].size, what)
            if kind == _BOOL and self.buffer[start] > 1:
                raise self.fail(what, f"bool is {self.buffer[start]}, not 0 or 1", start)
            return Entry(kind, -1, 1, start)
        if kind == _STRING:
            start = self.at
            self.text(what, MAX_STRING)
            return Entry(kind, -1, 1, start)
        if kind != _ARRAY:
            raise self.fail(what, f"unknown value type {kind}", self.at - 4)
        element, count = self.u32(what + " element type"), self.u64(what + " count")
        start = self.at
        if element == _STRING:
            self.skip_strings(count, what)
        elif element in _SCALAR:
            self.need(count * _SCALAR[element].size, f"{what} ({count} elements)")
            if element == _BOOL and count and int(np.frombuffer(self.buffer, np.uint8, count, start).max()) > 1:
                raise self.fail(what, "an array of bool holds a byte that is not 0 or 1", start)
        else:
            kind_name = "nested arrays are not allowed" if element == _ARRAY else f"unknown element type {element}"
            raise self.fail(what, kind_name, start - 12)
        return Entry(kind, element, count, start)


class Metadata(Mapping[str, Any]):
    """A file's key-value pairs. Scalars come as Python values, numeric arrays as numpy, strings as list[str].

    Values are decoded on each access; a malformed string in an array is a ModelError at that moment.
    """

    def __init__(self, path: Path, buffer: memoryview, entries: dict[str, Entry]) -> None:
        self._path, self._buffer, self._entries = path, buffer, entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __getitem__(self, key: str) -> Any:
        kind, element, count, offset = self._entries[key]
        if kind == _ARRAY:
            if element == _STRING:
                return self._strings(key, count, offset)
            array = np.frombuffer(self._buffer, _NUMPY[element], count, offset)
            return array.astype(np.bool_) if element == _BOOL else array
        if kind == _STRING:
            length = _U64.unpack_from(self._buffer, offset)[0]
            return str(self._buffer[offset + 8 : offset + 8 + length], "utf-8")
        value = _SCALAR[kind].unpack_from(self._buffer, offset)[0]
        return bool(value) if kind == _BOOL else value

    def _strings(self, key: str, count: int, offset: int) -> list[str]:
        buffer, at, unpack, result = self._buffer, offset, _U64.unpack_from, list[str]()
        append = result.append
        try:
            for _ in range(count):
                start = at + 8
                at = start + unpack(buffer, at)[0]
                append(str(buffer[start:at], "utf-8"))
        except UnicodeDecodeError as error:
            raise ModelError(f"{self._path}: {key}[{len(result)}] is not UTF-8") from error
        return result

    def read(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key` as `kind` (int, float, bool, str); `default` when absent; ModelError when of
        another type, negative where an int is wanted, or not finite. An int is accepted where a float is
        wanted."""
        if key not in self._entries:
            return default
        entry = self._entries[key]
        value: Any = self[key] if entry.kind != _ARRAY else None
        if kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            name = _TYPE_NAMES[entry.kind] if entry.kind < len(_TYPE_NAMES) else "a 64-bit number"
            raise ModelError(f"{self._path}: {key} must be {kind.__name__}, the file has {name}")
        if (isinstance(value, int) and value < 0) or (isinstance(value, float) and not math.isfinite(value)):
            raise ModelError(f"{self._path}: {key} is {value}, which is not a usable number")
        return value

    def is_array(self, key: str) -> bool:
        """Whether `key` is present and an array."""
        return key in self._entries and self._entries[key].kind == _ARRAY

    def strings(self, key: str) -> list[str] | None:
        """The string array `key`, or None when absent."""
        return self._array(key, lambda element: element == _STRING, "strings")

    def numbers(self, key: str) -> np.ndarray | None:
        """The numeric array `key` (1-d numpy, the file's type), or None when absent."""
        return self._array(key, lambda element: element in _SCALAR, "numbers")

    def _array(self, key: str, accepts: Any, what: str) -> Any:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.kind != _ARRAY or not accepts(entry.element):
            raise ModelError(f"{self._path}: {key} must be an array of {what}")
        return self[key]


def _metadata(cursor: _Cursor, count: int) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for index in range(count):
        start = cursor.at
        key = cursor.text(f"key {index}", 65535)
        if not key or "\0" in key:
            raise cursor.fail(f"key {index}", "is empty" if not key else "contains NUL", start)
        if key in entries:
            raise cursor.fail(f"key {index}", f"{key!r} appears twice", start)
        kind = cursor.u32(f"type of {key!r}")
        entries[key] = cursor.value(kind, f"value of {key!r}")
    return entries


def _alignment(metadata: Metadata, entries: dict[str, Entry], path: Path) -> int:
    if "general.alignment" not in entries:
        return 32
    value = metadata["general.alignment"] if entries["general.alignment"].kind == 4 else None
    if value is None or not 8 <= value <= 1 << 20 or value & (value - 1):
        found = "another type" if value is None else value
        raise ModelError(
            f"{path}: general.alignment must be a uint32, a power of two from 8 to 2^20, it is {found}"
        )
    return int(value)


def _dimensions(cursor: _Cursor, what: str) -> tuple[int, ...]:
    """Shape in torch order (the file stores the fastest dimension first)."""
    count = cursor.u32(f"{what} dimension count")
    if not 1 <= count <= 4:
        raise cursor.fail(what, f"has {count} dimensions, not 1 to 4", cursor.at - 4)
    shape, values = [], 1
    for axis in range(count):
        size = cursor.u64(f"{what} dimension {axis}")
        values *= size
        if size == 0 or values >= 1 << 63:
            raise cursor.fail(
                what, f"dimension {axis} is {size}: zero, or the tensor has 2^63 values", cursor.at - 8
            )
        shape.append(size)
    return tuple(reversed(shape))


def _format(cursor: _Cursor, what: str, row: int) -> str:
    kind = cursor.u32(f"{what} type")
    name = FORMATS.get(kind)
    if name is None:
        state = "was removed from GGUF" if kind in _REMOVED else "is not supported"
        known = ", ".join(FORMATS.values())
        raise cursor.fail(what, f"type {kind} {state}; supported are {known}", cursor.at - 4)
    if row % BLOCKS[name].values:
        raise cursor.fail(what, f"row of {row} values is not a multiple of {name}'s {BLOCKS[name].values}")
    return name


def _tensor_table(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    """Read the table; offsets must follow each other without gap or overlap, and end inside the file."""
    rows: dict[str, tuple[str, tuple[int, ...], int]] = {}
    expected = 0
    for index in range(count):
        start = cursor.at
        name = cursor.text(f"name of tensor {index}", MAX_NAME - 1)
        what = f"tensor {name!r}"
        if not name or ".." in name or any(c in "/\\" or ord(c) < 32 for c in name):
            raise cursor.fail(what, f"name of tensor {index} is empty or holds '..', a slash or a control", start)
        if name in rows:
            raise cursor.fail(what, "appears twice", start)
        shape = _dimensions(cursor, what)
        kind = _format(cursor, what, shape[-1])
        values = 1
        for size in shape:
            values *= size
        nbytes = values // BLOCKS[kind].values * BLOCKS[kind].bytes
        offset = cursor.u64(f"{what} offset")
        if offset != expected:
            raise cursor.fail(
                what, f"data offset is {offset}, the tensors before it end at {expected}", cursor.at - 8
            )
        if nbytes > cursor.size:
            why = f"{kind} {list(shape)} needs {nbytes} bytes, the file has {cursor.size}; {CUT_SHORT}"
            raise cursor.fail(what, why)
        rows[name] = (kind, shape, nbytes)
        expected += -(-nbytes // alignment) * alignment
    base = at = -(-cursor.at // alignment) * alignment
    table, end = {}, base
    for name, (kind, shape, nbytes) in rows.items():
        end = at + nbytes
        if end > cursor.size:
            why = f"data ends at {end}, the file at {cursor.size}; {CUT_SHORT}"
            raise cursor.fail(f"tensor {name!r}", why, at)
        table[name] = TensorInfo(name, kind, shape, at, nbytes)
        at = -(-end // alignment) * alignment
    if cursor.size > at:
        raise cursor.fail("end of the last tensor", f"{cursor.size - at} bytes follow it", at)
    return table


class GGUFFile:
    """An open GGUF file; of a model that is cut into several files, one part (`gguf_split.open_gguf` reads all).

    `files`, `version`, `alignment`, `metadata` (Mapping) and `tensors` (name -> TensorInfo, in file order) are
    checked on construction; `tensor(name)` gives a view of the mapped bytes. Any defect is a ModelError.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.files: tuple[Path, ...] = (self.path,)
        self._file = _map(self.path)
        self.bytes = self._file.bytes
        cursor = _Cursor(self._file.view, self.path)
        if bytes(cursor.buffer[:4]) != b"GGUF":
            raise cursor.fail("magic", f"is {bytes(cursor.buffer[:4])!r}, not b'GGUF'; this is no GGUF file")
        cursor.at = 4
        self.version = cursor.u32("version")
        if self.version not in (2, 3):
            swapped = self.version in (2 << 24, 3 << 24)
            why = "big-endian files are not supported" if swapped else f"{self.version} is not 2 or 3"
            raise cursor.fail("version", why, 4)
        tensors, keys = cursor.u64("tensor count"), cursor.u64("metadata count")
        for count, least, what in ((tensors, 33, "tensor count"), (keys, 14, "metadata count")):
            if count > MAX_ENTRIES or count * least > cursor.size - cursor.at:
                raise cursor.fail(what, f"{count} does not fit in the file, or exceeds {MAX_ENTRIES}", 8)
        entries = _metadata(cursor, keys)
        self.metadata = Metadata(self.path, cursor.buffer, entries)
        self.alignment = _alignment(self.metadata, entries, self.path)
        self.tensors = _tensor_table(cursor, tensors, self.alignment)

    def tensor(self, name: str) -> StoredTensor:
        """The raw blocks of `name`, uint8 [rows, row_bytes], not copied."""
        info = self.tensors.get(name)
        if info is None:
            raise ModelError(f"{self.path}: has no tensor {name!r}")
        data = self._file.array(name, info.offset, info.nbytes)
        rows = info.nbytes // (info.shape[-1] // BLOCKS[info.format].values * BLOCKS[info.format].bytes)
        return StoredTensor(name, info.format, info.shape, data.reshape(rows, -1))

    def release(self, name: str) -> None:
        """Take the tensor's bytes out of this process' memory, until they are read again."""
        info = self.tensors[name]
        self._file.release(info.offset, info.nbytes)
